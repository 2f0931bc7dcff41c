"""How far a masked model's output is from the target's: KL of next-token distributions, or mean square.

The target's side is computed once for all losses of a step. Value and gradient come out of one pass over the logits. In
chunks, neither the target's nor the masked model's logits ever exist for more than some positions at a time: the forward
passes end before the unembedding, and each chunk is unembedded, compared and turned into a gradient at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Scored = Bool[Tensor, "..."] | None
"""Positions that count; None where all do."""


class Divergence(ABC):
    """Distance from one batch's target output; `of` takes what the masked model gives in its place."""

    of_hidden: ClassVar[bool] = False
    """Whether it takes vectors before the unembedding in place of outputs."""
    share: float = 1.0
    """Factor on a microbatch's distance, where it is not its share of all positions that it weighs by."""

    def __init__(self, target: Float[Tensor, "*rows width"], scored: Scored) -> None:
        self.by_row = target.ndim == 2
        """Whether there is one output for each row, as a classifier gives."""
        if scored is not None and self.by_row:
            scored = scored.flatten(1).any(1)
        self.scored = scored
        self.target = self.rows(target).detach()

    def rows(self, output: Float[Tensor, "*rows width"]) -> Float[Tensor, "n width"]:
        """The positions that count, one after the other."""
        return at_scored(output, self.scored)

    @abstractmethod
    def of(self, output: Float[Tensor, "*rows width"]) -> Float[Tensor, ""]:
        """Mean over the positions that count."""


class MeanSquare(Divergence):
    """Mean square over all elements."""

    def of(self, output: Float[Tensor, "*rows width"]) -> Float[Tensor, ""]:
        rows = wide(self.rows(output))
        if rows.numel() == 0:
            return rows.sum()  # a microbatch that is padding alone: 0, and not 0 / 0
        return self.share * torch.nn.functional.mse_loss(rows, self.target.to(rows.dtype))


class KL(Divergence):
    """KL(target || output) in nats, summed over the vocabulary."""

    def __init__(self, target: Float[Tensor, "*rows vocab"], scored: Scored) -> None:
        super().__init__(target, scored)
        self.target = log_probabilities(self.target)
        self.probs = self.target.exp()

    def of(self, output: Float[Tensor, "*rows vocab"]) -> Float[Tensor, ""]:
        return self.share * _KLFromLogits.apply(self.rows(output), self.target, self.probs) / max(1, len(self.target))


class ChunkedKL(Divergence):
    """The same KL from the vectors before the unembedding, some positions at a time."""

    of_hidden = True

    def __init__(
        self, target: Float[Tensor, "*rows d_model"], scored: Scored, unembed: Callable[[Tensor], Tensor], chunk: int
    ) -> None:
        super().__init__(target, scored)
        self.unembed, self.chunk = unembed, chunk

    def of(self, output: Float[Tensor, "*rows d_model"]) -> Float[Tensor, ""]:
        return _KLInChunks.apply(self.rows(output), self.target, self.unembed, self.chunk) / max(1, len(self.target))


def at_scored(values: Float[Tensor, "*rows width"], scored: Scored) -> Float[Tensor, "n width"]:
    """What stands at the positions that count, one after the other."""
    flat = values.flatten(0, -2)
    return flat if scored is None else flat[scored.flatten().to(flat.device)]


def kl(log_p: Float[Tensor, "*rows width"], log_q: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """KL(p || q) in nats of each row, from logarithms of probabilities; not a number where a p is 0."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_probabilities(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Of next tokens, in float32 at least."""
    return torch.log_softmax(wide(logits), -1)


def mean_square(target: Float[Tensor, "*rows width"], output: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """Mean square over the width of each row's difference, in float32 at least."""
    return (wide(output) - wide(target)).square().mean(-1)


def wide(values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """In float32 at least; indices stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values


def _kl_and_gradient(
    logits: Float[Tensor, "n vocab"], log_p: Float[Tensor, "n vocab"], p: Float[Tensor, "n vocab"], gradient: bool
) -> tuple[Float[Tensor, ""], Tensor | None]:
    """Sum over rows of KL(p || softmax(logits)), and its gradient softmax(logits) - p."""
    log_q = torch.log_softmax(logits.to(log_p.dtype), -1)
    value = (log_p - log_q).mul_(p).sum()  # one long float32 dot product is off by 3e-5 on some processors
    return value, log_q.exp_().sub_(p) if gradient else None


class _KLFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
        value, gradient = _kl_and_gradient(logits, log_p, p, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None


class _KLInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: Tensor, unembed: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p = torch.log_softmax(unembed(target[rows]).to(total.dtype), -1)
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_(wanted)
                logits = unembed(x)
            value, at_logits = _kl_and_gradient(logits.detach(), log_p, log_p.exp(), wanted)
            total += value
            if gradient is not None and at_logits is not None:
                gradient[rows] = torch.autograd.grad(logits, x, at_logits.to(logits.dtype))[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None, None
