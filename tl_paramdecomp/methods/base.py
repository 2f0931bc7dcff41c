"""What a method is to the loop: how to start, what to minimise, and with which optimiser settings.

A method is a frozen dataclass of hyperparameters; it keeps no state. Everything one training step needs stands in a
`LossStep`, and a loss is a small frozen object with a coefficient that is called on it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import Importance
from tl_paramdecomp.components.masked_output import site_fn
from tl_paramdecomp.components.masks import SiteMask
from tl_paramdecomp.sites import WeightSite

Progress: TypeAlias = Callable[[str, int], Iterable[int]]
"""Shows a phase: from its name and length to the numbers 0 to length - 1, shown as they pass."""

SiteValues: TypeAlias = Mapping[str, tuple[Tensor, "Tensor | float"]]
"""(m, d) by site; a site that is missing runs the target's own weight."""


@dataclass
class LossStep:
    """One batch, seen by every loss of a step."""

    adapter: ModelAdapter
    decomposition: Decomposition
    tokens: Shaped[Tensor, "batch ..."]
    attention_mask: Int[Tensor, "batch pos"] | None
    target: Float[Tensor, "batch ..."]
    """Output of the target model: logits [batch, pos, vocab], detached."""
    importances: Mapping[str, Importance]
    generator: torch.Generator
    """Draws every mask of the step."""
    progress: float
    """Share of the run that is over, in [0, 1]."""
    measure: Literal["kl", "mse"]

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        tokens: Tensor,
        attention_mask: Tensor | None,
        generator: torch.Generator,
        progress: float = 1.0,
        measure: Literal["kl", "mse"] = "kl",
    ) -> "LossStep":
        """A batch with the target's output and the importances of a clean forward pass."""
        with torch.no_grad():
            clean = adapter.capture(tokens, list(decomposition), attention_mask)
        importances = decomposition.importances(clean.inputs)
        return cls(
            adapter, decomposition, tokens, attention_mask, clean.logits, importances, generator, progress, measure
        )

    @functools.cached_property
    def scored(self) -> Bool[Tensor, "..."] | None:
        """Positions that count; None where all do."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    @functools.cached_property
    def target_log_probs(self) -> Float[Tensor, "n vocab"]:
        """Log probabilities of the target at the scored positions."""
        return torch.log_softmax(self._rows(self.target).float(), -1)

    def run_masked(self, values: SiteValues) -> Float[Tensor, "batch ..."]:
        """Output of the model with these masks at its sites."""
        fns = {}
        for name, (m, d) in values.items():
            components = self.decomposition[name]
            fns[name] = site_fn(components, SiteMask(components.site, components.n_components, m, d))
        with self.adapter.intercept(fns):
            return self.adapter.forward(self.tokens, self.attention_mask)

    def divergence(self, output: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """How far an output is from the target's.

        `kl`: KL(target || output) in nats, summed over the vocabulary, mean over scored positions.
        `mse`: mean over all elements.
        """
        if self.measure == "mse":
            return nn.functional.mse_loss(self._rows(output).float(), self._rows(self.target).float())
        log_q = torch.log_softmax(self._rows(output).float(), -1)
        return nn.functional.kl_div(log_q, self.target_log_probs, reduction="sum", log_target=True) / len(log_q)

    def _rows(self, output: Tensor) -> Tensor:
        flat = output.flatten(0, -2)
        return flat if self.scored is None else flat[self.scored.flatten()]


@runtime_checkable
class Loss(Protocol):
    """One term of a training objective, or the same quantity as a metric."""

    @property
    def coefficient(self) -> float:
        """Weight of the term in the objective."""
        ...

    @property
    def name(self) -> str:
        """Name in logs."""
        ...

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value of the term, before its coefficient."""
        ...


class LossReport(NamedTuple):
    """What one step's losses came to."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """Each term before its coefficient."""
    figures: dict[str, Tensor]
    """What else is worth watching, such as L0."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share optimiser settings."""

    name: str
    parameters: Sequence[Tensor]
    lr: float
    clip: float | None
    """Largest gradient norm of the group."""


class Method(ABC):
    """How components are found."""

    @abstractmethod
    def initialise(
        self, adapter: ModelAdapter, sites: Mapping[str, WeightSite], generator: torch.Generator, progress: Progress
    ) -> Decomposition:
        """A decomposition to start from, any warm-up included."""

    @abstractmethod
    def parameter_groups(self, decomposition: Decomposition) -> list[ParameterGroup]:
        """What is trained."""

    @abstractmethod
    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Learning rate at a step, as a share of each group's."""

    @abstractmethod
    def losses_of(
        self,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        tokens: Tensor,
        attention_mask: Tensor | None,
        generator: torch.Generator,
        progress: float,
    ) -> LossReport:
        """All terms on one batch."""
