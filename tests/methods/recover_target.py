"""Targeted SPD on a model with two independent circuits; prints which one the components found, by seed, as JSON.

Inputs 0 to 2 pass through neurons 0 to 5 to outputs 0 to 2, inputs 3 to 5 through neurons 6 to 11 to outputs 3 to 5. Target
rows use the first, background rows the second. Run apart from the tests, whose type checker makes small steps several times
slower.
"""

import json
import sys

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction

METHOD = tlpd.SPD.targeted(
    n_components=16, measure="mse", start="random", warm_up_steps=0, lr=2e-2, lr_importance=1e-2, clip=None,
    clip_importance=None, importance=ImportanceConfig("shared_mlp", hidden=32),
    losses=(StochasticReconstruction(), ImportanceMinimality(1e-3, p_end=1.0)),
    background_losses=(StochasticReconstruction(delta="kept"), ImportanceMinimality(1e-1, p_end=1.0)),
)  # fmt: skip
SITES = {"0.weight": (slice(0, 3), slice(0, 6)), "2.weight": (slice(0, 6), slice(0, 3))}
"""Rows and columns of the first circuit in each W."""


def two_circuits(seed):
    draw = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12, bias=False), torch.nn.ReLU(), torch.nn.Linear(12, 6, bias=False))
    with torch.no_grad():
        for layer, (a, b) in ((model[0], (3, 6)), (model[2], (6, 3))):
            layer.weight.zero_()
            for i in range(2):
                block = torch.randn(b, a, generator=draw)
                layer.weight[i * b : (i + 1) * b, i * a : (i + 1) * a] = block
    return model


def rows(first, seed, n=4096):
    draw = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 6)
    x[:, slice(0, 3) if first else slice(3, 6)] = torch.randn(n, 3, generator=draw)
    return x


def found(seed, steps):
    """Shares of ||V U||^2 in the first circuit; what the components alone give, against the model, on rows of either kind:
    relative squared error on the target's, relative power on the background's; how many are active there."""
    model = two_circuits(seed)
    made = tlpd.decompose(
        model, "*", METHOD, rows(True, seed), steps=steps, batch_size=128, seed=seed, background=rows(False, seed + 100),
        progress=False,
    )  # fmt: skip
    first, second = (made[name].product() for name in SITES)
    shares = [made[n].product()[block].square().sum() / made[n].product().square().sum() for n, block in SITES.items()]
    result = {"shares": [share.item() for share in shares]}
    for which in ("target", "background"):
        x = rows(which == "target", seed + 7, 512)
        own, alone = model(x), torch.relu(x @ first) @ second
        missed = alone - own if which == "target" else alone
        g = made.importances({"0.weight": x, "2.weight": torch.relu(model[0](x))})
        active = sum((i.lower > 0.1).sum(-1).float().mean().item() for i in g.values())
        result[which] = ((missed.square().sum() / own.square().sum()).item(), active)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print(json.dumps([found(seed, steps) for seed in range(3)]))
