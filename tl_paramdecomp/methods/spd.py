"""Stochastic Parameter Decomposition (Bushnaq, Braun, Sharkey 2025, arXiv 2506.20790), and its authors' later forms.

1. Every site gets rank-one components V, U that should sum to W, and a causal-importance function g in [0, 1].
2. A clean forward pass gives each site's input x, the target's output, and g(x).
3. Masks m = g + (1 - g) r with r uniform keep what is important whole and everything else in any amount; the model run with
   them must still give the target's output (stochastic reconstruction). The delta component W - V U is masked likewise.
4. An adversary picks the r that hurts most; the model must withstand that too.
5. Importances are pressed towards 0 (importance minimality), V U towards W (faithfulness).

`SPD()` is the modern form for language models, `SPD.paper()` the published one; `VPD()` ("Interpreting Language Model
Parameters", 2026) has a persistent adversary and one importance function, a transformer, for all sites.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.from_factors import describe, resolved_ties
from tl_paramdecomp.methods.loss import Loss, Objective, unscale
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.method import LossReport, Method, ParameterGroup, Progress, TrainingStep
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.methods.starts import Start, by_site, initial_factors, warm_up
from tl_paramdecomp.methods.step import KL_NEEDS, MSE_INSTEAD, Measure
from tl_paramdecomp.methods.survey import note_zero_mask, second_moments
from tl_paramdecomp.settings import Count, NotNegative, Positive, Whole, fit
from tl_paramdecomp.sites import WeightSite


@dataclass(frozen=True)
class SPD(Method[Decomposition]):
    """Hyperparameters of Stochastic Parameter Decomposition; the object is the method."""

    n_components: Count | Mapping[str, Count] | None = None
    """C for every site; or by glob, the first match counting; None: the larger side of W, at most 4 times the smaller."""
    losses: tuple[Loss, ...] = (
        Faithfulness(1000.0),
        StochasticReconstruction(0.5, sites="subset"),
        AdversarialReconstruction(0.5, steps=2, step_size=0.5),
        ImportanceMinimality(1e-3),
    )
    """Terms of the objective."""
    background_losses: tuple[Loss, ...] = ()
    """Terms on a second stream of rows, of everything that is not the behaviour in question; see `SPD.targeted`."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """The causal-importance function."""
    start: Start = "auto"
    """Where components start; see `starts.initial_factors`."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Sites whose factors are another's, transposed: {"linear2.weight": "linear1.weight"}."""
    warm_up_steps: Whole = 200
    """Faithfulness warm-up, for sites whose start is not already exact."""
    warm_up_lr: Positive = 1e-2
    """Learning rate of the warm-up."""
    warm_up_weight_decay: NotNegative = 0.0
    """Weight decay of the warm-up."""
    lr: Positive = 2e-3
    """Learning rate of V and U."""
    lr_importance: Positive = 6e-3
    """Learning rate of the importance function: the strongest lever on small language models."""
    ramp_steps: Whole = 20
    """Steps over which the learning rate rises at the start."""
    final_lr: NotNegative = 0.1
    """Share of the learning rate left at the end of the cosine; 1 keeps it constant."""
    clip: Positive | None = 1.0
    """Largest gradient norm of the components."""
    clip_importance: Positive | None = 1.0
    """Largest gradient norm of the importance function."""
    measure: Measure = "kl"
    """How outputs are compared: KL of next-token distributions, or mean square."""
    kl_chunk: Count | None = None
    """Positions whose logits may exist at once, where memory is short; None: all of a batch."""
    autocast: Literal["bfloat16"] | None = None
    """Number type of the forward passes; the components stay as they are."""
    prefix_memory: NotNegative = 1.0
    """GB that may be taken to remember, row by row, what the target gives before the first decomposed block, where the rows of
    a run come again; 0: it is computed anew each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.losses:
            raise SettingError("SPD needs at least one loss.")
        for losses in (self.losses, self.background_losses):
            for loss in losses:
                if loss.coefficient is not None:
                    fit(loss.coefficient, NotNegative, f"The coefficient of {loss.name}")
            names = [loss.name for loss in losses]
            if len(set(names)) < len(names):
                raise SettingError(
                    f"Each loss may stand once; given {', '.join(names)}. Raise its coefficient or samples instead."
                )

    @classmethod
    def paper(cls, **changes: Any) -> "SPD":
        """The published form (section 2, appendix): layerwise and joint stochastic reconstruction without delta component,
        an importance network per component, leaky sigmoids, no warm-up, AdamW at 1e-3 with a cosine to 0."""
        published = SPD(
            n_components=100,
            losses=(
                Faithfulness(1.0, relative=False),
                StochasticReconstruction(1.0, sites="all", delta="absent"),
                StochasticReconstruction(1.0, sites="layerwise", delta="absent"),
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
            clip_importance=None,
        )
        return replace(published, **changes)

    @classmethod
    def targeted(cls, **changes: Any) -> "SPD":
        """Decomposition of one narrow behaviour ("Targeted Recovery of Weight-Space Mechanisms"): two streams of rows.

        The rows of the behaviour (`data`) get all terms; on the others (`decompose(..., background=rows)`) the delta
        component stays whole and carries what is left, while the components must matter little there. Nothing presses
        V U towards W.
        """
        two = SPD(
            losses=(
                StochasticReconstruction(0.5, sites="subset"),
                AdversarialReconstruction(0.5, steps=2, step_size=0.5),
                ImportanceMinimality(1e-3),
            ),
            background_losses=(
                StochasticReconstruction(0.5, sites="subset", delta="kept"),
                AdversarialReconstruction(0.5, steps=2, step_size=0.5, delta="kept"),
                ImportanceMinimality(1e-3),
            ),
            start="random",
            warm_up_steps=0,
        )
        return replace(two, **changes)

    def with_components(self, n: int) -> "SPD":
        """The same method with so many components at each site."""
        return replace(self, n_components=n)

    def pressed(self, coefficient: float) -> "SPD":
        """The same method with another coefficient of importance minimality."""
        return self._with_minimality(lambda loss: replace(loss, coefficient=coefficient, keep=None))

    def sparser(self, factor: float) -> "SPD":
        """The same method, pressed so many times as hard by importance minimality."""
        return self._with_minimality(lambda loss: loss.sparser(factor))

    def _with_minimality(self, change: Callable[[ImportanceMinimality], Loss]) -> "SPD":
        def changed(losses: tuple[Loss, ...]) -> tuple[Loss, ...]:
            return tuple(change(loss) if isinstance(loss, ImportanceMinimality) else loss for loss in losses)

        if not any(isinstance(loss, ImportanceMinimality) for loss in self.losses):
            raise SettingError("None of the losses is ImportanceMinimality, so nothing presses towards few components.")
        return replace(self, losses=changed(self.losses), background_losses=changed(self.background_losses))

    def wider(self, factor: float, sites: Mapping[str, WeightSite]) -> "SPD":
        """The same method with so many times as many components at each site."""
        counts = {name: max(1, round(factor * count)) for name, count in self.counts(sites).items()}
        return replace(self, n_components=counts)

    # --- Method -------------------------------------------------------------------------------------------------------
    def check(self, adapter: ModelAdapter) -> None:
        if self.measure == "kl":
            need_logits(adapter, KL_NEEDS, MSE_INSTEAD)

    def initialise(
        self,
        adapter: ModelAdapter,
        sites: Mapping[str, WeightSite],
        generator: torch.Generator,
        progress: Progress,
        batches: Callable[[int], Batch] | None = None,
    ) -> Decomposition:
        counts = self.counts(sites)
        ties = resolved_ties(adapter, sites, self.tied, counts=counts)
        moments: Mapping[str, Tensor] = {}
        if self.start_needs_data:
            if batches is None:
                raise DataError("start='whitened' looks at the inputs of the sites; give data, or use start='svd'.")
            moments = second_moments(adapter, sites, batches, None, progress)
        factors = {
            name: initial_factors(site, adapter.weight(name), counts[name], self.start, generator, moments.get(name))
            for name, site in sites.items()
            if name not in ties
        }
        made = describe(adapter, factors, self.importance, generator, ties)
        note_zero_mask(made, adapter, batches, self.measure, (*self.losses, *self.background_losses))
        warm_up(adapter, made, self.warm_up_steps, self.warm_up_lr, self.warm_up_weight_decay, progress)
        return made

    @property
    def start_needs_data(self) -> bool:
        return self.start == "whitened"

    @property
    def room_for_prefixes(self) -> int:
        return int(self.prefix_memory * 1e9)

    def counts(self, sites: Mapping[str, WeightSite]) -> dict[str, int]:
        """C of each site; errors as `by_site`."""
        if not isinstance(self.n_components, Mapping):
            count = _rank if self.start == "whitened" else _default_count
            return {name: self.n_components or count(site) for name, site in sites.items()}
        return by_site(self.n_components, sites, "n_components")

    def parameter_groups(self, decomposition: Decomposition) -> list[ParameterGroup]:
        assert decomposition.importance is not None
        networks = list(decomposition.importance.parameters())
        of_networks = {id(p) for p in networks}
        components = [p for p in decomposition.parameters() if id(p) not in of_networks]
        return [
            ParameterGroup("components", components, self.lr, self.clip),
            ParameterGroup("importance", networks, self.lr_importance, self.clip_importance),
        ]

    def learning_rate_factor(self, step: int, steps: int) -> float:
        ramp = min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / max(1, steps - 1)))
        return ramp * (self.final_lr + (1.0 - self.final_lr) * cosine)

    def gradients(self, step: TrainingStep) -> LossReport:
        if (step.background is not None) != bool(self.background_losses):
            raise SettingError(
                "A second stream of rows (decompose(..., background=rows)) and background_losses belong together; give both, "
                "as SPD.targeted() has them, or neither."
            )
        objective = Objective(self.measure, self.kl_chunk, self.autocast is not None)
        terms, weights, l0 = objective.take(step, step.batch, self.losses)
        if step.background is not None:
            # a persistent adversary has sources of its own on each stream
            own = {
                key.removeprefix("background/"): t for key, t in step.memory.items() if key.startswith("background/")
            }
            others, own_weights, _ = objective.take(replace(step, memory=own), step.background, self.background_losses)
            step.memory |= {f"background/{key}": t for key, t in own.items()}
            terms |= {f"background_{name}": value for name, value in others.items()}
            weights |= {f"background_{name}": weight for name, weight in own_weights.items()}
        unscale(step)
        total = torch.stack([weights[name] * value.float() for name, value in terms.items()]).sum()
        worked_out = {
            f"{loss.name}_coefficient": torch.tensor(weights[loss.name])
            for loss in self.losses
            if loss.coefficient is None
        }
        return LossReport(total, terms, lambda: {"l0": l0(), **worked_out})

    def goes_over_rows(self, key: str) -> bool:
        losses = self.background_losses if key.startswith("background/") else self.losses
        return any(loss.goes_over_rows(key.removeprefix("background/")) for loss in losses)


@dataclass(frozen=True)
class VPD(SPD):
    """SPD with a persistent adversary, a frequency term, and one transformer as importance function for all sites.

    The published run's sizes (67 M parameters, 400,000 steps) are 1e-3 to 1e-4 of these learning rates and
    `ImportanceConfig("global_transformer", hidden=2048, layers=8, heads=16)`; the defaults here are for small models.
    """

    losses: tuple[Loss, ...] = (
        Faithfulness(1000.0),
        StochasticReconstruction(0.5, sites="subset"),
        PersistentAdversarialReconstruction(0.5, ascents=1, lr=0.1),
        ImportanceMinimality(1.5e-3, frequency=0.1),
    )
    importance: ImportanceConfig = field(default_factory=lambda: ImportanceConfig("global_transformer"))


def _rank(site: WeightSite) -> int:
    return min(site.d_in, site.d_out)


def _default_count(site: WeightSite) -> int:
    return min(max(site.d_in, site.d_out), 4 * min(site.d_in, site.d_out))
