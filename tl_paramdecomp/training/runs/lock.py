"""One process at a time in a run's directory: an advisory lock that ends with the process, however it ends."""

import contextlib
import json
import os
import socket
import time
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO

from tl_paramdecomp.errors import DecompositionFileError, RunInUseError

try:
    import fcntl
except ImportError:  # a system without it has no lock
    fcntl = None

_HELD: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunLock:
    """Holds a file's lock as a context; the file says who holds it, and stays.

    Args:
        path: The file, in a folder that is there.

    Raises:
        RunInUseError: Another process holds the lock, or another call of this one.
        DecompositionFileError: The file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        try:
            self._file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise DecompositionFileError(
                f"{self.path.parent} cannot be written to ({error}); choose another run_dir."
            ) from error
        try:
            self._take(self._file)
        except BaseException:
            self._close()
            raise
        _HELD.add(self)
        return self

    def _take(self, file: IO[str]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUseError(
                f"{self.path.parent} is in use by {self._holder()}; wait for it to end, stop it, or choose another run_dir."
            ) from None
        except OSError as error:
            warnings.warn(
                f"The file system of {self.path} has no locks ({error}); see that no two runs write there.",
                stacklevel=2,
            )
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # a full disk is told of when something that matters is written
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()

    def _holder(self) -> str:
        for _ in range(10):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(self.path.read_text(encoding="utf-8"))
                return f"process {known['pid']} on {known['host']}, since {known['since']}"
            time.sleep(0.02)  # it has the lock and is about to say who it is
        return "another process"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
        self._close()

    def _close(self) -> None:
        _HELD.discard(self)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _let_go_in_child() -> None:
    """A forked child, such as a data worker, does not keep the lock when its parent is gone."""
    for lock in list(_HELD):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
