"""A short run by however many processes. Begun by `torchrun`, it is told as JSON what to do: `{"run_dir": ..., "stop": 3}`,
`"die": [1, 4]` (a rank, and the step before which it is killed), `"spoil": [1, 2]`."""

import json
import os
import signal
import sys

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.adversary import PersistentAdversarialReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.training.callbacks import STOP

from .test_fit import tiny_gpt2, tokens

LOSSES = (
    Faithfulness(10.0),
    StochasticReconstruction(0.5, sites="subset"),
    PersistentAdversarialReconstruction(0.5, ramp=0.0),
    ImportanceMinimality(1e-3, frequency=0.2),
)
METHODS = {
    "VPD": lambda: tlpd.VPD(n_components=12, losses=LOSSES, importance=ImportanceConfig(hidden=8)),
    "L3D": lambda: tlpd.L3D(n_subnetworks=6, revive_every=2),
}


class Rows:
    """Rows as a function of the step; on one rank, and at one step, the process dies."""

    def __init__(self, die):
        self.die = tuple(die or ())

    def __call__(self, step):
        rank = int(os.environ.get("RANK", "0"))
        if (rank, step) == self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokens()[torch.arange(8).add(3 * step) % 40]


def spoiled(method, rank, step):
    """The method; one rank's part of a parameter is no number after one step."""
    after_step = method.after_step

    def after(now):
        after_step(now)
        if (now.processes.rank, now.number) == (rank, step):
            parameter = now.decomposition["blocks.0.mlp.W_in"].parameter_pair[0].detach()
            getattr(parameter, "to_local", lambda: parameter)()[0, 1] = float("nan")

    object.__setattr__(method, "after_step", after)
    return method


def run(run_dir, steps=6, stop=None, die=None, spoil=None, method="VPD", double=True, **settings):
    model = tiny_gpt2().double() if double else tiny_gpt2()
    used = spoiled(METHODS[method](), *spoil) if spoil else METHODS[method]()
    return tlpd.decompose(
        model, "blocks.0.mlp.*", used, Rows(die), steps, 8, run_dir=run_dir, log_every=1, checkpoint_every=100,
        progress=False, callbacks=[lambda info: STOP if info.step == stop else None], **settings,
    )  # fmt: skip


def forked(pipe, run_dir, settings):
    """The same in a process that a test began."""
    run(run_dir, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(**json.loads(sys.argv[1]))
