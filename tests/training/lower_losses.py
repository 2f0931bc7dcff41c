"""The first and last terms of short runs from random starts, by form and seed, as JSON.

Run apart from the tests, whose type checker makes small steps several times slower.
"""

import json

import torch

import tl_paramdecomp as tlpd
from tests.training.test_fit import fit, tiny_gpt2

FORMS = {"SPD": tlpd.SPD, "paper": tlpd.SPD.paper, "VPD": tlpd.VPD}


def found(form, seed):
    """Terms at steps 5 and 45."""
    seen = []
    method = FORMS[form](n_components=24, start="random", warm_up_steps=0, lr=1e-2, final_lr=1.0)
    fit(tiny_gpt2(), steps=45, method=method, seed=seed, callbacks=[seen.append], log_every=5)
    first, last = seen[0].figures, seen[-1].figures
    return {name: (first[name], last[name]) for name in first if name.startswith(("faithfulness", "stochastic"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({form: [found(form, seed) for seed in range(3)] for form in FORMS}))
