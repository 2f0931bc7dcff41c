"""What a method is to the loop: how to start, what to minimise, and with which optimiser settings."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.prefixes import Prefixes
from tl_paramdecomp.methods.random_streams import RandomNumbers, RandomStreams, as_streams
from tl_paramdecomp.parallel import ALONE, WHOLE, Place, ProcessGroup, Window, windows
from tl_paramdecomp.settings import Kind
from tl_paramdecomp.sites import WeightSite

Progress: TypeAlias = Callable[[str, int], Iterable[int]]
"""Shows a phase: from its name and length to the numbers 0 to length - 1, shown as they pass."""


class LossReport(NamedTuple):
    """What one step's losses came to; the gradients are in the parameters."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """Each term before its coefficient."""
    figures: Callable[[], dict[str, Tensor]]
    """What else is worth watching, such as L0, worked out when asked for."""


class Microbatch(NamedTuple):
    """Some rows of a batch, where they stand in it, and the random numbers of each term of the objective."""

    batch: Batch
    place: Place
    random: Callable[[int], RandomStreams]


@dataclass
class TrainingStep:
    """What the loop hands a method at one step."""

    adapter: ModelAdapter
    decomposition: Any
    batch: Batch
    """All rows of the step, on whatever device."""
    generator: torch.Generator | RandomNumbers
    """Draws every mask of the run."""
    progress: float = 0.0
    """Share of the run that is over, in [0, 1]."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that outlive the step; saved with checkpoints."""
    background: Batch | None = None
    """Rows of a second stream, for methods that take one."""
    processes: ProcessGroup = ALONE
    """The processes among which the rows are divided."""
    accumulate: int = 1
    """Micro-batches into which each process divides its rows."""
    number: int = 0
    """Steps done before."""
    prefixes: Prefixes | None = None
    """Remembers what stands before the first decomposed block, where rows come again."""

    def microbatches(self, batch: Batch, together: int = 1) -> list[Microbatch]:
        """This process's microbatches, on the model's device; the batch itself where it is not divided.

        Raises:
            DataError: It cannot be divided evenly, or no position of it counts.
        """
        if batch.attention_mask is not None and not bool(batch.attention_mask.any()):
            raise DataError(
                "No position of this batch counts: its attention mask is 0 everywhere. Leave such rows out."
            )
        mine = windows(len(batch.tokens), self.processes, self.accumulate, together)
        if mine[0].rows == mine[0].of:
            return [Microbatch(batch.to(self.adapter.device), WHOLE, self._random(mine[0]))]
        counts = None if batch.attention_mask is None else batch.attention_mask.flatten(1).sum(1).double().cpu()
        found = []
        for window in mine:
            rows = slice(window.first, window.first + window.rows)
            weight = window.rows / window.of if counts is None else float(counts[rows].sum() / counts.sum())
            local = Window(window.first - mine[0].first, window.rows, window.rows * len(mine))
            place = Place(window, weight, self.processes.world, local)
            found.append(Microbatch(batch.rows(rows).to(self.adapter.device), place, self._random(window)))
        return found

    def _random(self, window: Window) -> Callable[[int], RandomStreams]:
        """Random numbers of a microbatch by term."""
        if isinstance(self.generator, RandomNumbers):
            return functools.cache(functools.partial(self.generator.of_microbatch, self.number, window))
        whole = as_streams(self.generator)
        return lambda term: whole


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share optimiser settings."""

    name: str
    parameters: Sequence[Tensor]
    lr: float
    clip: float | None
    """Largest gradient norm of the group."""


Made = TypeVar("Made", bound=Saved)
"""What a method makes."""


class Method(Kind, ABC, Generic[Made]):
    """How components are found.

    A method is a frozen dataclass of hyperparameters that keeps no state. What must outlive a step, such as an adversary's
    sources, is in `memory`, which the loop keeps and checkpoints.
    """

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; otherwise the start is the result."""
        return True

    @property
    def rows_together(self) -> int:
        """Rows of the data that must stay neighbours when it is shuffled."""
        return 1

    @property
    def start_needs_data(self) -> bool:
        """Whether what it starts from depends on the rows of the run."""
        return False

    @property
    def room_for_prefixes(self) -> int:
        """Bytes that may be taken to remember rows' streams before the first decomposed block; 0: it makes no use of them."""
        return 0

    @property
    def sized_by_weights(self) -> bool:
        """Whether the weights say how many components it has."""
        return False

    @property
    def without_steps(self) -> str:
        """A sentence on how to use it without training, for messages; empty where there is no way."""
        return ""

    def check(self, adapter: ModelAdapter) -> None:
        """See, before anything is written, that the method can be used on a model, or raise `UnsupportedModelError`."""

    @abstractmethod
    def initialise(
        self,
        adapter: ModelAdapter,
        sites: Mapping[str, WeightSite],
        generator: torch.Generator,
        progress: Progress,
        batches: Callable[[int], Batch] | None = None,
    ) -> Made:
        """A decomposition to start from, any warm-up included.

        Args:
            adapter: The target's.
            sites: What to decompose.
            generator: Draws what is random.
            progress: Shows long work.
            batches: Rows of the run's data by number, from 0 on, for methods whose start depends on data.
        """

    @abstractmethod
    def parameter_groups(self, decomposition: Made) -> list[ParameterGroup]:
        """What is trained; nothing else gets gradients."""

    @abstractmethod
    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Learning rate at a step, as a share of each group's."""

    @abstractmethod
    def gradients(self, step: TrainingStep) -> LossReport:
        """Work out all terms on one batch and add their gradients to the parameters'."""

    def after_step(self, step: TrainingStep) -> None:
        """What is to be done to the parameters after the optimiser has moved them."""

    def goes_over_rows(self, key: str) -> bool:
        """Whether what is remembered under a key has an entry for each row of the batch, so that each process has its own."""
        return False

    def untrained(self) -> "Method[Made]":
        """The same method without an importance function; a `SettingError` where it has one of its own."""
        raise SettingError(f"{type(self).__name__} has an importance function of its own, or needs none.")

    def with_components(self, n: int) -> "Method[Made]":
        """The same method with so many components at each site; a `SettingError` where weights say how many."""
        raise SettingError(f"the weight's shape says how many components {type(self).__name__} has.")

    def pressed(self, coefficient: float) -> "Method[Made]":
        """The same method with another coefficient of importance minimality; a `SettingError` where it has none."""
        raise SettingError(f"{type(self).__name__} has no importance minimality.")

    def sparser(self, factor: float) -> "Method[Made]":
        """The same method, pressed so many times as hard towards few important components; a `SettingError` where it cannot."""
        raise SettingError(f"{type(self).__name__} has no term that presses towards few components; given {factor}.")

    def wider(self, factor: float, sites: Mapping[str, WeightSite]) -> "Method[Made]":
        """The same method with so many times as many components at each site; a `SettingError` where weights say how many."""
        raise SettingError(
            f"{type(self).__name__} has as many components as the weights of {', '.join(sites)} say; given {factor}."
        )
