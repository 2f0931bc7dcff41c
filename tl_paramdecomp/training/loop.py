"""The one training loop, for every method.

1. A batch, the method's losses, one optimiser step per parameter group; a step that is not finite stops the run.
2. Log, tell the callbacks, write a checkpoint, where they are due.
3. Leave early when asked by a signal, a callback or the clock.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.data.sources import BatchSource
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.method import LossReport, Method, TrainingStep
from tl_paramdecomp.methods.prefixes import Prefixes
from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.parallel import ProcessGroup
from tl_paramdecomp.training import watch
from tl_paramdecomp.training.callbacks import Callback, RunInfo, StepInfo, listening, tell
from tl_paramdecomp.training.checkpoint import Checkpoint, restore
from tl_paramdecomp.training.config import RunConfig
from tl_paramdecomp.training.distributed import Replicas
from tl_paramdecomp.training.distributed import shard as shard_over
from tl_paramdecomp.training.guards import CollapseWatch, FiniteGuard
from tl_paramdecomp.training.run_folder import RunFolder
from tl_paramdecomp.training.state import TrainingState, figures_of, optimise, start_state
from tl_paramdecomp.training.watch import Interrupts, Shown, say


@dataclass
class Run:
    """A run under way."""

    adapter: ModelAdapter
    method: Method[Any]
    settings: dict[str, Any]
    config: RunConfig
    steps: int
    callbacks: tuple[Callback, ...]
    """Of the process that talks; others have none."""
    processes: ProcessGroup
    until: float | None
    """When the budget of time is spent, by `watch.now`."""
    folder: RunFolder | None = None
    shown: Shown = field(init=False)
    state: TrainingState = field(init=False)
    gradients: Callable[[TrainingStep], LossReport] = field(init=False)
    prefixes: Prefixes | None = None
    finite: FiniteGuard = field(init=False)
    watch: CollapseWatch = field(init=False)

    def begin(self, resume: Literal["auto"] | bool) -> Checkpoint | None:
        """The checkpoint to go on from, if any; the process that writes looks first."""
        begun = None
        for turn in (True, False):
            if self.folder is not None and self.processes.leads == turn:
                begun = self.folder.begin(resume)
            self.processes.wait()
        return begun

    def prepare(self, made: Any, source: BatchSource, background: BatchSource | None, begun: Checkpoint | None) -> None:
        """All that the first step needs, from a checkpoint where there is one."""
        config, processes, device = self.config, self.processes, self.adapter.device
        if config.shard:
            shard_over(made, processes, device)
        apart = processes.world * config.accumulate > 1 or config.random_numbers == "global"
        numbers = RandomNumbers(config.seed, device, processes.rank, apart, config.random_numbers)
        self.state = start_state(self.method, made, numbers, source, background, processes, config.accumulate)
        counts = made.n_components if getattr(made, "importance", None) is not None else None
        self.finite = FiniteGuard(config.on_nonfinite, config.max_skips)
        components = counts and sum(counts.values())
        self.watch = CollapseWatch(self.state.groups, components, self.settings["method"], self.steps)
        if self.method.room_for_prefixes and source.comes_again(self.steps):
            self.prefixes = Prefixes(self.method.room_for_prefixes)
        if begun is not None:
            restore(begun, self.state)
            self.finite.restore(begun.values["guards"])
            self.watch.warned |= set(begun.values["warned"])
        replicated = processes.world > 1 and not config.shard
        self.gradients = Replicas(self.method, made, processes).gradients if replicated else self.method.gradients

    def train(self) -> None:
        """The steps that are left."""
        state, path = self.state, None if self.folder is None else self.folder.path
        info = RunInfo(path, self.steps, state.done, self.settings, state.decomposition, self.adapter.model)
        interrupts, begun, stopped = Interrupts(self.folder is not None), watch.now(), False
        if self.processes.leads:
            self.watch.begin()
        with interrupts, listening(self.callbacks, info), self.shown.steps(self.steps, state.done) as bar:
            try:
                while state.done < self.steps and not stopped:
                    figures = self.step(begun)
                    if figures is None:
                        self.note_skip()
                    bar.update()
                    stopped = self.log(figures, bar, interrupts)
                    if self.due(self.config.checkpoint_every):
                        self.checkpoint(figures)
                    late = self.until is not None and watch.now() >= self.until
                    stopped = self.processes.any_of(stopped | late)[0] | interrupts.agree(self.processes)
            except KeyboardInterrupt:
                if state.settled and not interrupts.leaving and self.processes.world == 1:
                    self.stop()
                raise
            if stopped and (state.done < self.steps or interrupts.asked):
                self.stop()

    def step(self, begun: float) -> dict[str, float] | None:
        """One step; its figures, empty where nobody asks, and None where the step was left out."""
        state, method, done, config = self.state, self.method, self.state.done, self.config
        state.settled = False
        batch = state.source.batch(done)
        other = None if state.background is None else state.background.batch(done)
        self.finite.before_step(state)
        state.optimiser.zero_grad()
        share = done / max(1, self.steps - 1)
        now = TrainingStep(
            self.adapter, state.decomposition, batch, state.numbers, share, state.memory, other,
            self.processes, config.accumulate, done, self.prefixes,
        )  # fmt: skip
        report = self.gradients(now)
        norms = optimise(state.groups, state.optimiser, method.learning_rate_factor(done, self.steps))
        method.after_step(now)
        stands = self.finite.after_step(report, norms, state, self.told_last())
        state.done, state.settled = done + 1, True
        if not stands:
            return None
        if not self.due(config.log_every) and not (config.keep_best and self.due(config.checkpoint_every)):
            return {}
        figures = figures_of(report, norms, state)
        if config.on_nonfinite == "skip":
            figures["skipped"] = float(self.finite.skipped)
        return {**figures, "seconds": watch.now() - begun}

    def due(self, every: int) -> bool:
        """Whether it is time for what is done every so many steps, and after the last."""
        return self.state.done % every == 0 or self.state.done == self.steps

    def log(self, figures: dict[str, float] | None, bar: "tqdm[Any]", interrupts: Interrupts) -> bool:
        """Show, tell and write down a step's figures, where they are due; whether a callback wants the run to stop."""
        if not figures or not self.due(self.config.log_every) or not self.processes.leads:
            return False
        state, stopped = self.state, False
        bar.set_postfix(loss=f"{figures['loss']:.4g}", L0=f"{figures.get('l0', float('nan')):.1f}")
        info = StepInfo(state.done, self.steps, figures, state.decomposition)
        try:
            stopped = tell(self.callbacks, info)
        except KeyboardInterrupt:
            if self.processes.world == 1:
                raise
            interrupts.asked = signal.SIGINT  # the others must hear of it
        finally:
            if self.folder is not None:
                self.folder.log(info)
        self.watch.look(state.done, figures)
        return stopped

    def note_skip(self) -> None:
        """Write down a step that was left out, and why."""
        if not self.processes.leads:
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
        if not self.processes.leads:
            return
        best = self.config.keep_best
        if best is not None and figures and best not in figures and not self.callbacks:
            raise SettingError(f"keep_best={best!r} is no logged figure; there are {', '.join(figures)}.")
        self.finite.check(saved, self.told_last())
        known = {"settings": self.folder.settings, "guards": self.finite.counts(), "warned": sorted(self.watch.warned)}
        self.folder.checkpoints.save(saved, known, figures)

    def stop(self) -> None:
        """Leave early: save what is not saved, and say so."""
        done, checkpoints = self.state.done, None if self.folder is None else self.folder.checkpoints
        if checkpoints is not None and done:
            unsaved = self.processes.leads and (checkpoints.last is None or checkpoints.last.step != done)
            if self.processes.any_of(unsaved)[0]:
                self.checkpoint()
            if self.processes.leads:
                say(f"Stopped after step {done} of {self.steps}; the same call goes on from {checkpoints.folder}.")
        self.state.decomposition.info["stopped_after"] = done

    def told(self) -> str:
        """Where the run is."""
        done = f"after step {self.state.done}" if hasattr(self, "state") else "before the first step"
        return f"{done}. {self.told_last()}"

    def told_last(self) -> str:
        """A sentence on the last good checkpoint."""
        return "There is no checkpoint." if self.folder is None else self.folder.checkpoints.told_last()
