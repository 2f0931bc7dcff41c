"""Measures of masked models against values worked out apart from the library."""

import subprocess
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.slow_ablations import ablation_effects
from tl_paramdecomp.analysis.activations import sparsity
from tl_paramdecomp.analysis.next_tokens import answer_log_prob, kl_divergence, masked_kl, next_token_probs
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import NoImportanceError, ShapeError
from tl_paramdecomp.methods.spd import SPD


@pytest.fixture(scope="module")
def model():
    return tlpd.load_micro_gpt2().requires_grad_(False)


@pytest.fixture(scope="module")
def dec(model):
    return tlpd.decompose(
        model, "blocks.0.mlp.*", SPD(n_components=256), tlpd.micro_gpt2_tokens(8), 2, 2, progress=False
    )


def test_kl_of_a_two_token_vocabulary_by_hand():
    """p = (3/4, 1/4) and q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2); the padded position does not count."""
    p = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log()
    q = torch.tensor([[[1.0, 1.0], [9.0, 1.0]]]).log()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert abs(kl_divergence(p, q, torch.tensor([[1, 0]])) - expected.item()) < 1e-6
    assert kl_divergence(p, p) == 0.0


def test_kl_over_a_batch_is_the_mean_over_its_parts(model, dec):
    tokens = tlpd.micro_gpt2_tokens(4, seed=3)
    masks = dec.masks().ablate("blocks.0.mlp.W_in", slice(0, 100))
    parts = [masked_kl(model, dec, tokens[i : i + 1], masks) for i in range(4)]
    assert abs(masked_kl(model, dec, tokens, masks) - sum(parts) / 4) < 1e-5
    assert masked_kl(model, dec, tokens, dec.masks()) == 0.0


def test_every_kind_of_mask_has_its_order(model, dec):
    """Exact neurons unmasked lose nothing; the zero mask is the edited model; the adversary does not help."""
    tokens = tlpd.micro_gpt2_tokens(4, seed=4)
    kinds = ("unmasked", "stochastic", "importance", "rounded", "adversarial", "random", "zero")
    kl = {kind: masked_kl(model, dec, tokens, tlpd.importance_masks(model, dec, tokens, kind)) for kind in kinds}
    assert kl["unmasked"] < 1e-4 < kl["zero"]
    zero = dec.masks()
    for name in dec:
        zero = zero.keep_only(name, [])
    with tlpd.edited_weights(model, dec, zero):
        edited = model(tokens).logits
    assert abs(kl_divergence(model(tokens).logits, edited) - kl["zero"]) < 1e-4
    assert kl["adversarial"] > 0


def test_importance_masks_are_what_they_say(model, dec):
    tokens = tlpd.micro_gpt2_tokens(2, seed=5)
    g = tlpd.causal_importances(model, dec, tokens)
    name = "blocks.0.mlp.W_out"
    masks = {
        kind: tlpd.importance_masks(model, dec, tokens, kind)[name] for kind in ("importance", "rounded", "stochastic")
    }
    assert torch.equal(masks["importance"].m, g[name]) and masks["importance"].d == 0
    assert torch.equal(masks["rounded"].m, (g[name] > 0.1).float())
    assert (masks["stochastic"].m >= g[name]).all() and masks["stochastic"].d.shape == tokens.shape
    again = tlpd.importance_masks(model, dec, tokens, "stochastic")[name]
    other = tlpd.importance_masks(model, dec, tokens, "stochastic", seed=1)[name]
    assert torch.equal(again.m, masks["stochastic"].m) and not torch.equal(other.m, again.m)


def test_sparsity_counts_importances_above_the_threshold(model, dec):
    tokens = tlpd.micro_gpt2_tokens(2, seed=6)
    found = sparsity(model, dec, tokens, threshold=0.2)
    for name, g in tlpd.causal_importances(model, dec, tokens).items():
        assert abs(found.l0[name] - (g > 0.2).sum().item() / tokens.numel()) < 1e-4
        assert found.alive[name] == (g > 0.2).flatten(0, 1).any(0).sum().item()


def test_effects_of_single_ablations_are_those_of_edited_weights(model, dec):
    """Of the sweep, and of the slow form that other tests compare with."""
    prompt = tlpd.micro_gpt2_prompts("pronoun", 1)[0]
    tokens, name = prompt.tokens.unsqueeze(0), "blocks.0.mlp.W_out"
    metric = answer_log_prob(prompt.answers)
    slow = ablation_effects(model, dec, tokens, metric, rows_at_once=100)[name]
    found = tlpd.sweep(model, dec, tokens, metric, progress=False)
    base = next_token_probs(model, tokens)[list(prompt.answers)].sum().log()
    for c in (0, 101, 255):
        with tlpd.edited_weights(model, dec, dec.masks().ablate(name, c)):
            alone = next_token_probs(model, tokens)[list(prompt.answers)].sum().log()
        assert abs(slow[c] - (base - alone)) < 1e-4 and abs(found.effect(name)[c] - (base - alone)) < 1e-4
    sizes = torch.cat([found.effect(site) for site in dec]).abs()
    assert abs(found.top(1)[0].effect) == sizes.max().item()


def test_without_importance_function_only_some_masks_exist(model):
    weight = tlpd.site_weight(model, "blocks.0.mlp.W_in")
    plain = tlpd.from_factors(model, {"blocks.0.mlp.W_in": (weight, torch.eye(256))})
    tokens = tlpd.micro_gpt2_tokens(2)
    for kind in ("unmasked", "random", "zero"):
        assert masked_kl(model, plain, tokens, tlpd.importance_masks(model, plain, tokens, kind)) > -1e-6
    with pytest.raises(NoImportanceError, match="decompose"):
        tlpd.importance_masks(model, plain, tokens)
    assert ImportanceConfig(hidden=None).hidden is None


def test_rows_that_are_no_rows_are_refused(model, dec):
    with pytest.raises(ShapeError, match="unsqueeze"):
        tlpd.component_acts(model, dec, torch.zeros(5, dtype=torch.long).reshape(5, 1).expand(5, 2).unsqueeze(0))
    with pytest.raises(ShapeError, match="attention mask"):
        tlpd.component_acts(model, dec, tlpd.micro_gpt2_tokens(2), torch.ones(2, 3, dtype=torch.long))


def test_rows_are_refused_by_name_without_a_type_checker_in_front():
    code = """
import torch, tl_paramdecomp as tlpd
model = tlpd.load_micro_gpt2()
dec = tlpd.from_factors(model, {"blocks.0.mlp.W_in": (torch.zeros(64, 2), torch.zeros(2, 256))})
row = torch.zeros(3, dtype=torch.long)
for tokens, mask in (("text", None), (row, None), (row[None], torch.ones(1, 3))):
    try:
        tlpd.component_acts(model, dec, tokens, mask)
    except (tlpd.errors.DtypeError, tlpd.errors.ShapeError) as error:
        print(type(error).__name__)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["DtypeError", "ShapeError", "DtypeError"]
