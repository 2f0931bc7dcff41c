"""Loss terms: each a frozen object with a coefficient, called on a `LossStep`.

Formulas and normalisation as in "Stochastic Parameter Decomposition" (arXiv 2506.20790) and its successors: sums run over
sites and components without dividing by their number, reconstructions are means over scored positions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.base import LossStep, SiteValues


@dataclass(frozen=True)
class Faithfulness:
    """How far V U is from W."""

    coefficient: float = 1.0
    relative: bool = True
    """Mean over sites of ||W - V U||^2 / ||W||^2; otherwise the mean square over all entries of all sites (the paper's)."""
    name: str = "faithfulness"

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value for the step's components; computed in at least float32."""
        squares, sizes = [], []
        with torch.autocast(step.target.device.type, enabled=False):
            for site, components in step.decomposition.items():
                weight = step.adapter.weight(site).detach()
                wide = torch.promote_types(weight.dtype, torch.float32)
                rest = weight.to(wide) - components.V.to(wide) @ components.U.to(wide)
                squares.append(rest.square().sum())
                sizes.append(weight.to(wide).square().sum().clamp(min=1e-30) if self.relative else weight.numel())
        if self.relative:
            return torch.stack([s / n for s, n in zip(squares, sizes, strict=True)]).mean()
        return torch.stack(squares).sum() / sum(sizes)


@dataclass(frozen=True)
class ImportanceMinimality:
    """Mean over positions of the sum over sites and components of g^p, with p going from `p_start` to `p_end`."""

    coefficient: float = 1e-3
    p_start: float = 2.0
    p_end: float = 0.4
    frequency: float = 0.0
    """beta of the frequency term: adds beta * mean_c * log2(1 + sum_c), which splits components that do two rare jobs."""
    name: str = "importance_minimality"

    def __post_init__(self) -> None:
        if self.p_start <= 0 or self.p_end <= 0:
            raise SettingError(
                f"The exponent of importance minimality must be positive; given {self.p_start} to {self.p_end}."
            )

    def exponent(self, progress: float) -> float:
        """p at a share of the run."""
        return self.p_start + (self.p_end - self.p_start) * min(max(progress, 0.0), 1.0)

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value at the step's progress."""
        p, total = self.exponent(step.progress), torch.zeros((), device=step.target.device)
        for importance in step.importances.values():
            g = importance.upper.flatten(0, -2).float()
            if step.scored is not None:
                g = g[step.scored.flatten()]
            sums = (g + 1e-12).pow(p).sum(0)
            means = sums / len(g)
            total = total + means.sum()
            if self.frequency:
                total = total + self.frequency * (means * torch.log2(1 + sums)).sum()
        return total


@dataclass(frozen=True)
class StochasticReconstruction:
    """Divergence under masks m = g + (1 - g) r with r uniform: whatever is unimportant may be kept in any amount."""

    coefficient: float = 1.0
    sites: Literal["all", "layerwise", "subset"] = "all"
    """Which sites are masked at once: all; one at a time, averaged; or at each position a random subset of random size."""
    delta: bool = True
    """Mask the delta component by a uniform number too; otherwise it is absent."""
    samples: int = 1
    """Mask draws per step."""

    def __post_init__(self) -> None:
        if self.sites not in ("all", "layerwise", "subset"):
            raise SettingError(f"Reconstruction sites must be 'all', 'layerwise' or 'subset'; given {self.sites!r}.")
        if self.samples < 1:
            raise SettingError(f"Reconstruction needs at least one sample; given {self.samples}.")

    @property
    def name(self) -> str:
        """Name in logs."""
        return f"stochastic_{self.sites}"

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Mean over the draws (and, layerwise, over the sites)."""
        values = []
        for _ in range(self.samples):
            masks = stochastic_values(step, self.delta, subset=self.sites == "subset")
            if self.sites == "layerwise":
                values += [step.divergence(step.run_masked({name: pair})) for name, pair in masks.items()]
            else:
                values.append(step.divergence(step.run_masked(masks)))
        return torch.stack(values).mean()


@dataclass(frozen=True)
class UnmaskedReconstruction:
    """Divergence with every component whole and the delta component absent: faithfulness on the scale of outputs."""

    coefficient: float = 1.0
    name: str = "unmasked"

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value for the step's components."""
        ones = {name: (g.lower.new_ones(g.lower.shape[-1]), 0.0) for name, g in step.importances.items()}
        return step.divergence(step.run_masked(ones))


def stochastic_values(step: LossStep, delta: bool, subset: bool = False) -> SiteValues:
    """Masks m = 1 - (1 - g) q and d = 1 - q_delta with q uniform, drawn anew; q = 0 at positions routed past a site.

    With m = d = 1 a site returns the target's own output bit for bit, so routing needs no selection of outputs.
    """
    routes = subset_routes(step) if subset else None
    values = {}
    for name, importance in step.importances.items():
        g = importance.lower
        q = torch.rand(g.shape, generator=step.generator, device=g.device, dtype=g.dtype)
        absent: Tensor | float = 1.0
        if delta:
            absent = torch.rand(g.shape[:-1], generator=step.generator, device=g.device, dtype=g.dtype)
        if routes is not None:
            q, absent = q * routes[name].unsqueeze(-1), absent * routes[name]
        d = 1.0 - absent if isinstance(absent, Tensor) else 0.0
        values[name] = (1.0 - (1.0 - g) * q, d)
    return values


def subset_routes(step: LossStep) -> dict[str, Bool[Tensor, "..."]]:
    """At each position a number k of sites, uniform over 1 to all, and k sites chosen at random."""
    names = list(step.importances)
    first = step.importances[names[0]].lower
    noise = torch.rand((len(names), *first.shape[:-1]), generator=step.generator, device=first.device)
    chosen = torch.randint(1, len(names) + 1, first.shape[:-1], generator=step.generator, device=first.device)
    ranks = noise.argsort(0).argsort(0)
    return {name: ranks[i] < chosen for i, name in enumerate(names)}
