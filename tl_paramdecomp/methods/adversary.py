"""Adversarial masks: the worst choice of what unimportant components do.

Sources s in [0, 1], shared by all rows and positions of a batch so that they find systematic faults rather than noise, fill
the masks m = g + (1 - g) s and the delta mask; each step moves them by the sign of the divergence's gradient (projected
gradient ascent). From the successors of "Stochastic Parameter Decomposition" (PGD reconstruction).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.base import LossStep, SiteValues

Sources = Mapping[str, Float[Tensor, " C_and_delta"]]
"""One source per component of each site, and a last one for its delta component."""


@dataclass(frozen=True)
class AdversarialReconstruction:
    """Divergence under adversarial masks found anew at every step, at all sites."""

    coefficient: float = 1.0
    steps: int = 1
    step_size: float = 1.0
    name: str = "adversarial"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.step_size <= 0:
            raise SettingError(
                f"The adversary needs steps >= 1 and a positive step size; given {self.steps} and {self.step_size}."
            )

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value under the sources found; they are constants to the components and importances."""
        sources = worst_sources(step, self.steps, self.step_size)
        return step.divergence(step.run_masked(source_values(step, sources)))


def worst_sources(step: LossStep, steps: int, step_size: float) -> Sources:
    """Sources that raise the divergence, from a random start by `steps` sign steps."""
    sources = random_sources(step)
    for _ in range(steps):
        leaves = {name: s.requires_grad_(True) for name, s in sources.items()}
        with torch.enable_grad():
            loss = step.divergence(step.run_masked(source_values(step, leaves, detached=True)))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        sources = {
            name: (s.detach() + step_size * g.sign()).clamp(0.0, 1.0)
            for (name, s), g in zip(leaves.items(), gradients, strict=True)
        }
    return sources


def random_sources(step: LossStep) -> Sources:
    """Uniform sources."""
    return {
        name: torch.rand(g.lower.shape[-1] + 1, generator=step.generator, device=g.lower.device, dtype=g.lower.dtype)
        for name, g in step.importances.items()
    }


def source_values(step: LossStep, sources: Sources, detached: bool = False) -> SiteValues:
    """Masks m = g + (1 - g) s and the delta mask that sources stand for."""
    values = {}
    for name, importance in step.importances.items():
        g = importance.lower.detach() if detached else importance.lower
        s = sources[name]
        values[name] = (1.0 - (1.0 - g) * (1.0 - s[:-1]), s[-1])
    return values
