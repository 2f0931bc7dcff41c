"""Two processes on one batch: their averaged gradients are those of one process, for every loss and preset."""

import functools
import json
import signal
import subprocess
import sys

import pytest

import tl_paramdecomp as tlpd
from tests.support.divided import methods
from tests.support.processes import HANGS, all_well, hear, ranks
from tl_paramdecomp.errors import DataError, SettingError

from . import ranked_run, two_ranks
from .checkpoints import steps

pytestmark = pytest.mark.timeout(1800)  # more than all that is waited for in a test
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of two processes from one: by the way they divide their work, and by method."""
    with ranks(tmp_path_factory.mktemp("two"), 2, two_ranks.compare) as both:
        all_well(both)
        return hear(both[0].pipe)


@pytest.mark.parametrize("how", two_ranks.WAYS)
def test_two_processes_are_one(how, differences):
    """By DDP, with micro-batches on top, and by FSDP2; three steps in float64 with the same random numbers."""
    found = differences[how]
    assert len(found) == len(methods()) - (5 if how == "sharded" else 0)
    print(f"{how}: largest relative difference {max(found.values()):.1e} of {len(found)} losses and presets")
    assert max(found.values()) < TOLERANCE, {name: d for name, d in found.items() if d >= TOLERANCE}


def loaded(run_dir):
    """The result of a run, of whichever kind."""
    kind = json.loads((run_dir / "decomposition" / "decomposition.json").read_text()).get("kind")
    return (tlpd.Decomposition if kind is None else tlpd.SubnetworkDecomposition).load(run_dir / "decomposition")


def ranked(processes, run_dir, **settings):
    """A short run, by several processes or in this one."""
    if processes == 1:
        return ranked_run.run(run_dir, **settings)
    with ranks(run_dir.with_suffix(".told"), processes, ranked_run.forked, run_dir, settings) as all_of_them:
        all_well(all_of_them)
    return loaded(run_dir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process that never stopped, by their settings; its folder is beside the result."""

    @functools.cache
    def made(**settings):
        folder = tmp_path_factory.mktemp("alone")
        return ranked(1, folder, **settings), folder

    return made


def furthest(a, b):
    """Largest difference of two decompositions' parameters."""
    return max(
        (x - y).abs().max().item() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("first, then, settings", [
    (2, 1, {}), (1, 2, {}), (2, 1, {"accumulate": 2}), (2, 1, {"shard": True}), (1, 2, {"method": "L3D"}),
], ids=["2 to 1", "1 to 2", "2 x 2 to 1", "2 shards to 1", "1 to 2, L3D"])  # fmt: skip
def test_a_run_goes_on_with_another_number_of_processes(first, then, settings, tmp_path, alone):
    """With the same random numbers it is, to rounding in float64, the run of one process that never stopped."""
    plain = {key: value for key, value in settings.items() if key not in ("accumulate", "shard")}
    whole, _ = alone(random_numbers="global", **plain)
    ranked(first, tmp_path / "cut", stop=3, random_numbers="global", **settings)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    again = ranked(then, tmp_path / "cut", random_numbers="global", **plain)
    assert furthest(again, whole) < 1e-9
    other, _ = alone(random_numbers="per_rank", **plain)
    assert furthest(other, whole) > 1e-4, "the masks are the same anyway"


@pytest.mark.parametrize("how", [{}, {"shard": True}], ids=["replicated", "sharded"])
def test_what_one_process_finds_not_finite_all_take_back(how, tmp_path, alone):
    settings = {"random_numbers": "global", "on_nonfinite": "skip"}
    whole, folder = alone(spoil=(0, 2), **settings)
    found = ranked(2, tmp_path / "two", spoil=(1, 2), **settings, **how)
    assert furthest(found, whole) < 1e-9
    for run_dir in (folder, tmp_path / "two"):
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        (left_out,) = [line for line in lines if "left_out" in line]
        assert left_out["step"] == 3 and "blocks.0.mlp.W_in.V is not finite after the step" in left_out["left_out"]
    assert furthest(alone(random_numbers="global")[0], whole) > 1e-4


def test_each_process_has_random_numbers_of_its_own_and_goes_on_with_them(tmp_path):
    """Two processes stopped and resumed are, bit for bit, two that never stopped."""
    whole = ranked(2, tmp_path / "whole", double=False)
    ranked(2, tmp_path / "cut", stop=3, double=False)
    assert furthest(ranked(2, tmp_path / "cut", double=False), whole) == 0.0


def test_a_process_that_dies_is_missed_at_once(tmp_path):
    """The other sees the connection close, waits for no time-out, and says what to do."""
    ranked(2, tmp_path / "run", stop=3)
    with ranks(tmp_path / "told", 2, ranked_run.forked, tmp_path / "run", {"die": (1, 4)}) as (left, lost):
        assert lost.wait() == -signal.SIGKILL
        assert left.wait() == 1
        told = left.errors.read_text()
    assert "PeerLostError: Process 0 of 2 does not hear from another one after step 4" in told
    assert "step-00000003" in told and "timed out" not in told.lower()


def test_torchrun_begins_a_run_ends_it_when_a_process_dies_and_begins_it_again(tmp_path):
    """As users do. Where it was cut it goes on, bit for bit as processes that were begun otherwise and never stopped."""

    def torchrun(**settings):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
                   "--rdzv-endpoint", "localhost:0", "-m", ranked_run.__name__, json.dumps(settings)]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=HANGS)

    run_dir = tmp_path / "cut"
    ranked(2, run_dir, stop=3, double=False)
    cut = torchrun(run_dir=str(run_dir), die=[1, 4], double=False)
    assert cut.returncode != 0 and "SIGKILL" in cut.stderr, cut.stderr[-3000:]
    assert list(steps(run_dir)) == [3]
    ended = torchrun(run_dir=str(run_dir), double=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert furthest(loaded(run_dir), ranked(2, tmp_path / "whole", double=False)) == 0.0


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(DataError, match="8 rows cannot be divided among 3 micro-batches"):
        ranked_run.run(tmp_path, accumulate=3)
    with pytest.raises(SettingError, match="several processes"):
        ranked_run.run(tmp_path, shard=True)
