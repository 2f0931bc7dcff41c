"""Run by two processes: gradients of divided batches for every loss and preset, written by rank 0 as the differences found."""

import json
import sys

import torch

import tl_paramdecomp as tlpd
from tests.support.divided import difference, methods, train
from tl_paramdecomp.methods.pieces import Peers
from tl_paramdecomp.training.distributed import Replicas, joined
from tl_paramdecomp.training.shards import shard, whole

if __name__ == "__main__":
    torch.set_num_threads(1)
    how, names = sys.argv[1], sys.argv[2:] or list(methods())
    found = {}
    with joined(torch.device("cpu")) as peers:
        assert isinstance(peers, Peers) and peers.world == 2

        def replicate(method, made):
            if how == "sharded":
                shard(made, peers, torch.device("cpu"))
                return method.gradients
            return Replicas(method, made, peers).gradients

        if how == "sharded":
            names = [name for name in names if not isinstance(methods()[name], tlpd.L3D)]
        for name in names:
            alone, memory, _ = train(name)
            seen, other, _ = train(name, peers, accumulate=2 if how == "accumulated" else 1, replicate=replicate)
            if how == "sharded":
                seen = [(figures, {k: whole(g) for k, g in grads.items()}) for figures, grads in seen]
            found[name] = difference(alone, seen)
    if peers.rank == 0:
        print(json.dumps(found))
