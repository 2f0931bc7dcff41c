"""Reconstruction terms: a model with masked components must still give what the target gives.

Masks are m = g + (1 - g) r: what is important stays whole, the rest in any amount r. Formulas and normalisation as in
"Stochastic Parameter Decomposition" (arXiv 2506.20790) and its successors: means over scored positions.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.components.sigmoids import binomial_lower
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.step import LossStep, SiteMasks
from tl_paramdecomp.settings import Count, NotNegative

Replaced = Literal["all", "layerwise", "subset"]
"""Which sites are masked at once: all; one at a time, averaged; or at each position a random subset of random size."""
Sampling = Literal["continuous", "binomial"]
"""r uniform in [0, 1], or 0 and 1 by the toss of a coin."""
DeltaUse = Literal["masked", "absent", "kept"]
"""What happens to the delta component: masked like a component of importance 0, absent, or kept whole."""


class Reconstruction(Loss):
    """Divergence from the target under masks that `draw` makes, at all sites, one at a time, or a subset."""

    sites: Replaced = "all"
    """Masked at once: all, one at a time (`layerwise`), or at each position a random subset."""
    samples: Count = 1

    @abstractmethod
    def draw(self, step: LossStep) -> SiteMasks:
        """Masks of every site, drawn anew."""

    def parts(self, step: LossStep, shared: Any) -> Iterator[Tensor]:
        """One part for each forward pass, divided by their number."""
        passes = self.samples * (len(step.importances) if self.sites == "layerwise" else 1)
        for _ in range(self.samples):
            masks = self.draw(step)
            if self.sites == "layerwise":
                for name, mask in masks.items():
                    yield step.divergence.of(step.run_masked({name: mask})) / passes
            else:
                masks = routed(masks, subset_routes(step)) if self.sites == "subset" else masks
                yield step.divergence.of(step.run_masked(masks)) / passes


@dataclass(frozen=True)
class StochasticReconstruction(Reconstruction):
    """Divergence under random masks: whatever is unimportant may be kept in any amount."""

    coefficient: NotNegative = 1.0
    sites: Replaced = "all"
    delta: DeltaUse = "masked"
    """Masked by a uniform number, absent, or kept."""
    samples: Count = 1
    """Mask draws per step."""
    sampling: Sampling = "continuous"
    """`binomial` tests whole ablations only; importances then pass 0 and 1 noisily."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"stochastic_{self.sites}"

    def draw(self, step: LossStep) -> SiteMasks:
        return stochastic_masks(step, self.delta, self.sampling)


@dataclass(frozen=True)
class ImportanceMaskedReconstruction(Reconstruction):
    """Divergence with every component kept in the amount of its importance, the delta component absent.

    A metric: a run trained on it drives it to 0 without finding mechanisms.
    """

    coefficient: NotNegative = 1.0
    sites: Replaced = "all"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"importance_masked_{self.sites}"

    def draw(self, step: LossStep) -> SiteMasks:
        return importance_masks_of(step)


@dataclass(frozen=True)
class UnmaskedReconstruction(Reconstruction):
    """Divergence with every component whole and the delta component absent: faithfulness on the scale of outputs."""

    coefficient: NotNegative = 1.0
    name: str = "unmasked"

    def draw(self, step: LossStep) -> SiteMasks:
        every = {name: g.lower.detach().new_ones(g.lower.shape[-1]) for name, g in step.importances.items()}
        return {name: InterpolatedMask(ones, torch.zeros_like(ones), 1.0) for name, ones in every.items()}


def stochastic_masks(step: LossStep, delta: DeltaUse = "masked", sampling: Sampling = "continuous") -> SiteMasks:
    """Masks with q = 1 - r drawn for every position and component, and a for the delta component."""
    masks = {}
    for name, importance in step.importances.items():
        g = importance.lower
        q = step.random.uniform(g.shape, g)
        if sampling == "binomial":
            assert importance.raw is not None and step.decomposition.importance is not None
            sigmoid = step.decomposition.importance.config.sigmoid
            g = binomial_lower(importance.raw, step.random.uniform(g.shape, g), sigmoid)
            q = q.round_()
        a = step.random.uniform(g.shape[:-1], g) if delta == "masked" else float(delta == "absent")
        masks[name] = InterpolatedMask(g, q, a)
    return masks


def importance_masks_of(step: LossStep) -> SiteMasks:
    """m = g with the delta component absent."""
    return {name: InterpolatedMask(g.lower, g.lower.new_ones(()), 1.0) for name, g in step.importances.items()}


def routed(masks: SiteMasks, routes: dict[str, Bool[Tensor, "..."]]) -> SiteMasks:
    """Masks that leave the target's own output, bit for bit, at positions routed past a site."""
    there = {name: routes[name].to(mask.g) for name, mask in masks.items()}
    return {
        name: InterpolatedMask(mask.g, mask.q * there[name].unsqueeze(-1), mask.a * there[name])
        for name, mask in masks.items()
    }


def subset_routes(step: LossStep) -> dict[str, Bool[Tensor, "..."]]:
    """At each position a number k of sites, uniform over 1 to all, and k sites chosen at random.

    For each row instead, where sites have other positions than one another, as convolutions of different resolutions do.
    """
    names = list(step.importances)
    rows, device = step.rows_of(names[0]), step.device
    alike = all(step.rows_of(name) == rows for name in names)
    rows = rows if alike else rows[:1]
    like = torch.empty(0, device=device)
    noise = step.random.uniform((len(names), *rows), like, rows=1)
    chosen = step.random.integers(1, len(names) + 1, rows, device)
    ranks = noise.argsort(0).argsort(0)
    routes = {name: ranks[i] < chosen for i, name in enumerate(names)}
    return routes if alike else {name: _spread(route, step.rows_of(name)) for name, route in routes.items()}


def _spread(route: Bool[Tensor, " batch"], rows: Sequence[int]) -> Bool[Tensor, "batch ..."]:
    return route.view(-1, *[1] * (len(rows) - 1)).expand(*rows)
