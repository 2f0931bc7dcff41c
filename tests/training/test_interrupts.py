"""Signals, callbacks and clocks that end a run: what is saved, how it leaves, and that the same call goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tl_paramdecomp.errors import DecompositionFileError
from tl_paramdecomp.training.callbacks import STOP, JsonLines, RunInfo, StepInfo
from tl_paramdecomp.training.interrupts import ECHO, Interrupts

from . import runs
from .checkpoints import steps
from .interrupted_run import EVERY, STEPS
from .runs import lines, start
from .test_fit import same


@pytest.fixture(autouse=True)
def type_checked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "DRAWS_IN_PYTHON", False)
        yield


class Running:
    """A run in a process of its own; `signals` are sent once it is within what it is to be interrupted in."""

    def __init__(self, folder, where, *signals, pause=0.3):
        command = [sys.executable, "-m", "tests.training.interrupted_run", str(folder), where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while (line := process.stdout.readline()) != "within\n":
                assert line, process.stderr.read()
            for i, which in enumerate(signals):
                time.sleep(pause if i else 0.1)
                process.send_signal(which)
            sent = time.monotonic()
            self.said = process.stdout.readline().strip()
            self.seconds = time.monotonic() - sent
            """From the last signal until the run was left."""
            _, self.err = process.communicate(timeout=60)
        self.code = process.returncode

    def told(self):
        """Lines on standard error before Python's own traceback."""
        return [line for line in self.err.partition("Traceback")[0].splitlines() if line.strip()]


def goes_on(folder):
    """Whether the run, gone on with in this process, is one that was never stopped."""
    settings = {"steps": STEPS, "checkpoint_every": EVERY}
    whole = start("SPD", folder.parent / "whole", **settings)
    return same(start("SPD", folder, **settings), whole) and lines(folder) == lines(folder.parent / "whole")


@pytest.mark.parametrize("which, name, code", [
    (signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT), (signal.SIGTERM, "SystemExit", 143),
], ids=["SIGINT", "SIGTERM"])  # fmt: skip
def test_one_signal_lets_the_step_end_saves_and_leaves(tmp_path, which, name, code):
    """In the sixth step, which takes a second."""
    run = Running(tmp_path / "cut", "step", which)
    assert run.said == f"{name} handlers restored" and run.code == code
    assert list(steps(tmp_path / "cut")) == [6] and len(lines(tmp_path / "cut")) == 6
    told = f"Stopped after step 6 of 12; the same call goes on from {tmp_path / 'cut' / 'checkpoints'}."
    assert run.told() == [told] and run.seconds > 0.4
    assert not (tmp_path / "cut" / "decomposition").exists()
    if which == signal.SIGTERM:
        assert goes_on(tmp_path / "cut")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(tmp_path, second):
    """Within a step that would go on for 20 seconds; nothing is saved."""
    run = Running(tmp_path, "long", signal.SIGINT, second)
    print(f"{run.seconds:.2f} s from the second signal until the run was left")
    assert run.said.endswith("handlers restored") and run.code == (-signal.SIGINT if second == signal.SIGINT else 143)
    assert run.seconds < 5 and run.told() == [] and steps(tmp_path) == {}


