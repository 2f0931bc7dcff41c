"""HookedTransformer: every kind of block, its flags, its users' hooks, and weights converted from transformers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from ..support.exactness import (
    GONE,
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    no_hooks_left,
    part_kept,
    patched_run,
    random_decomposition,
)
from ..support.families import FAMILIES, build
from ..support.hosts import VOCAB, HookedTransformer, hooked, off_trivial, run

pytestmark = pytest.mark.skipif(HookedTransformer is None, reason="transformer-lens 4 has no HookedTransformer")

GQA = {"n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "unfolded LayerNorm": {},
    "folded LayerNorm": {"normalization_type": "LNPre"},
    "RMSNorm, grouped queries, gated, rotary": GQA | {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
    "folded RMSNorm, gated": {"normalization_type": "RMSPre", "gated_mlp": True, "act_fn": "silu"},
    "attention only, no norm": {"attn_only": True, "normalization_type": None},
    "parallel attention and MLP": {"parallel_attn_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 4},
    "norms before and after": GQA
    | {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "use_normalization_before_and_after": True},
    "shortformer positions": {"positional_embedding_type": "shortformer"},
    "alibi positions": {"positional_embedding_type": "alibi"},
    "no norm": {"normalization_type": None},
}


def parameter(model: Any, name: str) -> torch.nn.Parameter:
    """The parameter of a site, by hand."""
    owner, role = model, name.rsplit(".", 1)[1]
    for part in name.split(".")[:-1]:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    grouped = role in ("W_K", "W_V") and hasattr(owner, f"_{role}")
    return getattr(owner, f"_{role}" if grouped else role)


def subtract(model: Any, name: str, delta: Tensor) -> None:
    """W -= delta [d_in, d_out] by hand."""
    weight, role = parameter(model, name), name.rsplit(".", 1)[1]
    if role in ("W_Q", "W_K", "W_V"):
        for head, part in enumerate(delta.chunk(weight.shape[0], dim=1)):
            weight[head] -= part
    elif role == "W_O":
        for head, part in enumerate(delta.chunk(weight.shape[0], dim=0)):
            weight[head] -= part
    else:
        weight -= delta


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_site_against_hand_edited_parameters(kind: str, tokens: Tensor) -> None:
    model = hooked(**CONFIGS[kind])
    decomposition = random_decomposition(model)
    attn_only, gated = CONFIGS[kind].get("attn_only", False), CONFIGS[kind].get("gated_mlp", False)
    positions = CONFIGS[kind].get("positional_embedding_type", "standard") in ("standard", "shortformer")
    assert len(decomposition) == 2 * (4 + (0 if attn_only else 2 + gated)) + 2 + positions
    before = no_hooks_left(model)
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-10)
    for name in decomposition:
        edited = copy.deepcopy(model)
        subtract(edited, name, gone(decomposition, name))
        hooked_run = patched_run(model, decomposition, ablate(decomposition, [name]), tokens)
        assert difference(hooked_run, run(edited, tokens)) < 1e-10, name
        assert difference(hooked_run, run(model, tokens)) > 1e-4, f"{name}: the patch does nothing"
        masks, taken = part_kept(decomposition, name)
        edited = copy.deepcopy(model)
        subtract(edited, name, taken(tlpd.site_weight(model, name)))
        assert difference(patched_run(model, decomposition, masks, tokens), run(edited, tokens)) < 1e-10, name
    assert no_hooks_left(model) == before


@pytest.mark.parametrize("kind", ["unfolded LayerNorm", "RMSNorm, grouped queries, gated, rotary"])
def test_heads_against_hand_edited_slices(kind: str, tokens: Tensor) -> None:
    model = hooked(**CONFIGS[kind])
    decomposition = random_decomposition(model, "blocks.1.attn.*")
    for name in decomposition:
        n_heads = parameter(model, name).shape[0]
        assert decomposition.sites[name].n_heads == n_heads
        for head in range(n_heads):
            whole = gone(decomposition, name)
            axis = 0 if name.endswith("W_O") else 1
            delta = torch.zeros_like(whole)
            delta.chunk(n_heads, dim=axis)[head].copy_(whole.chunk(n_heads, dim=axis)[head])
            edited = copy.deepcopy(model)
            subtract(edited, name, delta)
            ablated = patched_run(model, decomposition, ablate(decomposition, [name], head), tokens)
            assert difference(ablated, run(edited, tokens)) < 1e-10, (name, head)


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_hooks_agree_with_the_context_or_are_refused(kind: str, tokens: Tensor) -> None:
    model = hooked(**CONFIGS[kind])
    decomposition = random_decomposition(model, "blocks.*")
    reached = 0
    for name in decomposition:
        masks = ablate(decomposition, [name])
        try:
            pairs = tlpd.fwd_hooks(model, decomposition, masks)
        except tlpd.errors.UnsupportedSiteError as error:
            assert name in str(error) and "tl_paramdecomp.patched" in str(error)
            continue
        reached += 1
        assert (
            difference(model.run_with_hooks(tokens, fwd_hooks=pairs), patched_run(model, decomposition, masks, tokens))
            < 1e-10
        )
    refused = {"norms before and after": 4, "shortformer positions": 4}.get(kind, 0)
    assert len(decomposition) - reached == refused


FLAGS = {
    "set_use_attn_result": None,
    "set_use_split_qkv_input": None,
    "set_use_attn_in": None,
    "set_use_hook_mlp_in": None,
    "set_ungroup_grouped_query_attention": ("W_K", "W_V"),
}
"""Setter -> sites that it makes impossible with grouped queries."""


@pytest.mark.parametrize("kind", ["unfolded LayerNorm", "RMSNorm, grouped queries, gated, rotary"])
@pytest.mark.parametrize("setter", FLAGS)
def test_flags_are_exact_or_refused_by_name(kind: str, setter: str, tokens: Tensor) -> None:
    model = hooked(**CONFIGS[kind])
    decomposition = random_decomposition(model, "blocks.*")
    masks = ablate(decomposition)
    expected = patched_run(model, decomposition, masks, tokens)
    grouped = kind != "unfolded LayerNorm"
    if (setter, grouped) in (("set_ungroup_grouped_query_attention", False), ("set_use_attn_in", True)):
        pytest.skip("HookedTransformer has no such combination")
    getattr(model, setter)(True)
    assert difference(run(model, tokens), run(hooked(**CONFIGS[kind]), tokens)) < 1e-10
    lost = FLAGS[setter] or ()
    if lost:
        with pytest.raises(tlpd.errors.TLParamDecompError, match=rf"{setter}\(False\)"):
            patched_run(model, decomposition, masks, tokens)
    sites = [name for name in decomposition if not name.endswith(lost or "nothing")]
    few = random_decomposition(model, sites)
    assert_no_mask_is_the_model(model, tokens, few, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, few, 1e-10)
    getattr(model, setter)(False)
    assert torch.equal(patched_run(model, decomposition, masks, tokens), expected)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("attn.hook_z", "attn.W_O"),
        ("mlp.hook_post", "mlp.W_out"),
        ("ln2.hook_normalized", "mlp.W_in"),
        ("ln1.hook_normalized", "attn.W_V"),
        ("hook_resid_pre", "attn.W_Q"),
    ],
)
def test_an_upstream_edit_of_the_user_counts(hook: str, site: str, tokens: Tensor) -> None:
    """The user's hook changes x of the patched site: the model with the edited weight gives the same under that hook."""
    model, name = hooked(), f"blocks.1.{site}"
    decomposition = random_decomposition(model, name)

    def edit(activation: Tensor, hook: Any) -> Tensor:
        return activation * 0.5 + 1.0

    hooks = [(f"blocks.1.{hook}", edit)]
    edited = copy.deepcopy(model)
    subtract(edited, name, gone(decomposition, name))
    with tlpd.patched(model, decomposition, ablate(decomposition)):
        inside = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert difference(inside, edited.run_with_hooks(tokens, fwd_hooks=hooks)) < 1e-10
    assert difference(inside, edited(tokens)) > 1e-3, "the user's hook does nothing"
    with model.hooks(fwd_hooks=hooks), tlpd.patched(model, decomposition, ablate(decomposition)):  # hooks set before
        assert difference(model(tokens), inside) < 1e-10


