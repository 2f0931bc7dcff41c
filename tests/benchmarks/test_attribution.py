"""What attribution costs: all components of a prompt against plain forward passes, GPT-2 small by size and micro-gpt2."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.benchmarks.test_overhead import build, random_factors
from tests.benchmarks.timing import ratio
from tl_paramdecomp.analysis.effects.attribution import attribute
from tl_paramdecomp.analysis.effects.edges import edges_into

pytestmark = pytest.mark.benchmark
LENGTH = 128
LIMIT = 4.0
"""Forward passes that attributing every component of a prompt may cost."""


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.mark.parametrize("host", ["transformers", "transformer_bridge", "hooked_transformer"])
def test_attributing_every_component_against_a_forward_pass(host, report):
    """72 block matrices at C = 64, every component and delta component at each of 128 positions: 4,608 values a position."""
    model = build(host).requires_grad_(False)
    tokens = torch.randint(0, 50257, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    corrupt = torch.randint(0, 50257, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    dec = tlpd.from_factors(model, random_factors(model))

    def plain():
        with torch.no_grad():
            model(tokens)

    for label, other in (("gradient", None), ("gradient with a corrupt prompt", corrupt)):
        measured = ratio(
            lambda other=other: attribute(model, dec, tokens, difference, corrupt=other), plain, rounds=3, warm=1
        )
        report(f"attribute / plain forward, {host}, {label} (at most {LIMIT:.0f})", measured)


def test_exact_ablations_of_a_site_against_its_gradients(report):
    model = tlpd.load_micro_gpt2().requires_grad_(False)
    tokens = tlpd.micro_gpt2_tokens(1)[:, :16]
    dec = tlpd.decompose(model, "blocks.*", tlpd.SVD(), tlpd.micro_gpt2_tokens(2), 1, 2, progress=False)

    def attributed(method):
        return attribute(model, dec, tokens, difference, method=method, sites="blocks.1.mlp.W_in", progress=False)

    measured = ratio(lambda: attributed("ablation"), lambda: attributed("gradient"), rounds=3, warm=1)
    report("every component of one site at 16 positions, exact / by gradient, micro-gpt2", measured)
    edges = ratio(
        lambda: edges_into(model, dec, tokens, ("blocks.1.mlp.W_in", 0, -1)), lambda: model(tokens), rounds=3, warm=1
    )
    report("edges into one component from all others / plain forward, micro-gpt2", edges)
