"""Positions while generating: what each decoding step computes is what one long forward pass over the whole row computes.

The long pass needs no cache and no notion of a prompt: its positions are spelled out by hand. It is held against every
decoding step's logits on every host, with and without a cache.
"""

import functools
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from ..support.models import GPT2_LIKE, C, build, decomposition_of, logits, module_of, nnsight_lm, tokenizer, tolerance

PROMPT, NEW = 6, 3
LONG = PROMPT + NEW - 1
SITES = ["blocks.0.attn.W_V", "blocks.0.mlp.W_in", "blocks.1.attn.W_Q", "blocks.1.mlp.W_out"]


class Generated(NamedTuple):
    """Rows and the logits of each decoding step."""

    rows: Tensor
    steps: list[Tensor]
    """[batch, vocab] each."""


def generate(model: Any, host: str, tokens: Tensor, cache: bool = True, **kwargs: Any) -> Generated:
    """Greedy decoding the way each host's users call it; logits seen by a torch hook at the unembedding."""
    steps: list[Tensor] = []
    unembed = {"hooked": "unembed", "bridge": "unembed.original_component"}.get(host, "lm_head")
    module = module_of(model).get_submodule(unembed)
    handle = module.register_forward_hook(lambda m, args, out: steps.append(out[:, -1].detach().clone()))
    try:
        with torch.no_grad():
            rows = _generated_rows(model, host, tokens, cache, **kwargs)
    finally:
        handle.remove()
    assert rows.shape == (len(tokens), tokens.shape[1] + NEW) and len(steps) == NEW
    return Generated(rows, steps)


def _generated_rows(model: Any, host: str, tokens: Tensor, cache: bool, **kwargs: Any) -> Tensor:
    if host in ("hooked", "bridge"):
        settings = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
        return model.generate(tokens, max_new_tokens=NEW, use_past_kv_cache=cache, **settings, **kwargs)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    if host == "nnsight":
        with model.generate(tokens, **settings, **kwargs) as tracer:
            rows = tracer.result.save()
        return rows
    return model.generate(tokens, **settings, **kwargs)


@functools.cache
def with_tokenizer(host: str) -> Any:
    """A model that can generate: HookedTransformer 2 and nnsight need a tokenizer for it."""
    if host == "nnsight":
        return nnsight_lm(build("gpt2"))
    model = build(host)
    if host == "hooked":
        model.set_tokenizer(tokenizer())
    return model


def agrees(model: Any, dec: tlpd.Decomposition, generated: Generated, long_masks: tlpd.Masks, **kwargs: Any) -> None:
    """One pass over the whole row gives every step's logits."""
    with tlpd.patched(model, dec, long_masks):
        whole = logits(model, generated.rows[:, :-1], **kwargs)
    for k, step in enumerate(generated.steps):
        assert (whole[:, -NEW + k] - step).abs().max() < tolerance(model), f"step {k}"


# given -> the same positions spelled out over a row of LONG columns
CASES = {
    "first": (0, [0]),
    "last of the prompt": (-1, [PROMPT - 1]),
    "several": ([1, -2], [1, PROMPT - 2]),
    "from the end": (slice(-3, None), [3, 4, 5]),
    "open end": (slice(4, None), list(range(4, LONG))),
    "before the end": (slice(None, -4), [0, 1]),
    "boolean": (torch.arange(PROMPT) % 2 == 0, [0, 2, 4]),
    "boolean by row": (torch.stack([torch.arange(PROMPT) == 1, torch.arange(PROMPT) > 3]), None),
    "decoded": ([PROMPT + 1, 2], [2, PROMPT + 1]),
    "everywhere": (None, None),
}


WITHOUT_CACHE = ["last of the prompt", "from the end", "open end", "boolean", "decoded"]


