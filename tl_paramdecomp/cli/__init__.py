"""The command `tl-paramdecomp`: thin, over the same functions that a notebook calls.

Exit status: 0 done, 1 an error of this package (one line on standard error), 2 wrong usage, 130 stopped by Ctrl-C.
"""

import os
import sys

from tl_paramdecomp.errors import TLParamDecompError


def main() -> None:
    """Run the command; errors of the package end it with a line, not with a traceback."""
    from tl_paramdecomp.cli.app import app

    try:
        app(standalone_mode=True)
    except TLParamDecompError as error:
        print(f"tl-paramdecomp: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("tl-paramdecomp: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
