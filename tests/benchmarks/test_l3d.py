"""A step of L3D against the dense form: time and memory, and how the cost grows with the number of subnetworks."""

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.l3d import Step, target
from tests.benchmarks.timing import ratio
from tl_paramdecomp.patching.target import frozen

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize("rank", [1, 8])
def test_an_l3d_step(rank, report):
    torch.set_num_threads(1)
    model = target()
    with frozen(model):
        step = Step(model, rank)
        ours = step.factored().item(), {n: p.grad.clone() for n, p in step.made.named_parameters()}
        assert abs(ours[0] - step.plain().item()) < 1e-4
        for name, parameter in step.made.named_parameters():
            assert (ours[1][name] - parameter.grad).norm() < 1e-3 * parameter.grad.norm(), name
        measured = ratio(step.factored, step.plain, rounds=5, warm=1)
    report(f"L3D step / dense form, 4 layers of 128, 64 samples, 128 subnetworks of rank {rank}", measured)


def test_the_cost_grows_with_subnetworks(report):
    torch.set_num_threads(1)
    model = target()
    with frozen(model):
        few, many = Step(model, 1, 256), Step(model, 1, 1024)
        report("L3D step, 1,024 subnetworks / 256", ratio(many.factored, few.factored, rounds=5, warm=1))


@pytest.mark.parametrize("rank", [1, 8])
def test_peak_memory_of_an_l3d_step(rank, report):
    found = {}
    for which in ("factored", "plain"):
        command = [sys.executable, "-m", "tests.benchmarks.l3d", which, str(rank)]
        found[which] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    mega = {which: values["grown"] / 2**20 for which, values in found.items()}
    name = f"peak memory of an L3D step above the model's / dense form's, rank {rank} (MB)"
    report(name, (mega["factored"] / mega["plain"], mega["factored"], mega["plain"]))


def test_peak_memory_at_the_size_of_gpt2_small(report):
    """Above 8 GB the dictionaries, their moments or the gradients exist more often than they need to."""
    command = [sys.executable, "-m", "tests.benchmarks.l3d", "gpt2-small"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    report(
        "peak memory of L3D on GPT-2 small's 24 MLP matrices, 1,000 subnetworks of rank 1, 16 x 64 tokens / 8 GB",
        (found["peak"] / 8e9, found["peak"] / 1e9, 8.0),
    )
    assert found["peak"] < 8e9
