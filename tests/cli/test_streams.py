"""The command when it is stopped, or when nobody takes what it prints: one line, its status, and no traceback.

Ctrl-C comes when a module is looked for, or when the interpreter ends: a sitecustomize in the child sends it, so that nothing
depends on how fast the machine is.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = [sys.executable, "-c", "from tl_paramdecomp.cli import main; main()"]
SITES = ("sites", "micro-gpt2", "blocks.0.mlp.*")
STOPPED = "tl-paramdecomp: stopped\n"
SENDER = """
import atexit, os, signal, sys

def send():
    os.kill(os.getpid(), signal.SIGINT)

class Dying:
    def __del__(self):
        send()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"].removesuffix(" lost").removesuffix(" bent"):
            sys.meta_path.remove(self)
            if os.environ["AT"].endswith(" lost"):
                Dying()
            elif os.environ["AT"].endswith(" bent"):
                try:
                    send()
                except KeyboardInterrupt:
                    raise RuntimeError("something else")
            else:
                send()

sys.meta_path.insert(0, Finder())
if os.environ["AT"] == "the end":
    atexit.register(send)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "JAXTYPING"))}
    here = str(Path(__file__).parents[2])
    return {**kept, "PYTHONPATH": os.pathsep.join([more.pop("first", here), here]), **more}


@pytest.mark.parametrize("at", [
    "tl_paramdecomp.cli.streams", "torch", "tl_paramdecomp.training.fit", "transformers", "transformers lost",
    "transformers bent", "the end",
    *(pytest.param(at, marks=pytest.mark.slow) for at in ("typer", "rich.console", "tl_paramdecomp.cli.app", "torch.nn",
                                                          "jaxtyping", "tl_paramdecomp.cli.models")),
])  # fmt: skip
def test_ctrl_c_is_one_line_and_status_130_whenever_it_comes(tmp_path, at):
    (tmp_path / "sitecustomize.py").write_text(SENDER)
    done = subprocess.run(
        [*MAIN, *SITES, "--json"],
        capture_output=True,
        text=True,
        env=environment(first=str(tmp_path), AT=at),
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (130, STOPPED)
    assert json.loads(done.stdout)["sites"] if at == "the end" else not done.stdout


def test_where_ctrl_c_is_ignored_it_stays_so(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SENDER)
    done = subprocess.run(
        [*MAIN, *SITES, "--json"], capture_output=True, text=True, env=environment(first=str(tmp_path), AT="torch"),
        timeout=300, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["sites"] and not done.stderr


def in_shell(redirections, *arguments):
    """The command under redirections, as a shell makes them: its status, and what is left of both streams."""
    line = f'"$@" {redirections}; echo "status $?" >&3'
    reader, writer = os.pipe()
    done = subprocess.run(
        ["bash", "-c", line.replace(">&3", f">&{writer}"), "bash", *MAIN, *arguments], capture_output=True, text=True,
        env=environment(), timeout=300, pass_fds=[writer],
    )  # fmt: skip
    os.close(writer)
    with open(reader) as kept:
        status = int(kept.read().split()[-1])
    return status, done.stdout, done.stderr


FULL, CLOSED = "No space left on device", "it is closed"
WHAT = pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        (*SITES, "--json"),
        *(pytest.param(a, marks=pytest.mark.slow) for a in (("circuit", "--help"), SITES)),
    ],
    ids=" ".join,
)


@WHAT
def test_standard_output_that_takes_nothing(arguments):
    for redirection, why in ((">/dev/full", FULL), (">&-", CLOSED)):
        status, out, err = in_shell(redirection, *arguments)
        assert (status, out) == (1, "")
        assert err == f"tl-paramdecomp: cannot write to standard output: {why}\n"


@WHAT
def test_a_reader_that_leaves(arguments):
    """The pipe's other end is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        done = subprocess.run([*MAIN, *arguments], stdout=out, stderr=subprocess.PIPE, env=environment(), timeout=300)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_standard_error_that_takes_nothing_changes_nothing(redirection, tmp_path):
    """Neither results nor statuses: success, an error, wrong usage."""
    status, out, _ = in_shell(redirection, *SITES, "--json")
    assert status == 0 and json.loads(out)["sites"]
    assert in_shell(redirection, "sites", "micro-gpt2", "nothing.*")[:2] == (1, "")
    assert in_shell(redirection, "sites")[:2] == (2, "")


def test_bars_without_a_place_do_not_stop_the_work(tmp_path):
    """An evaluation and its bar on a standard error that is full."""
    what = ("decompose", "micro-gpt2", "--sites", "blocks.0.mlp.W_in", "--steps", "1", "--batch-size", "2")
    status, out, _ = in_shell("2>/dev/full", *what, "--out", str(tmp_path / "run"))
    assert status == 0 and "KL from the target" in out
    what = ("evaluate", "micro-gpt2", str(tmp_path / "run" / "decomposition"), "--rows", "2", "--restarts", "1")
    status, out, _ = in_shell("2>/dev/full", *what, "--seconds", "0", "--json")
    assert status == 0 and json.loads(out)["left_out"]


@pytest.mark.parametrize("redirections", [">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>&-"])
def test_where_no_stream_is_left_the_status_is(redirections):
    assert in_shell(redirections, "--help") == (1, "", "")
    assert in_shell(redirections, "sites") == (2, "", "")


def test_results_are_written_before_they_are_printed(tmp_path):
    """A reader that leaves does not take the file with it."""
    what = ("patch", "micro-gpt2", str(tmp_path / "dec"), "--prompt", "the cat", "--ablate", "blocks.0.mlp.W_in:0")
    code = (
        "import tl_paramdecomp as tlpd; m = tlpd.load_micro_gpt2();"
        "tlpd.decompose(m, 'blocks.0.mlp.W_in', tlpd.SVD(training=None)).save('dec')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=300)
    status, _, err = in_shell(">/dev/full", *what, "--out", str(tmp_path / "found.json"))
    assert status == 1 and FULL in err and json.loads((tmp_path / "found.json").read_text())["kl"] >= 0


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = in_shell("", "demo", "--steps", "0", "--out", str(tmp_path / "file" / "below"))
    assert status == 1 and "Traceback" not in err and "below" in err.splitlines()[-1]


def test_help_takes_no_torch():
    code = (
        "import sys\nfrom tl_paramdecomp.cli import main\nsys.argv[1:] = ['--help']\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
