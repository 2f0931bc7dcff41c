"""Exact bases as decompositions: what a learned method has to beat.

`SVD()` trains importances, and wants data and steps; `SVD(training=None)` is the plain basis, and wants neither.

1. Factors V, U with V U = W are worked out once: singular directions, singular directions of the data-whitened weight, neurons
   (directions within heads for attention), or random directions. They stay as they are.
2. The importance function is trained as `training` trains its own: the same losses, importance function, learning rate,
   steps and data, so that components are compared and nothing else. With `training=None` there is none, and nothing to
   train: importances then come from an attribution (`analysis.evaluation.oracle`).

As in "Interpreting Language Model Parameters" (VPD, 2026) and the singular-vector baselines of circuit work.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods import starts
from tl_paramdecomp.methods.from_factors import describe
from tl_paramdecomp.methods.method import LossReport, Method, ParameterGroup, Progress, TrainingStep
from tl_paramdecomp.methods.spd import SPD
from tl_paramdecomp.methods.starts import Factors
from tl_paramdecomp.methods.survey import note_zero_mask, second_moments
from tl_paramdecomp.settings import Count, Positive
from tl_paramdecomp.sites import WeightSite

Matrix: TypeAlias = Float[Tensor, "d_in d_out"]


@dataclass(frozen=True)
class ExactBasis(Method[Decomposition]):
    """Components that are worked out and stay; only their importance function is trained, on data, in steps. With
    `training=None` nothing is: `decompose(model, sites, SVD(training=None))` is all there is to it."""

    training: SPD | None = field(default_factory=SPD)
    """How the importance function is trained; what this says of components (their number, start, ties, learning rate) has
    no effect. None: no importance function."""

    @abstractmethod
    def factors(self, site: WeightSite, weight: Matrix, moments: Tensor | None, generator: torch.Generator) -> Factors:
        """V and U of one site, from its W, and from second moments of its inputs where `moment_batches` asks for them."""

    @property
    def moment_batches(self) -> int:
        """Batches whose inputs the factors depend on."""
        return 0

    @property
    def trains(self) -> bool:
        return self.training is not None

    def check(self, adapter: ModelAdapter) -> None:
        if self.training is not None:
            self.training.check(adapter)

    def initialise(
        self,
        adapter: ModelAdapter,
        sites: Mapping[str, WeightSite],
        generator: torch.Generator,
        progress: Progress,
        batches: Callable[[int], Batch] | None = None,
    ) -> Decomposition:
        moments: Mapping[str, Tensor] = {}
        if self.moment_batches:
            if batches is None:
                raise DataError(f"{type(self).__name__} looks at the inputs of its sites; give data.")
            moments = second_moments(adapter, sites, batches, self.moment_batches, progress)
        factors = {}
        for name, site in sites.items():
            weight = adapter.weight(name).detach()
            wide = torch.promote_types(weight.dtype, torch.float32)
            V, U = self.factors(site, weight.double(), moments.get(name), generator)
            factors[name] = V.to(wide), U.to(wide)
        made = describe(adapter, factors, None if self.training is None else self.training.importance, generator)
        if self.training is not None:
            note_zero_mask(made, adapter, batches, self.training.measure, self.training.losses)
        return made

    @property
    def start_needs_data(self) -> bool:
        return bool(self.moment_batches)

    @property
    def room_for_prefixes(self) -> int:
        return 0 if self.training is None else self.training.room_for_prefixes

    @property
    def sized_by_weights(self) -> bool:
        return True

    @property
    def without_steps(self) -> str:
        return f" It trains importances; {type(self).__name__}(training=None) is the plain basis, and takes no steps."

    def untrained(self) -> "ExactBasis":
        return replace(self, training=None)

    def pressed(self, coefficient: float) -> "ExactBasis":
        return replace(self, training=self._trainer().pressed(coefficient))

    def sparser(self, factor: float) -> "ExactBasis":
        return replace(self, training=self._trainer().sparser(factor))

    def parameter_groups(self, decomposition: Decomposition) -> list[ParameterGroup]:
        return [group for group in self._trainer().parameter_groups(decomposition) if group.name == "importance"]

    def learning_rate_factor(self, step: int, steps: int) -> float:
        return self._trainer().learning_rate_factor(step, steps)

    def gradients(self, step: TrainingStep) -> LossReport:
        return self._trainer().gradients(step)

    def goes_over_rows(self, key: str) -> bool:
        return self._trainer().goes_over_rows(key)

    def _trainer(self) -> SPD:
        if self.training is None:
            raise SettingError(f"{type(self).__name__}(training=None) has nothing to train.")
        return self.training


@dataclass(frozen=True)
class SVD(ExactBasis):
    """Singular directions of W. `SVD()` also trains an importance function for them; `SVD(training=None)` does not."""

    def factors(self, site: WeightSite, weight: Matrix, moments: Tensor | None, generator: torch.Generator) -> Factors:
        return starts.svd_factors(weight)


@dataclass(frozen=True)
class WhitenedSVD(ExactBasis):
    """Singular directions of W behind the data's own scale: those that matter most to the outputs x W come first. It looks at
    data with `training=None` too, and then takes no steps."""

    batches: Count = 16
    """Batches over which second moments of the inputs are taken."""
    ridge: Positive = 1e-6
    """Added to the moments, as a share of their mean."""

    @property
    def moment_batches(self) -> int:
        return self.batches

    def factors(self, site: WeightSite, weight: Matrix, moments: Tensor | None, generator: torch.Generator) -> Factors:
        assert moments is not None
        return starts.whitened_factors(weight, moments, self.ridge)


@dataclass(frozen=True)
class NeuronBasis(ExactBasis):
    """One component per neuron (per row or column of W, whichever are more); for attention singular directions of each head.
    `NeuronBasis(training=None)`: without importances, data and steps."""

    def factors(self, site: WeightSite, weight: Matrix, moments: Tensor | None, generator: torch.Generator) -> Factors:
        return starts.neuron_factors(weight) if site.n_heads is None else starts.head_factors(site, weight)


@dataclass(frozen=True)
class RandomBasis(ExactBasis):
    """Random orthogonal directions on the smaller side of W: the null. `RandomBasis(training=None)`: without importances, data
    and steps."""

    def factors(self, site: WeightSite, weight: Matrix, moments: Tensor | None, generator: torch.Generator) -> Factors:
        return starts.random_factors(weight, generator)