def test_a_second_signal_within_a_save_leaves_what_was_whole(tmp_path):
    run = Running(tmp_path / "cut", "save", signal.SIGINT, signal.SIGINT)
    assert run.code == -signal.SIGINT and run.seconds < 5 and steps(tmp_path / "cut") == {}
    assert (tmp_path / "cut" / "checkpoints" / ".writing").exists() and goes_on(tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    """SIGTERM ends the process as it always does."""
    run = Running(tmp_path, "thread", signal.SIGTERM)
    assert run.code == -signal.SIGTERM and steps(tmp_path) == {}


def test_handlers_of_others_are_back_after_every_exit(tmp_path):
    def ours(number, frame):
        raise AssertionError("it was called")

    before = {which: signal.signal(which, ours) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        handled = []

        def look(info):
            handled.append(signal.getsignal(signal.SIGTERM) is not ours)

        def fail(info):
            raise RuntimeError("on purpose")

        def interrupt(info):
            raise KeyboardInterrupt

        start("SPD", tmp_path / "a", callbacks=[look])
        for callback, error in ((fail, RuntimeError), (interrupt, KeyboardInterrupt)):
            with pytest.raises(error):
                start("SPD", tmp_path / "b", callbacks=[callback])
        start("SPD", tmp_path / "c", callbacks=[lambda info: STOP])
        with pytest.raises(SystemExit):
            start("SPD", tmp_path / "d", callbacks=[lambda info: os.kill(os.getpid(), signal.SIGTERM)])
        assert all(signal.getsignal(which) is ours for which in before) and handled == [True] * 8
        handled.clear()
        start("SPD", callbacks=[look])
        assert handled == [False] * 8, "without a folder there is nothing to save, and nothing is handled"
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As `nohup` and shells set it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start("SPD", tmp_path, callbacks=[lambda info: os.kill(os.getpid(), signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(lines(tmp_path)) == 8


def test_an_echo_is_no_second_signal(tmp_path):
    """Launchers pass a signal on to processes that got it themselves."""

    def twice(info):
        if info.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        start("SPD", tmp_path, callbacks=[twice])
    assert caught.value.code == 143 and sorted(steps(tmp_path)) == [3, 4]
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * ECHO)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert interrupts.leaving
        interrupts.asked = None


def test_a_signal_that_comes_last_is_not_swallowed(tmp_path):
    """After the last step the run is complete and saved; it leaves, and the same call writes the result."""

    def late(info):
        if info.step == info.steps:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start("SPD", tmp_path / "cut", callbacks=[late])
    assert not (tmp_path / "cut" / "decomposition").exists()
    assert same(start("SPD", tmp_path / "cut"), start("SPD"))


def test_an_interrupt_within_the_data_saves_nothing_of_a_half_step(tmp_path):
    """Where the data stands then belongs to no number of steps: what was saved before is gone on with."""

    def make(step):
        if step == 5 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return runs.drawn_rows(step)

    with pytest.raises(KeyboardInterrupt):
        start("VPD", tmp_path / "cut", data=make)
    assert sorted(steps(tmp_path / "cut")) == [3]
    (tmp_path / "again").touch()
    assert same(start("VPD", tmp_path / "cut", data=make), start("VPD"))


# --- budgets and STOP -------------------------------------------------------------------------------------------------
def test_a_budget_of_time_saves_and_returns_what_there_is(tmp_path, capsys):
    """At least one step is taken each time, so that every call gets further."""

    def wait(info):
        time.sleep(0.05)

    begun, calls, last = time.monotonic(), 0, None
    while last is None or "stopped_after" in last.info:
        known = 0 if last is None else last.info["stopped_after"]
        last = start("VPD", tmp_path / "cut", callbacks=[wait], max_seconds=0.3 if calls else 1e-6)
        assert last.info.get("stopped_after", 8) > known
        assert calls or last.info["stopped_after"] == 1
        calls += 1
        assert time.monotonic() - begun < 60
    assert calls > 2 and same(last, start("VPD", tmp_path / "whole"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert "Stopped after step 1 of 8; the same call goes on" in capsys.readouterr().err
    part = start("VPD", max_seconds=1e-6)
    assert part.info["stopped_after"] == 1 and capsys.readouterr().err == ""


def test_stop_ends_the_run_after_all_callbacks_were_told(tmp_path):
    told = []
    made = start("SPD", tmp_path, callbacks=[
        lambda info: STOP if info.step == 4 else "go on", lambda info: told.append(info.step),
    ])  # fmt: skip
    assert told == [1, 2, 3, 4] and made.info["stopped_after"] == 4
    assert (tmp_path / "decomposition" / "components.safetensors").exists()
    assert same(type(made).load(tmp_path / "decomposition"), made)
    whole = start("SPD", tmp_path)
    assert "stopped_after" not in whole.info and same(type(made).load(tmp_path / "decomposition"), whole)
    assert "stopped_after" not in type(made).load(tmp_path / "decomposition").info


# --- callbacks --------------------------------------------------------------------------------------------------------
class Heard:
    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def begin(self, run):
        assert isinstance(run, RunInfo)
        self.heard.append((self.name, "begin", run.first))
        self.run = run

    def __call__(self, info):
        assert isinstance(info, StepInfo)
        self.heard.append((self.name, info.step))
        info.figures[self.name] = float(info.step)

    def end(self):
        self.heard.append((self.name, "end"))


def test_callbacks_are_told_of_begin_and_end_however_it_ends(tmp_path):
    heard = []
    a, b = Heard("a", heard), Heard("b", heard)

    def fail(info):
        assert info.figures["a"] == info.figures["b"] == info.step
        if info.step == 2:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        start("SPD", tmp_path, callbacks=[a, b, fail], checkpoint_every=1)
    assert heard == [
        ("a", "begin", 0), ("b", "begin", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", "end"), ("a", "end"),
    ]  # fmt: skip
    assert [line["a"] for line in lines(tmp_path)] == [1.0, 2.0], "figures that callbacks add are in the log"
    heard.clear()
    start("SPD", tmp_path, callbacks=[a], steps=8)
    assert heard[0] == ("a", "begin", 1) and heard[-1] == ("a", "end")
    assert a.run.run_dir == tmp_path and a.run.steps == 8 and a.run.settings["seed"] == 0
    assert a.run.decomposition["blocks.0.mlp.W_in"].V.shape == (16, 12)


def test_lines_are_cut_to_a_step_and_torn_ones_go(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(1, 6):
        log(StepInfo(step, 9, {"loss": step / 2}, None))
    with log.path.open("ab") as file:
        file.write(b'not JSON\n[3]\n{"loss": 1}\n{"step": 4.5}\n{"step": 3, "lo\xff')
    log.cut(3)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": step, "loss": step / 2} for step in (1, 2, 3)
    ]
    log(StepInfo(4, 9, {}, None))
    assert log.path.read_text().endswith('{"step": 4}\n')
    log.cut(0)
    assert log.path.read_text() == ""
    with pytest.raises(DecompositionFileError, match="Could not write to"):
        JsonLines(tmp_path / "none" / "log.jsonl")(StepInfo(1, 2, {}, None))


def test_a_torn_log_does_not_keep_a_run_from_going_on(tmp_path):
    start("SPD", tmp_path / "cut", callbacks=[lambda info: STOP if info.step == 4 else None])
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5, "loss": 3.')
    start("SPD", tmp_path / "cut"), start("SPD", tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("progress, terminal, shown", [
    (None, False, False), (None, True, True), (True, False, True), (False, True, False),
])  # fmt: skip
def test_bars_are_shown_where_somebody_looks(monkeypatch, capsys, progress, terminal, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    start("SPD", progress=progress, steps=1)
    assert ("decompose" in capsys.readouterr().err) == shown


def test_a_run_in_a_thread(tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(start("SPD", tmp_path / "thread")))
    thread.start()
    thread.join()
    whole = start("SPD", tmp_path / "whole")
    assert lines(tmp_path / "thread") == lines(tmp_path / "whole")
    assert same(made[0], whole)
