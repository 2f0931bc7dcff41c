"""Peak memory of two training steps in a process of its own; prints bytes as JSON."""

import json
import resource
import sys

import torch

from tests.benchmarks.test_training_step import Ours, Plain, gpt2, method_of
from tl_paramdecomp.training.fit import frozen


def resident():
    """The most this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
