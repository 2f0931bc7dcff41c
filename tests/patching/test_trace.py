"""Components patched inside nnsight's own interventions."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import (
    PatchConflictError,
    PositionIndexError,
    SiteNotFiredError,
    TargetMismatchError,
    UnsupportedModelError,
    UnsupportedSiteError,
)

from ..support.models import VOCAB, C, build, decomposition_of, gpt2, logits, nnsight_lm, tolerance

SITES = [
    "embed.W_E",
    "pos_embed.W_pos",
    "blocks.0.attn.W_Q",
    "blocks.0.attn.W_V",
    "blocks.0.mlp.W_in",
    "blocks.1.attn.W_O",
    "unembed.W_U",
]
HOSTS = ["nnsight", "nnsight-llama"]


def all_kinds(dec: tlpd.Decomposition) -> tlpd.Masks:
    """Every kind of mask, two of them on parts of the fused c_attn."""
    masks = dec.masks()
    for i, site in enumerate(dec):
        if i % 3 == 0:
            masks = masks.ablate(site, [0, 1], positions=[1, -1])
        elif i % 3 == 1:
            masks = masks.keep_only(site, [0, 2], delta=0.4)
        else:
            masks = masks.with_values(
                site, torch.linspace(0, 1, 2 * 7 * C).reshape(2, 7, C), delta=torch.linspace(0, 1, 14).reshape(2, 7)
            )
    return masks.ablate("blocks.0.attn.W_Q", 3, head=1)


def decomposition(lm: object) -> tlpd.Decomposition:
    return decomposition_of(lm, [site for site in SITES if site in tlpd.find_sites(lm)])


@pytest.mark.parametrize("host", HOSTS)
def test_a_trace_agrees_with_patched_and_with_another_host(host: str, tokens: Tensor) -> None:
    lm = build(host)
    dec = decomposition(lm)
    masks = all_kinds(dec)
    with tlpd.patched(lm, dec, masks):
        expected = logits(lm, tokens)
    with torch.no_grad():
        with lm.trace(tokens):
            tlpd.patch_trace(lm, dec, masks)
            found = lm.output.logits.save()
    assert (found - expected).abs().max() < tolerance(lm)
    with tlpd.patched(lm._module, dec, masks), torch.no_grad():
        assert (lm._module(tokens).logits - expected).abs().max() < tolerance(lm)
    assert not torch.equal(logits(lm, tokens), expected)


@pytest.mark.parametrize("host", HOSTS)
def test_no_mask_is_the_model_bit_for_bit(host: str, tokens: Tensor) -> None:
    lm = build(host)
    dec = decomposition(lm)
    ones = dec.masks()
    for site in dec:
        ones = ones.with_values(site, torch.ones(2, 7, C), delta=torch.ones(2, 7))
    plain = logits(lm, tokens)
    for masks in (dec.masks(), ones):
        with torch.no_grad():
            with lm.trace(tokens):
                tlpd.patch_trace(lm, dec, masks)
                found = lm.output.logits.save()
        assert torch.equal(found, plain)


def test_outputs_show_the_patched_value_and_inputs_take_edits(tokens: Tensor) -> None:
    """Within `patched` a trace reads what downstream gets, and what it writes to an input counts."""
    lm = build("nnsight")
    name, envoy = "blocks.0.mlp.W_in", lm.transformer.h[0].mlp.c_fc
    dec = decomposition_of(lm, name)
    masks = dec.masks().ablate(name, [1, 2])
    with torch.no_grad(), tlpd.patched(lm, dec, masks):
        with lm.trace(tokens):
            x = envoy.input.save()
            envoy.input = envoy.input * 0.5
            y = envoy.output.save()
            after = lm.transformer.h[0].mlp.act.input.save()
    weight = tlpd.site_weight(lm, name) - dec[name].component(1) - dec[name].component(2)
    assert (y - (0.5 * x @ weight + lm._module.transformer.h[0].mlp.c_fc.bias)).abs().max() < 1e-10
    assert torch.equal(after, y)


def test_an_invoke_patches_its_own_rows_alone(tokens: Tensor) -> None:
    lm = nnsight_lm(build("gpt2"))
    dec = decomposition_of(lm, ["embed.W_E", "blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "unembed.W_U"])
    masks = dec.masks()
    for site in dec:
        masks = masks.ablate(site, [0, 1], positions=[2, -1])
    first, second = tokens, (tokens + 9) % VOCAB
    plain = [logits(lm, t) for t in (first, second)]
    with tlpd.patched(lm, dec, masks):
        patched = logits(lm, first)
    with torch.no_grad():
        with lm.trace() as tracer:
            with tracer.invoke(first):
                tlpd.patch_trace(lm, dec, masks)
                a = lm.output.logits.save()
            with tracer.invoke(second):
                b = lm.output.logits.save()
    assert (a - patched).abs().max() < 1e-10 and (b - plain[1]).abs().max() < 1e-10
    assert (a - plain[0]).abs().max() > 1e-3


def test_position_embeddings_shared_by_invokes_are_refused(tokens: Tensor) -> None:
    lm = nnsight_lm(build("gpt2"))
    dec = decomposition_of(lm, "pos_embed.W_pos")
    with pytest.raises(UnsupportedSiteError, match=r"pos_embed\.W_pos is looked up once for all invokes"):
        with lm.trace() as tracer:
            with tracer.invoke(tokens):
                tlpd.patch_trace(lm, dec, dec.masks().ablate("pos_embed.W_pos", 0))
            with tracer.invoke(tokens):
                lm.output.logits.save()


def test_a_saved_edit(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, ["blocks.0.attn.W_Q", "blocks.1.attn.W_O"])
    masks = dec.masks().ablate("blocks.0.attn.W_Q", 1).ablate("blocks.1.attn.W_O", [0, 2])
    with tlpd.patched(lm, dec, masks):
        expected = logits(lm, tokens)
    with lm.edit() as (_, edited):  # nnsight 0.8 binds the tracer as well
        tlpd.patch_trace(lm, dec, masks)
    assert (logits(edited, tokens) - expected).abs().max() < 1e-10
    assert (logits(edited, (tokens + 1) % VOCAB) - logits(lm, (tokens + 1) % VOCAB)).abs().max() > 1e-3
    assert not torch.equal(logits(lm, tokens), expected)


def test_gradients_of_a_trace_reach_the_factors(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, ["blocks.0.attn.W_K", "blocks.1.mlp.W_out"])
    masks = dec.masks().scale("blocks.0.attn.W_K", 1, 0.3).keep_only("blocks.1.mlp.W_out", [0, 2], delta=0.6)
    with lm.trace(tokens):
        tlpd.patch_trace(lm, dec, masks)
        out = lm.output.logits.save()
    found = torch.autograd.grad(out.pow(2).mean(), list(dec.parameters()))
    with tlpd.patched(lm, dec, masks):
        expected = torch.autograd.grad(lm._module(tokens).logits.pow(2).mean(), list(dec.parameters()))
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).abs().max() < 1e-10


def test_a_trace_beside_patched(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, ["blocks.0.attn.W_Q", "blocks.1.attn.W_O"])
    one, two = dec.masks().ablate("blocks.0.attn.W_Q", 1), dec.masks().ablate("blocks.1.attn.W_O", 2)
    with tlpd.patched(lm, dec, one.ablate("blocks.1.attn.W_O", 2)):
        expected = logits(lm, tokens)
    with torch.no_grad(), tlpd.patched(lm, dec, one):
        with lm.trace(tokens):
            tlpd.patch_trace(lm, dec, two)
            found = lm.output.logits.save()
    assert (found - expected).abs().max() < 1e-10


def test_a_trace_within_patched_on_the_same_site(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, "blocks.0.attn.W_Q")
    with tlpd.patched(lm, dec, dec.masks().ablate("blocks.0.attn.W_Q", 1)):
        with pytest.raises(PatchConflictError, match="already patched"):
            with lm.trace(tokens):
                tlpd.patch_trace(lm, dec, dec.masks().ablate("blocks.0.attn.W_Q", 1))


def test_a_decomposition_in_another_order_is_patched_in_forward_order(tokens: Tensor) -> None:
    lm = build("nnsight-llama")
    names = ["blocks.1.mlp.W_out", "blocks.0.mlp.W_in", "blocks.0.mlp.W_gate", "blocks.0.attn.W_V", "blocks.0.attn.W_Q"]
    dec = decomposition_of(lm, names)
    turned = tlpd.Decomposition({n: (dec[n].V, dec[n].U) for n in names}, dec.sites, dec.fingerprints)
    assert list(turned) == names
    masks = turned.masks()
    for name in names:
        masks = masks.ablate(name, [0, 1])
    with tlpd.patched(lm, turned, masks):
        expected = logits(lm, tokens)
    with torch.no_grad():
        with lm.trace(tokens):
            tlpd.patch_trace(lm, turned, masks)
            found = lm.output.logits.save()
    assert (found - expected).abs().max() < tolerance(lm)


READS = {
    "an output": lambda lm: lm.transformer.h[0].output,
    "an input": lambda lm: lm.transformer.h[0].input,
    "the model's input": lambda lm: lm.inputs,
    "the site's own input": lambda lm: lm.transformer.h[1].mlp.c_fc.input,
    "a write": lambda lm: setattr(lm.transformer.h[0].mlp, "output", lm.transformer.h[0].mlp.output * 1.0),
    "several": lambda lm: [lm.transformer.wte.output, lm.transformer.h[0].attn.output, lm.transformer.h[1].ln_2.output],
}


def later_masks(dec: tlpd.Decomposition) -> tlpd.Masks:
    masks = dec.masks().ablate("blocks.1.mlp.W_in", [0, 1], positions=[2, -1])
    return masks.keep_only("unembed.W_U", [0, 2], delta=0.4).ablate("unembed.W_U", 0, positions=-2)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("wrap", ["nnsight", "language model"])
def test_positions_after_other_reads(wrap: str, read: str, tokens: Tensor) -> None:
    """What the model was called with is known from the call that is under way."""
    lm = build("nnsight") if wrap == "nnsight" else nnsight_lm(build("gpt2"))
    dec = decomposition_of(lm, ["blocks.1.mlp.W_in", "unembed.W_U"])
    masks = later_masks(dec)
    with tlpd.patched(lm, dec, masks):
        expected = logits(lm, tokens)
    with torch.no_grad():
        with lm.trace(tokens):
            READS[read](lm)
            tlpd.patch_trace(lm, dec, masks)
            found = lm.output.logits.save()
    assert (found - expected).abs().max() < 1e-10


def test_positions_after_reads_in_each_of_several_invokes(tokens: Tensor) -> None:
    lm = nnsight_lm(build("gpt2"))
    dec = decomposition_of(lm, ["blocks.1.mlp.W_in", "unembed.W_U"])
    masks, second = later_masks(dec), (tokens + 9) % VOCAB
    expected = []
    for rows in (tokens, second):
        with tlpd.patched(lm, dec, masks):
            expected.append(logits(lm, rows))
    with torch.no_grad():
        with lm.trace() as tracer:
            with tracer.invoke(tokens):
                lm.transformer.h[0].output.save()
                tlpd.patch_trace(lm, dec, masks)
                a = lm.output.logits.save()
            with tracer.invoke(second):
                lm.transformer.h[1].attn.output[0].save()
                tlpd.patch_trace(lm, dec, masks)
                b = lm.output.logits.save()
            with tracer.invoke(tokens):
                c = lm.output.logits.save()
    assert (a - expected[0]).abs().max() < 1e-10 and (b - expected[1]).abs().max() < 1e-10
    assert (c - logits(lm, tokens)).abs().max() < 1e-10


def cached(lm: object, tokens: Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        lm._module(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("told", ["attention_mask", "position_ids", "layers", "nothing"])
def test_positions_after_a_cache(told: str, tokens: Tensor) -> None:
    """Layers that have run have put this pass's columns into the cache; how many were there before is told otherwise."""
    lm = build("nnsight")
    dec = decomposition_of(lm, ["blocks.1.mlp.W_in", "unembed.W_U"])
    masks = dec.masks().ablate("blocks.1.mlp.W_in", [0, 1], positions=[1, 3, 5])
    more = {"attention_mask": torch.ones_like(tokens), "position_ids": torch.arange(4, 7).expand(2, 3)}
    more = {told: more[told]} if told in more else {}

    def traced(read: bool) -> Tensor:
        with torch.no_grad():
            with lm.trace(tokens[:, 4:], past_key_values=cached(lm, tokens[:, :4]), **more):
                if read:
                    (lm.transformer.h[0] if told == "layers" else lm.transformer.h[1].ln_2).output.save()
                tlpd.patch_trace(lm, dec, masks)
                out = lm.output.logits.save()
        return out

    weight = lm._module.transformer.h[1].mlp.c_fc
    change = dec["blocks.1.mlp.W_in"].component(0) + dec["blocks.1.mlp.W_in"].component(1)

    def without(module: Any, args: Any, output: Tensor) -> Tensor:
        at = torch.tensor([0.0, 1.0, 0.0]).double().view(1, 3, 1)  # position 5 of the columns 4 to 6
        return output - at * (args[0] @ change.detach())

    past = cached(lm, tokens[:, :4])
    handle = weight.register_forward_hook(without)
    with torch.no_grad():
        expected = lm._module(tokens[:, 4:], past_key_values=past).logits
    handle.remove()
    assert (traced(read=False) - expected).abs().max() < 1e-10
    if told == "nothing":
        with pytest.raises(SiteNotFiredError, match="Call patch_trace before reading"):
            traced(read=True)
        return
    assert (traced(read=True) - expected).abs().max() < 1e-10


