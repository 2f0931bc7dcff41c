"""Which attention heads a component belongs to, by its weights alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.analysis.records import Record, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import HeadIndexError
from tl_paramdecomp.sites import WeightSite, resolve_name

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ComponentHeads(Record):
    """Each component's squared norm, divided among the heads of its site."""

    what: ClassVar[str] = "shares of heads"

    site: str
    side: str
    """`in`: heads divide what is read, V (W_O). `out`: they divide what is written, U (W_Q, W_K, W_V)."""
    values: list[list[float]]
    """[C, heads]; over heads they sum to 1, or to 0 for a component without norm."""

    def check(self) -> None:
        """As many heads for every component."""
        if not self.values or not self.values[0] or len(set(map(len, self.values))) != 1:
            raise ValueError("components are of different numbers of heads, or there are none")

    @property
    def shares(self) -> Float[Tensor, "C heads"]:
        """The values as a tensor."""
        return torch.tensor(self.values, dtype=torch.float64)

    def tables(self) -> "list[Table]":
        """A row for each component."""
        heads = len(self.values[0])
        table = plain_table(
            f"Shares of heads in what components of {self.site} {'read' if self.side == 'in' else 'write'}",
            "component",
            *(f"head {head}" for head in range(heads)),
        )
        for c, shares in enumerate(self.values):
            table.add_row(str(c), *(f"{share:.3f}" for share in shares))
        return [table]


def component_heads(decomposition: Decomposition, site: str) -> ComponentHeads:
    """Share of each component's squared norm that lies in each head; key/value heads for W_K and W_V.

    For W_Q, W_K and W_V heads divide what is written, U_c; for W_O what is read, V_c. Activations head by head on given
    tokens are those of `per_head`.

    Args:
        decomposition: Of any model.
        site: Name or alias of a W_Q, W_K, W_V or W_O.

    Raises:
        HeadIndexError: The site does not divide into heads.
        NoMatchingSiteError: The decomposition has no such site.
    """
    components = decomposition[resolve_name(decomposition.sites, site)]
    _, side = heads_of(components.site)
    return ComponentHeads(components.site.name, side, head_shares(components).tolist())


def heads_of(site: WeightSite) -> tuple[int, Literal["in", "out"]]:
    """Number of heads of a site, and the side of its weight that they divide.

    Raises:
        HeadIndexError: It does not divide into heads.
    """
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
