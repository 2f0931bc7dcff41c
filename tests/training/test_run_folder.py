"""A run's directory: one process at a time, what is written down of the run, and the result as a whole."""

import json
import os
import socket

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.processes import Child, hear
from tl_paramdecomp.errors import DecompositionFileError, RunInUseError, SettingError
from tl_paramdecomp.training import run_folder as room
from tl_paramdecomp.training.run_folder import RunFolder, held

from .checkpoints import steps
from .test_fit import fit, same, tiny_gpt2


def hold(pipe, lock, forks):
    """Hold a lock, perhaps with a child, until killed, or until the test has ended."""
    with held(lock):
        if forks and not os.fork():
            pipe.send(os.getpid())
        else:
            pipe.send("held")
        pipe.recv()


class Holder:
    """Another process that holds a run's directory, perhaps with a child."""

    def __init__(self, folder, forks=False):
        folder.mkdir(exist_ok=True)
        self.process = Child(folder.with_suffix(".holder"), hold, folder / ".lock", forks)
        said = {hear(self.process.pipe) for _ in range(1 + forks)}
        assert "held" in said
        self.pid, self.child = self.process.process.pid, next(iter(said - {"held"}), None)

    def __enter__(self):
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_):
        self.kill()
        self.process.pipe.close()  # which ends the child


# --- the lock ---------------------------------------------------------------------------------------------------------
def test_a_directory_in_use_is_refused_until_its_process_is_gone(tmp_path):
    """Which is told by number, host and time; it is killed, and its lock ends with it."""
    with Holder(tmp_path) as holder:
        with pytest.raises(
            RunInUseError, match=rf"in use by process {holder.pid} on {socket.gethostname()}, since 20\d\d-"
        ):
            fit(tiny_gpt2(), run_dir=tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
        known = json.loads((tmp_path / ".lock").read_text())
        assert known["pid"] == holder.pid and known["host"] == socket.gethostname()
    fit(tiny_gpt2(), run_dir=tmp_path)
    assert (tmp_path / ".lock").read_text() == ""


def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path):
    """As data workers that were forked do, for a while, after their parent was killed."""
    with Holder(tmp_path, forks=True) as holder:
        with pytest.raises(RunInUseError), held(tmp_path / ".lock"):
            pass
        holder.kill()
        os.kill(holder.child, 0)
        with held(tmp_path / ".lock"):
            pass
        os.kill(holder.child, 0)


def test_one_process_does_not_run_twice_in_a_directory_either(tmp_path):
    def again(info):
        with pytest.raises(RunInUseError, match=f"process {os.getpid()} "):
            fit(tiny_gpt2(), run_dir=tmp_path)
        seen.append(info.step)

    seen = []
    made = fit(tiny_gpt2(), run_dir=tmp_path, callbacks=[again])
    assert seen == [2, 4, 6] and same(made, fit(tiny_gpt2()))


def test_the_lock_is_given_up_however_a_run_ends(tmp_path):
    for changes, error in (
        ({"callbacks": [lambda info: 1 // 0]}, ZeroDivisionError), ({"sites": "blocks.0.attn.W_Q"}, SettingError),
    ):  # fmt: skip
        fit(tiny_gpt2(), run_dir=tmp_path, steps=2)
        with pytest.raises(error):
            fit(tiny_gpt2(), run_dir=tmp_path, **({"steps": 2, "resume": error is SettingError or False} | changes))
    with held(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("looks", [1, 5, None])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, monkeypatch, looks):
    """It is looked at a few times more: it may be about to say so."""
    naps, lock = [], tmp_path / ".lock"

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == looks:
            lock.write_text(said)

    monkeypatch.setattr(room.time, "sleep", nap)
    with held(lock):
        said = lock.read_text()
        lock.write_text("")
        who = "another process" if looks is None else f"process {os.getpid()} on"
        with pytest.raises(RunInUseError, match=f"in use by {who}"), held(lock):
            pass
    assert len(naps) == (looks or 10) and sum(naps) < 1


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="has no locks.*no two runs"), held(tmp_path / ".lock"):
        pass


# --- what is written down ---------------------------------------------------------------------------------------------
def test_run_json_says_what_the_run_is(tmp_path):
    made = fit(tiny_gpt2(), run_dir=tmp_path, checkpoint_every=4, keep_best="loss")
    known = json.loads((tmp_path / "run.json").read_text())
    assert known["settings"] == json.loads(json.dumps(made.info["run"]))
    assert known["loop"]["checkpoint_every"] == 4 and known["loop"]["keep_best"] == "loss"
    assert known["versions"]["torch"] == torch.__version__ and known["device"] == "cpu"
    print_of = made.fingerprints["blocks.0.mlp.W_in"]
    assert known["target"]["blocks.0.mlp.W_in"]["norm"] == print_of.norm and len(known["target"]) == 2


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"steps": 7}, {"batch_size": 2}, {"sites": "blocks.0.mlp.W_in"}], ids=str
)
def test_what_the_run_depends_on_may_not_change(tmp_path, change):
    fit(tiny_gpt2(), run_dir=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SettingError, match=f"run with other {next(iter(change))}.*; choose another run_dir"):
        fit(tiny_gpt2(), run_dir=tmp_path, **change)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_how_it_is_kept_may_change(tmp_path):
    first = fit(tiny_gpt2(), run_dir=tmp_path)
    other = {"log_every": 3, "checkpoint_every": 2, "keep_checkpoints": 1, "on_nonfinite": "skip", "keep_best": "loss"}
    assert same(fit(tiny_gpt2(), run_dir=tmp_path, **other), first)


def test_a_run_that_is_complete_is_read_and_not_done_again(tmp_path):
    first, seen = fit(tiny_gpt2(), run_dir=tmp_path), []
    log = (tmp_path / "metrics.jsonl").read_bytes()
    assert same(fit(tiny_gpt2(), run_dir=tmp_path, callbacks=[seen.append], resume=True), first)
    assert seen == [] and (tmp_path / "metrics.jsonl").read_bytes() == log and sorted(steps(tmp_path)) == [6]


def test_a_method_that_trains_nothing(tmp_path):
    made = tlpd.decompose(tiny_gpt2(), "blocks.0.mlp.*", tlpd.SVD(training=None), run_dir=tmp_path)
    assert same(tlpd.Decomposition.load(tmp_path / "decomposition"), made)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "decomposition", "metrics.jsonl", "run.json"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DecompositionFileError, match="choose another run_dir"):
        fit(tiny_gpt2(), run_dir=tmp_path / "file")


# --- the result -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", [1, 2])
def test_a_result_is_there_as_a_whole(tmp_path, monkeypatch, at):
    """Wherever its writing stops before the new one is whole, one that was there before is there still."""
    before, now = (
        tlpd.decompose(tiny_gpt2(), "blocks.0.mlp.*", tlpd.RandomBasis(training=None), seed=s) for s in (0, 1)
    )
    folder = RunFolder(tmp_path, {})
    folder.save_result(before)
    real, calls = os.replace, []

    def fail(*args):
        calls.append(args)
        if len(calls) >= at:
            raise OSError(5, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DecompositionFileError, match="Could not write the result"):
        folder.save_result(now)
    monkeypatch.undo()
    with RunFolder(tmp_path, {}).opened():
        assert same(tlpd.Decomposition.load(tmp_path / "decomposition"), before)
    folder.save_result(now)
    assert same(tlpd.Decomposition.load(tmp_path / "decomposition"), now)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "decomposition"]
