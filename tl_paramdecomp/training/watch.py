"""What a run shows while it goes on, the time as it asks for it, and signals that stop it."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

from tqdm.auto import tqdm

from tl_paramdecomp.parallel import ProcessGroup


def is_watched() -> bool:
    """Whether standard error is a terminal, or the cell of a notebook."""
    in_notebook = type(sys.stdout).__module__.startswith("ipykernel")
    return in_notebook or bool(getattr(sys.stderr, "isatty", lambda: False)())


class Shown:
    """The progress bars of a run; `progress` None: where somebody looks."""

    def __init__(self, progress: bool | None) -> None:
        self.hidden = not (is_watched() if progress is None else progress)

    def phase(self, what: str, total: int) -> Iterable[int]:
        """Numbers 0 to total - 1 under a bar."""
        return tqdm(range(total), desc=what, disable=self.hidden, leave=False)

    def steps(self, total: int, first: int) -> "tqdm[Any]":
        """The bar of the steps; use it as a context."""
        return tqdm(total=total, initial=first, desc="decompose", disable=self.hidden, unit="step", mininterval=0.5)


def say(text: str) -> None:
    """One line on standard error, above the bars."""
    tqdm.write(text, file=sys.stderr)


now = time.monotonic
"""Seconds since some moment, as `now()`."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.1
"""Seconds in which a second signal is the first one's echo: launchers and terminals pass on what their children got too."""


class Interrupts:
    """A context in which signals are noted, where there is something to save; leaving it raises what the first one stands for.

    Only the main thread gets signals: elsewhere, and where a signal is ignored or handled outside Python, nothing changes.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.asked: signal.Signals | None = None
        """The signal that came."""
        self.leaving = False
        """Whether a second one came: nothing is to be saved any more."""
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if self.active and threading.current_thread() is threading.main_thread():
            for which in SIGNALS:
                before = signal.getsignal(which)
                if before not in (None, signal.SIG_IGN):
                    self._before[which] = before
                    signal.signal(which, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for which, before in self._before.items():
            signal.signal(which, before)
        if kind is None and self.asked is not None:
            raise _meaning(self.asked)

    def agree(self, processes: ProcessGroup) -> bool:
        """Whether a signal came to any process, to all of which it then came."""
        for which, came in zip(SIGNALS, processes.any_of(*(self.asked == which for which in SIGNALS)), strict=True):
            if came and self.asked is None:
                self.asked = which
        return self.asked is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        at = now()
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), at
            with contextlib.suppress(Exception):
                if sys.stderr.isatty():  # not through Python's buffers, which this may have interrupted
                    os.write(sys.stderr.fileno(), b"\nSaving after this step; once more leaves at once.\n")
        elif at - self._since > ECHO:
            self.leaving = True
            raise _meaning(signal.Signals(number))


def _meaning(which: signal.Signals) -> BaseException:
    """What a signal raises: KeyboardInterrupt as always, or the exit code that shells give a terminated process."""
    return KeyboardInterrupt() if which == signal.SIGINT else SystemExit(128 + which)
