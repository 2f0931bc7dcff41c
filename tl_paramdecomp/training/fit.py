"""`decompose`: the one training loop, for every method.

1. Pick the sites, freeze the target, let the method make its start (or read a checkpoint).
2. For each step: a batch, the method's losses, one optimiser step per parameter group.
3. Log to `metrics.jsonl`, show progress, write checkpoints; a loss that is no number stops the run.
4. Save the decomposition and return it; the target is as it was.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.errors import DataError, DivergedError, SettingError
from tl_paramdecomp.methods.base import LossReport, Made, Method, ParameterGroup, TrainingStep
from tl_paramdecomp.methods.settings import to_settings
from tl_paramdecomp.patching.frozen import frozen
from tl_paramdecomp.sites import SitePattern
from tl_paramdecomp.training.callbacks import Callback, StepInfo
from tl_paramdecomp.training.checkpoint import FOLDER, read_state, restore, save_checkpoint
from tl_paramdecomp.training.data import BatchSource, batch_source


def decompose(
    model: Any,
    sites: SitePattern,
    method: Method[Made],
    data: Any = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: Literal["auto"] | bool = "auto",
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
    *,
    background: Any = None,
    log_every: int = 10,
    checkpoint_every: int = 1000,
    progress: bool = True,
) -> Made:
    """Learn components of a model's weights.

    Args:
        model: The target, on any host. It is frozen and in evaluation mode meanwhile, and afterwards as it was.
        sites: Which weights; a glob, a list of globs, or a predicate.
        method: `SPD(...)`, or another method's object.
        data: Token rows [rows, pos], batches, a dataset, or a function from the step's number to a batch; see
            `training.data.batch_source`. None for a method that looks at none.
        steps: Optimiser steps; 0 gives the start as it is. None where there is nothing to train.
        batch_size: Rows per step, where the data comes as rows.
        seed: Start, order of the rows and masks.
        run_dir: Where metrics, checkpoints and the result go; None keeps nothing on disk.
        resume: `auto` goes on from a checkpoint of the same settings where `run_dir` has one; True demands one; False begins
            anew.
        device: Must be the model's own; None takes it.
        callbacks: Called after every logged step.
        background: A second stream of rows, in any of the same forms, for methods that take one (`SPD.targeted`).
        log_every: Steps between lines of `metrics.jsonl`.
        checkpoint_every: Steps between checkpoints.
        progress: Show a progress bar.

    Returns:
        The decomposition, on the model's device: a `Decomposition`, from `L3D` a `SubnetworkDecomposition`.

    Raises:
        NoMatchingSiteError, UnsupportedModelError: No such site, or none that is exact.
        DataError, SettingError: Data or settings that make no sense; a checkpoint of other settings.
        DivergedError: A loss is NaN or infinite; the last checkpoint stays.
    """
    adapter = adapt(model)
    steps = _steps(method, steps, data)
    _check(adapter, device, resume)
    chosen = adapter.select(sites)
    tokenizer = getattr(model, "tokenizer", None)
    source, looked_at = (
        None if data is None else batch_source(data, batch_size, seed, tokenizer, together=method.rows_together)
        for _ in range(2)
    )
    other = None if background is None else batch_source(background, batch_size, seed + 1, tokenizer)
    run = _Run(
        None if run_dir is None else Path(run_dir), steps, log_every, checkpoint_every, progress, tuple(callbacks)
    )
    run.settings = {
        "method": to_settings(method),
        "sites": list(chosen),
        "batch_size": batch_size,
        "seed": seed,
        "steps": steps,
    }
    with frozen(adapter.root):
        first = run.first_step(resume)
        decomposition = method.initialise(
            adapter, chosen, torch.Generator().manual_seed(seed), run.phase, looked_at and looked_at.batch
        )
        decomposition.info["run"] = run.settings
        decomposition.requires_grad_(False)
        if source is not None and steps:
            groups = method.parameter_groups(decomposition)
            for parameter in (p for group in groups for p in group.parameters):
                parameter.requires_grad_(True)
            optimiser = torch.optim.AdamW(
                [{"params": g.parameters, "lr": g.lr} for g in groups], weight_decay=0.0, fused=_can_fuse(groups)
            )
            generator = torch.Generator(device=adapter.device).manual_seed(seed)
            state = _State(decomposition, groups, optimiser, generator)
            if first and run.folder is not None:
                state.memory = restore(run.folder, decomposition, optimiser, generator)
            with torch.enable_grad():
                run.train(adapter, method, state, source, other, first)
            decomposition.requires_grad_(False)
    if run.folder is not None:
        decomposition.save(run.folder / "decomposition")
    return decomposition


@dataclass
class _State:
    """Everything the next step depends on, besides the data."""

    decomposition: Any
    groups: list[ParameterGroup]
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    memory: dict[str, Tensor] = field(default_factory=dict)


class _Run:
    """One run's folder, progress bar and log."""

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        log_every: int,
        checkpoint_every: int,
        progress: bool,
        callbacks: tuple[Callback, ...],
    ) -> None:
        self.folder, self.steps, self.progress, self.callbacks = folder, steps, progress, callbacks
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.settings: dict[str, Any] = {}
        self.saved_at: int | None = None

    def phase(self, what: str, total: int) -> Iterable[int]:
        """Numbers 0 to total - 1 under a progress bar."""
        return tqdm(range(total), desc=what, disable=not self.progress, leave=False)

    def first_step(self, resume: Literal["auto"] | bool) -> int:
        """Steps already done according to a checkpoint of the same settings."""
        state = None if self.folder is None or resume is False else read_state(self.folder)
        if state is None:
            if resume is True:
                raise SettingError(
                    f"resume=True, but {self.folder} holds no checkpoint; use resume='auto' to begin anew."
                )
            self._cut_log(0)
            return 0
        differing = [
            key for key, value in json.loads(json.dumps(self.settings)).items() if state["settings"].get(key) != value
        ]
        if differing:
            raise SettingError(
                f"{self.folder} holds a checkpoint of a run with other {', '.join(differing)}; choose another run_dir, or pass "
                "resume=False to begin anew there."
            )
        self.saved_at = state["step"]
        self._cut_log(state["step"])
        return state["step"]

    def train(
        self,
        adapter: ModelAdapter,
        method: Method[Any],
        state: _State,
        source: BatchSource,
        background: BatchSource | None,
        first: int,
    ) -> None:
        """The steps from `first` on."""
        begun = time.perf_counter()
        bar = tqdm(
            total=self.steps, initial=first, desc="decompose", disable=not self.progress, unit="step", mininterval=0.5
        )
        done = first
        try:
            for step in range(first, self.steps):
                batch = source.batch(step).to(adapter.device)
                other = None if background is None else background.batch(step).to(adapter.device)
                share = step / max(1, self.steps - 1)
                state.optimiser.zero_grad()
                now = TrainingStep(adapter, state.decomposition, batch, state.generator, share, state.memory, other)
                report = method.gradients(now)
                self._check_finite(report, step)
                norms = optimise(state.groups, state.optimiser, method.learning_rate_factor(step, self.steps))
                method.after_step(now)
                done = step + 1
                bar.update()
                if done % self.log_every == 0 or done == self.steps:
                    figures = _figures(report, norms, state) | {"seconds": time.perf_counter() - begun}
                    bar.set_postfix(loss=f"{figures['loss']:.4g}", L0=f"{figures.get('l0', float('nan')):.1f}")
                    self._log(done, figures, state.decomposition)
                if self.folder is not None and (done % self.checkpoint_every == 0 or done == self.steps):
                    self._checkpoint(done, state)
        except KeyboardInterrupt:
            if self.folder is not None and done > (self.saved_at or 0):
                self._checkpoint(done, state)
                bar.write(f"Stopped after step {done}; the same call goes on from {self.folder / FOLDER}.")
            raise
        finally:
            bar.close()

    def _check_finite(self, report: LossReport, step: int) -> None:
        if bool(torch.isfinite(report.total)):
            return
        bad = [name for name, value in report.terms.items() if not bool(torch.isfinite(value))]
        kept = f"The last checkpoint is of step {self.saved_at}." if self.saved_at else "There is no checkpoint."
        raise DivergedError(
            f"At step {step} the loss is {report.total.item()} ({', '.join(bad) or 'the sum'} is not finite). {kept} "
            "Lower the learning rates, or clip gradients."
        )

    def _checkpoint(self, done: int, state: _State) -> None:
        assert self.folder is not None
        save_checkpoint(
            self.folder, done, state.decomposition, state.optimiser, state.generator, state.memory, self.settings
        )
        self.saved_at = done

    def _log(self, done: int, figures: dict[str, float], decomposition: Any) -> None:
        if self.folder is not None:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": done, **figures}) + "\n")
        for callback in self.callbacks:
            callback(StepInfo(done, self.steps, figures, decomposition))

    def _cut_log(self, done: int) -> None:
        """Keep the lines of the first `done` steps: what came after a checkpoint is done again."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if done and path.exists() else []
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= done), encoding="utf-8")


def optimise(groups: Sequence[ParameterGroup], optimiser: torch.optim.Optimizer, factor: float) -> dict[str, Tensor]:
    """One optimiser step with each group's gradient clipped apart; returns the norms before clipping."""
    norms = {}
    for group, settings in zip(groups, optimiser.param_groups, strict=True):
        settings["lr"] = group.lr * factor
        limit = float("inf") if group.clip is None else group.clip
        norms[group.name] = nn.utils.clip_grad_norm_(group.parameters, limit)
    optimiser.step()
    return norms


