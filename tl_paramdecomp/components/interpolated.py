"""Masks between a causal importance and one, as training draws them: what is unimportant may be absent in any amount.

    m = 1 - (1 - g) q        d = 1 - a

with g the importances [..., C], q in [0, 1] the share that is taken away of what may be (r = 1 - q in the papers'
m = g + (1 - g) r), and a that of the delta component. q = a = 0 is the target itself, bit for bit.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import delta_part
from tl_paramdecomp.sites import SiteCall


class InterpolatedMask(NamedTuple):
    """Masks of one site; q and a broadcast to g's rows."""

    g: Float[Tensor, "... C"]
    q: Float[Tensor, "... C"]
    a: Float[Tensor, "..."] | float = 0.0
    """1 - d: 1 where the delta component is absent."""

    @property
    def m(self) -> Float[Tensor, "... C"]:
        """Component masks."""
        return 1.0 - (1.0 - self.g) * self.q

    @property
    def d(self) -> Float[Tensor, "..."] | float:
        """Delta masks."""
        return 1.0 - self.a

    def weigh(self, h: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """(m - d) * h, what the correction writes with, of component activations h."""
        a = self.a if isinstance(self.a, Tensor) else torch.tensor(self.a, dtype=h.dtype, device=h.device)
        return _Weigh.apply(h, self.g, self.q, a)


def interpolated_output(components: Components, mask: InterpolatedMask, call: SiteCall) -> Tensor:
    """A site's output under such a mask: b + d (y - b) + ((m - d) * h) U, in y's dtype."""
    wide = torch.promote_types(call.y.dtype, components.V.dtype)
    rows = mask.weigh(components.acts(call.x)) @ components.U
    return (delta_part(call.y, call.bias, mask.d, wide) + rows).to(call.y.dtype)


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
