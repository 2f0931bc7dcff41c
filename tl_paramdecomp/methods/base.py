"""What a method is to the loop: how to start, what to minimise, and with which optimiser settings.

A method is a frozen dataclass of hyperparameters; it keeps no state. What one batch needs for its losses stands in a
`LossStep`, and a loss is a small frozen object with a coefficient that is called on it. What must outlive a step, such as an
adversary's sources, is in `memory`, which the loop keeps and checkpoints.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.importance import Importance
from tl_paramdecomp.components.masked_output import InterpolatedMask, masked_output
from tl_paramdecomp.components.saved import Saved
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.divergence import KL, ChunkedKL, Divergence, MeanSquare
from tl_paramdecomp.methods.pieces import Work, run_alone
from tl_paramdecomp.methods.random_streams import AnyGenerator, RandomNumbers, RandomStreams, as_streams
from tl_paramdecomp.parallel import ALONE, WHOLE, Place, ProcessGroup, Window, windows
from tl_paramdecomp.sites import SiteCall, WeightSite

Progress: TypeAlias = Callable[[str, int], Iterable[int]]
"""Shows a phase: from its name and length to the numbers 0 to length - 1, shown as they pass."""

Measure = Literal["kl", "mse"]
"""How outputs are compared: KL of next-token distributions, or mean square."""

KL_NEEDS, MSE_INSTEAD = (
    "KL compares distributions of next tokens and needs",
    "use measure='mse', of outputs as they are",
)
"""Why KL is refused where there are no logits, and what works."""


def measure_of(adapter: ModelAdapter) -> Measure:
    """What outputs are compared by where nobody says: KL of logits, else their mean square."""
    return "kl" if adapter.gives_logits else "mse"


SiteMasks: TypeAlias = Mapping[str, InterpolatedMask]
"""Masks by site; a site that is missing runs the target's own weight."""


class SiteValues(NamedTuple):
    """What passes one site in a forward pass."""

    x: Tensor
    """Input [..., d_in]."""
    y: Tensor
    """Output [..., d_out], after the mask."""


