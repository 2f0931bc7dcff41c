"""TransformerBridge: its own random models, its flags and compatibility mode, and its users' hooks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from ..support.exactness import (
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    patched_run,
    random_decomposition,
    roles,
)
from ..support.families import FAMILIES, build, subtract
from ..support.hosts import VOCAB, build_bridge_from_module, off_trivial, on_host, run

pytestmark = pytest.mark.skipif(build_bridge_from_module is None, reason="transformer-lens 2 has no TransformerBridge")

NATIVE: dict[str, dict[str, Any]] = {
    "LayerNorm": {},
    "attention only": {"attn_only": True},
    "RMSNorm, grouped queries, gated": {
        "normalization_type": "RMS",
        "n_key_value_heads": 2,
        "gated_mlp": True,
        "act_fn": "silu",
    },
}
FLAGS = ("set_use_attn_result", "set_use_split_qkv_input", "set_use_attn_in", "set_use_hook_mlp_in")
MODES = ("raw", "no_processing", "processed")
"""As booted; in compatibility mode with the weights as they were; and with LayerNorm folded and weights centred."""


def native(**changes: Any) -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    settings: dict[str, Any] = {
        **{"n_layers": 2, "d_model": 24, "n_ctx": 16, "d_head": 6, "n_heads": 4, "d_mlp": 28, "d_vocab": VOCAB},
        **{"act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, "initializer_range": 0.3},
    }
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**(settings | changes))).eval()
    return off_trivial(model.to(torch.float64)).requires_grad_(False)


def in_mode(family: str, mode: str) -> Any:
    model = on_host(build(family), "bridge")
    if mode != "raw":
        model.enable_compatibility_mode(no_processing=mode == "no_processing", disable_warnings=True)
    return model


@pytest.mark.parametrize("kind", NATIVE)
def test_native_models(kind: str, tokens: Tensor) -> None:
    model = native(**NATIVE[kind])
    decomposition = random_decomposition(model)
    per_block = 4 + (0 if kind == "attention only" else 2 + NATIVE[kind].get("gated_mlp", False))
    assert sum(name.startswith("blocks.") for name in decomposition) == 2 * per_block
    assert {"embed.W_E", "unembed.W_U"} <= set(decomposition)
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-10, roles(decomposition).values())
    edited = native(**NATIVE[kind])
    for name in decomposition:  # by hand, in the nn.Linear or nn.Embedding underneath
        part = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_gate": "gate", "W_in": "in", "W_out": "out"}
        owner, role = name.rsplit(".", 1)
        linear = edited.get_submodule(f"{owner}.{part[role]}" if role in part else owner).original_component
        delta = gone(decomposition, name)
        linear.weight.data -= delta if isinstance(linear, torch.nn.Embedding) else delta.T
    assert difference(patched_run(model, decomposition, ablate(decomposition), tokens), run(edited, tokens)) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "gemma2"])
def test_compatibility_mode(family: str, mode: str, tokens: Tensor) -> None:
    """Whatever was folded and centred, the sites hold the weights that the bridge multiplies by."""
    model = in_mode(family, mode)
    decomposition = random_decomposition(model)
    blocks = len(FAMILIES[family].blocks)
    assert sum(name.startswith("blocks.") for name in decomposition) == 2 * blocks
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-7, roles(decomposition).values())
    if mode == "processed":
        with pytest.raises(tlpd.errors.TargetMismatchError, match="processed"):
            tlpd.check_target(model, random_decomposition(build(family)))


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("setter", FLAGS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flags_are_exact_or_refused_by_name(family: str, setter: str, mode: str, tokens: Tensor) -> None:
    model = in_mode(family, mode)
    every = set(tlpd.find_sites(model))
    try:
        getattr(model, setter)(True)
    except (NotImplementedError, ValueError, AssertionError, AttributeError) as error:
        pytest.skip(f"the bridge itself refuses: {error}")
    try:
        sites = tlpd.find_sites(model)
    except tlpd.errors.UnsupportedModelError as error:
        assert setter in str(error)
        return
    for name in every - set(sites):
        with pytest.raises(tlpd.errors.UnsupportedSiteError, match=r"set_\w+\(False\)"):
            tlpd.find_sites(model, name)
    assert len(every - set(sites)) in (0, 2, 6)
    decomposition = random_decomposition(model)
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-7, roles(decomposition).values())
    getattr(model, setter)(False)
    assert set(tlpd.find_sites(model)) == every


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("attn.hook_z", "attn.W_O"),
        ("mlp.hook_post", "mlp.W_out"),
        ("mlp.hook_in", "mlp.W_in"),
        ("attn.hook_in", "attn.W_K"),
    ],
)
def test_an_upstream_edit_of_the_user_counts(family: str, hook: str, site: str, tokens: Tensor) -> None:
    """The user's hook changes x of the patched site: the bridge of an edited model gives the same under that hook."""
    name = f"blocks.1.{site}"
    original = build(family)
    model = on_host(original, "bridge")
    if hook == "mlp.hook_post" and hook not in "".join(model.hook_dict):
        hook = "mlp.out.hook_in"
    decomposition = random_decomposition(model, name)
    subtract(original, FAMILIES[family].places()[name], gone(decomposition, name))
    edited = on_host(original, "bridge")

    def edit(activation: Tensor, hook: Any) -> Tensor:
        return activation * 0.5 + 1.0

    hooks = [(f"blocks.1.{hook}", edit)]
    with torch.no_grad():
        with tlpd.patched(model, decomposition, ablate(decomposition)):
            inside = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert difference(inside, edited.run_with_hooks(tokens, fwd_hooks=hooks)) < 1e-10
        assert difference(inside, edited(tokens)) > 1e-3, "the user's hook does nothing"
        with (
            model.hooks(fwd_hooks=hooks),
            tlpd.patched(model, decomposition, ablate(decomposition)),
        ):  # hooks set before
            assert difference(model(tokens), inside) < 1e-10


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plain_hooks_agree_with_the_context(family: str, mode: str, tokens: Tensor) -> None:
    model = in_mode(family, mode)
    decomposition = random_decomposition(model)
    for name in decomposition:
        masks = ablate(decomposition, [name])
        with torch.no_grad():
            by_pairs = model.run_with_hooks(tokens, fwd_hooks=tlpd.fwd_hooks(model, decomposition, masks))
        assert difference(by_pairs, patched_run(model, decomposition, masks, tokens)) < 1e-10, name


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_every_pass_in_one_context_reads_its_own_inputs(mode: str, tokens: Tensor) -> None:
    model = in_mode("llama", mode)
    decomposition = random_decomposition(model)
    rows = (tokens, tokens.flip(1), tokens[:1, :3], (tokens + 5) % VOCAB)
    with tlpd.patched(model, decomposition, ablate(decomposition)):
        together = [run(model, other) for other in rows]
    for other, out in zip(rows, together):
        assert torch.equal(out, patched_run(model, decomposition, ablate(decomposition), other))


def test_the_user_reads_patched_values(tokens: Tensor) -> None:
    original = build("gpt2")
    model = on_host(original, "bridge")
    decomposition = random_decomposition(model, "blocks.0.*")
    for name in decomposition:
        subtract(original, FAMILIES["gpt2"].places()[name], gone(decomposition, name))
    with torch.no_grad(), tlpd.patched(model, decomposition, ablate(decomposition)):
        _, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        _, by_hand = on_host(original, "bridge").run_with_cache(tokens)
    for key in ("attn.q.hook_out", "attn.o.hook_out", "mlp.in.hook_out", "mlp.out.hook_out"):
        assert difference(cache[f"blocks.0.{key}"], by_hand[f"blocks.0.{key}"]) < 1e-10, key


def test_a_deep_copy_is_a_model_of_its_own(tokens: Tensor) -> None:
    model = on_host(build("gpt2"), "bridge")
    decomposition = random_decomposition(model, "blocks.0.*")
    twin = copy.deepcopy(model)
    plain = run(model, tokens)
    with tlpd.patched(twin, decomposition, ablate(decomposition)):
        assert torch.equal(run(model, tokens), plain)
        assert difference(run(twin, tokens), plain) > 1e-3