LATE = {
    "its output": lambda lm: lm.transformer.h[0].mlp.c_fc.output,
    "later": lambda lm: lm.transformer.h[1].output,
    "the logits": lambda lm: lm.output,
}


@pytest.mark.parametrize("positions", [None, [2]])
@pytest.mark.parametrize("read", LATE)
def test_a_site_that_the_trace_has_gone_by(read: str, positions: list[int] | None, tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, ["blocks.0.mlp.W_in", "unembed.W_U"])
    masks = (
        dec.masks().ablate("blocks.0.mlp.W_in", 0, positions=positions).ablate("unembed.W_U", 0, positions=positions)
    )
    with pytest.raises(SiteNotFiredError, match=r"too late for blocks\.0\.mlp\.W_in.*patch_trace first"):
        with lm.trace(tokens):
            LATE[read](lm)
            tlpd.patch_trace(lm, dec, masks)
    assert torch.equal(logits(lm, tokens), logits(lm, tokens))


def test_outside_of_a_trace(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, "blocks.0.mlp.W_in")
    with pytest.raises(UnsupportedModelError, match=r"Nothing is traced here.*trace"):
        tlpd.patch_trace(lm, dec, dec.masks().ablate("blocks.0.mlp.W_in", 0))


def test_errors_reach_the_user(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, "blocks.0.mlp.W_in")
    with pytest.raises(UnsupportedModelError, match=r"patch_trace is for nnsight.*patched"):
        tlpd.patch_trace(gpt2(), dec, dec.masks())
    other = decomposition_of(gpt2(seed=5), "blocks.0.mlp.W_in")
    with pytest.raises(TargetMismatchError, match=r"blocks\.0\.mlp\.W_in"):
        with lm.trace(tokens):
            tlpd.patch_trace(lm, other, other.masks())
    with pytest.raises(PositionIndexError, match="0 to 6"):
        with lm.trace(tokens):
            tlpd.patch_trace(lm, dec, dec.masks().ablate("blocks.0.mlp.W_in", 0, positions=7))
    assert torch.equal(logits(lm, tokens), logits(lm, tokens))
