"""Peak memory of a run, predicted or measured, in a process of its own; prints one JSON object.

python -m tests.benchmarks.run_memory predict|measure gpt2|middling|recipe|recipe_layer [METHOD [ROWS]]
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace

import torch

from tests.benchmarks.peak_memory import resident
from tl_paramdecomp.cli.methods import ALL_PRESETS
from tl_paramdecomp.training.estimate import estimate_run
from tl_paramdecomp.training.fit import decompose

STEPS = 3
SIZES = {
    "gpt2": ({}, "blocks.*.mlp.*", 1536, 4, 128),
    "middling": ({"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4000}, "blocks.*.mlp.*", 4096, 16, 64),
    "recipe": ({}, "blocks.*.mlp.*", 3072, 16, 128),
    "recipe_layer": ({}, "blocks.0.mlp.*", 3072, 16, 128),
}
"""Changes to GPT-2's configuration, sites, components per site, rows, and their length; the recipes are the README's."""


def model_of(size):
    """A GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES[size][0])).eval()


def arguments(size, name="spd", rows=None):
    """What `decompose` and `estimate_run` are both called with."""
    _, sites, C, batch, length = SIZES[size]
    model, batch = model_of(size), int(rows or batch)
    tokens = torch.randint(0, model.config.vocab_size, (4 * batch, length), generator=torch.Generator().manual_seed(1))
    method = ALL_PRESETS[name]()
    if hasattr(method, "n_components"):
        method = replace(method, n_components=C)
    return model, sites, method, tokens, STEPS, batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:]
    given, begun = arguments(*rest), time.perf_counter()
    if what == "predict":
        found = estimate_run(*given)
        print(json.dumps({**asdict(found), "took": time.perf_counter() - begun}))
    else:
        with tempfile.TemporaryDirectory() as folder:
            decompose(*given, run_dir=folder, progress=False)
        print(json.dumps({"peak": resident(), "took": time.perf_counter() - begun}))
