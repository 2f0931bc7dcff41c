"""Hidden activations and attention patterns under masks, against dense forms and patterns worked out from q and k."""

import math

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import VOCAB, gpt2
from tests.support.zoo import tiny
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction, importance_masks_of, stochastic_masks
from tl_paramdecomp.methods.step import LossStep

from .forms import case, compare, padded


# --- hidden activations -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [case, padded])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("at", ["outputs", "inputs"])
@pytest.mark.parametrize("masks", ["stochastic", "importance"])
def test_hidden_activations(make, masks, at, relative):
    of = make()
    book, draws = of.book(), of.draws()
    of_masks = {name: (g, 0.0) for name, g in book.lower.items()} if masks == "importance" else book.stochastic(draws)
    book.run(of_masks)
    total = 0.0
    for name, (x, y) in book.seen.items():
        clean, masked = (book.inputs[name], x) if at == "inputs" else (book.outputs[name], y)
        clean, masked = clean[book.scored], masked[book.scored]
        error = ((masked - clean) ** 2).sum() / clean.numel()
        total = total + (error / (clean**2).sum() * clean.numel() if relative else error) / len(book.seen)
    compare(of, HiddenActsReconstruction(masks=masks, at=at, relative=relative)(of.step()), total)


def test_a_site_that_gives_nothing_but_its_bias_has_a_relative_error_of_one():
    of = case(widths=(5, 3), counts=(4,))
    of.model.layers[0].bias.zero_()
    step = of.step()
    step.importances = {n: i._replace(lower=torch.zeros_like(i.lower)) for n, i in step.importances.items()}
    assert HiddenActsReconstruction(masks="importance")(step).item() == 1.0
    assert HiddenActsReconstruction(masks="importance", at="inputs")(step).item() == 0.0


def test_an_embedding_has_no_inputs_to_compare():
    model = gpt2().requires_grad_(False)
    both, kept = step_of(model, ["embed.W_E", "blocks.0.mlp.W_in"]), {}
    with torch.no_grad():
        both.run_masked(importance_masks_of(both), kept)
        found = HiddenActsReconstruction(masks="importance", at="inputs", relative=False)(both)
    clean = both.inputs["blocks.0.mlp.W_in"]
    assert (found - (kept["blocks.0.mlp.W_in"].x - clean).square().mean()).abs() < 1e-12
    with pytest.raises(SettingError, match="compare at='outputs'"):
        HiddenActsReconstruction(at="inputs")(step_of(model, ["embed.W_E"]))
    assert HiddenActsReconstruction()(step_of(model, ["embed.W_E", "pos_embed.W_pos"])) > 0


# --- attention patterns -----------------------------------------------------------------------------------------------
def step_of(model, pattern, attention_mask=None, seed=0, keep_blocks=False, kl_chunk=None):
    """A random decomposition's step on two rows."""
    method = tlpd.SPD(
        n_components=5, warm_up_steps=0, start="random", importance=ImportanceConfig("component_mlp", hidden=4)
    )
    adapter = adapt(model)
    made = method.initialise(
        adapter, tlpd.find_sites(model, pattern), torch.Generator().manual_seed(0), lambda _, n: range(n)
    )
    tokens = torch.randint(0, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    return LossStep.of(adapter, made, tokens, attention_mask, generator, keep_blocks=keep_blocks, kl_chunk=kl_chunk)


def patterns_by_hand(model, masked, attention_mask):
    """Softmax of q k / sqrt(d_head) of every layer of a GPT-2, causal and without padded keys, from the outputs of its
    fused projection while the model runs."""
    found, handles = [], []

    def keep(module, args, output):
        q, k, _ = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in output.split(24, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None, :]
        found.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1))

    for block in model.transformer.h:
        handles.append(block.attn.c_attn.register_forward_hook(keep))
    try:
        masked()
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("masks", ["stochastic", "importance"])
def test_attention_patterns(masks, padding):
    """Mean over layers, heads and scored queries of the KL between rows of patterns, and its gradient."""
    model = gpt2().requires_grad_(False)
    attention_mask = torch.ones(2, 6, dtype=torch.long)
    if padding:
        attention_mask[0, 4:] = 0
    given = attention_mask if padding else None
    sites = ["blocks.*.attn.W_Q", "blocks.0.mlp.W_out", "blocks.1.attn.W_K"]
    step = step_of(model, sites, given)
    value = AttentionPatternReconstruction(masks=masks)(step)
    again = step_of(model, sites, given)
    drawn = stochastic_masks(again) if masks == "stochastic" else importance_masks_of(again)
    # the masked outputs must be seen after the components' own hooks: run with the site functions installed first
    from tl_paramdecomp.components.masked_output import masked_output

    fns = {
        n: (lambda call, n=n: masked_output(again.decomposition[n], drawn[n], call.x, call.y, call.bias)) for n in drawn
    }
    with again.adapter.intercept(fns):
        masked = patterns_by_hand(model, lambda: again.adapter.forward(again.tokens, given), given)
    clean = patterns_by_hand(model, lambda: again.adapter.forward(again.tokens, given), given)
    terms = []
    for p, q in zip(clean, masked, strict=True):
        kl = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)
        terms += [kl[b, h, t] for b in range(2) for h in range(3) for t in range(6) if attention_mask[b, t]]
    expected = torch.stack(terms).mean()
    assert abs(value - expected) < 1e-12 and value > 1e-4
    for part, whole in ((step, value), (again, expected)):
        part.grads = torch.autograd.grad(whole, [*part.decomposition.parameters()], allow_unused=True)
    for a, b in zip(step.grads, again.grads, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-12)


@pytest.mark.parametrize("loss", [AttentionPatternReconstruction(), HiddenActsReconstruction()])
def test_passes_that_begin_at_a_later_block_or_end_early_give_the_same(loss):
    model = gpt2(n_layer=3).requires_grad_(False)
    sites = ["blocks.1.attn.W_Q", "blocks.2.mlp.*", "blocks.2.attn.W_K"]
    values = [
        loss(step_of(model, sites, keep_blocks=keep, kl_chunk=chunk)) for keep in (False, True) for chunk in (None, 2)
    ]
    assert values[0] > 1e-5 and all((value - values[0]).abs() < 1e-13 for value in values)


def test_patterns_need_a_host_that_has_them():
    of = case()
    with pytest.raises(UnsupportedModelError, match="attention patterns"):
        AttentionPatternReconstruction()(of.step())


def test_patterns_do_not_change_where_no_earlier_site_does():
    """Masks at the last layer's W_V, W_O and MLP alone leave every pattern as it was."""
    model = gpt2().requires_grad_(False)
    step = step_of(model, ["blocks.1.attn.W_V", "blocks.1.attn.W_O", "blocks.1.mlp.*"])
    assert AttentionPatternReconstruction()(step).abs() < 1e-15
    assert StochasticReconstruction()(step) > 1e-4


def test_outputs_are_kept_from_hosts_that_write_into_them():
    model, kept = tiny("FalconForCausalLM/bias"), {}
    step = step_of(model, "blocks.*.mlp.*")
    with torch.no_grad():
        step.run_masked(importance_masks_of(step), kept)
    for name, (x, y) in kept.items():
        c, g = step.decomposition[name], step.importances[name].lower
        bias = 0.0 if adapt(model).bias(name) is None else adapt(model).bias(name)
        torch.testing.assert_close(y, (g * (x @ c.V)) @ c.U + bias, rtol=1e-4, atol=1e-5)
