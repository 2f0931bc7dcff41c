"""One term of a training objective, what it may know of the whole batch, and how the terms of a step are taken.

1. A clean forward pass over a microbatch gives the target's output and the importances (`LossStep`), which losses see as
   leaves; what gathers there is passed on to the importance function once, at the end.
2. A loss works out what it must know of the whole batch in `prepare` (an adversary's sources, how often a component fired): it
   goes over the microbatches itself, as often as it needs, and adds over processes.
3. It yields its `parts` on each microbatch; each part's gradient is taken before the next is made. Then it may `finish`.

Of several microbatches only one at a time holds its clean pass.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.method import Microbatch, TrainingStep
from tl_paramdecomp.methods.step import LossStep, Measure
from tl_paramdecomp.parallel import ALONE, ProcessGroup
from tl_paramdecomp.settings import Kind, NotNegative

ZERO_MASK = "zero_mask"
"""Under which a decomposition's `info` holds Z, the measure it is of, and the positions it was taken over; see `survey`."""
ACTIVE = 0.1
"""Importance above which a component counts as active in L0."""
FLOAT16_SCALE = 256.0
"""Factor on losses of a target in float16, whose smallest number is 6e-8: gradients of means over positions are small. A power
of two, so that it changes no digit of others."""


@dataclass
class LossBatch:
    """All rows of a step that this process has; iterating gives its microbatches, of which one at a time has its clean pass."""

    make: Sequence[Callable[[int], LossStep]]
    """Makes each microbatch, with the random numbers of a term."""
    sites: Sequence[str]
    memory: dict[str, Tensor]
    """Tensors that outlive the step."""
    progress: float
    """Share of the run that is over, in [0, 1]."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Of the decomposition."""
    processes: ProcessGroup = ALONE
    """Among which the rows of the batch are divided."""
    term: int = 0
    """Which of the objective's terms draws random numbers."""

    @classmethod
    def of(cls, step: LossStep) -> "LossBatch":
        """Rows that are a whole batch, or share nothing with the others."""
        return cls([lambda term: step], tuple(step.importances), step.memory, step.progress, step.decomposition.info)

    @property
    def divided(self) -> bool:
        """Whether no microbatch is the whole batch."""
        return len(self.make) > 1 or self.processes.world > 1

    def __iter__(self) -> Iterator[LossStep]:
        for make in self.make:
            step = make(self.term)
            yield step
            if len(self.make) > 1:
                step.forget()

    def total(self, values: Callable[[LossStep], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sums over all microbatches of all processes."""
        sums: dict[str, Tensor] = {}
        for step in self:
            sums = {name: sums[name] + t if name in sums else t for name, t in values(step).items()}
        return self.processes.total(sums)


class Loss(Kind, ABC):
    """One term of a training objective, or the same quantity as a metric: a frozen dataclass with a `coefficient`."""

    coefficient: NotNegative
    """Weight of the term in the objective; one that works it out may have None."""
    name: str
    """Name in logs."""
    of_rows: ClassVar[bool] = True
    """Whether it is a mean over rows; otherwise it is of the weights, whatever the rows."""

    def weight(self, batch: "LossBatch") -> float:
        """Weight of the term in the objective at this step, after `prepare`."""
        return self.coefficient

    def goes_over_rows(self, key: str) -> bool:
        """Whether what it remembers under a key has an entry for each row of the batch."""
        return False

    def prepare(self, batch: LossBatch) -> Any:
        """What `parts` must know of the whole batch; worked out without gradients, and a constant to them."""
        return None

    @abstractmethod
    def parts(self, step: LossStep, shared: Any) -> Iterator[Tensor]:
        """Terms whose sum is the value, a mean over the microbatch's positions.

        One part's activations are gone when the next is made. A part may read its gradients after its `yield`.

        Args:
            step: A microbatch, or a whole batch.
            shared: From `prepare`.
        """

    def finish(self, batch: LossBatch, shared: Any) -> None:
        """What is to be done when all gradients are taken, such as moving what is remembered; `batch` is not iterated."""
        return None

    def alone(self, step: LossStep) -> Iterator[Tensor]:
        """All of it on a batch that is whole."""
        batch = LossBatch.of(step)
        with torch.no_grad():
            shared = self.prepare(batch)
        yield from self.parts(step, shared)
        self.finish(batch, shared)

    def __call__(self, step: LossStep) -> Float[Tensor, ""]:
        """Value of the term, before its coefficient."""
        parts = [part.to(step.device) for part in self.alone(step)]
        return sum(parts[1:], parts[0]) if parts else torch.zeros((), device=step.device)


@dataclass(frozen=True)
class Objective:
    """How the losses of a step are taken; see `SPD` for the settings."""

    measure: Measure
    kl_chunk: int | None
    autocast: bool

    def take(
        self, run: TrainingStep, batch: Batch, losses: tuple[Loss, ...]
    ) -> tuple[dict[str, Tensor], dict[str, float], Callable[[], Tensor]]:
        """All terms on one batch, their weights, and L0 when asked; gradients are added to the parameters'.

        The loss functions run under autocast where it is asked for, gradients are taken outside it, as torch wants.
        """
        microbatches = run.microbatches(batch)
        several = len(microbatches) > 1
        makers = [self._maker(run, microbatch, losses, several) for microbatch in microbatches]
        made = run.decomposition
        rows = LossBatch(makers, tuple(made), run.memory, run.progress, made.info, run.processes)
        values = {loss.name: torch.zeros((), device=run.adapter.device) for loss in losses}
        weights: dict[str, float] = {}
        shared: dict[int, Any] = {}

        def prepare(term: int) -> None:
            rows.term = term
            with torch.no_grad(), self._autocast(run):
                shared[term] = losses[term].prepare(rows)
            weights[losses[term].name] = losses[term].weight(rows)

        for term in range(len(losses)) if several else ():
            prepare(term)
        active = []
        for microbatch, step in zip(microbatches, rows, strict=True):
            for term, loss in enumerate(losses):
                if not several:  # the terms of a whole batch draw their numbers one after the other
                    prepare(term)
                if loss.of_rows or step.place.leads:
                    step.random = microbatch.random(term)
                    value = self._value(run, loss, step, shared[term], weights[loss.name])
                    values[loss.name] = values[loss.name] + value
            step.join()
            count = functools.cache(functools.partial(_l0, step))
            if several:
                count()  # while the clean pass is here
            active.append((step.place.weight, count))
        for term, loss in enumerate(losses):
            loss.finish(rows, shared[term])

        def l0() -> Tensor:
            own = torch.stack([weight * count() for weight, count in active]).sum()
            return run.processes.total({"": own})[""]

        return run.processes.total(values), weights, l0

    def _value(self, run: TrainingStep, loss: Loss, step: LossStep, shared: Any, coefficient: float) -> Tensor:
        """What a microbatch adds to a loss of the batch, part by part; gradients are added to the parameters'."""
        place, value = step.place, torch.zeros((), device=run.adapter.device)
        share, weight = (place.share, place.weight) if loss.of_rows else (1.0, 1.0 / place.n_processes)
        parts = iter(loss.parts(step, shared))
        while True:
            with self._autocast(run):
                part = next(parts, None)
            if part is None:
                return value
            if part.requires_grad:
                (coefficient * share * step.scale * part).backward()
            value = value + weight * part.detach().to(value.device)
            del part

    def _autocast(self, run: TrainingStep) -> torch.autocast:
        return torch.autocast(run.adapter.device.type, torch.bfloat16, enabled=self.autocast)

    def _maker(
        self, run: TrainingStep, microbatch: Microbatch, losses: tuple[Loss, ...], several: bool
    ) -> Callable[[int], LossStep]:
        """Makes the clean forward pass over a microbatch, of several anew each time."""

        def clean() -> LossStep:
            with self._autocast(run):
                return LossStep.of(
                    run.adapter, run.decomposition, *microbatch.batch, microbatch.random(0), run.progress, self.measure,
                    run.memory, self.kl_chunk,
                    keep_blocks=any(getattr(loss, "sites", None) == "layerwise" for loss in losses),
                    place=microbatch.place, scale=scale_of(run), prefixes=run.prefixes,
                ).cut()  # fmt: skip

        make = clean if several else functools.cache(clean)

        def of_term(term: int) -> LossStep:
            step = make()
            step.random = microbatch.random(term)
            return step

        return of_term


def scale_of(run: TrainingStep) -> float:
    """Factor on losses while gradients are taken."""
    weight = run.adapter.weight(next(iter(run.decomposition)))
    return FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0


def unscale(run: TrainingStep) -> None:
    """Divide gradients by the factor that their losses had."""
    scale = scale_of(run)
    for parameter in run.decomposition.parameters() if scale != 1.0 else ():
        if parameter.grad is not None:
            parameter.grad /= scale


def _l0(step: LossStep) -> Tensor:
    """Active components over all sites, each site's a mean over its scored positions."""
    means = []
    for importance in step.importances.values():
        counts = (importance.lower.detach() > ACTIVE).sum(-1).float()
        if step.scored is not None and step.scored.shape == counts.shape:
            counts = counts[step.scored.to(counts.device)]
        means.append((counts.sum() / max(1, counts.numel())).to(step.device))
    return torch.stack(means).sum()
