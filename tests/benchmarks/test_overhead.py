"""What patching costs: GPT-2 small by size, 128 tokens, all 72 block matrices at C = 64, entering included."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.benchmarks.timing import ratio

pytestmark = pytest.mark.benchmark
C, LENGTH = 64, 128


def gpt2_small():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval().requires_grad_(False)


def build(host):
    if host == "transformers":
        return gpt2_small()
    if host == "transformer_bridge":
        pytest.importorskip("transformer_lens.model_bridge", reason="this TransformerLens has no TransformerBridge")
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        hf = gpt2_small()
        return build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=hf.config).requires_grad_(False)
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer")
    cfg = HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257, act_fn="gelu_new",
        normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    return HookedTransformer(cfg).eval().requires_grad_(False)


def random_factors(model):
    generator = torch.Generator().manual_seed(0)
    sites = tlpd.find_sites(model, "blocks.*")
    assert len(sites) == 72
    return {
        name: (torch.randn(s.d_in, C, generator=generator) * 0.02, torch.randn(C, s.d_out, generator=generator) * 0.02)
        for name, s in sites.items()
    }


@pytest.mark.parametrize("host", ["transformers", "transformer_bridge", "hooked_transformer"])
@torch.no_grad()
def test_patched_forward_against_the_plain_one(host, report):
    model = build(host)
    tokens = torch.randint(0, 50257, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    dec = tlpd.from_factors(model, random_factors(model))
    one = dec.masks()
    given = dec.masks()
    for name in dec:
        one = one.ablate(name, [3])
        given = given.with_values(name, torch.rand(1, LENGTH, C), delta=torch.rand(1, LENGTH))

    def plain():
        model(tokens)

    def patched(masks):
        with tlpd.patched(model, dec, masks):
            model(tokens)

    def entered():
        with tlpd.patched(model, dec, one):
            pass

    report(f"entering and leaving a context of 72 sites / plain forward, {host}", ratio(entered, plain))
    for label, masks in (("one component ablated at each site", one), ("mask tensors at each site", given)):
        measured = ratio(lambda masks=masks: patched(masks), plain)
        report(f"patched / plain forward, {host}, {label}", measured)
        assert measured[1] > 0
