"""TMS 5-2 from target to scores in some seconds; prints them as JSON. Arguments: seed, kinds of losses to leave out.

Run apart from the tests, whose type checker makes small steps several times slower.
"""

import json
import sys
from dataclasses import replace

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.experiments import scores as toys
from tl_paramdecomp.experiments.recipes import RECIPES
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.toy_models import TMSConfig, train_tms

METHOD = RECIPES["tms-5-2"].method
KINDS = {"reconstruction": StochasticReconstruction, "importance": ImportanceMinimality}
STEPS, BATCH = 1500, 512


def scores(seed: int, without: list[str]) -> dict[str, object]:
    """Scores of one run, and how far the target itself is from the pentagon."""
    model = train_tms(TMSConfig(steps=1000, batch_size=512, lr=1e-2), seed)
    losses = tuple(loss for loss in METHOD.losses if not any(isinstance(loss, KINDS[name]) for name in without))
    method = replace(METHOD, losses=losses, lr=3e-3, lr_importance=6e-3)
    data = replace(model.config.data(BATCH, seed), without_empty=True)
    made = tlpd.decompose(model, "*", method, data, steps=STEPS, batch_size=BATCH, seed=seed, progress=False)
    matrices = toys.importance_matrices(model, made, 5)
    found = toys.tms_scores(model, made)
    return {
        "smallest_norm": model.strengths().min().item(),
        "mmcs": found["mmcs"],
        "ml2r": [found["feature_scores"][name]["ml2r_alive"] for name in made],
        "alive": [int((matrices[name] > toys.TOLERANCE).any(0).sum()) for name in made],
        "identity_ci_error": [toys.identity_error(matrices[name]) for name in made],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(scores(int(sys.argv[1]), sys.argv[2:])))