def test_every_pass_in_one_context_reads_its_own_inputs(tokens: Tensor) -> None:
    model = hooked()
    decomposition = random_decomposition(model)
    edited = copy.deepcopy(model)
    for name in decomposition:
        subtract(edited, name, gone(decomposition, name))
    with tlpd.patched(model, decomposition, ablate(decomposition)):
        for other in (tokens, tokens.flip(1), tokens[:1, :3], (tokens + 5) % VOCAB):
            assert difference(model(other), edited(other)) < 1e-10


def test_the_user_reads_patched_values(tokens: Tensor) -> None:
    model = hooked()
    decomposition = random_decomposition(model, "blocks.0.*")
    edited = copy.deepcopy(model)
    for name in decomposition:
        subtract(edited, name, gone(decomposition, name))
    with tlpd.patched(model, decomposition, ablate(decomposition)):
        _, cache = model.run_with_cache(tokens)
    _, by_hand = edited.run_with_cache(tokens)
    for key in ("blocks.0.attn.hook_q", "blocks.0.hook_attn_out", "blocks.0.mlp.hook_pre", "blocks.0.hook_mlp_out"):
        assert difference(cache[key], by_hand[key]) < 1e-10, key


def test_a_decomposition_made_through_transformers_opens_on_converted_weights(tokens: Tensor) -> None:
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    original = build("gpt2")
    settings = FAMILIES["gpt2"].config
    config = HookedTransformerConfig(
        n_layers=2, d_model=24, n_ctx=32, d_head=8, n_heads=3, d_mlp=40, d_vocab=VOCAB, act_fn="gelu_new",
        normalization_type="LN", eps=1e-5, dtype=torch.float64, device="cpu", init_weights=False,
    )  # fmt: skip
    assert settings["n_embd"] == config.d_model
    model = HookedTransformer(config).eval().requires_grad_(False)
    state = convert_gpt2_weights(original, config)
    missing = model.load_state_dict({key: value.to(torch.float64) for key, value in state.items()}, strict=False)
    assert all("mask" in key or "IGNORE" in key or key == "unembed.b_U" for key in missing.missing_keys)
    model.unembed.b_U.zero_()
    decomposition = random_decomposition(original)
    assert difference(run(model, tokens), run(original, tokens)) < 1e-10
    tlpd.check_target(model, decomposition)
    masks = ablate(decomposition).keep_only("blocks.0.mlp.W_in", [0, 2], delta=0.0, positions=[1, -1])
    assert (
        difference(
            patched_run(model, decomposition, masks, tokens), patched_run(original, decomposition, masks, tokens)
        )
        < 1e-10
    )
    folded = off_trivial(copy.deepcopy(model))
    with pytest.raises(tlpd.errors.TargetMismatchError):
        tlpd.check_target(folded, decomposition)
    assert GONE in range(decomposition["blocks.0.mlp.W_in"].n_components)
