"""Whether two decompositions have the same components: cosines between the best matches, components that split, nearest ones.

Component c of a matrix is the rank-one matrix V_c U_c; its cosine with another is cos(V_c, V_d) cos(U_c, U_d). The mean over
components of the largest one is MMCS ("Stochastic Parameter Decomposition", and "Interpreting Language Model Parameters",
2026, for rank-one matrices). It says little by itself: what counts is how far it lies above that of untrained starts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.analysis.activations import at_real, causal_importances
from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike, component_indices
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError, ShapeError
from tl_paramdecomp.sites import resolve_name

Which = Mapping[str, Bool[Tensor, "_"]]
"""Components that take part, by site: [C], each site its own C."""


class Matched(NamedTuple):
    """Means over one decomposition's components of the largest cosine with another's."""

    read: float
    """Of V, without sign."""
    write: float
    """Of U, without sign."""
    rank_one: float
    """Of V U, with sign."""
    components: int
    """How many the means are over."""


def active_components(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    threshold: float = 0.1,
    rows_at_once: int = 8,
) -> dict[str, Bool[Tensor, "_"]]:
    """Components with importance above the threshold at one position at least; all, where there is no importance function."""
    if decomposition.importance is None:
        return {name: c.V.new_ones(c.n_components, dtype=torch.bool) for name, c in decomposition.items()}
    found: dict[str, Tensor] = {}
    for first in range(0, len(tokens), rows_at_once):
        rows, mask = Batch(tokens, attention_mask).rows(slice(first, first + rows_at_once))
        for name, g in causal_importances(model, decomposition, rows, mask).items():
            active = (at_real(g, mask) > threshold).any(0)
            found[name] = found[name] | active if name in found else active
    return found


def rank_one_cosines(
    a: Decomposition, b: Decomposition, site: str, of_a: Bool[Tensor, " C"], of_b: Bool[Tensor, " C2"]
) -> tuple[Float[Tensor, "A B"], Float[Tensor, "A B"]]:
    """Cosines of V, and of U, between the components of two decompositions at one site, in the first one's number type."""
    unit = torch.nn.functional.normalize
    like = a[site].V.detach()
    V = unit(like.T[of_a], dim=-1) @ unit(b[site].V.detach().to(like).T[of_b.to(like.device)], dim=-1).T
    U = unit(a[site].U.detach()[of_a], dim=-1) @ unit(b[site].U.detach().to(like)[of_b.to(like.device)], dim=-1).T
    return V, U


def matched_cosines(
    a: Decomposition, b: Decomposition, of_a: Which | None = None, of_b: Which | None = None
) -> Matched | None:
    """How well b's components match a's, over all sites; None where nothing takes part."""
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for V, U in _sites(a, b, of_a, of_b):
        if V.numel():
            best = (V.abs().amax(1), U.abs().amax(1), (V * U).amax(1))
            sums += torch.stack([value.double().sum().cpu() for value in best])
        count += len(V)
    if not count:
        return None
    read, write, rank_one = (sums / count).tolist()
    return Matched(read, write, rank_one, count)


def split_share(
    small: Decomposition, large: Decomposition, of_small: Which | None = None, of_large: Which | None = None,
    cosine: float = 0.5,
) -> float | None:  # fmt: skip
    """Share of one decomposition's components that more than one of another's, of larger capacity, matches."""
    split = count = 0
    for V, U in _sites(small, large, of_small, of_large):
        split += int(((V * U).gt(cosine).sum(1) > 1).sum())
        count += len(V)
    return split / count if count else None


def _sites(a: Decomposition, b: Decomposition, of_a: Which | None, of_b: Which | None):
    for name in a:
        if name not in b:
            raise NoMatchingSiteError(f"The other decomposition has no {name}; it has {', '.join(b)}.")
        every = [d[name].V.new_ones(d[name].n_components, dtype=torch.bool) for d in (a, b)]
        chosen = [e if which is None else which[name] for e, which in zip(every, (of_a, of_b), strict=True)]
        yield rank_one_cosines(a, b, name, *chosen)


@dataclass(frozen=True)
class NearestComponents(Record, what="nearest components"):
    """For components of one decomposition, those of another that resemble them most, most alike first."""

    site: str
    """Its name."""
    components: list[int]
    """Those whose nearest are given."""
    nearest: list[list[int]]
    """For each component, indices in the other decomposition."""
    cosines: list[list[float]]
    """Cosines of the rank-one matrices, with sign."""
    read: list[list[float]]
    """Cosines of V, with sign; `cosines` are these times those of U."""

    def check(self) -> None:
        shapes = [[len(row) for row in of] for of in (self.nearest, self.cosines, self.read)]
        if any(shape != shapes[0] or len(shape) != len(self.components) for shape in shapes):
            raise ValueError(f"tables of {', '.join(str(len(shape)) for shape in shapes)} rows do not fit each other")

    def tables(self) -> list[Table]:
        rows = [
            [str(c), str(other), *(f"{v:+.3f}" for v in (cosine, read, cosine / read if read else 0.0))]
            for c, *of in zip(self.components, self.nearest, self.cosines, self.read)
            for other, cosine, read in zip(*of)
        ]
        title = f"Nearest components at {self.site}"
        return [plain_table(title, "component", "nearest", "cosine", "cosine of V", "cosine of U", rows=rows)]

    def footnotes(self) -> list[str]:
        return ["A cosine says little by itself: compare it with that of the nearest component of an untrained start."]


def nearest_components(
    dec_a: Decomposition, dec_b: Decomposition, site: str, components: ComponentsLike | None = None, n: int = 1
) -> NearestComponents:
    """For components of one decomposition, the nearest of another by absolute cosine of the rank-one matrices.

    The cosine of V_c U_c and V_d U_d is cos(V_c, V_d) cos(U_c, U_d); at a negative one the two do the opposite. A component
    without norm has cosine 0 with all.

    Args:
        components: Which of `dec_a`'s; None: all.
        n: How many of `dec_b`'s for each.

    Raises:
        NoMatchingSiteError: One of the two has no such site.
        ShapeError: The site has another shape in the other decomposition.
        ComponentIndexError: There is no such component.
        SettingError: n is not between 1 and the other's number of components.
    """
    site = resolve_name(dec_a.sites, site)
    a, b = dec_a[site], dec_b[resolve_name(dec_b.sites, site)]
    if (a.site.d_in, a.site.d_out) != (b.site.d_in, b.site.d_out):
        raise ShapeError(
            f"{site} is [{a.site.d_in}, {a.site.d_out}] in one decomposition and [{b.site.d_in}, {b.site.d_out}] in the other; "
            "compare decompositions of the same model."
        )
    if not 1 <= n <= b.n_components:
        raise SettingError(f"n lies between 1 and the other's {b.n_components} components; given {n}.")
    chosen = component_indices(slice(None) if components is None else components, a.n_components, site)
    every = [torch.ones(own.n_components, dtype=torch.bool, device=own.V.device) for own in (a, b)]
    V, U = (cosines[chosen] for cosines in rank_one_cosines(dec_a, dec_b, site, *every))
    nearest = (V * U).abs().sort(dim=1, descending=True, stable=True).indices[:, :n]
    return NearestComponents(
        site, chosen, nearest.tolist(), (V * U).gather(1, nearest).tolist(), V.gather(1, nearest).tolist()
    )
