"""SPD on three one-feature circuits, y_i = a_i x_i; prints what it found, by seed, as JSON.

Run apart from the tests, whose type checker makes small steps several times slower.
"""

import json

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction

METHOD = tlpd.SPD(
    n_components=6,
    measure="mse",
    start="random",
    losses=(Faithfulness(1.0), StochasticReconstruction(1.0), ImportanceMinimality(3e-3, p_start=1.0, p_end=1.0)),
    importance=ImportanceConfig("component_mlp", hidden=16),
    lr=5e-3,
    lr_importance=5e-3,
    final_lr=0.0,
    clip=None,
)


def found(seed: int) -> list[tuple[int, int, float]]:
    """(feature, component, cosine of reading direction and feature) for importances above 0.1 on single features."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 1.5, 0.7])))
    x = torch.rand(4096, 3) * (torch.rand(4096, 3) < 0.2)
    made = tlpd.decompose(model, "0.weight", METHOD, x, steps=1000, batch_size=256, seed=seed, progress=False)
    features = 0.75 * torch.eye(3)
    g = made.importances({"0.weight": features})["0.weight"].lower
    cosines = torch.nn.functional.normalize(made["0.weight"].V, dim=0).abs()
    return [(f, c, cosines[f, c].item()) for f, c in (g > 0.1).nonzero().tolist()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([found(seed) for seed in range(3)]))
