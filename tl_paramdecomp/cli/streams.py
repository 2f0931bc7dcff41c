"""Standard output and error of the command, which may be closed, full, or without a reader.

What goes wrong with standard output ends the command; what goes wrong with standard error is lost, and the command goes on.
"""

import contextlib
import errno
import os
import sys
from typing import Any


class Streams:
    """A context in which both streams exist, and writing to standard error never fails."""

    def __enter__(self) -> "Streams":
        self.closed = sys.stdout is None
        _fill_descriptors()
        out, err = (
            os.fdopen(descriptor, "w", encoding="utf-8", closefd=False) if stream is None else stream
            for descriptor, stream in ((1, sys.stdout), (2, sys.stderr))
        )
        self.out, self.err = _Stream(out), _Stream(err, forgiving=True)
        sys.stdout, sys.stderr = self.out, self.err  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self.out.stream, self.err.stream

    def finished(self, status: int) -> int:
        """The status to leave with, once all that was printed is written: 1 in place of 0 where it could not be."""
        with contextlib.suppress(OSError):
            self.out.flush()
        error = self.out.error
        if error is None:
            return status
        if error.errno != errno.EPIPE:  # the reader (head, less) has all it wanted
            why = "it is closed" if self.closed else error.strerror
            print(f"tl-paramdecomp: cannot write to standard output: {why}", file=sys.stderr)
        _discard(self.out.stream)
        return status or 1


class _Stream:
    """A stream that remembers the first error of what it writes to; a `forgiving` one goes on as if nothing had happened."""

    def __init__(self, stream: Any, forgiving: bool = False) -> None:
        self.stream, self.forgiving = stream, forgiving
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Any, *given: str) -> None:
        try:
            call(*given)
        except OSError as error:
            self.error = self.error or error
            if not self.forgiving:
                raise
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
