"""Components divided among attention heads: what each head reads of a component of W_O, or each writes of W_Q, W_K or W_V.

Parts are what is there with the component minus without it, in one head: they sum to its activation, or to its write.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.analysis.effects.component_heads import head_shares, heads_of
from tl_paramdecomp.analysis.effects.site_writes import SiteWrites
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows, resolve_name


@dataclass(frozen=True, eq=False)
class PerHead:
    """Components of one site, head by head; key/value heads for W_K and W_V under grouped-query attention."""

    site: str
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
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        tokens: Token rows.
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
    adapter, seen = checked_adapter(model, decomposition), SiteWrites(len(tokens))
    with torch.no_grad(), adapter.intercept(seen.fns([site], "read")):
        adapter.forward(tokens, attention_mask)
    with torch.no_grad():
        acts = seen.acts(site, components)
        divided = components.V.unflatten(0, (heads, -1)).transpose(1, 2) if side == "in" else None
        divided = components.U.unflatten(1, (heads, -1)).transpose(0, 1) if divided is None else divided
        shares = head_shares(components).T
        reads = components.head_acts(seen.x[site]) if side == "in" else None
        writes = acts[:, :, None, :, None] * divided if side == "out" else None
    return PerHead(site, side, acts, reads, writes, shares)
