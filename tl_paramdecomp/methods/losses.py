"""Terms that hold a decomposition to the weights and to few active components; each a frozen object called on a `LossStep`.

Formulas and normalisation as in "Stochastic Parameter Decomposition" (arXiv 2506.20790) and its successors: sums run over
sites and components without dividing by their number.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.divergence import wide
from tl_paramdecomp.methods.loss import ZERO_MASK, Loss, LossBatch
from tl_paramdecomp.methods.reconstruction import stochastic_masks
from tl_paramdecomp.methods.step import LossStep
from tl_paramdecomp.settings import Count, NotNegative, Positive, Share

EPSILON = 1e-12
"""Added to importances before a power is taken."""
PART = 1_000_000
"""Entries of weights whose gradients may wait for each other."""
SHARE = 1.3e-3
"""Of a site's part of Z that a component costs by default."""
STEER_EVERY, STEER_MEMORY, STEER_RATE, STEER_REACH = 5, 0.8, 0.25, 6.0
"""Steps between two looks at what stochastic masks cost; how much of the earlier looks counts; how far the coefficient's
logarithm moves at most each time, and away from where it began."""


@dataclass(frozen=True)
class Faithfulness(Loss):
    """How far V U is from W; always in at least float32."""

    coefficient: NotNegative = 1.0
    relative: bool = True
    """Mean over sites of ||W - V U||^2 / ||W||^2; otherwise the mean square over all entries of all sites (the paper's)."""
    rows: Count | None = None
    """Compare only so many rows of each W, drawn anew at every step; its mean is the exact value. None: all of them."""
    name: str = "faithfulness"
    of_rows: ClassVar[bool] = False

    def parts(self, step: LossStep, shared: Any) -> Iterator[Tensor]:
        """One part for each large site, small ones together."""
        sizes = {name: c.site.d_in * c.site.d_out for name, c in step.decomposition.items()}
        gathered, entries = torch.zeros((), device=step.device), 0
        for name, components in step.decomposition.items():
            weight = step.adapter.weight(name).detach()
            if self.relative:
                norm = step.decomposition.fingerprints[name].norm
                scale = 1.0 / (max(norm * norm, 1e-30) * len(sizes))
            else:
                scale = 1.0 / sum(sizes.values())
            draw = None
            if self.rows is not None and self.rows < components.site.d_in:
                draw = step.random.permutation(components.site.d_in, weight.device)[: self.rows]
                scale = scale * components.site.d_in / self.rows
            gathered = gathered + components(_squared_rest, weight, scale, draw).to(step.device)
            entries += sizes[name]
            if entries >= PART:
                yield gathered
                gathered, entries = torch.zeros((), device=step.device), 0
        yield gathered


def _squared_rest(
    components: Components, weight: Float[Tensor, "d_in d_out"], scale: float, draw: Int[Tensor, " rows"] | None
) -> Float[Tensor, ""]:
    """scale ||W - V U||^2, of some rows or all."""
    V = components.V
    if draw is not None:
        V, weight = V[draw], weight[draw]
    with torch.autocast(V.device.type, enabled=False):
        return _SquaredRest.apply(V, components.U, weight, scale)


