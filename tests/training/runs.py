"""Short runs of every kind of method, whose data draws from every global source of random numbers."""

import json
import random

import numpy as np
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig

from .test_fit import tiny_gpt2

SMALL = ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1)
METHODS = {
    "SPD": lambda: tlpd.SPD(n_components=12),
    "VPD": lambda: tlpd.VPD(n_components=12, importance=SMALL),
    "L3D": lambda: tlpd.L3D(n_subnetworks=6, rank=2, revive_every=2),
    "SVD": lambda: tlpd.SVD(),
    "targeted": lambda: tlpd.SPD.targeted(n_components=12),
}


DRAWS_IN_PYTHON = True
"""Whether rows also come from the `random` module, from which a type checker of the tests draws too."""


def drawn_rows(step):
    """Rows that depend on everything that was drawn before."""
    first = torch.randint(0, 31, (2, 8))
    second = torch.from_numpy(np.random.randint(0, 31, (1, 8)))
    draw = random if DRAWS_IN_PYTHON else random.Random(step)
    third = torch.tensor([[draw.randrange(31) for _ in range(7)] + [int(30 * abs(draw.gauss(0, 1))) % 31]])
    return torch.cat([first, second, third, torch.from_numpy(abs(np.random.randn(1, 8)) * 10).long() % 31])


def background_rows():
    """A stream of batches."""
    return list(torch.randint(0, 31, (30, 5, 8), generator=torch.Generator().manual_seed(7)))


def start(name, folder=None, model=None, **changes):
    """A run of one of the methods."""
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    settings = {"steps": 8, "progress": False, "log_every": 1, "checkpoint_every": 3}
    if name == "targeted":
        settings["background"] = background_rows()
    model = tiny_gpt2() if model is None else model
    torch.manual_seed(3)
    return tlpd.decompose(
        model, "blocks.0.mlp.*", METHODS[name](), **({"data": drawn_rows, "run_dir": folder} | settings | changes)
    )


def lines(folder):
    """The log of a run, without what depends on the clock."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]
