"""Peak memory of two training steps in a process of its own; prints bytes as JSON."""

import json
import sys
from pathlib import Path

import torch

from tests.benchmarks.test_training_step import Ours, Plain, gpt2, method_of
from tl_paramdecomp.patching.target import frozen


def resident():
    """The most this process has held so far; getrusage would count what the parent held before it started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    which, layerwise = sys.argv[1], bool(int(sys.argv[2]))
    model, modules, tokens = gpt2()
    with frozen(model):
        stepper = Ours(method_of(layerwise), model, modules, tokens)
        if which == "plain":
            stepper = Plain(stepper, modules, layerwise=layerwise)
        before = resident()
        for _ in range(2):
            stepper.step()
    print(json.dumps({"peak": resident(), "grown": resident() - before}))
