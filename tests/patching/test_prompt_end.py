"""Where the prompt ends while a host generates: what `generate` is called with, however the passes read it.

The right rows come from whole forward passes, one for each decoded token, with the positions spelled out.
"""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import PositionIndexError

from ..support.models import VOCAB, bridge, build, decomposition_of, gpt2, logits, nnsight_lm, tokenizer

PROMPT = torch.tensor([[5, 9, 5, 9, 5, 9, 5, 9]])
LENGTH, NEW = PROMPT.shape[1], 4
SETTINGS = {"max_new_tokens": NEW, "do_sample": False}
WAYS = {
    "plain": {},
    "chunks": {"prefill_chunk_size": 3},
    "looked up": {"prompt_lookup_num_tokens": 2},
    "assistant": {"assistant_model": "another"},
}


def reversed_at(dec: tlpd.Decomposition, positions: Any) -> tlpd.Masks:
    """Components three times over and subtracted: what is decoded afterwards is something else."""
    masks = dec.masks()
    for name, components in dec.items():
        masks = masks.scale(name, range(components.n_components), -3.0, positions=positions)
    return masks


def one_pass_a_token(model: Any, dec: tlpd.Decomposition, positions: Any) -> Tensor:
    rows = PROMPT
    with tlpd.patched(model, dec, reversed_at(dec, positions)):
        for _ in range(NEW):
            rows = torch.cat([rows, logits(model, rows)[:, -1:].argmax(-1)], 1)
    return rows


def generated(model: Any, host: str, prompt: Any, **more: Any) -> Tensor:
    if more.get("assistant_model") == "another":
        more["assistant_model"] = gpt2(torch.float32, seed=1).requires_grad_(False)
    with torch.no_grad():
        if host == "nnsight":
            with model.generate(prompt, **SETTINGS, **more) as tracer:
                rows = tracer.result.save()
            return rows
        if host == "bridge":
            settings = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
            return model.hf_generate(prompt, **settings, **more)
        return model.generate(prompt, pad_token_id=0, **SETTINGS, **more)


def on_host(host: str) -> Any:
    model = gpt2(torch.float32).requires_grad_(False)
    model.generation_config.eos_token_id = VOCAB  # which never comes: nothing ends a row early
    if host == "bridge":
        model = bridge(model)
        model.tokenizer = tokenizer()  # hf_generate asks it for padding
    return nnsight_lm(model) if host == "nnsight" else model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", ["gpt2", "bridge", "nnsight"])
@pytest.mark.filterwarnings("ignore:.*prefill_chunk_size.*")
def test_the_last_of_the_prompt_is_that_of_the_call(host: str, way: str) -> None:
    model = on_host(host)
    dec = decomposition_of(model, "blocks.*.mlp.*")
    right = one_pass_a_token(model, dec, LENGTH - 1)
    assert not torch.equal(right, one_pass_a_token(model, dec, 0)), "the place makes no difference"
    for positions in (-1, slice(-1, None), torch.arange(LENGTH) == LENGTH - 1):
        with tlpd.patched(model, dec, reversed_at(dec, positions)):
            assert torch.equal(generated(model, host, PROMPT, **WAYS[way]), right), positions


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*was never reached")  # how nnsight ends an open loop
def test_a_trace_of_a_generation_knows_the_prompt_of_the_call(way: str) -> None:
    model = on_host("nnsight")
    dec = decomposition_of(model, "blocks.*.mlp.*")
    right, more = one_pass_a_token(model, dec, LENGTH - 1), dict(WAYS[way])
    if "assistant_model" in more:
        more["assistant_model"] = gpt2(torch.float32, seed=1).requires_grad_(False)
    with torch.no_grad(), model.generate(**SETTINGS, **more) as tracer:
        with tracer.invoke(PROMPT):
            for _ in tracer.iter[:]:
                tlpd.patch_trace(model, dec, reversed_at(dec, -1))
        with tracer.invoke():
            rows = tracer.result.save()
    assert torch.equal(rows, right)


@pytest.mark.parametrize("way", WAYS)
def test_given_values_cover_the_prompt_of_the_call(way: str) -> None:
    model = on_host("gpt2")
    dec = decomposition_of(model, "blocks.*.mlp.*")
    right = one_pass_a_token(model, dec, [2, LENGTH - 1])
    m = torch.ones(LENGTH, 5)
    m[[2, LENGTH - 1]] = -3.0
    masks = dec.masks()
    for name in dec:
        masks = masks.with_values(name, m)
    with tlpd.patched(model, dec, masks):
        assert torch.equal(generated(model, "gpt2", PROMPT, **WAYS[way]), right)


@pytest.mark.parametrize("way", WAYS)
def test_patched_activations_end_where_the_prompt_ends(way: str) -> None:
    model, site = on_host("gpt2"), "blocks.0.mlp.W_in"
    dec = decomposition_of(model, site)
    with tlpd.patched_acts(model, dec, tlpd.act_patches(dec).set(site, [0, 1], 2.0, positions=LENGTH - 1)):
        rows = PROMPT
        for _ in range(NEW):
            rows = torch.cat([rows, logits(model, rows)[:, -1:].argmax(-1)], 1)
    with tlpd.patched_acts(model, dec, tlpd.act_patches(dec).set(site, [0, 1], 2.0, positions=-1)):
        assert torch.equal(generated(model, "gpt2", PROMPT, **WAYS[way]), rows)


