"""Two processes on one batch: their averaged gradients are those of one process, for every loss and preset."""

import json
import os
import subprocess
import sys
import time

import pytest

import tl_paramdecomp as tlpd
from tests.support.divided import methods
from tl_paramdecomp.errors import DataError, SettingError

from .ranked_run import run

TOLERANCE = 1e-6


def torchrun(module, *words, processes=2, timeout=300):
    """A module run by so many processes; its rank 0 prints one JSON object last."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "-m", module, *words]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.mark.parametrize("how", ["replicated", "accumulated", "sharded"])
def test_two_processes_are_one(how):
    """By DDP, with micro-batches on top, and by FSDP2; three steps in float64 with the same random numbers."""
    done = torchrun("tests.training.two_ranks", how)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(methods()) - (5 if how == "sharded" else 0)
    print(f"{how}: largest relative difference {max(found.values()):.1e} of {len(found)} losses and presets")
    assert max(found.values()) < TOLERANCE, {name: d for name, d in found.items() if d >= TOLERANCE}


def ranked(processes, run_dir, **settings):
    """A short run, by several processes or in this one."""
    if processes == 1:
        return run(run_dir, **settings)
    done = torchrun("tests.training.ranked_run", json.dumps({"run_dir": str(run_dir), **settings}), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return tlpd.Decomposition.load(run_dir / "decomposition") if settings.get("method") != "L3D" else (
        tlpd.SubnetworkDecomposition.load(run_dir / "decomposition")
    )  # fmt: skip


def furthest(a, b):
    """Largest difference of two decompositions' parameters."""
    return max(
        (x - y).abs().max().item() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("first, then, settings", [
    (2, 1, {}), (1, 2, {}), (2, 1, {"accumulate": 2}), (2, 1, {"shard": True}), (1, 2, {"method": "L3D"}),
], ids=["2 to 1", "1 to 2", "2 x 2 to 1", "2 shards to 1", "1 to 2, L3D"])  # fmt: skip
def test_a_run_goes_on_with_another_number_of_processes(first, then, settings, tmp_path):
    """With the same random numbers it is, to rounding in float64, the run of one process that never stopped."""
    settings = {"random_numbers": "global"} | settings
    plain = {key: value for key, value in settings.items() if key not in ("accumulate", "shard")}
    whole = ranked(1, tmp_path / "whole", **plain)
    ranked(first, tmp_path / "cut", stop=3, **settings)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    again = ranked(then, tmp_path / "cut", **plain)
    assert furthest(again, whole) < 1e-9
    other = ranked(1, tmp_path / "other", **(plain | {"random_numbers": "per_rank"}))
    assert furthest(other, whole) > 1e-4, "the masks are the same anyway"


@pytest.mark.parametrize("how", [{}, {"shard": True}], ids=["replicated", "sharded"])
def test_what_one_process_finds_not_finite_all_take_back(how, tmp_path):
    settings = {"random_numbers": "global", "on_nonfinite": "skip"}
    whole = ranked(1, tmp_path / "whole", spoil=[0, 2], **settings)
    found = ranked(2, tmp_path / "two", spoil=[1, 2], **settings, **how)
    assert furthest(found, whole) < 1e-9
    for folder in ("whole", "two"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        (left_out,) = [line for line in lines if "left_out" in line]
        assert left_out["step"] == 3 and "blocks.0.mlp.W_in.V is not finite after the step" in left_out["left_out"]
    assert furthest(ranked(1, tmp_path / "none", random_numbers="global"), whole) > 1e-4


def test_each_process_has_random_numbers_of_its_own_and_goes_on_with_them(tmp_path):
    """Two processes stopped and resumed are, bit for bit, two that never stopped."""
    whole = ranked(2, tmp_path / "whole", double=False)
    ranked(2, tmp_path / "cut", stop=3, double=False)
    assert furthest(ranked(2, tmp_path / "cut", double=False), whole) == 0.0


def test_a_process_that_dies_brings_the_run_down(tmp_path):
    """Within a minute, with a message, and without harm to the checkpoint before."""
    ranked(2, tmp_path, stop=3)
    begun = time.monotonic()
    command = json.dumps({"run_dir": str(tmp_path), "die": [1, 4]})
    done = torchrun("tests.training.ranked_run", command, timeout=120)
    seconds = time.monotonic() - begun
    print(f"down after {seconds:.1f} s")
    assert done.returncode != 0 and seconds < 60
    assert "PeerLostError: Process 0 of 2 does not hear from another one after step 4" in done.stderr
    assert "step-00000003" in done.stderr
    ranked(2, tmp_path)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(DataError, match="8 rows cannot be divided among 3 micro-batches"):
        run(tmp_path, accumulate=3)
    with pytest.raises(SettingError, match="several processes"):
        run(tmp_path, shard=True)
