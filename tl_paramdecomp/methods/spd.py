"""Stochastic Parameter Decomposition (Bushnaq, Braun, Sharkey 2025, arXiv 2506.20790), and its authors' later form.

1. Every site gets rank-one components V, U that should sum to W, and a causal-importance function g in [0, 1].
2. A clean forward pass gives each site's input x, the target logits, and g(x).
3. Masks m = g + (1 - g) r with r uniform keep what is important whole and everything else in any amount; the model run with
   them must still give the target logits (stochastic reconstruction). The delta component W - V U is masked likewise.
4. An adversary picks the r that hurts most (one shared step); the model must withstand that too.
5. Importances are pressed towards 0 (importance minimality), V U towards W (faithfulness).

`SPD()` is the modern form for language models, `SPD.paper()` the published one.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction
from tl_paramdecomp.methods.base import Loss, LossReport, LossStep, Method, ParameterGroup, Progress
from tl_paramdecomp.methods.from_factors import describe
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality, StochasticReconstruction
from tl_paramdecomp.methods.starts import Start, initial_factors, warm_up
from tl_paramdecomp.sites import WeightSite

ALIVE = 0.1
"""Importance above which a component counts as active in L0."""


@dataclass(frozen=True)
class SPD(Method):
    """Hyperparameters of Stochastic Parameter Decomposition; the object is the method."""

    n_components: int | Mapping[str, int] | None = None
    """C for every site; or by glob, the first match counting; None: the larger side of W, at most 4 times the smaller."""
    losses: tuple[Loss, ...] = (
        Faithfulness(100.0),
        StochasticReconstruction(0.5, sites="subset"),
        AdversarialReconstruction(0.5),
        ImportanceMinimality(1e-3),
    )
    """Terms of the objective."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """The causal-importance function."""
    start: Start = "auto"
    """Where components start; see `starts.initial_factors`."""
    warm_up_steps: int = 200
    """Faithfulness warm-up, for sites whose start is not already exact."""
    warm_up_lr: float = 1e-2
    warm_up_weight_decay: float = 0.0
    lr: float = 2e-3
    """Learning rate of V and U."""
    lr_importance: float = 6e-3
    """Learning rate of the importance function: the strongest lever on small language models."""
    ramp_steps: int = 20
    """Steps over which the learning rate rises at the start."""
    final_lr: float = 0.1
    """Share of the learning rate left at the end of the cosine; 1 keeps it constant."""
    clip: float | None = 1.0
    """Largest gradient norm, for components and importance function apart."""
    measure: Literal["kl", "mse"] = "kl"
    """How outputs are compared: KL of next-token distributions, or mean square."""
    autocast: Literal["bfloat16"] | None = None
    """Number type of the forward passes; the components stay as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.n_components, int) and self.n_components < 1:
            raise SettingError(f"n_components must be at least 1; given {self.n_components}.")
        if not self.losses:
            raise SettingError("SPD needs at least one loss.")
        names = [loss.name for loss in self.losses]
        if len(set(names)) < len(names):
            raise SettingError(
                f"Each loss may stand once; given {', '.join(names)}. Raise its coefficient or samples instead."
            )
        for rate in ("lr", "lr_importance"):
            if getattr(self, rate) <= 0:
                raise SettingError(f"{rate} must be positive; given {getattr(self, rate)}.")
        if self.measure not in ("kl", "mse"):
            raise SettingError(f"measure must be 'kl' or 'mse'; given {self.measure!r}.")

    @classmethod
    def paper(cls, **changes: Any) -> "SPD":
        """The published form (section 2, appendix): layerwise and joint stochastic reconstruction without delta component,
        an importance network per component, leaky sigmoids, no warm-up, AdamW at 1e-3 with a cosine to 0."""
        published = cls(
            n_components=100,
            losses=(
                Faithfulness(1.0, relative=False),
                StochasticReconstruction(1.0, sites="all", delta=False),
                StochasticReconstruction(1.0, sites="layerwise", delta=False),
                ImportanceMinimality(3e-3, p_start=1.0, p_end=1.0),
            ),
            importance=ImportanceConfig("component_mlp", hidden=16, sigmoid="leaky"),
            start="random_fan_out",
            warm_up_steps=0,
            lr=1e-3,
            lr_importance=1e-3,
            ramp_steps=0,
            final_lr=0.0,
            clip=None,
        )
        return replace(published, **changes)

    # --- Method -------------------------------------------------------------------------------------------------------
    def initialise(
        self, adapter: ModelAdapter, sites: Mapping[str, WeightSite], generator: torch.Generator, progress: Progress
    ) -> Decomposition:
        counts = self.counts(sites)
        factors = {
            name: initial_factors(site, adapter.weight(name), counts[name], self.start, generator)
            for name, site in sites.items()
        }
        made = describe(adapter, factors, self.importance, generator)
        warm_up(adapter, made, self.warm_up_steps, self.warm_up_lr, self.warm_up_weight_decay, progress)
        return made

    def counts(self, sites: Mapping[str, WeightSite]) -> dict[str, int]:
        """C of each site.

        Raises:
            NoMatchingSiteError: A glob of `n_components` matches no site, or a site matches none.
        """
        if not isinstance(self.n_components, Mapping):
            return {name: self.n_components or _default_count(site) for name, site in sites.items()}
        for glob in self.n_components:
            if not fnmatch.filter(sites, glob):
                raise NoMatchingSiteError(f"n_components names {glob!r}, which matches none of {', '.join(sites)}.")
        counts = {}
        for name in sites:
            glob = next((g for g in self.n_components if fnmatch.fnmatchcase(name, g)), None)
            if glob is None:
                raise NoMatchingSiteError(f"n_components says nothing of {name}; add a glob for it, or '*' last.")
            counts[name] = self.n_components[glob]
        return counts

    def parameter_groups(self, decomposition: Decomposition) -> list[ParameterGroup]:
        assert decomposition.importance is not None
        components = [p for c in decomposition.values() for p in (c.V, c.U)]
        return [
            ParameterGroup("components", components, self.lr, self.clip),
            ParameterGroup("importance", list(decomposition.importance.parameters()), self.lr_importance, self.clip),
        ]

    def learning_rate_factor(self, step: int, steps: int) -> float:
        ramp = min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps - 1)))
        return ramp * (self.final_lr + (1.0 - self.final_lr) * cosine)

    def losses_of(
        self,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        tokens: Tensor,
        attention_mask: Tensor | None,
        generator: torch.Generator,
        progress: float,
    ) -> LossReport:
        enabled = self.autocast is not None
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=enabled):
            step = LossStep.of(adapter, decomposition, tokens, attention_mask, generator, progress, self.measure)
            terms = {loss.name: loss(step) for loss in self.losses}
        total = torch.stack([loss.coefficient * terms[loss.name].float() for loss in self.losses]).sum()
        l0 = sum((g.lower.detach() > ALIVE).sum(-1).float() for g in step.importances.values())
        assert isinstance(l0, Tensor)
        l0 = l0.mean() if step.scored is None else l0[step.scored].mean()
        return LossReport(total, terms, {"l0": l0})


def _default_count(site: WeightSite) -> int:
    return min(max(site.d_in, site.d_out), 4 * min(site.d_in, site.d_out))
