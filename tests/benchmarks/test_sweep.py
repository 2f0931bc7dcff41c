"""What a sweep costs: 1,000 components of a GPT-2-small-size model, against as many full forward passes of its prompt.

Both run in batches of as many rows. The cost of full passes is that of a batch (median of three, before and after the sweep)
times the number of batches.
"""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.effects.sweep import sweep

from ..support.models import gpt2

pytestmark = pytest.mark.benchmark
LENGTH, ROWS, TOTAL = 32, 64, 1000
SMALL = {"vocab_size": 50257, "n_positions": 64, "n_embd": 768, "n_layer": 12, "n_head": 12, "initializer_range": 0.02}
"""GPT-2 small in all but its longest row."""


def decomposition(model, sites, total):
    """Random components, spread evenly over the sites."""
    generator, factors = torch.Generator().manual_seed(0), {}
    for i, (name, site) in enumerate(sites.items()):
        n = total * (i + 1) // len(sites) - total * i // len(sites)
        V = torch.randn(site.d_in, n, generator=generator) / site.d_in**0.5
        factors[name] = (V, torch.randn(n, site.d_out, generator=generator) / site.d_out**0.5)
    return tlpd.from_factors(model, factors)


def logit_difference(logits, task):
    return logits[:, 5] - logits[:, 6]


def timed(run):
    begun = time.process_time()
    run()
    return 1e3 * (time.process_time() - begun)


@torch.no_grad()
def test_a_sweep_of_a_thousand_components(report):
    model = gpt2(torch.float32, **SMALL).requires_grad_(False)
    sites = tlpd.find_sites(model, ["blocks.*.attn.*", "blocks.*.mlp.*"])
    assert len(sites) == 72
    dec = decomposition(model, sites, TOTAL)
    tokens = torch.randint(0, 50257, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    task = SimpleNamespace(clean=tokens, corrupt=None, attention_mask=None, last=torch.tensor([LENGTH - 1]))
    batch = tokens.expand(ROWS, -1).contiguous()
    model(batch)
    sweep(model, dec, task, logit_difference, sites="blocks.11.mlp.W_out", rows_at_once=ROWS, progress=False)
    plain = [timed(lambda: model(batch))]
    found = []
    cost = timed(lambda: found.append(sweep(model, dec, task, logit_difference, rows_at_once=ROWS, progress=False)))
    plain += [timed(lambda: model(batch)) for _ in range(2)]
    assert sum(found[0].effect(name).numel() for name in sites) == TOTAL
    full = TOTAL / ROWS * statistics.median(plain)
    report(f"sweep over {TOTAL} components of GPT-2 small's size (ms) / as many full passes", (cost / full, cost, full))
