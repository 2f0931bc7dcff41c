"""Components divided among attention heads: by their weights alone, and by what each head reads or writes on given tokens.

Parts are what is there with the component minus without it, in one head: they sum to its activation, or to its write.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import HeadIndexError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import WeightSite, check_rows, resolve_name


@dataclass(frozen=True)
class ComponentHeads(Record, what="shares of heads"):
    """Each component's squared norm, divided among the heads of its site."""

    site: str
    """Its name."""
    side: str
    """`in`: heads divide what is read, V (W_O). `out`: they divide what is written, U (W_Q, W_K, W_V)."""
    values: list[list[float]]
    """[C, heads]; over heads they sum to 1, or to 0 for a component without norm."""

    def check(self) -> None:
        if not self.values or not self.values[0] or len(set(map(len, self.values))) != 1:
            raise ValueError("components are of different numbers of heads, or there are none")

    @property
    def shares(self) -> Float[Tensor, "C heads"]:
        """The values as a tensor."""
        return torch.tensor(self.values, dtype=torch.float64)

    def tables(self) -> list[Table]:
        title = f"Shares of heads in what components of {self.site} {'read' if self.side == 'in' else 'write'}"
        heads = (f"head {head}" for head in range(len(self.values[0])))
        rows = [[str(c), *(f"{share:.3f}" for share in shares)] for c, shares in enumerate(self.values)]
        return [plain_table(title, "component", *heads, rows=rows)]


def component_heads(decomposition: Decomposition, site: str) -> ComponentHeads:
    """Share of each component's squared norm that lies in each head; key/value heads for W_K and W_V.

    For W_Q, W_K and W_V heads divide what is written, U_c; for W_O what is read, V_c. Activations head by head on given
    tokens are those of `per_head`.

    Raises:
        HeadIndexError: The site does not divide into heads.
        NoMatchingSiteError: The decomposition has no such site.
    """
    components = decomposition[resolve_name(decomposition.sites, site)]
    _, side = heads_of(components.site)
    return ComponentHeads(components.site.name, side, head_shares(components).tolist())


def heads_of(site: WeightSite) -> tuple[int, Literal["in", "out"]]:
    """Number of heads of a site, and the side of its weight that they divide."""
    if site.n_heads is None or site.head_side is None:
        raise HeadIndexError(f"{site.name} does not divide into heads; W_Q, W_K, W_V and W_O do.")
    return site.n_heads, site.head_side


def head_shares(components: Components) -> Float[Tensor, "C heads"]:
    """Squares of V_c (W_O) or U_c summed over each head, divided by their sum over all heads."""
    heads, side = heads_of(components.site)
    with torch.no_grad():
        divided = components.V.T if side == "in" else components.U
        squares = divided.unflatten(1, (heads, -1)).pow(2).sum(-1)
        return squares / squares.sum(1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)


@dataclass(frozen=True, eq=False)
class PerHead:
    """Components of one site, head by head; key/value heads for W_K and W_V under grouped-query attention."""

    site: str
    """Its name."""
    side: str
    """`in`: heads divide what is read (W_O). `out`: they divide what is written."""
    acts: Float[Tensor, "batch pos C"]
    """Activations h = x V of the whole components."""
    reads: Float[Tensor, "batch pos head C"] | None
    """Of W_O: the part of each activation that comes from each head; the sum over heads is `acts`."""
    writes: Float[Tensor, "batch pos head C d_head"] | None
    """Of W_Q, W_K, W_V: what each component writes into each head; side by side the heads make up h_c U_c."""
    shares: Float[Tensor, "head C"]
    """Each head's share of the squared norm of V_c (W_O) or U_c; over heads it sums to 1."""


def per_head(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    site: str,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> PerHead:
    """Components of an attention weight, head by head, on given tokens.

    Args:
        site: Name or alias of a W_Q, W_K, W_V or W_O.
        attention_mask: 1 where a position counts.

    Raises:
        HeadIndexError: The site does not divide into heads.
        NoMatchingSiteError: The decomposition has no such site.
        ShapeError, DtypeError, TargetMismatchError, DeviceError: As `component_acts`.
    """
    check_rows(tokens, attention_mask)
    site = resolve_name(decomposition.sites, site)
    components = decomposition[site]
    heads, side = heads_of(components.site)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    with torch.no_grad():
        x = adapter.capture(tokens, [site], attention_mask).inputs[site]
        acts, reads, writes = components.acts(x), None, None
        if side == "in":
            reads = components.head_acts(x)
        else:
            writes = acts[:, :, None, :, None] * components.U.unflatten(1, (heads, -1)).transpose(0, 1)
        return PerHead(site, side, acts, reads, writes, head_shares(components).T)