@pytest.mark.parametrize("case, cache", [*((case, True) for case in CASES), *((case, False) for case in WITHOUT_CACHE)])
@pytest.mark.parametrize("host", GPT2_LIKE)
def test_every_step_is_a_column_of_one_long_pass(host: str, case: str, cache: bool, tokens: Tensor) -> None:
    model = with_tokenizer(host)
    dec = decomposition_of(model, "blocks.*")
    given, spelled_out = CASES[case]
    if case == "boolean by row":
        spelled_out = torch.cat([given, torch.zeros(2, NEW - 1, dtype=torch.bool)], 1)
    masks, long_masks = dec.masks(), dec.masks()
    for site in SITES:
        masks = masks.ablate(site, [0, 1], positions=given).scale(site, 3, 0.2, positions=given)
        long_masks = long_masks.ablate(site, [0, 1], positions=spelled_out).scale(site, 3, 0.2, positions=spelled_out)
    masks = masks.keep_only(SITES[0], [2, 3], delta=0.3, positions=given)
    long_masks = long_masks.keep_only(SITES[0], [2, 3], delta=0.3, positions=spelled_out)
    prompt = tokens[:, :PROMPT]
    with tlpd.patched(model, dec, masks):
        generated = generate(model, host, prompt, cache)
    agrees(model, dec, generated, long_masks)
    plain = generate(model, host, prompt, cache)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain.steps, generated.steps)), "the patch does nothing"


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("host", GPT2_LIKE)
def test_mask_tensors_of_the_prompt_leave_decoded_tokens_to_the_model(host: str, cache: bool, tokens: Tensor) -> None:
    model = with_tokenizer(host)
    dec = decomposition_of(model, "blocks.*")
    m, d = torch.rand(2, PROMPT, C).double(), torch.rand(2, PROMPT).double()
    masks, long_masks = dec.masks(), dec.masks()
    for site in SITES:
        delta = 0.0 if site == SITES[1] else d
        masks = masks.with_values(site, m, delta=delta)
        long_d = torch.cat([torch.zeros_like(d) if site == SITES[1] else d, torch.ones(2, NEW - 1)], 1)
        long_masks = long_masks.with_values(site, torch.cat([m, torch.ones(2, NEW - 1, C)], 1), delta=long_d)
    with tlpd.patched(model, dec, masks):
        agrees_with = generate(model, host, tokens[:, :PROMPT], cache)
    agrees(model, dec, agrees_with, long_masks)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("case", ["first", "last of the prompt", "boolean", "decoded"])
@pytest.mark.parametrize("site", ["embed.W_E", "pos_embed.W_pos", "unembed.W_U"])
@pytest.mark.parametrize("host", GPT2_LIKE)
def test_positions_on_embeddings_and_unembedding(host: str, site: str, case: str, cache: bool, tokens: Tensor) -> None:
    """Hosts embed outside their forward pass, look positions up once for all rows, and unembed the last column alone."""
    model = with_tokenizer(host)
    dec = decomposition_of(model, site)
    given, spelled_out = CASES[case]
    with tlpd.patched(model, dec, dec.masks().ablate(site, [0, 1, 2], positions=given)):
        generated = generate(model, host, tokens[:, :PROMPT], cache)
    agrees(model, dec, generated, dec.masks().ablate(site, [0, 1, 2], positions=spelled_out))


@pytest.mark.parametrize("host", GPT2_LIKE)
def test_a_second_prompt_of_another_length_starts_anew(host: str, tokens: Tensor) -> None:
    model = with_tokenizer(host)
    dec = decomposition_of(model, "blocks.0.mlp.W_in")
    masks = dec.masks().ablate("blocks.0.mlp.W_in", slice(None), positions=-1)
    with tlpd.patched(model, dec, masks):
        first = generate(model, host, tokens[:, :4])
        second = generate(model, host, tokens[:, :PROMPT])
        third = logits(model, tokens)
    for generated, last in ((first, 3), (second, PROMPT - 1)):
        agrees(model, dec, generated, dec.masks().ablate("blocks.0.mlp.W_in", slice(None), positions=last))
    with tlpd.patched(model, dec, dec.masks().ablate("blocks.0.mlp.W_in", slice(None), positions=6)):
        assert torch.equal(logits(model, tokens), third)


PADS = 2
PADDED_SITES = [*SITES, "embed.W_E", "pos_embed.W_pos"]


