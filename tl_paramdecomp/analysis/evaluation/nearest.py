"""Each component's nearest one in another decomposition of the same weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from tl_paramdecomp.analysis.evaluation.matching import rank_one_cosines
from tl_paramdecomp.analysis.records import Record, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike, component_indices
from tl_paramdecomp.errors import SettingError, ShapeError
from tl_paramdecomp.sites import resolve_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class NearestComponents(Record):
    """For components of one decomposition, those of another that resemble them most, most alike first."""

    what: ClassVar[str] = "nearest components"

    site: str
    components: list[int]
    nearest: list[list[int]]
    """For each component, indices in the other decomposition."""
    cosines: list[list[float]]
    """Cosines of the rank-one matrices, with sign."""
    read: list[list[float]]
    """Cosines of V, with sign; `cosines` are these times those of U."""

    def check(self) -> None:
        """One row for each component, of as many entries in each table."""
        shapes = [[len(row) for row in of] for of in (self.nearest, self.cosines, self.read)]
        if any(shape != shapes[0] or len(shape) != len(self.components) for shape in shapes):
            raise ValueError(f"tables of {', '.join(str(len(shape)) for shape in shapes)} rows do not fit each other")

    def tables(self) -> "list[Table]":
        """A row for each pair."""
        table = plain_table(
            f"Nearest components at {self.site}", "component", "nearest", "cosine", "cosine of V", "cosine of U"
        )
        for c, others, cosines, reads in zip(self.components, self.nearest, self.cosines, self.read):
            for other, cosine, read in zip(others, cosines, reads):
                write = cosine / read if read else 0.0
                table.add_row(str(c), str(other), f"{cosine:+.3f}", f"{read:+.3f}", f"{write:+.3f}")
        return [table]

    def footnotes(self) -> list[str]:
        """What a cosine says."""
        return ["A cosine says little by itself: compare it with that of the nearest component of an untrained start."]


def nearest_components(
    dec_a: Decomposition, dec_b: Decomposition, site: str, components: ComponentsLike | None = None, n: int = 1
) -> NearestComponents:
    """For components of one decomposition, the nearest of another by absolute cosine of the rank-one matrices.

    The cosine of V_c U_c and V_d U_d is cos(V_c, V_d) cos(U_c, U_d); at a negative one the two do the opposite. A component
    without norm has cosine 0 with all.

    Args:
        dec_a: Whose components are looked at.
        dec_b: Where they are looked for.
        site: Name or alias.
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
