"""Two processes on one batch: their averaged gradients are those of one process, for every loss and preset."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.divided import methods

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
