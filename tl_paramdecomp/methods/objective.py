"""Several losses on one batch: each part's gradient is taken before the next is made, and micro-batches take turns.

1. A clean forward pass over a microbatch of the batch gives the target's output and the importances (`LossStep`).
2. Losses see importances as leaves; what gathers there is passed on to the importance function once, at the end.
3. Of several micro-batches only the one whose turn it is holds what its clean pass gave: when losses ask for something of the
   whole batch it lets go, and makes it anew when its turn comes again.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.base import Loss, LossStep, Measure, Microbatch, TrainingStep
from tl_paramdecomp.methods.pieces import Work, run_together

ACTIVE = 0.1
"""Importance above which a component counts as active in L0."""
FLOAT16_SCALE = 256.0
"""Factor on losses of a target in float16, whose smallest number is 6e-8: gradients of means over positions are small. A power
of two, so that it changes no digit of others."""


@dataclass(frozen=True)
class Objective:
    """How the losses of a step are taken; see `SPD` for the settings."""

    measure: Measure
    kl_chunk: int | None
    autocast: bool

    def take(
        self, run: TrainingStep, batch: Batch, losses: tuple[Loss, ...]
    ) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        """All terms on one batch, and L0 when asked; gradients are added to the parameters'.

        The loss functions run under autocast where it is asked for, gradients are taken outside it, as torch wants.
        """
        microbatches, before, device = run.microbatches(batch), dict(run.memory), run.adapter.device
        clean = [functools.partial(self._clean, run, microbatch, before, losses) for microbatch in microbatches]
        seats = [_Seat(make, several=len(microbatches) > 1) for make in clean]
        values = {loss.name: torch.zeros((), device=device) for loss in losses}

        def add(number: int, part: Tensor) -> None:
            seat, place = seats[number], microbatches[number].place
            share, weight = (place.share, place.weight) if seat.loss.of_rows else (1.0, 1.0 / place.n_processes)
            if part.requires_grad:
                (seat.loss.coefficient * share * scale_of(run) * part).backward()
            values[seat.loss.name] = values[seat.loss.name] + weight * part.detach().to(device)

        work = [seat.work(losses, microbatch.place.leads) for seat, microbatch in zip(seats, microbatches, strict=True)]
        run_together(work, run.processes, add, lambda i: seats[i].taken(), lambda: self._autocast(run))
        for seat in seats:
            seat.leave()

        def l0() -> Tensor:
            own = [microbatch.place.weight * seat.l0() for microbatch, seat in zip(microbatches, seats, strict=True)]
            return run.processes.total({"": torch.stack(own).sum()})[""]

        return run.processes.total(values), l0

    def _autocast(self, run: TrainingStep) -> torch.autocast:
        return torch.autocast(run.adapter.device.type, torch.bfloat16, enabled=self.autocast)

    def _clean(
        self, run: TrainingStep, microbatch: Microbatch, before: Mapping[str, Tensor], losses: tuple[Loss, ...]
    ) -> LossStep:
        """The clean forward pass over a microbatch."""
        with self._autocast(run):
            return LossStep.of(
                run.adapter, run.decomposition, *microbatch.batch, microbatch.random, run.progress, self.measure, run.memory,
                self.kl_chunk, keep_blocks=any(getattr(loss, "sites", None) == "layerwise" for loss in losses),
                place=microbatch.place, before=before, scale=scale_of(run),
            )  # fmt: skip


class _Seat:
    """One micro-batch of a step."""

    loss: Loss
    """Whose parts are being taken."""
    step: LossStep
    """What losses see, throughout; made when it is first this microbatch's turn."""

    def __init__(self, make: Callable[[], LossStep], several: bool) -> None:
        self.make, self.several = make, several
        self.whole: LossStep | None = None
        """The clean forward pass, with the graph of the importance function."""
        self.begun, self.over = False, False
        self._l0: Tensor | None = None

    def work(self, losses: tuple[Loss, ...], leads: bool) -> Work:
        """All losses one after the other; those that rows do not matter to by one microbatch of a process."""
        for loss in losses:
            if loss.of_rows or leads:
                self.loss = loss
                yield from loss.parts(self.step)
        self.over = True

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """It is this microbatch's turn."""
        if self.whole is None:
            self.whole = self.make()
            if self.begun:
                self.step.recall(self.whole.cut())
            else:
                self.step, self.begun = self.whole.cut(), True
        yield
        if self.several:
            self._l0 = _l0(self.step) if self._l0 is None else self._l0
            if self.over:
                self.leave()
            self.step.forget()
            self.whole = None

    def leave(self) -> None:
        """Pass gradients on to the importance function: all of them at once, as sigmoids look at the sign of their sum."""
        if self.whole is not None:
            self.whole.join(self.step)
            self.whole = None

    def l0(self) -> Tensor:
        """Active components of this microbatch."""
        return _l0(self.step) if self._l0 is None else self._l0


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
        scored = step.scored is not None and step.scored.shape == counts.shape
        counted = counts[step.scored.to(counts.device)] if scored and step.scored is not None else counts
        means.append((counted.sum() / max(1, counted.numel())).to(step.device))
    return torch.stack(means).sum()
