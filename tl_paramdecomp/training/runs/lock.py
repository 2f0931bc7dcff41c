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

from tl_paramdecomp.components.disk import open_regular, read_json
from tl_paramdecomp.errors import DecompositionFileError, RunInUseError

try:
    import fcntl
except ImportError:  # a system without it has no lock
    fcntl = None

LARGEST = 1 << 12
"""Bytes that a lock's file has at most."""
OWN = b'{"pid": '
"""What is in a lock's file begins so."""
_HELD: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunLock:
    """Holds a file's lock as a context; the file says who holds it, and stays.

    Args:
        path: The file, in a folder that is there.

    Raises:
        RunInUseError: Another process holds the lock, or another call of this one.
        DecompositionFileError: The file cannot be made, is a link or no regular file, or is another's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        try:
            handle = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._file = os.fdopen(handle, "a+", encoding="utf-8")
            self._check_own(handle)
        except OSError as error:
            self._close()
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

    def _check_own(self, handle: int) -> None:
        """See that the file is nobody else's, as it will be emptied."""
        size = os.fstat(handle).st_size
        with os.fdopen(os.dup(handle), "rb") as file:
            file.seek(0)
            content = file.read(LARGEST)
        # zeros are what a power cut may leave
        if size > LARGEST or not (content.strip(b"\0") == b"" or OWN.startswith(content[: len(OWN)])):
            raise OSError(f"{self.path} is no lock of a run, and holds something else; move it away")

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
                known = read_json(self.path, "pid", "host", "since", largest=LARGEST)
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
