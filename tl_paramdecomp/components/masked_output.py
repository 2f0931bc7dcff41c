"""The masked output of one site, as a correction to the model's own output y.

    y' = b + d (y - b) + ((m - d) * h) U          with h = x V

equals the textbook `b + (m * h) U + d x (W - V U)` in value and gradient, needs no second full matrix product, and with
m = d = 1 returns y bit for bit. m [..., C] are component masks, d [...] the mask of the delta component W - V U. All that
changes what a site writes (training, patches, hook points, edits of activations) ends in `corrected`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tl_paramdecomp.components.factors import Components, read, write


class ResolvedMask(NamedTuple):
    """Masks of one site for the columns of one forward pass."""

    m: Float[Tensor, "... C"]
    """Component masks; [..., head, C] where `by_head`."""
    d: Float[Tensor, "..."] | float
    """Delta masks."""
    by_head: bool = False
    only: Tensor | None = None
    """Indices of the components whose m differs from d, where they are constants and few."""

    @property
    def weight(self) -> Float[Tensor, "... C"]:
        """m - d, what multiplies the component activations in the correction."""
        if not isinstance(self.d, Tensor):
            return self.m - self.d
        return self.m - (self.d[..., None, None] if self.by_head else self.d[..., None])

    def weigh(self, h: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """(m - d) * h of component activations h (of those that `only` names)."""
        return (self.weight if self.only is None else self.weight[self.only]) * h


class InterpolatedMask(NamedTuple):
    """Masks between a causal importance and one, as training draws them: what is unimportant may be absent in any amount.

        m = 1 - (1 - g) q        d = 1 - a

    with q in [0, 1] the share that is taken away of what may be (r = 1 - q in the papers' m = g + (1 - g) r). q and a
    broadcast to g's rows; q = a = 0 is the target itself, bit for bit.
    """

    g: Float[Tensor, "... C"]
    q: Float[Tensor, "... C"]
    a: Float[Tensor, "..."] | float = 0.0
    """1 - d: 1 where the delta component is absent."""
    by_head = False
    only = None

    @property
    def m(self) -> Float[Tensor, "... C"]:
        """Component masks."""
        return 1.0 - (1.0 - self.g) * self.q

    @property
    def d(self) -> Float[Tensor, "..."] | float:
        """Delta masks."""
        return 1.0 - self.a

    def weigh(self, h: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """(m - d) * h of component activations h."""
        a = self.a if isinstance(self.a, Tensor) else torch.tensor(self.a, dtype=h.dtype, device=h.device)
        return _Weigh.apply(h, self.g, self.q, a)


def masked_output(
    components: Components,
    mask: ResolvedMask | InterpolatedMask,
    x: Shaped[Tensor, "..."],
    y: Float[Tensor, "*rows d_out"],
    bias: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "*masked_rows d_out"]:
    """Output [..., d_out] of a site under masks, in y's dtype, computed in the wider of the dtypes of y and V.

    Args:
        components: V and U of the site. mask: m [..., C] (or [..., head, C] where heads differ) and d [...]; where they
        have more rows than y, so has the output. x: The site's input [..., d_in], or indices [...] for an embedding. y: The
        model's own output [..., d_out], bias included. bias: The bias in y, or None.
    """
    site, V, U = components.site, components.V, components.U
    if mask.only is not None:  # few components change: the others' columns need not be read
        V, U = V[:, mask.only], U[mask.only]
    h = read(site, x, V, mask.by_head)
    return corrected(components, y, bias, mask.d, write(site, mask.weigh(h), U, mask.by_head))


def corrected(
    components: Components, y: Tensor, bias: Tensor | None, d: Tensor | float, *changes: Tensor
) -> Float[Tensor, "*masked_rows d_out"]:
    """b + d (y - b) and what components write more than y holds of them, the changes [..., d_out], in y's dtype.

    It is computed in the wider of the dtypes of y and V. Where the delta mask d is the number 1, y stays itself bit for bit.
    """
    wide = torch.promote_types(y.dtype, components.V.dtype)
    new = y.to(wide)
    if isinstance(d, Tensor) or d != 1.0:
        d = torch.as_tensor(d, dtype=wide, device=y.device).unsqueeze(-1)
        new = new * d if bias is None else torch.lerp(bias.to(wide), new, d)
    for change in changes:
        new = new + change.to(wide)
    return new.to(y.dtype)


def masked_weight(
    components: Components, mask: ResolvedMask, weight: Float[Tensor, "d_in d_out"]
) -> Float[Tensor, "d_in d_out"]:
    """W' = V diag(m) U + d (W - V U), the one weight that constant masks amount to."""
    site, by_head = components.site, mask.by_head
    wide = torch.promote_types(weight.dtype, components.V.dtype)
    V, U = components.V.to(wide), components.U.to(wide)
    d = torch.as_tensor(mask.d, dtype=wide, device=weight.device)
    m = mask.m.to(wide).to(weight.device)
    m = m.reshape(m.shape[-2:]) if by_head else m.reshape(m.shape[-1:])
    if by_head and site.head_side == "in":  # a row of V belongs to one head
        m, by_head = m.repeat_interleave(site.d_in // len(m), 0), False
    part = write(site, (m - d) * (V.unsqueeze(-2) if by_head else V), U, by_head)
    return (d * weight.to(wide) + part).to(weight.dtype)


class _Weigh(torch.autograd.Function):
    """(a - (1 - g) q) h in few passes over memory, which is most of a small model's step."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, q: Tensor, a: Tensor) -> Tensor:
        left = (1.0 - g).mul_(q) if _within(q, g) else (1.0 - g) * q
        a_column = a.unsqueeze(-1)
        weight = left.neg_().add_(a_column) if _within(a_column, left) else a_column - left
        ctx.save_for_backward(h, g, q, weight)
        ctx.a_shape = a.shape
        return weight * h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, g, q, weight = ctx.saved_tensors
        to_h, to_g, to_q, to_a = ctx.needs_input_grad
        dh = dg = dq = da = None
        if to_h:
            dh = (grad * weight).sum_to_size(h.shape).to(h.dtype)
        if to_g or to_q or to_a:
            reach = grad * h
            if to_a:
                da = reach.sum(-1).sum_to_size(ctx.a_shape)
            if to_q:
                dq = (reach * (g - 1.0)).sum_to_size(q.shape).to(q.dtype)
            if to_g:
                dg = reach.mul_(q) if _within(q, reach) else reach * q
                dg = dg.sum_to_size(g.shape).to(g.dtype)
        return dh, dg, dq, da


def _within(small: Tensor, large: Tensor) -> bool:
    """Whether an operation of the two has the large one's own shape and dtype, so that it can be done in place."""
    shapes = zip(reversed(small.shape), reversed(large.shape))
    return small.dtype == large.dtype and small.ndim <= large.ndim and all(n in (1, m) for n, m in shapes)
