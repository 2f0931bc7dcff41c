"""What a run tells others after its logged steps, and the JSON-lines log.

1. A callback is anything that can be called with a `StepInfo`; what it returns is ignored, unless it is `STOP`.
2. It may also have `begin(run: RunInfo)`, called before the first step, and `end()`, called once however the run ends.
3. It may add figures of its own to `StepInfo.figures`: later callbacks and the log see them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tl_paramdecomp.components.files import replace_text
from tl_paramdecomp.errors import DecompositionFileError

STOP = "stop"
"""A callback that returns this ends the run after the step: it is saved, and the same call goes on with it."""


class StepInfo(NamedTuple):
    """What callbacks are told after a logged step."""

    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    figures: dict[str, float]
    """Loss, its terms, L0, gradient norms, learning rates, seconds since the start; and what earlier callbacks added."""
    decomposition: Any


class RunInfo(NamedTuple):
    """What callbacks are told before the first step."""

    run_dir: Path | None
    """Where the run keeps its files; None: nowhere."""
    steps: int
    """Steps of the whole run."""
    first: int
    """Steps done before, by the run that this one goes on with."""
    settings: dict[str, Any]
    """Method, sites, batch size, seed and steps, as JSON-able values."""
    decomposition: Any
    model: Any = None
    """The target, frozen and in evaluation mode."""


Callback = Callable[[StepInfo], Any]
"""Called after every logged step."""


@contextlib.contextmanager
def listening(callbacks: Sequence[Callback], run: RunInfo) -> Iterator[None]:
    """Call `begin` of those callbacks that have it now, and `end` of those that were begun on leaving, last one first."""
    with contextlib.ExitStack() as begun:
        for callback in callbacks:
            begin, end = getattr(callback, "begin", None), getattr(callback, "end", None)
            if begin is not None:
                begin(run)
            if end is not None:
                begun.callback(end)
        yield


def tell(callbacks: Sequence[Callback], info: StepInfo) -> bool:
    """Call every callback; returns whether one of them wants the run to stop."""
    answers = [callback(info) for callback in callbacks]
    return any(isinstance(answer, str) and answer == STOP for answer in answers)


# --- the log ----------------------------------------------------------------------------------------------------------
class JsonLines:
    """A callback that appends every logged step to a file, one JSON object a line: `{"step": 10, "loss": 0.5, ...}`.

    Args:
        path: The file; made where it is missing, in a folder that is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, info: StepInfo) -> None:
        self.write({"step": info.step, **info.figures})

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line.

        Raises:
            DecompositionFileError: The file cannot be written to.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DecompositionFileError(
                f"Could not write to {self.path}: {error}. Free some space or choose another run_dir; the checkpoints stay."
            ) from error

    def cut(self, step: int) -> None:
        """Keep the lines of the first `step` steps: what came after is done again. Torn lines, as a kill leaves them, go."""
        kept = [line for line in self._lines() if line["step"] <= step] if step else []
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept), alone=True)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield line