@dataclass
class LossStep:
    """One batch, or one piece of a batch, seen by every loss of a step."""

    adapter: ModelAdapter
    decomposition: Decomposition
    tokens: Shaped[Tensor, "batch ..."]
    attention_mask: Int[Tensor, "batch pos"] | None
    inputs: Mapping[str, Tensor]
    """x of each site in the clean forward pass: [batch, pos, d_in], or indices."""
    importances: Mapping[str, Importance]
    divergence: Divergence
    """Distance of an output from the target's."""
    random: RandomStreams
    """Draws every mask of the step."""
    progress: float = 1.0
    """Share of the run that is over, in [0, 1]."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that outlive the step."""
    blocks: Sequence[object] = ()
    """What each block of the target returned, where passes may begin at a later one."""
    place: Place = WHOLE
    """Where these rows stand, where they are not the whole batch."""
    before: Mapping[str, Tensor] | None = None
    """`memory` as it was when the step began; None: as it is now."""
    scale: float = 1.0
    """Factor on losses while gradients are taken, which are divided by it afterwards: float16 has no room for small ones."""
    gathered: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)
    """Gradients at importances that were let go of."""

    def __post_init__(self) -> None:
        self.before = dict(self.memory) if self.before is None else self.before

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        tokens: Tensor,
        attention_mask: Tensor | None,
        generator: AnyGenerator,
        progress: float = 1.0,
        measure: Measure = "kl",
        memory: dict[str, Tensor] | None = None,
        kl_chunk: int | None = None,
        keep_blocks: bool = False,
        importances: Mapping[str, Importance] | None = None,
        place: Place = WHOLE,
        before: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
    ) -> "LossStep":
        """A batch with the target's output and the importances of a clean forward pass.

        Args:
            adapter: The target's.
            decomposition: With an importance function.
            tokens: Rows.
            attention_mask: 1 where a position counts.
            generator: Draws masks.
            progress: Share of the run that is over.
            measure: How outputs are compared.
            memory: What outlives the step.
            kl_chunk: Positions whose logits may exist at once; None: all.
            keep_blocks: Let passes that mask later sites alone begin at their block.
            importances: Taken instead of what the decomposition's own function gives.
            place: Where these rows stand in their batch.
            before: `memory` as it was when the step began, where other pieces have run since.
            scale: Factor on losses while gradients are taken.

        Raises:
            UnsupportedModelError: KL is asked of a model that gives no logits.
        """
        if measure == "kl":
            need_logits(adapter, KL_NEEDS, MSE_INSTEAD)
        scored = None if attention_mask is None else attention_mask.bool()
        in_chunks = kl_chunk is not None and measure == "kl" and _can_chunk(adapter, decomposition)
        with torch.no_grad():
            clean = adapter.capture(tokens, list(decomposition), attention_mask, keep_blocks, to_hidden=in_chunks)
        divergence: Divergence
        if in_chunks and kl_chunk is not None:
            divergence = ChunkedKL(clean.output, scored, adapter.unembed, kl_chunk)
        else:
            divergence = (KL if measure == "kl" else MeanSquare)(clean.output, scored)
            if (
                divergence.by_row and place is not WHOLE
            ):  # a mean over rows, while microbatches weigh as their positions do
                divergence.share = place.window.rows / place.window.of / place.weight
        if importances is None:
            importances = decomposition.importances(clean.inputs, attention_mask)
        return cls(
            adapter, decomposition, tokens, attention_mask, clean.inputs, importances, divergence, as_streams(generator),
            progress, {} if memory is None else memory, clean.blocks, place, before, scale,
        )  # fmt: skip

    @property
    def known(self) -> Mapping[str, Tensor]:
        """What was remembered when the step began."""
        assert self.before is not None
        return self.before

    @property
    def scored(self) -> Bool[Tensor, "..."] | None:
        """Positions that count; None where all do."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def at_scored(self, values: Float[Tensor, "batch *pos width"]) -> Float[Tensor, "n width"]:
        """What stands at the positions that count, one after the other."""
        flat, scored = values.flatten(0, -2), self.scored
        return flat if scored is None else flat[scored.flatten().to(flat.device)]

    @property
    def device(self) -> torch.device:
        """Where the step is computed."""
        return self.tokens.device

    def rows_of(self, site: str) -> Sequence[int]:
        """Shape of a site's masks without components: [batch, pos], or [batch]."""
        return self.importances[site].lower.shape[:-1]

    def run_masked(self, masks: SiteMasks, kept: dict[str, SiteValues] | None = None) -> Float[Tensor, "batch ..."]:
        """What the model gives with these masks at its sites, in the form that `divergence` takes.

        Args:
            masks: By site.
            kept: Filled with what passes each site, where it is given.
        """
        fns = {
            name: functools.partial(_masked_call, self.decomposition[name], mask, name, kept)
            for name, mask in masks.items()
        }
        with self.adapter.intercept(fns), self._resumed(masks):
            if isinstance(self.divergence, ChunkedKL):
                return self.adapter.hidden(self.tokens, self.attention_mask)
            return self.adapter.forward(self.tokens, self.attention_mask)

    def _resumed(self, masks: SiteMasks) -> contextlib.AbstractContextManager[None]:
        """Nothing before the first masked site's block needs to be computed again."""
        blocks = [self.adapter.block_of(name) for name in masks] if self.blocks else []
        first = min((b for b in blocks if b is not None), default=0)
        return contextlib.nullcontext() if first == 0 or None in blocks else self.adapter.resumed(self.blocks, first)

    def forget(self) -> None:
        """Let go of what a clean forward pass gave, but for the gradients that gathered at importances."""
        self.gathered = {name: [None if t is None else t.grad for t in g] for name, g in self.importances.items()}
        self.inputs, self.importances, self.blocks = {}, {}, ()
        del self.divergence

    def recall(self, step: "LossStep") -> None:
        """Take what another clean forward pass over the same rows gave, and go on gathering gradients there."""
        self.inputs, self.importances, self.blocks = step.inputs, step.importances, step.blocks
        self.divergence = step.divergence
        for name, g in self.importances.items():
            for leaf, grad in zip(g, self.gathered[name], strict=True):
                if leaf is not None:
                    leaf.grad = grad

    def cut(self) -> "LossStep":
        """The same step with importances as leaves, so that each loss's gradient can be taken by itself."""
        return replace(self, importances={name: _leaves(g) for name, g in self.importances.items()})

    def join(self, cut: "LossStep") -> None:
        """Pass the gradients that gathered at a cut step's importances on to the importance function."""
        pairs = [
            (whole, leaf.grad)
            for name, g in self.importances.items()
            for whole, leaf in zip(g, cut.importances[name], strict=True)
            if whole is not None and leaf is not None and leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([whole for whole, _ in pairs], [grad for _, grad in pairs])


def _leaves(importance: Importance) -> Importance:
    lower, upper = (t.detach().requires_grad_(t.requires_grad) for t in (importance.lower, importance.upper))
    raw = importance.raw
    return Importance(lower, upper, None if raw is None else raw.detach().requires_grad_(raw.requires_grad))


def _masked_call(
    components: Components, mask: InterpolatedMask, name: str, kept: dict[str, SiteValues] | None, call: SiteCall
) -> Tensor:
    y = components(masked_output, mask, call.x, call.y, call.bias)
    if kept is not None:
        kept[name] = SiteValues(call.x, y)
    return y


def _can_chunk(adapter: ModelAdapter, decomposition: Decomposition) -> bool:
    """Whether forward passes may end before the unembedding: it is none of the sites, and its host adds nothing after."""
    untouched = not any(name.startswith("unembed.W_U") for name in decomposition)
    return untouched and adapter.splits_at_unembedding


class Loss(ABC):
    """One term of a training objective, or the same quantity as a metric: a frozen dataclass with a `coefficient`."""

    coefficient: float
    """Weight of the term in the objective."""
    name: str
    """Name in logs."""
    of_rows: ClassVar[bool] = True
    """Whether it is a mean over rows; otherwise it is of the weights, whatever the rows."""

    def goes_over_rows(self, key: str) -> bool:
        """Whether what it remembers under a key has an entry for each row of the batch."""
        return False

    @abstractmethod
    def parts(self, step: LossStep) -> Work:
        """Terms whose sum is the value.

        Who trains takes each part's gradient before asking for the next, so that one part's activations are gone when
        the next is made. A part may read such a gradient after its `yield`. What must be known of the whole batch is asked
        for by a request (`pieces`).
        """

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value of the term, before its coefficient."""
        values = [torch.zeros((), device=step.device)]
        run_alone(self.parts(step), lambda part: values.append(part.to(step.device)))
        return sum(values[1:], values[0])


class LossReport(NamedTuple):
    """What one step's losses came to; the gradients are in the parameters."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """Each term before its coefficient."""
    figures: Callable[[], dict[str, Tensor]]
    """What else is worth watching, such as L0, worked out when asked for."""


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

    def microbatches(self, batch: Batch, together: int = 1) -> list["Microbatch"]:
        """This process's micro-batches, on the model's device; the batch itself where it is not divided.

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
            part = batch.rows(rows).to(self.adapter.device)
            found.append(Microbatch(part, Place(window, weight, self.processes.world, local), self._random(window)))
        return found

    def _random(self, window: Window) -> RandomStreams:
        if isinstance(self.generator, RandomNumbers):
            return self.generator.of_microbatch(self.number, window)
        return as_streams(self.generator)


class Microbatch(NamedTuple):
    """Some rows of a batch, where they stand in it, and their random numbers."""

    batch: Batch
    place: Place
    random: RandomStreams


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


class Method(ABC, Generic[Made]):
    """How components are found."""

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; otherwise the start is the result."""
        return True

    @property
    def rows_together(self) -> int:
        """Rows of the data that must stay neighbours when it is shuffled."""
        return 1

    def check(self, adapter: ModelAdapter) -> None:
        """See that the method can be used on a model, before anything is written.

        Raises:
            UnsupportedModelError: It cannot.
        """

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

    def sparser(self, factor: float) -> "Method[Made]":
        """The same method, pressed so many times as hard towards few important components.

        Raises:
            SettingError: Nothing in it presses.
        """
        raise SettingError(f"{type(self).__name__} has no term that presses towards few components; given {factor}.")

    def wider(self, factor: float, sites: Mapping[str, WeightSite]) -> "Method[Made]":
        """The same method with so many times as many components at each site.

        Raises:
            SettingError: The weights say how many it has.
        """
        raise SettingError(
            f"{type(self).__name__} has as many components as the weights of {', '.join(sites)} say; given {factor}."
        )
