"""SIGINT and SIGTERM while a run goes on: the first lets the step end and the run save, a second leaves at once."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tl_paramdecomp.parallel import ProcessGroup
from tl_paramdecomp.training import clock

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.1
"""Seconds in which a second signal is the first one's echo: launchers and terminals pass on what their children got too."""


class Interrupts:
    """A context in which signals are noted; leaving it raises what the first one stands for.

    Only the main thread gets signals: elsewhere, and where a signal is ignored or handled outside Python, nothing changes.

    Args:
        active: False leaves signals alone, where there is nothing to save.
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
        now = clock.now()
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), now
            with contextlib.suppress(Exception):
                if sys.stderr.isatty():  # not through Python's buffers, which this may have interrupted
                    os.write(sys.stderr.fileno(), b"\nSaving after this step; once more leaves at once.\n")
        elif now - self._since > ECHO:
            self.leaving = True
            raise _meaning(signal.Signals(number))


def _meaning(which: signal.Signals) -> BaseException:
    """What a signal raises: KeyboardInterrupt as always, or the exit code that shells give a terminated process."""
    return KeyboardInterrupt() if which == signal.SIGINT else SystemExit(128 + which)
