"""`decompose`: the one training loop, for every method.

1. Pick the sites, freeze the target, let the method make its start; go on from the newest good checkpoint where there is one.
2. For each step: a batch, the method's losses, one optimiser step per parameter group; a step that is not finite stops the run.
3. Log, tell the callbacks, write checkpoints; leave early when asked by a signal, a callback or the clock.
4. Save the decomposition and return it; the target is as it was.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.base import LossReport, Made, Method, TrainingStep
from tl_paramdecomp.methods.draws import RandomNumbers, Scope
from tl_paramdecomp.methods.pieces import Peers
from tl_paramdecomp.methods.settings import to_settings
from tl_paramdecomp.patching.frozen import frozen
from tl_paramdecomp.sites import SitePattern
from tl_paramdecomp.training.callbacks import STOP, Callback, RunInfo, StepInfo, listening, tell
from tl_paramdecomp.training.checkpoint import Checkpoint, restore
from tl_paramdecomp.training.collapse import CollapseWatch
from tl_paramdecomp.training.data import BatchSource, batch_source
from tl_paramdecomp.training.distributed import Replicas, answering, joined
from tl_paramdecomp.training.guards import FiniteGuard, OnNonfinite
from tl_paramdecomp.training.interrupts import Interrupts
from tl_paramdecomp.training.plan import Plan, check_place, steps_of
from tl_paramdecomp.training.progress import Shown, say
from tl_paramdecomp.training.run_folder import RunFolder
from tl_paramdecomp.training.shards import brought_together
from tl_paramdecomp.training.shards import shard as shard_over
from tl_paramdecomp.training.state import TrainingState, figures_of, optimise, start_state

__all__ = ["STOP", "Callback", "RunInfo", "StepInfo", "decompose", "optimise"]


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
    keep_checkpoints: int = 2,
    keep_best: str | None = None,
    on_nonfinite: OnNonfinite = "stop",
    max_skips: int = 10,
    max_seconds: float | int | None = None,
    progress: bool | None = None,
    accumulate: int = 1,
    random_numbers: Scope = "per_rank",
    shard: bool = False,
) -> Made:
    """Learn components of a model's weights.

    Started by `torchrun`, every process holds the target and takes its part of every batch; one of them writes and talks.

    With a `run_dir`, SIGINT (Ctrl-C) and SIGTERM let the running step end, save a checkpoint and leave with `KeyboardInterrupt`
    or `SystemExit(143)`; a second one leaves at once. The same call then goes on, bit for bit as if it had never stopped.

    Args:
        model: The target, on any host. It is frozen and in evaluation mode meanwhile, and afterwards as it was.
        sites: Which weights; a glob, a list of globs, or a predicate.
        method: `SPD(...)`, or another method's object.
        data: What `token_batches` gives, token rows [rows, pos], batches, a dataset, or a function from the step's number to
            a batch; see `training.data.batch_source`. None for a method that looks at none. Every process is given the same.
        steps: Optimiser steps; 0 gives the start as it is. None where there is nothing to train.
        batch_size: Rows per step, of all processes together, where the data comes as rows.
        seed: Start, order of the rows and masks.
        run_dir: Where metrics, checkpoints and the result go; None keeps nothing on disk. One process at a time may have it.
        resume: `auto` goes on from the newest good checkpoint where `run_dir` has one; True demands one; False begins anew.
        device: Must be the model's own; None takes it.
        callbacks: Called after every logged step; see `training.callbacks`. One that returns `STOP` ends the run there.
        background: A second stream of rows, in any of the same forms, for methods that take one (`SPD.targeted`).
        log_every: Steps between lines of `metrics.jsonl`.
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints stay.
        keep_best: A logged figure, such as `loss`; the checkpoint where it is lowest stays too.
        on_nonfinite: What a step does whose losses, gradients or new parameters are not finite: `stop` the run, or be taken
            back and left out (`skip`), for which a copy of all that a step changes is kept.
        max_skips: Steps in a row that may be left out.
        max_seconds: The run saves and returns what there is after the first step that ends later than this after the call.
        progress: Show progress bars; None: where standard error is a terminal, or in a notebook.
        accumulate: Micro-batches into which each process divides its rows, where a batch has no room; the gradients are those
            of the whole batch.
        random_numbers: `per_rank`: each process draws the masks of its own rows. `global`: each draws those of the whole batch,
            so that a run is the same, to rounding, on any number of processes and micro-batches.
        shard: Keep components, their gradients and the optimiser's state in shards, one on each process (FSDP2), where they
            outgrow a device; otherwise every process has all of them (DDP).

    Returns:
        The decomposition, where the model is (on the CPU where it was in shards), on every process: a `Decomposition`, from
        `L3D` a `SubnetworkDecomposition`. Where `STOP` or
        `max_seconds` ended the run early, `info["stopped_after"]` is the number of steps done, and the same call goes on.

    Raises:
        NoMatchingSiteError, UnsupportedModelError: No such site, or none that is exact.
        DataError, SettingError: Data or settings that make no sense; a checkpoint of other settings.
        DivergedError: A loss, a gradient or a parameter is not finite; the last checkpoint stays.
        RunInUseError: Another process writes to `run_dir`.
        DecompositionFileError, DiskSpaceError: A checkpoint cannot be read or written; those before stay.
        PeerLostError: Another process of the run died.
    """
    until = None if max_seconds is None else time.monotonic() + max_seconds
    adapter = adapt(model)
    steps = steps_of(method, steps, data)
    check_place(adapter, device, run_dir, resume)
    plan = Plan(
        log_every, checkpoint_every, keep_checkpoints, keep_best, on_nonfinite, max_skips, max_seconds,
        accumulate, random_numbers, shard,
    )  # fmt: skip
    chosen = adapter.select(sites)
    tokenizer = getattr(model, "tokenizer", None)
    source, looked_at = (
        None if data is None else batch_source(data, batch_size, seed, tokenizer, None, method.rows_together, adapter)
        for _ in range(2)
    )
    other = None if background is None else batch_source(background, batch_size, seed + 1, tokenizer, model=adapter)
    read = {name: used for name, used in (("data", source), ("background", other)) if used is not None and steps}
    for used in read.values():
        used.check()
    settings = {
        "method": to_settings(method), "sites": list(chosen), "batch_size": batch_size, "seed": seed, "steps": steps,
        **{name: used.info for name, used in read.items()},
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(joined(adapter.device))
        run = _Run(adapter, method, settings, plan, steps, tuple(callbacks) if peers.leads else (), peers, until)
        run.shown = Shown(progress if peers.leads else False)
        if run_dir is not None:
            run.folder = RunFolder(Path(run_dir), settings, keep_checkpoints, keep_best, peers.leads)
            stack.enter_context(run.folder.opened())
        stack.enter_context(frozen(adapter.root))
        stack.enter_context(answering(peers, run.told))
        begun = run.begin(resume)
        made = method.initialise(
            adapter, chosen, torch.Generator().manual_seed(seed), run.shown.phase, looked_at and looked_at.batch
        )
        made.info["run"] = settings
        made.requires_grad_(False)
        if run.folder is not None and peers.leads:
            run.folder.describe(made, loop=asdict(plan), model=type(model).__name__, device=str(adapter.device))
        if source is not None and steps:
            run.prepare(made, seed, source, other, begun)
            with torch.enable_grad():
                run.train()
            run.gradients = method.gradients  # DDP must go before its process group does
            made = brought_together(made).requires_grad_(False)
        if run.folder is not None and peers.leads:
            run.folder.save_result(made)
    return made


@dataclass
class _Run:
    """A run under way."""

    adapter: ModelAdapter
    method: Method[Any]
    settings: dict[str, Any]
    plan: Plan
    steps: int
    callbacks: tuple[Callback, ...]
    """Of the process that talks; others have none."""
    peers: Peers
    until: float | None
    """When the budget of time is spent, by the monotonic clock."""
    folder: RunFolder | None = None
    shown: Shown = field(init=False)
    state: TrainingState = field(init=False)
    gradients: Callable[[TrainingStep], LossReport] = field(init=False)
    finite: FiniteGuard = field(init=False)
    watch: CollapseWatch = field(init=False)

    def begin(self, resume: Literal["auto"] | bool) -> Checkpoint | None:
        """The checkpoint to go on from, if any; the process that writes looks first."""
        begun = None
        for turn in (True, False):
            if self.folder is not None and self.peers.leads == turn:
                begun = self.folder.begin(resume)
            self.peers.wait()
        return begun

    def prepare(
        self, made: Any, seed: int, source: BatchSource, background: BatchSource | None, begun: Checkpoint | None
    ) -> None:
        """All that the first step needs, from a checkpoint where there is one."""
        plan, peers, device = self.plan, self.peers, self.adapter.device
        if plan.shard:
            shard_over(made, peers, device)
        divided = peers.world * plan.accumulate > 1
        numbers = RandomNumbers(
            seed, device, peers.rank, divided or plan.random_numbers == "global", plan.random_numbers
        )
        self.state = start_state(self.method, made, numbers, source, background, peers, plan.accumulate)
        counts = made.n_components if getattr(made, "importance", None) is not None else None
        self.finite = FiniteGuard(plan.on_nonfinite, plan.max_skips)
        self.watch = CollapseWatch(
            self.state.groups, counts and sum(counts.values()), self.settings["method"], self.steps
        )
        if begun is not None:
            restore(begun, self.state)
            self.finite.restore(begun.values["guards"])
            self.watch.warned |= set(begun.values["warned"])
        replicated = peers.world > 1 and not plan.shard
        self.gradients = Replicas(self.method, made, peers).gradients if replicated else self.method.gradients

    def train(self) -> None:
        """The steps that are left."""
        state, path = self.state, None if self.folder is None else self.folder.path
        info = RunInfo(path, self.steps, state.done, self.settings, state.decomposition, self.adapter.model)
        interrupts, begun, stopped = Interrupts(self.folder is not None), time.perf_counter(), False
        if self.peers.leads:
            self.watch.begin()
        with interrupts, listening(self.callbacks, info), self.shown.steps(self.steps, state.done) as bar:
            try:
                while state.done < self.steps and not stopped:
                    figures = self.step(begun)
                    bar.update()
                    stopped = self.log(figures, bar, interrupts)
                    if self.due(self.plan.checkpoint_every):
                        self.checkpoint(figures)
                    late = self.until is not None and time.monotonic() >= self.until
                    stopped = self.peers.any_of(stopped | late)[0] | interrupts.agree(self.peers)
            except KeyboardInterrupt:
                if state.settled and not interrupts.leaving and self.peers.world == 1:
                    self.stop()
                raise
            if stopped and (state.done < self.steps or interrupts.asked):
                self.stop()

    def step(self, begun: float) -> dict[str, float] | None:
        """One step; its figures, empty where nobody asks, and None where the step was left out."""
        state, method, done, plan = self.state, self.method, self.state.done, self.plan
        state.settled = False
        batch = state.source.batch(done)
        other = None if state.background is None else state.background.batch(done)
        self.finite.before_step(state)
        state.optimiser.zero_grad()
        share = done / max(1, self.steps - 1)
        now = TrainingStep(
            self.adapter, state.decomposition, batch, state.numbers, share, state.memory, other,
            self.peers, plan.accumulate, done,
        )  # fmt: skip
        report = self.gradients(now)
        norms = optimise(state.groups, state.optimiser, method.learning_rate_factor(done, self.steps))
        method.after_step(now)
        stands = self.finite.after_step(report, norms, state, self.told_last())
        state.done, state.settled = done + 1, True
        if not stands:
            self.note_skip()
            return None
        if not self.due(plan.log_every) and not (plan.keep_best and self.due(plan.checkpoint_every)):
            return {}
        skipped = {"skipped": float(self.finite.skipped)} if plan.on_nonfinite == "skip" else {}
        return {**figures_of(report, norms, state), **skipped, "seconds": time.perf_counter() - begun}

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps, and after the last."""
        return self.state.done % every == 0 or self.state.done == self.steps

    def log(self, figures: dict[str, float] | None, bar: "tqdm[Any]", interrupts: Interrupts) -> bool:
        """Show, tell and write down a step's figures, where they are due; whether a callback wants the run to stop."""
        if not figures or not self.due(self.plan.log_every) or not self.peers.leads:
            return False
        state, stopped = self.state, False
        bar.set_postfix(loss=f"{figures['loss']:.4g}", L0=f"{figures.get('l0', float('nan')):.1f}")
        info = StepInfo(state.done, self.steps, figures, state.decomposition)
        try:
            stopped = tell(self.callbacks, info)
        except KeyboardInterrupt:
            if self.peers.world == 1:
                raise
            interrupts.asked = signal.SIGINT  # the others must hear of it
        finally:
            if self.folder is not None:
                self.folder.log(info)
        self.watch.look(state.done, figures)
        return stopped

    def note_skip(self) -> None:
        """Write down a step that was left out, and why."""
        if not self.peers.leads:
            return
        fault, count = self.finite.fault, self.finite.skipped
        say(f"Step {self.state.done} was left out, {count} so far: {fault}")
        if self.folder is not None:
            self.folder.log.write({"step": self.state.done, "skipped": count, "left_out": fault})

    def checkpoint(self, figures: dict[str, float] | None = None) -> None:
        """Save the state; `figures` tell whether it is the best."""
        if self.folder is None:
            return
        saved = self.state.saved()
        if not self.peers.leads:
            return
        best = self.plan.keep_best
        if best is not None and figures and best not in figures and not self.callbacks:
            raise SettingError(f"keep_best={best!r} is no logged figure; there are {', '.join(figures)}.")
        self.finite.check(saved, self.told_last())
        known = {"settings": self.folder.settings, "guards": self.finite.counts(), "warned": sorted(self.watch.warned)}
        self.folder.checkpoints.save(saved, known, figures)

    def stop(self) -> None:
        """Leave early: save what is not saved, and say so."""
        done, checkpoints = self.state.done, None if self.folder is None else self.folder.checkpoints
        if checkpoints is not None and done:
            unsaved = self.peers.leads and (checkpoints.last is None or checkpoints.last.step != done)
            if self.peers.any_of(unsaved)[0]:
                self.checkpoint()
            if self.peers.leads:
                say(f"Stopped after step {done} of {self.steps}; the same call goes on from {checkpoints.folder}.")
        self.state.decomposition.info["stopped_after"] = done

    def told(self) -> str:
        """Where the run is."""
        done = f"after step {self.state.done}" if hasattr(self, "state") else "before the first step"
        return f"{done}. {self.told_last()}"

    def told_last(self) -> str:
        """A sentence on the last good checkpoint."""
        return "There is no checkpoint." if self.folder is None else self.folder.checkpoints.told_last()
