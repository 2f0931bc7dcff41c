"""The adversary of an evaluation: one source for each component, shared by all rows and positions of all batches.

Masks are m = g + (1 - g) s, the delta mask is a source of its own. Sources start at random and climb the KL over the whole
data by sign steps; a source shared by everything can only find faults that are systematic. The worst sources that were seen
are what counts, so that a climb never ends below its start.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tl_paramdecomp.methods.adversary import ascended, source_masks
from tl_paramdecomp.methods.step import LossStep

Steps = Callable[[], Iterable[tuple[LossStep, int]]]
"""Gives the batches of an evaluation anew, each with the number of its scored positions."""


class Climb(NamedTuple):
    """One restart."""

    start: float
    """KL under the random sources it began from, nats per token."""
    worst: float
    """The largest KL it met."""


def climb(batches: Steps, steps: int, generator: torch.Generator) -> Climb:
    """Projected gradient ascent from random sources; a step of 2 / steps, at most 1, lets sources cross [0, 1] and back."""
    size = min(1.0, 2.0 / steps)
    sources: dict[str, Tensor] = {}
    for step, _ in batches():
        for name, g in ((name, i.lower) for name, i in step.importances.items()):
            sources[name] = torch.rand(g.shape[-1] + 1, generator=generator, device=g.device, dtype=g.dtype)
        break
    values = []
    for i in range(steps + 1):
        kl, gradients = _value_and_gradient(batches, sources, wanted=i < steps)
        values.append(kl)
        sources = {name: ascended(sources[name], gradient, size) for name, gradient in gradients.items()}
    return Climb(values[0], max(values))


def _value_and_gradient(batches: Steps, sources: dict[str, Tensor], wanted: bool) -> tuple[float, dict[str, Tensor]]:
    """KL over all scored positions, and its gradient with respect to the sources where that is wanted."""
    total, count = 0.0, 0
    leaves = {name: s.detach().requires_grad_(wanted) for name, s in sources.items()}
    gradients: dict[str, Tensor] = {}
    for step, positions in batches():
        with torch.set_grad_enabled(wanted):
            kl = step.divergence.of(step.run_masked(source_masks(step, leaves, detached=True))) * positions
        if wanted and kl.requires_grad:  # nothing that is compared may come after the sites
            found = torch.autograd.grad(kl, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(leaves, found, strict=True):
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        total, count = total + kl.item(), count + positions
    return total / count, gradients