def _figures(report: LossReport, norms: dict[str, Tensor], state: _State) -> dict[str, float]:
    named = {
        "loss": report.total,
        **report.terms,
        **report.figures(),
        **{f"grad_norm_{n}": v for n, v in norms.items()},
    }
    rates = {
        f"lr_{g.name}": settings["lr"] for g, settings in zip(state.groups, state.optimiser.param_groups, strict=True)
    }
    return {name: float(value.detach()) for name, value in named.items()} | rates


def _can_fuse(groups: Sequence[ParameterGroup]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g.parameters)


def _steps(method: Method[Any], steps: int | None, data: Any) -> int:
    """Steps to take: none where there is nothing to train."""
    if not method.trains:
        return 0
    if steps is None or steps < 0:
        raise SettingError(f"{type(method).__name__} needs steps, a number from 0 on; given {steps}.")
    if steps and data is None:
        raise DataError(f"{type(method).__name__} needs data to train on: token rows, batches or a dataset.")
    return steps


def _check(adapter: ModelAdapter, device: Any, resume: Any) -> None:
    if device is not None and torch.device(device).type != adapter.device.type:
        raise SettingError(
            f"device={device!r}, but the model is on {adapter.device}; move the model there first, components follow it."
        )
    if resume not in ("auto", True, False):
        raise SettingError(f"resume must be 'auto', True or False; given {resume!r}.")
