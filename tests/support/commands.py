"""The command in processes of its own that start at once: forked from one that has imported what commands import.

As a user's process each has its arguments, folder, streams and exit status; only starting the interpreter is done once.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds that a command may take."""
_server: "subprocess.Popen[str] | None" = None


def command(*arguments: Any, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the command and return what it printed."""
    global _server
    if _server is None or _server.poll() is not None:
        start = [sys.executable, "-m", "tests.support.commands"]
        _server = subprocess.Popen(start, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ("out", "err")]
        _server.stdin.write(json.dumps([words, str(cwd or Path.cwd()), *streams]) + "\n")
        _server.stdin.flush()
        if not select.select([_server.stdout], [], [], PATIENCE)[0]:
            _server.kill()
            raise subprocess.TimeoutExpired(words, PATIENCE)
        status = int(_server.stdout.readline())
        out, err = (Path(path).read_text(encoding="utf-8") for path in streams)
    return subprocess.CompletedProcess(words, status, out, err)


def _serve() -> None:
    """Fork for every line of standard input, and answer with the exit status."""
    import transformer_lens
    import transformers  # noqa: F401

    import tl_paramdecomp.cli.app
    import tl_paramdecomp.training.fit  # noqa: F401

    del transformer_lens
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(words: list[str], cwd: str, out: str, err: str) -> None:
    """The command, in a process that ends with it."""
    from tl_paramdecomp.cli import main

    os.chdir(cwd)
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv = ["tl-paramdecomp", *words]
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
