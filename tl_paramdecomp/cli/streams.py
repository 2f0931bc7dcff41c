"""Standard output and error of the command, which may be closed, full, or without a reader.

What goes wrong with standard output ends the command; what goes wrong with standard error is lost, and the command goes on.
"""

import contextlib
import errno
import os
import sys
from types import TracebackType
from typing import Any


class Streams:
    """A context in which both streams exist, and writing to standard error never fails."""

    def __enter__(self) -> "Streams":
        self.closed = sys.stdout is None
        _fill_descriptors()
        if sys.stdout is None:
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        if sys.stderr is None:
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        self.out, self.err = _Stream(sys.stdout), _Stream(sys.stderr, forgiving=True)
        sys.stdout, sys.stderr = self.out, self.err  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self.out.stream, self.err.stream

    def say(self, line: str) -> None:
        """One line on standard error."""
        print(line, file=sys.stderr)

    def finished(self, status: int) -> int:
        """The status to leave with, once all that was printed is written: 1 in place of 0 where it could not be."""
        with contextlib.suppress(OSError):
            self.out.flush()
        error = self.out.error
        if error is None:
            return status
        if error.errno != errno.EPIPE:  # the reader (head, less) has all it wanted
            why = "it is closed" if self.closed else error.strerror
            self.say(f"tl-paramdecomp: cannot write to standard output: {why}")
        _discard(self.out.stream)
        return status or 1

    def failed(self, error: OSError) -> int:
        """The status to leave with after an error of the system; those of standard output are told by `finished`."""
        if self.out.error is None:
            self.say(f"tl-paramdecomp: {type(error).__name__}: {error}")
        return 1


class _Stream:
    """A stream that remembers the first error of what it writes to.

    Args:
        stream: What is written to.
        forgiving: Go on as if nothing had happened; what it is given from then on is lost.
    """

    def __init__(self, stream: Any, forgiving: bool = False) -> None:
        self.stream, self.forgiving = stream, forgiving
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self._note(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        self.error = self.error or error
        if not self.forgiving:
            raise error
        _discard(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _fill_descriptors() -> None:
    """Put something in the place of closed descriptors, so that no file of ours is taken for a standard stream.

    Output that nobody can see must not seem written: descriptor 1 cannot be written to.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest that is free: this one


def _discard(stream: Any) -> None:
    """Let a stream write to nowhere: what it still holds would fail again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
