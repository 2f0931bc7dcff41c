"""Runs that are killed: every kill leaves something whole to go on from, and the end is that of a run never killed."""

import json
import subprocess
import sys

import pytest

from .runs import METHODS


def check(method, kills, seed, folder):
    command = [sys.executable, "-m", "tests.training.killed_run", method, str(kills), str(seed), str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    steps = [kill["step"] for kill in found["kills"]]
    print(f"{method}: {sum(kill['killed'] for kill in found['kills'])} of {kills} killed, newest checkpoints {steps}")
    assert found["same"], "the parameters differ from those of a run that was not killed"
    assert found["log"], "the log differs from that of a run that was not killed"
    assert steps == sorted(steps), "a checkpoint was lost"
    assert sum(kill["killed"] for kill in found["kills"]) >= 0.6 * kills
    assert all(kill["killed"] or kill["code"] == 0 for kill in found["kills"]), shown.stderr
    assert "broken" not in shown.stderr and found["left_over"] == []


def test_a_run_killed_five_times(tmp_path):
    check("VPD", 5, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_runs_killed_thirty_times(tmp_path, method):
    check(method, 30, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_at_every_operation_on_its_files(tmp_path):
    """Checkpoints written, replaced, judged and deleted, and the result: wherever it ends, it goes on to the same. Where
    an operation changes no file, a kill after it leaves what one before it did, and is left out."""
    command = [sys.executable, "-m", "tests.training.killed_run", "VPD", "everywhere", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    *killed, last = found
    print(
        f"killed {len(killed)} times in {last['at'] - 1} operations, with newest checkpoints {[k['step'] for k in found]}"
    )
    assert all(kill["killed"] for kill in killed) and not last["killed"]
    assert len(killed) > 40 and last["at"] > 60 and {kill["step"] for kill in found} == {-1, 2, 4, 5}
    assert [kill["at"] for kill in found if not kill["same"]] == [] and "broken" not in shown.stderr