class _SquaredRest(torch.autograd.Function):
    """scale ||W - V U||^2, with its gradient worked out at once so that W - V U is not kept."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, U: Tensor, weight: Tensor, scale: float) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.promote_types(V.dtype, torch.float32))
        v, u = V.to(dtype), U.to(dtype)
        rest = torch.addmm(weight.to(dtype), v, u, alpha=-1.0)
        to_v, to_u = ctx.needs_input_grad[:2]
        dv = (rest @ u.T).mul_(-2.0 * scale).to(V.dtype) if to_v else None
        du = (v.T @ rest).mul_(-2.0 * scale).to(U.dtype) if to_u else None
        ctx.save_for_backward(dv, du)
        # row by row: one long float32 dot product of all entries is off by 3e-5 on some processors
        return scale * torch.linalg.vector_norm(rest, dim=1).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dv, du = ctx.saved_tensors  # nobody else holds them, and a part's gradient is taken once
        return None if dv is None else dv.mul_(grad), None if du is None else du.mul_(grad), None, None


@dataclass(frozen=True)
class ImportanceMinimality(Loss):
    """Mean over positions of the sum over sites and components of a penalty of g.

    What a component may cost differs between layers as what they do differs: `coefficient=None` makes it a share of Z, the
    distance that removing all of the sites makes, which `decompose` then measures on its first batches (`info["zero_mask"]`).
    """

    coefficient: NotNegative | None = 1e-3  # type: ignore[assignment]
    """Nats (or mean square) per component of importance 1; None: share * Z / number of sites."""
    penalty: Literal["power", "smooth_l0"] = "power"
    """`power`: g^p, with p going from `p_start` to `p_end`. `smooth_l0`: g^2 / (g^2 + gamma^2), scaled to be 1 at g = 1, with
    gamma going from `gamma_start` to `gamma_end`."""
    p_start: Positive = 2.0
    """Exponent of `power` until `begin`."""
    p_end: Positive = 0.4
    """Exponent of `power` from `end` on."""
    gamma_start: Positive = 1.0
    """Of `smooth_l0` until `begin`."""
    gamma_end: Positive = 0.1
    """Of `smooth_l0` from `end` on."""
    begin: float = 0.0
    """Share of the run at which p or gamma begins to move."""
    end: float = 1.0
    """Share of the run at which it has arrived."""
    frequency: NotNegative = 0.0
    """beta of the frequency term: adds beta * mean_c * log2(1 + sum_c), which splits components that do two rare jobs."""
    frequency_reference: Count | None = None
    """Positions that the sum in the frequency term stands for; None: those of the batch."""
    share: Positive = SHARE
    """What a component of importance 1 costs, as a share of its site's part of Z; where `coefficient` is None."""
    keep: Share | None = None
    """Fidelity to settle at, between 0 and 1: the coefficient is steered so that the distance under stochastic masks, of all
    sites at once, becomes (1 - keep) Z. None: it stays."""
    name: str = "importance_minimality"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.begin <= self.end <= 1.0:
            raise SettingError(
                f"begin and end are shares of the run, 0 <= begin <= end <= 1; given {self.begin}, {self.end}."
            )
        if self.keep is not None and not (0.0 < self.keep < 1.0 and self.coefficient is None):
            raise SettingError(
                f"keep is the share of Z that stochastic masks leave standing, above 0 and below 1, in place of a coefficient; "
                f"given keep={self.keep:g}, coefficient={self.coefficient}."
            )

    def sharpness(self, progress: float) -> float:
        """p or gamma at a share of the run."""
        start, end = (self.p_start, self.p_end) if self.penalty == "power" else (self.gamma_start, self.gamma_end)
        if progress >= self.end:
            return end
        if progress <= self.begin:
            return start
        share = (progress - self.begin) / (self.end - self.begin)
        return start + (end - start) * share

    def weight(self, batch: LossBatch) -> float:
        """The coefficient; SettingError where it follows from Z and that was not measured."""
        if self.coefficient is not None:
            return self.coefficient
        factor = math.exp(float(batch.memory.get(self._key("factor"), 0.0)))
        return factor * self.share * zero_distance(batch) / len(batch.sites)

    def sparser(self, factor: float) -> "ImportanceMinimality":
        """The same, pressing so many times as hard; of what is to be kept, so many times as much may go."""
        if self.keep is not None:
            return replace(self, keep=1.0 - factor * (1.0 - self.keep))
        if self.coefficient is not None:
            return replace(self, coefficient=factor * self.coefficient)
        return replace(self, share=factor * self.share)

    def _key(self, what: str) -> str:
        return f"{self.name}/{what}"

    def _steer(self, batch: LossBatch, keep: float) -> None:
        """Move the coefficient a little where what stochastic masks cost is not what it should be; every few steps."""
        done = int(batch.memory.get(self._key("steps"), 0))
        batch.memory[self._key("steps")] = torch.tensor(done + 1)
        if done % STEER_EVERY:
            return

        def cost(step: LossStep) -> dict[str, Tensor]:
            return {"": step.place.weight * step.divergence.of(step.run_masked(stochastic_masks(step)))}

        seen = float(batch.total(cost)[""]) / zero_distance(batch)
        usual = STEER_MEMORY * float(batch.memory.get(self._key("lost"), seen)) + (1.0 - STEER_MEMORY) * seen
        batch.memory[self._key("lost")] = torch.tensor(usual, dtype=torch.float64)
        off = max(-1.0, min(1.0, math.log(max(usual, 1e-9) / (1.0 - keep))))
        factor = float(batch.memory.get(self._key("factor"), 0.0)) - STEER_RATE * off
        factor = max(-STEER_REACH, min(STEER_REACH, factor))
        batch.memory[self._key("factor")] = torch.tensor(factor, dtype=torch.float64)

    def prepare(self, batch: LossBatch) -> dict[str, Tensor]:
        """How much each component is used in the whole batch, which the frequency term asks for; by site."""
        if self.keep is not None:
            self._steer(batch, self.keep)
        if not (self.frequency and batch.divided):
            return {}
        sharpness = self.sharpness(batch.progress)
        return batch.total(lambda step: {name: self._sums(_scored(step, name), sharpness) for name in batch.sites})

    def parts(self, step: LossStep, shared: dict[str, Tensor]) -> Iterator[Tensor]:
        sharpness, total = self.sharpness(step.progress), torch.zeros((), device=step.device)
        for name in step.importances:
            g = _scored(step, name)
            value = _Penalty.apply(g, self, sharpness, shared.get(name), round(len(g) / (step.place.weight or 1.0)))
            total = total + value.to(total.device)
        yield total

    def _sums(self, g: Float[Tensor, "n C"], sharpness: float) -> Float[Tensor, " C"]:
        """Penalties summed over positions."""
        g = wide(g.detach())
        if self.penalty == "power":
            return (g + EPSILON).log().mul_(sharpness).exp_().sum(0)
        square, gamma = g.square(), sharpness * sharpness
        return (square / (square + gamma)).mul_(1.0 + gamma).sum(0)


