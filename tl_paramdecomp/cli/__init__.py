"""The command `tl-paramdecomp`: thin, over the same functions that a notebook calls.

Exit status: 0 done; 1 an error of this package, of a file, or of standard output (one line on standard error; none where the
reader has left); 2 wrong usage; 130 stopped by Ctrl-C (one line). What cannot be written to standard error is lost.
"""

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_paramdecomp.cli.streams import Streams

STOPPED = "tl-paramdecomp: stopped"


def main() -> None:
    """Run the command and leave with its status; whatever ends it early ends it with a line, not with a traceback."""
    _on_interrupt(_leave_at_once)
    from tl_paramdecomp.cli.streams import Streams

    with Streams() as streams:
        status = streams.finished(_status(streams))
        _on_interrupt(_leave_at_once)
    raise SystemExit(status)


def _status(streams: "Streams") -> int:
    """Exit status of the command that the arguments name, once it has run."""
    from tl_paramdecomp.cli.app import app
    from tl_paramdecomp.errors import TLParamDecompError

    if sys.argv[1:] and not {"--help", "--version"} & {*sys.argv}:
        import tl_paramdecomp.training.fit  # noqa: F401 - takes seconds, and nothing is to be tidied up yet
    asked: list[int] = []

    def raise_it(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    _on_interrupt(raise_it)
    sys.unraisablehook = _not_lost
    try:
        try:
            app(standalone_mode=True)
            return 0
        except SystemExit as end:  # typer makes one of Ctrl-C, too
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if code not in (1, 130) or not (asked or code == 130):
                return code
        except (TLParamDecompError, OSError) as error:
            known = isinstance(error, TLParamDecompError)
            if known or (not asked and streams.out.error is None):  # `finished` tells those of standard output
                print(f"tl-paramdecomp: {type(error).__name__}: {error}", file=sys.stderr)
            if known or not asked:
                return 1
        except Exception:
            if not asked:  # a library may make something else of Ctrl-C
                raise
    except KeyboardInterrupt:
        pass
    print(STOPPED, file=sys.stderr)
    return 130


def _on_interrupt(handler: Any) -> None:
    """What Ctrl-C does from here on; nothing, where it is ignored (nohup) or this is not the main thread."""
    if signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN):
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, handler)


def _leave_at_once(number: int, frame: Any) -> None:
    """While modules load and after all is done there is nothing to tidy up, and an exception could be lost in an import."""
    with contextlib.suppress(OSError):
        os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


def _not_lost(unraisable: "sys.UnraisableHookArgs") -> None:
    """A Ctrl-C that comes where nothing can be raised (a finaliser, an import lock's callback) is no less a Ctrl-C."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave_at_once(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)
