"""Attention scores from pairs of components, against TransformerLens' own and scores recomputed from queries and keys."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.effects.attention_scores import attention_scores
from tl_paramdecomp.analysis.effects.component_heads import per_head
from tl_paramdecomp.errors import HeadIndexError, NoMatchingSiteError, SettingError, UnsupportedModelError

from ..support.models import C, build, decomposition_of, gpt2, hooked
from ..support.zoo import tiny
from .test_attribution import HOSTS, WIDE, made

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"


def turned(x: Tensor, base: float, n: int, neighbours: bool) -> Tensor:
    """Rotary embedding by complex numbers: pairs of the first n coordinates of [batch, pos, d], turned by pos base^(-2i/n)."""
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, n, 2) / n)
    turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())
    first, second = (x[..., 0:n:2], x[..., 1:n:2]) if neighbours else (x[..., : n // 2], x[..., n // 2 : n])
    found = torch.complex(first.double(), second.double()) * turn
    parts = (
        torch.stack([found.real, found.imag], -1).flatten(-2) if neighbours else torch.cat([found.real, found.imag], -1)
    )
    return torch.cat([parts, x[..., n:].double()], -1)


def queries_and_keys(model: Any, tokens: Tensor, head: int, layer: int = 1) -> tuple[Tensor, Tensor]:
    """One head's queries and its group's keys, before any rotation, from site inputs and the weights."""
    adapter = adapt(model)
    names = [f"blocks.{layer}.attn.W_{role}" for role in "QK"]
    inputs = adapter.capture(tokens, names).inputs
    sites = [adapter.site(name) for name in names]
    found = []
    for name, site, h in zip(names, sites, (head, head * sites[1].n_heads // sites[0].n_heads)):
        y = inputs[name] @ adapter.weight(name) + (0 if adapter.bias(name) is None else adapter.bias(name))
        found.append(y.unflatten(-1, (site.n_heads, -1))[:, :, h])
    return found[0], found[1]


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("host", HOSTS)
def test_pairs_sum_to_the_models_scores(host: str, tokens: Tensor) -> None:
    """Every head of every host: learned positions, rotary in halves, grouped keys; rotation worked out here."""
    model = made(host)
    dec = decomposition_of(model, "blocks.*")
    n_heads = tlpd.find_sites(model)[Q].n_heads
    assert n_heads is not None
    for head in range(n_heads):
        found = attention_scores(model, dec, tokens, 1, head)
        q, k = queries_and_keys(model, tokens, head)
        if host in WIDE or host == "hooked-gqa":
            q, k = (turned(x, 10000.0, 6, False) for x in (q, k))
            assert found.rotation != "none"
        expected = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
        limit = 1e-8 if found.rotation == "none" else 1e-5  # hosts work cosines out in float32
        assert (found.total - expected).abs().max() < limit
        assert (found.total - found.model)[:, causal(7)].abs().max() < 1e-8
        assert found.model[:, ~causal(7)].isnan().all()
        assert found.pairs.shape == (2, 7, 7, C + 2, C + 2)


@pytest.mark.parametrize("host", ["hooked", "hooked-gqa"])
def test_transformer_lens_own_scores(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, ["blocks.*.attn.W_Q", "blocks.*.attn.W_K"])
    for layer in (0, 1):
        with torch.no_grad():
            scores = model.run_with_cache(tokens)[1][f"blocks.{layer}.attn.hook_attn_scores"]
        for head in range(model.cfg.n_heads):
            found = attention_scores(model, dec, tokens, layer, head)
            assert (found.total - scores[:, head])[:, causal(7)].abs().max() < 1e-8


def test_a_pair_is_what_its_two_components_make_of_a_score(tokens: Tensor) -> None:
    """Keep only one component of W_Q and one of W_K, nothing else, not even biases: the score is their pair."""
    model = gpt2().requires_grad_(False)
    model.transformer.h[1].attn.c_attn.bias.data.zero_()
    dec = decomposition_of(model, [Q, K])
    found = attention_scores(model, dec, tokens, 1, 2)
    masks = dec.masks().keep_only(Q, [3]).keep_only(K, [1])
    with tlpd.patched(model, dec, masks):
        kept: list[Tensor] = []
        with model.transformer.h[1].attn.c_attn.register_forward_hook(lambda m, a, y: kept.append(y)):
            model(tokens)
    q, k = kept[0][..., 16:24], kept[0][..., 40:48]
    expected = q @ k.transpose(1, 2) / math.sqrt(8)
    assert (found.components[..., 3, 1] - expected).abs().max() < 1e-10
    best = found.top(6, 2, n=3)
    table = found.pairs[0, 6, 2]
    assert abs(best[0].value) == table.abs().max() and {best[0].query, best[0].key} <= {*range(C), "delta", "bias"}


def test_delta_and_bias_terms_by_hand(tokens: Tensor) -> None:
    model = build("hooked-gqa")
    model.blocks[1].attn._b_K.data.normal_(generator=torch.Generator().manual_seed(3))
    dec, adapter = decomposition_of(model, [Q, K]), adapt(model)
    found = attention_scores(model, dec, tokens, 1, 3)
    x = adapter.capture(tokens, [Q, K]).inputs
    q = (x[Q] @ (adapter.weight(Q) - dec[Q].product()))[..., 18:24]
    k = adapter.bias(K)[6:12].expand(2, 7, 6)  # head 3 reads key head 1
    expected = torch.einsum("bqd,bkd->bqk", turned(q, 1e4, 6, False), turned(k, 1e4, 6, False)) / math.sqrt(6)
    assert (found.pairs[..., C, C + 1] - expected).abs().max() < 1e-6
    assert found.pairs[..., C + 1, C + 1].abs().max() > 1e-3


@pytest.mark.parametrize(
    "name, n, neighbours",
    [("GPTJForCausalLM", 4, True), ("GPTNeoXForCausalLM", 4, False), ("GlmForCausalLM", None, True)],
)
def test_partial_and_neighbouring_rotations(name: str, n: int | None, neighbours: bool, tokens: Tensor) -> None:
    """GPT-J pairs neighbours, GPT-NeoX halves, each on a part of the coordinates."""
    model = tiny(name).double()
    dec = decomposition_of(model, ["blocks.0.attn.W_Q", "blocks.0.attn.W_K"])
    found = attention_scores(model, dec, tokens, 0, 1)
    q, k = queries_and_keys(model, tokens, 1, layer=0)
    if n is None:
        n = int(q.shape[-1] * model.config.rope_parameters["partial_rotary_factor"])
    q, k = (turned(x, 10000.0, n, neighbours) for x in (q, k))
    expected = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(q.shape[-1])
    assert (found.total - expected).abs().max() < 1e-5
    assert found.rotation.startswith("neighbours" if neighbours else "halves")


def test_positions_padding_and_one_sided_decompositions(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, [Q, K])
    whole = attention_scores(model, dec, tokens, 1, 0)
    some = attention_scores(model, dec, tokens, 1, 0, queries=[-1], keys=slice(0, 3))
    assert some.queries == [6] and some.keys == [0, 1, 2]
    assert (some.pairs - whole.pairs[:, 6:, :3]).abs().max() < 1e-12
    one = attention_scores(model, decomposition_of(model, [K]), tokens, 1, 0)
    assert one.pairs.shape[-2:] == (2, C + 2) and (one.total - whole.total).abs().max() < 1e-10
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[:, 5:], mask[:, 5:] = 0, 0
    short = attention_scores(model, dec, padded, 1, 0, attention_mask=mask)
    assert (short.pairs - whole.pairs)[:, :5, :5].abs().max() < 1e-10
    assert short.model[:, 5:].isnan().all() and not short.model[:, :5, :5][:, causal(5)].isnan().any()


@pytest.mark.parametrize(
    "name, why", [("Qwen3ForCausalLM", "qk-norm: k_norm, q_norm"), ("BloomForCausalLM", "ALiBi"),
                  ("Gemma2ForCausalLM", "soft-capping"), ("MptForCausalLM", "ALiBi")],
)  # fmt: skip
def test_other_scores_are_refused_by_name(name: str, why: str, tokens: Tensor) -> None:
    model = tiny(name)
    dec = decomposition_of(model, ["blocks.0.attn.W_Q", "blocks.0.attn.W_K"])
    with pytest.raises(UnsupportedModelError, match=why):
        attention_scores(model, dec, tokens, 0, 0)


def test_hooked_transformers_other_scores_are_refused_by_name(tokens: Tensor) -> None:
    for changes, why in (
        ({"positional_embedding_type": "alibi"}, "ALiBi"),
        ({"attn_scores_soft_cap": 20.0}, "soft-capping"),
        ({"use_qk_norm": True, "normalization_type": "RMS"}, "qk-norm"),
    ):
        model = hooked(**changes)
        dec = decomposition_of(model, [Q, K])
        with pytest.raises(UnsupportedModelError, match=why):
            attention_scores(model, dec, tokens, 1, 0)


def test_scores_that_are_something_else_are_refused_by_their_values(tokens: Tensor) -> None:
    """A query changed on its way from the weight to the inner product, which no name tells of."""
    model = build("hooked")
    model.blocks[1].attn.hook_q.add_hook(lambda q, hook: q.tanh(), is_permanent=True)
    dec = decomposition_of(model, [Q, K])
    with pytest.raises(UnsupportedModelError, match="something else between W_Q, W_K and the softmax"):
        attention_scores(model, dec, tokens, 1, 0)


def test_what_cannot_be_is_refused(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, [Q, K, "blocks.0.mlp.W_in"])
    with pytest.raises(HeadIndexError, match="query heads 0 to 2"):
        attention_scores(model, dec, tokens, 1, 3)
    with pytest.raises(NoMatchingSiteError, match="neither"):
        attention_scores(model, dec, tokens, 0, 0)
    with pytest.raises(NoMatchingSiteError, match=r"no blocks\.7"):
        attention_scores(model, dec, tokens, 7, 0)
    with pytest.raises(SettingError, match="given 6 and 6"):
        attention_scores(model, dec, tokens, 1, 0, keys=[0]).top(6, 6)
    with pytest.raises(HeadIndexError, match="does not divide into heads"):
        per_head(model, dec, tokens, "blocks.0.mlp.W_in")


@pytest.mark.parametrize("host", HOSTS)
def test_parts_by_head_sum_to_the_whole(host: str, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model, "blocks.1.attn.*")
    acts, sites = tlpd.component_acts(model, dec, tokens), tlpd.find_sites(model)
    for site in dec:
        found = per_head(model, dec, tokens, site)
        heads = sites[site].n_heads
        assert found.shares.shape == (heads, C) and (found.shares.sum(0) - 1).abs().max() < 1e-10
        if site.endswith("W_O"):
            assert found.writes is None and found.reads is not None
            assert (found.reads.sum(2) - acts[site]).abs().max() < 1e-10
            x = adapt(model).capture(tokens, [site]).inputs[site]
            width = x.shape[-1] // heads
            by_hand = x[..., width : 2 * width] @ dec[site].V[width : 2 * width]
            assert (found.reads[:, :, 1] - by_hand).abs().max() < 1e-10
        else:
            assert found.reads is None and found.writes is not None
            whole = acts[site].unsqueeze(-1) * dec[site].U
            assert (found.writes.transpose(2, 3).flatten(-2) - whole).abs().max() < 1e-10
