"""Signals, callbacks and clocks that end a run: what is saved, how it leaves, and that the same call goes on."""

import json
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe

import pytest

from tests.support.processes import HANGS, Child, EndedError, hear
from tl_paramdecomp.errors import DecompositionFileError
from tl_paramdecomp.training import watch as clock
from tl_paramdecomp.training.callbacks import STOP, JsonLines, RunInfo, StepInfo
from tl_paramdecomp.training.watch import ECHO, Interrupts

from . import interrupted_run, runs
from .checkpoints import steps
from .interrupted_run import EVERY, STEPS
from .runs import lines, start
from .test_fit import same


@pytest.fixture(autouse=True)
def type_checked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "DRAWS_IN_PYTHON", False)
        yield


@pytest.fixture(autouse=True)
def handlers():
    """Python's own, whatever the tests were begun with."""
    before = {which: signal.signal(which, handler) for which, handler in interrupted_run.HANDLERS.items()}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


class Hand:
    """What moves the clock, and nothing else does."""

    seconds = 0.0


@pytest.fixture
def hand(monkeypatch):
    found = Hand()
    monkeypatch.setattr(clock, "now", lambda: found.seconds)
    return found


class Running:
    """A run in a process of its own: forked, or begun as users begin theirs. It is killed if the test fails before it ends."""

    def __init__(self, folder, where, forked=True):
        folder.mkdir(exist_ok=True)
        self.errors = folder.parent / f"{folder.name}.txt"
        if forked:
            self.child = Child(self.errors, interrupted_run.run, folder, where)
            self.pipe = self.child.pipe
            return
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-m", interrupted_run.__name__, str(folder), where, str(theirs.fileno())]
        with theirs, self.errors.open("w") as errors:
            self.child = subprocess.Popen(command, stderr=errors, pass_fds=[theirs.fileno()])

    def __enter__(self):
        assert hear(self.pipe) == "within"
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        self.pipe.close()

    def signal(self, which):
        """Send a signal; what is heard then: that it was noted, or what left the run."""
        self.child.send_signal(which)
        return hear(self.pipe)

    def go_on(self):
        """Let what it is within end; what is heard then, and what left the run."""
        self.pipe.send("go on")
        return hear(self.pipe), hear(self.pipe)

    def end(self):
        """Its exit code, and its lines on standard error before Python's own traceback."""
        code = self.child.wait(HANGS)
        return code, [line for line in self.errors.read_text().partition("Traceback")[0].splitlines() if line.strip()]


def goes_on(folder):
    """Whether the run, gone on with in this process, is one that was never stopped."""
    settings = {"steps": STEPS, "checkpoint_every": EVERY}
    whole = start("SPD", folder.parent / "whole", **settings)
    return same(start("SPD", folder, **settings), whole) and lines(folder) == lines(folder.parent / "whole")


@pytest.mark.parametrize("which, name, code", [
    (signal.SIGINT, "KeyboardInterrupt", -signal.SIGINT), (signal.SIGTERM, "SystemExit", 143),
], ids=["SIGINT", "SIGTERM"])  # fmt: skip
def test_one_signal_lets_the_step_end_saves_and_leaves(tmp_path, which, name, code):
    """In the sixth step, which goes on after the signal was noted; one of the runs is begun as users begin theirs."""
    folder = tmp_path / "cut"
    with Running(folder, "step", forked=which == signal.SIGTERM) as run:
        assert run.signal(which) == "noted"
        assert run.go_on() == ("went on", f"{name}, handlers restored")
        told = f"Stopped after step 6 of 12; the same call goes on from {folder / 'checkpoints'}."
        assert run.end() == (code, [told])
    assert list(steps(folder)) == [6] and len(lines(folder)) == 6 and not (folder / "decomposition").exists()
    if which == signal.SIGTERM:
        assert goes_on(folder)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(tmp_path, second):
    """Within a step that nobody lets go on; nothing is saved."""
    name = "KeyboardInterrupt" if second == signal.SIGINT else "SystemExit"
    with Running(tmp_path / "cut", "step") as run:
        assert run.signal(signal.SIGINT) == "noted"
        assert run.signal(second) == f"{name}, handlers restored"
        code, told = run.end()
    assert (code == 143) == (second == signal.SIGTERM) and code and not any("Stopped" in line for line in told)
    assert steps(tmp_path / "cut") == {}


def test_a_second_signal_within_a_save_leaves_what_was_whole(tmp_path):
    folder = tmp_path / "cut"
    with Running(folder, "save") as run:
        assert run.signal(signal.SIGINT) == "noted"
        assert run.signal(signal.SIGINT) == "KeyboardInterrupt, handlers restored"
        run.end()
    assert steps(folder) == {} and (folder / "checkpoints" / ".writing").exists() and goes_on(folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    """SIGTERM ends the process as it always does."""
    with Running(tmp_path / "cut", "thread") as run:
        with pytest.raises(EndedError):
            run.signal(signal.SIGTERM)
        assert run.end() == (-signal.SIGTERM, [])
    assert steps(tmp_path / "cut") == {}


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
            start("SPD", tmp_path / "d", callbacks=[lambda info: signal.raise_signal(signal.SIGTERM)])
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
        start("SPD", tmp_path, callbacks=[lambda info: signal.raise_signal(signal.SIGINT)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(lines(tmp_path)) == 8


def test_an_echo_is_no_second_signal(tmp_path, hand):
    """Launchers pass a signal on to processes that got it themselves."""

    def twice(info):
        if info.step == 4:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        start("SPD", tmp_path, callbacks=[twice])
    assert caught.value.code == 143 and sorted(steps(tmp_path)) == [3, 4]
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        hand.seconds += ECHO
        signal.raise_signal(signal.SIGINT)
        hand.seconds += 0.01
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.leaving
        interrupts.asked = None


def test_a_signal_that_comes_last_is_not_swallowed(tmp_path):
    """After the last step the run is complete and saved; it leaves, and the same call writes the result."""

    def late(info):
        if info.step == info.steps:
            signal.raise_signal(signal.SIGINT)

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
def test_a_budget_of_time_saves_and_returns_what_there_is(tmp_path, capsys, hand):
    """Of steps that take 10 seconds each. At least one is taken each time, so that every call gets further."""

    def pass_by(info):
        hand.seconds += 10.0

    def done(folder, budget):
        made = start("VPD", folder, callbacks=[pass_by], max_seconds=budget)
        return made, made.info.get("stopped_after")

    assert [done(tmp_path / "cut", budget)[1] for budget in (1e-6, 20.0, 10.1)] == [1, 3, 5]
    last, stopped = done(tmp_path / "cut", 30.1)
    assert stopped is None and same(last, start("VPD", tmp_path / "whole"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert "Stopped after step 1 of 8; the same call goes on" in capsys.readouterr().err
    assert done(None, 1e-6)[1] == 1 and capsys.readouterr().err == ""


def test_the_log_has_the_seconds_since_the_call_began(tmp_path, hand):
    def pass_by(info):
        hand.seconds += 10.0

    start("SPD", tmp_path, steps=3, callbacks=[pass_by])
    log = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in log] == [0.0, 10.0, 20.0]


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