def padded_prompt(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows of PROMPT columns, the second of them left-padded, and their attention mask."""
    prompt, attention = tokens[:, :PROMPT].clone(), torch.ones(2, PROMPT, dtype=torch.long)
    prompt[1, :PADS] = attention[1, :PADS] = 0
    return prompt, attention


def ablated_at(dec: tlpd.Decomposition, positions: list[int], sites: list[str] = PADDED_SITES) -> tlpd.Masks:
    masks = dec.masks()
    for site in sites:
        masks = masks.ablate(site, [0, 1], positions=positions) if positions else masks
    return masks


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("positions", [[0, 2], [3], [PROMPT - 1, PROMPT + 1]])
@pytest.mark.parametrize("host", ["gpt2", "nnsight"])
def test_left_padding_counts_as_columns(host: str, positions: list[int], cache: bool, tokens: Tensor) -> None:
    """Each row against itself alone and without padding, where the same tokens stand PADS columns further left."""
    if host == "nnsight" and version("transformers").startswith("4."):
        pytest.skip("nnsight with transformers 4 keeps the first step's position ids while it decodes padded rows")
    model = with_tokenizer(host)
    dec = decomposition_of(model, PADDED_SITES)
    prompt, attention = padded_prompt(tokens)
    with tlpd.patched(model, dec, ablated_at(dec, positions)):
        both = generate(model, host, prompt, cache, attention_mask=attention)
    for row, shift in ((0, 0), (1, PADS)):
        shifted = [p - shift for p in positions if p >= shift]
        with tlpd.patched(model, dec, ablated_at(dec, shifted)):
            alone = generate(model, host, prompt[[row], shift:], cache)
        assert torch.equal(alone.rows[0], both.rows[row, shift:])
        for a, b in zip(alone.steps, both.steps):
            assert (a[0] - b[row]).abs().max() < tolerance(model)


@pytest.mark.parametrize("positions", [[0, 2], [3], [PROMPT - 1]])
@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_left_padding_in_a_forward_pass(host: str, positions: list[int], tokens: Tensor) -> None:
    """As above; HookedTransformer writes zeros where W_pos would be looked up for padding, and they stay zeros."""
    model = with_tokenizer(host)
    dec = decomposition_of(model, PADDED_SITES)
    prompt, attention = padded_prompt(tokens)
    extra = {"padding_side": "left"} if host == "hooked" else {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
    with tlpd.patched(model, dec, ablated_at(dec, positions)):
        both = logits(model, prompt, attention_mask=attention, **extra)
        if host == "hooked":
            with torch.no_grad():
                _, cache = model.run_with_cache(prompt, attention_mask=attention, padding_side="left")
            assert torch.equal(cache["hook_pos_embed"][1, :PADS], torch.zeros(PADS, 24).double())
    for row, shift in ((0, 0), (1, PADS)):
        with tlpd.patched(model, dec, ablated_at(dec, [p - shift for p in positions if p >= shift])):
            alone = logits(model, prompt[[row], shift:])
        assert (alone[0] - both[row, shift:]).abs().max() < tolerance(model)


def test_unembedding_the_last_columns_alone(tokens: Tensor) -> None:
    """transformers' logits_to_keep: the unembedding computes fewer columns than the pass."""
    model = build("gpt2")
    dec = decomposition_of(model, "unembed.W_U")
    for positions in (slice(5, None), -1, torch.arange(7) > 5):
        with tlpd.patched(model, dec, dec.masks().ablate("unembed.W_U", slice(None), positions=positions)):
            whole, last = logits(model, tokens), logits(model, tokens, logits_to_keep=2)
        assert (whole[:, -2:] - last).abs().max() < 1e-12
        assert (last - logits(model, tokens)[:, -2:]).abs().max() > 1e-3


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("case, cache", [*((case, True) for case in CASES), *((case, False) for case in WITHOUT_CACHE)])
def test_patch_trace_in_generation(case: str, cache: bool, read: bool, tokens: Tensor) -> None:
    """The same steps as under `patched`, whatever the form of the positions, and whatever each step has read before."""
    model = with_tokenizer("nnsight")
    sites = [*(SITES[2:] if read else SITES), "unembed.W_U"]
    dec = decomposition_of(model, sites)
    given, _ = CASES[case]
    masks = dec.masks()
    for site in dec:
        masks = masks.ablate(site, [0, 1], positions=given)
    masks = masks.with_values(sites[1], torch.rand(2, PROMPT, C).double(), delta=0.5)
    prompt = tokens[:, :PROMPT]
    with tlpd.patched(model, dec, masks):
        expected = generate(model, "nnsight", prompt, cache)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    with torch.no_grad():
        with model.generate(prompt, **settings) as tracer:
            steps = [].save()
            for _ in tracer.iter[:NEW]:
                if read:  # by then the first layer has put this step's columns into the cache
                    first = model.transformer.h[0].output  # a tuple in transformers 4
                    (first[0] if isinstance(first, tuple) else first).mean()
                tlpd.patch_trace(model, dec, masks)
                steps.append(model.lm_head.output[:, -1])
    assert len(steps) == NEW
    for a, b in zip(steps, expected.steps):
        assert (a - b).abs().max() < tolerance(model)
