"""From raw outputs of an importance network to causal importances: pairs of sigmoids, one for masks and one to penalise.

With leak = 0.01, x the raw value and dL/dg the gradient that arrives, both pairs have

    upper(x) = 0 for x <= 0,  x up to 1,  1 + leak (x - 1) above          slope 0, 1, leak

and `clamped`, the authors' later pair ("Interpreting Language Model Parameters", 2026), has

    lower(x) = clamp(x, 0, 1)                      slope for x <= 0: leak where dL/dg < 0, else 0; then 1; above 1: 0

while `leaky`, of "Stochastic Parameter Decomposition" (arXiv 2506.20790), has

    lower(x) = leak x for x <= 0,  x up to 1,  1 above                    slope leak, 1, 0

At the boundaries x = 0 counts as below and x = 1 as inside. Lower and upper are made together: on small models such
elementwise passes over memory are a large share of a training step, and both directions use few of them.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SIGMOID_LEAK = 0.01


class Importance(NamedTuple):
    """Causal importances of one site."""

    lower: Float[Tensor, "... C"]
    """What masks are made from; its gradient ends above 1."""
    upper: Float[Tensor, "... C"]
    """What importance minimality penalises; its gradient ends below 0."""
    raw: Float[Tensor, "... C"] | None = None
    """The network's output, before the sigmoids."""


def clamped(raw: Float[Tensor, "... C"]) -> Importance:
    """The authors' later pair: values in [0, 1]; below 0 lower's gradient leaks (0.01) where the loss wants it up."""
    return Importance(*_Pair.apply(raw, True), raw=raw)


def leaky(raw: Float[Tensor, "... C"]) -> Importance:
    """The paper's pair: lower really goes negative (0.01 x below 0), upper is 1 + 0.01 (x - 1) above 1."""
    return Importance(*_Pair.apply(raw, False), raw=raw)


SIGMOIDS = {"clamped": clamped, "leaky": leaky}


def binomial_lower(
    raw: Float[Tensor, "... C"], noise: Float[Tensor, "... C"], sigmoid: str = "clamped"
) -> Float[Tensor, "... C"]:
    """Lower importances for binomial sampling, of 1.05 raw - 0.05 noise with noise uniform in [0, 1].

    With masks m = g + (1 - g) r of r in {0, 1} the masks tell g from 0 and 1 only through such noise.
    """
    return SIGMOIDS[sigmoid](1.05 * raw - 0.05 * noise).lower


class _Pair(torch.autograd.Function):
    """(lower, upper) of raw values; `gated` says whether as in `clamped`."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(raw)
        ctx.gated = gated
        lower = raw.clamp(0.0, 1.0)
        beyond = torch.relu(raw)
        torch.ops.aten.softshrink.out(beyond, 1.0, out=beyond)  # x - 1 above 1, else 0
        upper = torch.add(lower, beyond, alpha=SIGMOID_LEAK, out=beyond)
        if not gated:
            torch.clamp(raw, max=1.0, out=lower)
            torch.nn.functional.leaky_relu_(lower, SIGMOID_LEAK)
        return lower, upper

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_lower: Tensor | None, to_upper: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        both = [g for g in (to_lower, to_upper) if g is not None]
        if not both:
            return None, None
        # hardtanh_backward passes a gradient where min < x < max, several times faster than a comparison and `where`.
        # Inside, 0 < x <= 1: no number lies between 1 and 1 + eps.
        grad = both[0] + both[1] if len(both) == 2 else both[0]
        within = (0.0, 1.0 + torch.finfo(x.dtype).eps)
        if len(both) == 2:
            torch.ops.aten.hardtanh_backward.grad_input(grad, x, *within, grad_input=grad)
        else:
            grad = torch.ops.aten.hardtanh_backward(grad, x, *within)
        part = torch.empty_like(grad)
        if to_lower is not None:  # x <= 0: no number lies between 0 and the smallest one
            smallest = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
            leak = torch.clamp(to_lower, max=0.0, out=part) if ctx.gated else to_lower
            torch.ops.aten.hardtanh_backward.grad_input(leak, x, -math.inf, smallest, grad_input=part)
            grad.add_(part, alpha=SIGMOID_LEAK)
        if to_upper is not None:
            torch.ops.aten.threshold_backward.grad_input(to_upper, x, 1.0, grad_input=part)
            grad.add_(part, alpha=SIGMOID_LEAK)
        return grad, None
