"""Callbacks that log for TensorBoard and Weights & Biases, and one that evaluates again and again during a run.

Callbacks run in their order: put `EvaluateEvery` before the loggers, and they log what it adds.
"""

import contextlib
import json
import math
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig, evaluate
from tl_paramdecomp.analysis.evaluation.result import Evaluation
from tl_paramdecomp.components.disk import read_json, replace_text
from tl_paramdecomp.errors import DecompositionFileError, MissingExtraError, SettingError
from tl_paramdecomp.settings import Whole, fit
from tl_paramdecomp.training.callbacks import JsonLines, RunInfo, StepInfo

QUICK = EvaluationConfig(ladder=(20,), restarts=1, samples=1, ablated=0, by_site=False)
"""An evaluation that is cheap enough to be done often."""
EVALUATIONS, RUN_ID = "evaluations.jsonl", "wandb.json"


class TensorBoard:
    """Logs every figure as a scalar of its name, for `tensorboard --logdir FOLDER`.

    Args:
        folder: Where the event files go; None: `tensorboard` in the run's folder.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "Logging for TensorBoard needs tensorboard, which is not installed; "
                "pip install 'tl-paramdecomp[tensorboard]'."
            ) from error
        self.folder, self._open = folder, SummaryWriter
        self._writer: Any = None

    def begin(self, run: RunInfo) -> None:
        """Open an event file; events of steps that are done again are hidden.

        Raises:
            SettingError: Neither this callback nor the run has a folder.
        """
        if self.folder is None and run.run_dir is None:
            raise SettingError(
                "TensorBoard() writes into the run's folder, and this run has none; give TensorBoard(folder)."
            )
        folder = Path(run.run_dir or "", "tensorboard") if self.folder is None else Path(self.folder)
        self._writer = self._open(str(folder), purge_step=run.first + 1 if run.first else None)

    def __call__(self, info: StepInfo) -> None:
        for name, value in info.figures.items():
            self._writer.add_scalar(name, value, info.step)

    def end(self) -> None:
        """Write what is left, and close."""
        self._writer.close()


class WandB:
    """Logs every figure to one run at Weights & Biases; a run that is resumed goes on there as well.

    Args:
        project: The project's name.
        settings: Other arguments of `wandb.init`, such as name, tags, mode="offline".

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                "Logging to Weights & Biases needs wandb, which is not installed; pip install 'tl-paramdecomp[wandb]'."
            ) from error
        self.project, self.settings, self._wandb = project, settings, wandb
        self._run: Any = None

    def begin(self, run: RunInfo) -> None:
        """Begin the run there, or go on with it, its settings as its configuration."""
        settings: dict[str, Any] = {"project": self.project, "config": run.settings}
        if run.run_dir is not None:
            settings |= {"dir": str(run.run_dir), "id": _run_id(run), "resume": "allow"}
        self._run = self._wandb.init(**(settings | self.settings))

    def __call__(self, info: StepInfo) -> None:
        self._run.log({k: v for k, v in info.figures.items() if math.isfinite(v)}, step=info.step)

    def end(self) -> None:
        """Send what is left."""
        self._run.finish()


class EvaluateEvery:
    """Evaluates the decomposition on held-out rows every so many steps, and at the end.

    Figures of the headline and some more are added to those of the step, as `evaluation_l0`, `evaluation_rounded` and so on;
    the whole evaluation is a line of `evaluations.jsonl` in the run's folder. The run itself is not changed by it.

    Args:
        steps: Steps between evaluations; each is at the first logged step that is due.
        data: Token rows [rows, pos] that training does not see.
        protocol: What is measured; None: few masks and one adversary of 20 steps.

    Raises:
        SettingError: `steps` is less than 1.
    """

    def __init__(self, steps: int, data: Any, protocol: EvaluationConfig | None = None) -> None:
        if fit(steps, Whole, "steps") < 1:
            raise SettingError(f"EvaluateEvery needs at least one step between evaluations; given {steps}.")
        self.steps, self.data, self.protocol = steps, data, QUICK if protocol is None else protocol

    def begin(self, run: RunInfo) -> None:
        """Forget evaluations of steps that are done again.

        Raises:
            SettingError: What is made has no importances, which an evaluation needs.
        """
        if not run.decomposition.gives_importances:
            raise SettingError(
                f"EvaluateEvery needs a decomposition with importances; {run.settings['method']['type']} makes none. "
                "Leave it out, and evaluate the result."
            )
        self._model, self._last = run.model, run.first
        self._file = None if run.run_dir is None else JsonLines(run.run_dir / EVALUATIONS)
        if self._file is not None:
            self._file.cut(run.first)

    def __call__(self, info: StepInfo) -> None:
        if info.step // self.steps == self._last // self.steps and info.step != info.steps:
            return
        self._last = info.step
        found = evaluate(self._model, info.decomposition, self.data, protocol=self.protocol, progress=False)
        info.figures.update(figures := figures_of(found))
        if self._file is not None:
            self._file.write({"step": info.step, **figures, "evaluation": asdict(found)})


def figures_of(found: Evaluation) -> dict[str, float]:
    """An evaluation in a few numbers: its headline, and KL with all components whole and under stochastic masks."""
    distances = {"unmasked": found.distance("unmasked"), "stochastic": found.distance("stochastic", "masked")}
    return {f"evaluation_{name}": value for name, value in {**found.headline, **distances}.items()}


def _run_id(run: RunInfo) -> str:
    """The run's name at Weights & Biases; a new one where the run begins anew."""
    assert run.run_dir is not None
    path = run.run_dir / RUN_ID
    if run.first:
        with contextlib.suppress(DecompositionFileError):  # the run before logged nothing there
            return str(read_json(path, "id")["id"])
    made = secrets.token_hex(4)
    replace_text(path, json.dumps({"id": made}))
    return made
