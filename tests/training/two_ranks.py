"""Run by two processes: gradients of divided batches for every loss and preset, and how far they are from those of one."""

import torch

import tl_paramdecomp as tlpd
from tests.support.divided import difference, methods, train
from tl_paramdecomp.parallel import ProcessGroup
from tl_paramdecomp.training.distributed import Replicas, joined, shard, whole

WAYS = ("replicated", "accumulated", "sharded")


def seen(how, name, processes):
    """Figures and gradients of some steps of a method in one of the ways to divide them."""

    def replicate(method, made):
        if how == "sharded":
            shard(made, processes, torch.device("cpu"))
            return method.gradients
        return Replicas(method, made, processes).gradients

    found, _, _ = train(name, processes, accumulate=2 if how == "accumulated" else 1, replicate=replicate)
    return [(figures, {key: whole(grad) for key, grad in grads.items()}) for figures, grads in found]


def compare(pipe):
    """Say, from rank 0, the largest relative difference of each method in each way."""
    found = {how: {} for how in WAYS}
    with joined(torch.device("cpu")) as processes:
        assert isinstance(processes, ProcessGroup) and processes.world == 2
        for name, method in methods().items():
            alone = train(name)[0] if processes.leads else None
            for how in WAYS:
                if how == "sharded" and isinstance(method, tlpd.L3D):
                    continue
                divided = seen(how, name, processes)
                if alone is not None:
                    found[how][name] = difference(alone, divided)
    if processes.leads:
        pipe.send(found)