def zero_distance(batch: LossBatch) -> float:
    """Z of the batch's sites; SettingError where nobody measured it."""
    if ZERO_MASK not in batch.info:
        raise SettingError(
            "The coefficient of ImportanceMinimality follows from Z, the zero-mask distance of the sites, which decompose "
            "measures on its data and this decomposition does not have. Give ImportanceMinimality a coefficient."
        )
    return float(batch.info[ZERO_MASK]["distance"])


def _scored(step: LossStep, name: str) -> Float[Tensor, "n C"]:
    """Upper importances at the positions that count."""
    return step.at_scored(step.importances[name].upper)


class _Penalty(torch.autograd.Function):
    """Sum over components of mean_c + beta mean_c log2(1 + sum_c), with its gradient worked out beside it.

    Of a microbatch, mean_c is its own and sum_c that of all `n_all` positions of the batch, so that values and gradients of
    the microbatches, each times its weight, add up to the batch's.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, loss: ImportanceMinimality, sharpness: float, sum_all: Tensor | None, n_all: int
    ) -> Tensor:
        g_wide = wide(g)
        shifted = g_wide + EPSILON if loss.penalty == "power" else g_wide.square()
        if loss.penalty == "power":
            values = shifted.log().mul_(sharpness).exp_()
            slopes = torch.div(values, shifted, out=shifted).mul_(sharpness)
        else:
            gamma = sharpness * sharpness
            below = (shifted + gamma).reciprocal_()
            values = shifted.mul_(below).mul_(1.0 + gamma)
            slopes = below.square_().mul_(g_wide).mul_(2.0 * gamma * (1.0 + gamma))
        n = max(len(g), 1)
        sums = values.sum(0)
        total, factor = sums.sum() / n, torch.full_like(sums, 1.0 / n)
        if loss.frequency:
            reach = 1.0 if loss.frequency_reference is None else loss.frequency_reference / max(n_all, 1)
            used = reach * (sums if sum_all is None else sum_all)
            logs = torch.log2(1.0 + used)
            total = total + loss.frequency * torch.dot(sums, logs) / n
            factor = factor * (1.0 + loss.frequency * (logs + used / ((1.0 + used) * math.log(2.0))))
        ctx.save_for_backward(slopes.mul_(factor).to(g.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * grad.to(slopes.dtype), None, None, None, None