def test_embeddings_are_a_prompt_too() -> None:
    model = on_host("gpt2")
    dec = decomposition_of(model, "blocks.*.mlp.*")
    right = one_pass_a_token(model, dec, LENGTH - 1)
    embedded = model.transformer.wte(PROMPT)
    with torch.no_grad(), tlpd.patched(model, dec, reversed_at(dec, -1)):
        rows = model.generate(inputs_embeds=embedded, pad_token_id=0, **SETTINGS)
    assert torch.equal(rows[:, -NEW:], right[:, -NEW:])


@pytest.mark.parametrize("positions", [-1, slice(-2, None), torch.arange(LENGTH) == 3])
def test_a_prompt_whose_end_is_not_known_is_refused(positions: Any) -> None:
    """Embeddings with token ids beside them; a prompt that the user's own loop reads in pieces."""
    model = on_host("gpt2")
    dec = decomposition_of(model, "blocks.*.mlp.*")
    embedded, masks = model.transformer.wte(PROMPT), reversed_at(dec, positions)
    with torch.no_grad(), tlpd.patched(model, dec, masks):
        with pytest.raises(tlpd.errors.PositionIndexError, match="Where the prompt ends is not known"):
            model.generate(PROMPT, inputs_embeds=embedded, pad_token_id=0, **SETTINGS)
        if not isinstance(positions, Tensor):
            first = model(PROMPT[:, :5], use_cache=True)
            with pytest.raises(tlpd.errors.PositionIndexError, match="Where the prompt ends is not known"):
                model(PROMPT[:, 5:], past_key_values=first.past_key_values)
    with torch.no_grad(), tlpd.patched(model, dec, reversed_at(dec, [1, 3])):
        whole = model(PROMPT).logits
        first = model(PROMPT[:, :5], use_cache=True)
        rest = model(PROMPT[:, 5:], past_key_values=first.past_key_values).logits
    assert (whole[:, 5:] - rest).abs().max() < 1e-4


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_plain_hooks_by_position_refuse_to_generate(host: str) -> None:
    """They see no more than one activation: neither a cache nor the prompt."""
    model = build(host)
    if host == "hooked":
        model.set_tokenizer(tokenizer())  # version 2 asks it for padding
    dec = decomposition_of(model, "blocks.0.mlp.W_in")
    pairs = tlpd.fwd_hooks(model, dec, reversed_at(dec, -1))
    settings = {
        "max_new_tokens": 2,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
        "return_type": "tokens",
    }
    for cache in (True, False):
        with torch.no_grad(), model.hooks(fwd_hooks=pairs):
            with pytest.raises(tlpd.errors.SiteNotFiredError, match="generate inside"):
                model.generate(PROMPT, use_past_kv_cache=cache, **settings)
    everywhere = reversed_at(dec, None)
    with torch.no_grad(), model.hooks(fwd_hooks=tlpd.fwd_hooks(model, dec, everywhere)):
        by_hooks = model.generate(PROMPT, **settings)
    with torch.no_grad(), tlpd.patched(model, dec, everywhere):
        assert torch.equal(model.generate(PROMPT, **settings), by_hooks)


def test_a_call_with_a_filled_cache_and_the_rows_that_come_after_it() -> None:
    if version("transformers").startswith("4."):
        pytest.skip("transformers 4 takes no new tokens alone beside a filled cache")
    model = on_host("gpt2")
    dec = decomposition_of(model, "blocks.*.mlp.*")
    right, cached = one_pass_a_token(model, dec, LENGTH - 1)[:, LENGTH:], 5
    mask = torch.ones_like(PROMPT)
    for given in (PROMPT[:, cached:], PROMPT):
        cache = model(PROMPT[:, :cached], use_cache=True).past_key_values
        with tlpd.patched(model, dec, reversed_at(dec, -1)):
            found = generated(model, "gpt2", given, past_key_values=cache, attention_mask=mask)
        assert torch.equal(found[:, given.shape[1] :], right)
    cache = model(PROMPT[:, :cached], use_cache=True).past_key_values
    with tlpd.patched(model, dec, reversed_at(dec, -1)), pytest.raises(PositionIndexError, match="not known"):
        generated(model, "gpt2", PROMPT[:, cached:], past_key_values=cache)


def test_two_rows_that_are_decoded_in_turn() -> None:
    model = gpt2().requires_grad_(False)
    dec = decomposition_of(model, "blocks.*.mlp.*")
    with tlpd.patched(model, dec, reversed_at(dec, -1)):
        cache = model(PROMPT[:, :5], use_cache=True).past_key_values
        model(PROMPT)
        with pytest.raises(PositionIndexError, match="not known"):
            model(PROMPT[:, :1], past_key_values=cache)


def test_a_part_that_is_called_after_a_pass_has_rows_of_its_own() -> None:
    model = gpt2().requires_grad_(False)
    dec, part = decomposition_of(model, "blocks.0.mlp.*"), model.transformer.h[0].mlp
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    with tlpd.patched(model, dec, reversed_at(dec, -1)):
        first = part(x)
    with tlpd.patched(model, dec, reversed_at(dec, -1)):
        cache = model(PROMPT, use_cache=True).past_key_values
        model(PROMPT[:, :1], past_key_values=cache)
        assert torch.equal(part(x), first)
        assert (part(x[:, -1:]) - first[:, -1:]).abs().max() < 1e-10
