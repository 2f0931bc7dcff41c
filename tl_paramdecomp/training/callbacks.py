"""What a run tells others after its logged steps, and the JSON-lines log.

1. A callback is anything that can be called with a `StepInfo`; what it returns is ignored, unless it is `STOP`.
2. It may also have `begin(run: RunInfo)`, called before the first step, and `end()`, called once however the run ends.
3. It may add figures of its own to `StepInfo.figures`: later callbacks and the log see them.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tl_paramdecomp.components.disk import append_text, failure, parse_json, read_bytes, replace_text
from tl_paramdecomp.errors import DecompositionFileError

OWN = b'{"step": '
"""What every line of a log begins with."""
LARGEST, LONGEST = 1 << 30, 1 << 24
"""Bytes of a log that are read at most, and of a line of it."""
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
    """A callback that appends every logged step to a file, one JSON object a line; a link is not followed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, info: StepInfo) -> None:
        self.write({"step": info.step, **info.figures})

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, all of it or nothing; DecompositionFileError or DiskSpaceError where that cannot be."""
        try:
            append_text(self.path, json.dumps(line) + "\n")
        except OSError as error:
            advice = "Free some space or choose another run_dir; the checkpoints stay."
            raise failure(f"Could not write to {self.path}", error, advice) from error

    def cut(self, step: int) -> None:
        """Keep the lines of the first `step` steps: what came after is done again. Torn lines, as a kill leaves them, go."""
        content = self.content()
        kept = [line for line in self._lines(content) if line["step"] <= step] if step else []
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept), alone=True)

    def content(self) -> bytes:
        """What the file holds, or nothing where it is not there; DecompositionFileError where it is no log."""
        if not os.path.lexists(self.path):
            return b""
        content = read_bytes(self.path, LARGEST, follow=False)
        if not (content.strip(b"\0") == b"" or OWN.startswith(content[: len(OWN)])):
            raise DecompositionFileError(
                f"{self.path}, line 1 is no line of a log ({content[:40]!r}); a run would write over the file. Move it away "
                "or choose another run_dir."
            )
        return content

    def _lines(self, content: bytes) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(content.split(b"\n"), 1):
            where = f"{self.path}, line {number}"
            if len(text) > LONGEST:
                raise DecompositionFileError(f"{where} has {len(text)} bytes; a line of a log has at most {LONGEST}.")
            try:
                line = parse_json(where, text.decode("utf-8", errors="replace"), finite=False)
            except DecompositionFileError as error:
                if isinstance(error.__cause__, ValueError):  # torn
                    continue
                raise
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
