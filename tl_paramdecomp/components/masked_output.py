"""The masked output of one site, as a correction to the model's own output y.

    y' = b + d (y - b) + ((m - d) * h) U          with h = x V

equals the textbook `b + (m * h) U + d x (W - V U)` in value and gradient, needs no second full matrix product, and with
m = d = 1 returns y bit for bit. m [..., C] are component masks, d [...] the mask of the delta component W - V U.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masks import ResolvedMask, SiteMask
from tl_paramdecomp.sites import SiteCall, SiteFn


def masked_output(
    components: Components,
    mask: ResolvedMask,
    x: Tensor,
    y: Float[Tensor, "*rows d_out"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*masked_rows d_out"]:
    """Output of a site under masks.

    Args:
        components: V and U of the site.
        mask: m [..., C] (or [..., head, C] where heads differ) and d [...], broadcast over the rows.
        x: The site's input [..., d_in], or indices [...] for an embedding.
        y: The model's own output [..., d_out], bias included.
        bias: The bias in y, or None.

    Returns:
        y' in y's dtype, computed in the wider of the dtypes of y and V; broadcast to the masks' batch if that is more.
    """
    wide = torch.promote_types(y.dtype, components.V.dtype)
    base = delta_part(y, bias, mask.d, wide)
    return (base + _component_part(components, mask, x)).to(y.dtype)


def delta_part(y: Tensor, bias: Tensor | None, d: Tensor | float, wide: torch.dtype) -> Tensor:
    """b + d (y - b), which is y itself for d = 1; d broadcasts to y's rows."""
    y = y.to(wide)
    if not isinstance(d, Tensor):
        if d == 1.0:
            return y
        d = torch.tensor(d, dtype=wide, device=y.device)
    d = d.to(wide).unsqueeze(-1)
    return y * d if bias is None else torch.lerp(bias.to(wide), y, d)


def _component_part(components: Components, mask: ResolvedMask, x: Tensor) -> Tensor:
    """((m - d) * h) U."""
    if mask.by_head:
        if components.site.head_side == "in":
            return (mask.weight * components.head_acts(x)).sum(-2) @ components.U
        return components.head_writes(mask.weight * components.acts(x).unsqueeze(-2))
    if mask.only is not None:  # few components change: the others' columns need not be read
        return (mask.weight[mask.only] * components.acts(x, mask.only)) @ components.U[mask.only]
    return (mask.weight * components.acts(x)) @ components.U


def site_fn(components: Components, mask: SiteMask) -> SiteFn:
    """The function that an adapter runs at a site to apply a mask."""

    return functools.partial(_apply, components, mask)


def _apply(components: Components, mask: SiteMask, call: SiteCall) -> Tensor:
    resolved = mask.resolve(call.y.shape[:-1], call.span, components.V.device, components.V.dtype)
    return masked_output(components, resolved, call.x, call.y, call.bias)


def masked_weight(
    components: Components, mask: ResolvedMask, weight: Float[Tensor, "d_in d_out"]
) -> Float[Tensor, "d_in d_out"]:
    """W' = V diag(m) U + d (W - V U), the one weight that constant masks amount to."""
    wide = torch.promote_types(weight.dtype, components.V.dtype)
    V, U = components.V.to(wide), components.U.to(wide)
    d = torch.as_tensor(mask.d, dtype=wide, device=weight.device)
    m = mask.m.to(wide).to(weight.device)
    m = m.reshape(m.shape[-2:]) if mask.by_head else m.reshape(m.shape[-1:])
    if not mask.by_head:
        part = (V * (m - d)) @ U
    elif components.site.head_side == "in":
        part = (V.unflatten(0, (m.shape[0], -1)) * (m - d).unsqueeze(1)).flatten(0, 1) @ U
    else:
        part = torch.einsum("ic,hc,chd->ihd", V, m - d, U.unflatten(1, (m.shape[0], -1))).flatten(1)
    return (d * weight.to(wide) + part).to(weight.dtype)
