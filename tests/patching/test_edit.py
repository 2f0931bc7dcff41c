"""Constant masks as edited weights: for a while, and for good in a copy that is saved and loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import MaskNotConstantError, PatchConflictError

from ..support.models import (
    BUILDERS,
    C,
    bridge,
    build,
    decomposition_of,
    gpt2,
    hooked,
    llama,
    logits,
    module_of,
    nnsight,
    tolerance,
)

EDITED = ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.mlp.W_in", "blocks.1.attn.W_O", "blocks.1.mlp.W_out"]


def some_masks(dec: tlpd.Decomposition) -> tlpd.Masks:
    masks = dec.masks()
    for i, site in enumerate(dec):
        masks = masks.ablate(site, i % C) if i % 2 else masks.keep_only(site, [0, 1], delta=0.5)
    return masks


def hand_edited(model: Any, dec: tlpd.Decomposition, masks: tlpd.Masks) -> dict[str, Tensor]:
    """V diag(m) U + d (W - V U), from the values that the masks state."""
    made = {}
    for name in masks.changed():
        pair, c = masks[name], dec[name]
        m = pair.m.flatten().to(c.V.dtype)
        W = tlpd.site_weight(model, name)
        made[name] = (c.V.detach() * m) @ c.U.detach() + pair.d.flatten().to(W.dtype) * (W - c.product().detach())
    return made


@pytest.mark.parametrize("host", BUILDERS)
def test_edited_weights_are_the_formula_and_the_hooks(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, EDITED)
    masks = some_masks(dec)
    expected = hand_edited(model, dec, masks)
    with tlpd.patched(model, dec, masks):
        hooked_logits = logits(model, tokens)
    with tlpd.edited_weights(model, dec, masks) as same:
        assert same is model
        for name, weight in expected.items():
            assert (tlpd.site_weight(model, name) - weight).abs().max() < tolerance(model), name
        assert (logits(model, tokens) - hooked_logits).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", BUILDERS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_same_parameters_are_back_bit_for_bit(host: str, fails: bool, tokens: Tensor) -> None:
    model = build(host)
    module = module_of(model)
    dec = decomposition_of(model, "*")
    parameters, plain = dict(module.named_parameters(remove_duplicate=False)), logits(model, tokens)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with tlpd.edited_weights(model, dec, some_masks(dec)):
            assert not torch.equal(logits(model, tokens), plain)
            if fails:
                raise RuntimeError("mine")
    except RuntimeError as error:
        assert str(error) == "mine"
    after = dict(module.named_parameters(remove_duplicate=False))
    assert list(after) == list(parameters)
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in parameters.items())
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("host", ["gpt2", "nnsight", "bridge"])
@pytest.mark.parametrize("side", ["embed.W_E", "unembed.W_U"])
def test_one_side_of_a_tied_embedding(host: str, side: str, tokens: Tensor) -> None:
    model = build(host)
    other = {"embed.W_E": "unembed.W_U", "unembed.W_U": "embed.W_E"}[side]
    tied = {id(p) for p in module_of(model).parameters()}
    assert len([n for n, p in module_of(model).named_parameters(remove_duplicate=False)]) > len(tied)
    dec = decomposition_of(model, [side])
    masks = dec.masks().ablate(side, [0, 1])
    before = tlpd.site_weight(model, other).clone()
    with tlpd.patched(model, dec, masks):
        expected = logits(model, tokens)
    with tlpd.edited_weights(model, dec, masks):
        assert torch.equal(tlpd.site_weight(model, other), before)
        assert (
            not torch.equal(tlpd.site_weight(model, side).T, before)
            and (logits(model, tokens) - expected).abs().max() < 1e-10
        )
    assert {id(p) for p in module_of(model).parameters()} == tied
    assert torch.equal(tlpd.site_weight(model, side).T, tlpd.site_weight(model, other))
    made = tlpd.edited_model(model, dec, masks)
    assert torch.equal(tlpd.site_weight(made, other), before) and (logits(made, tokens) - expected).abs().max() < 1e-10


# --- gradients --------------------------------------------------------------------------------------------------------
def test_gradients_taken_after_leaving_are_those_of_the_edited_model(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    masks = some_masks(dec)
    embeds = model.transformer.wte(tokens).detach().requires_grad_(True)
    with tlpd.edited_weights(model, dec, masks):
        loss = model(inputs_embeds=embeds).logits.pow(2).mean()
    (found,) = torch.autograd.grad(loss, embeds)
    with tlpd.patched(model, dec, masks):
        (expected,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.pow(2).mean(), embeds)
    assert (found - expected).abs().max() < 1e-10
    assert all(p.grad is None for p in dec.parameters())


# --- what cannot be ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [EDITED])
@pytest.mark.parametrize("use", ["edited_weights", "edited_model"])
def test_masks_that_differ_over_rows_are_no_weight(use: str, change: list[str]) -> None:
    model = gpt2()
    dec = decomposition_of(model, change)
    site = change[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for masks in (
        dec.masks().ablate(site, 0, positions=-1),
        dec.masks().with_values(site, torch.rand(2, 1, C)),
        dec.masks().with_values(site, torch.rand(7, C)),
        dec.masks().with_values(site, 1.0, delta=torch.rand(7)),
    ):
        with pytest.raises(MaskNotConstantError, match=rf"{site}.*patched"):
            made = getattr(tlpd, use)(model, dec, masks)
            with made:
                pass
    for masks in (
        dec.masks().with_values(site, torch.rand(1, 1, C), delta=torch.rand(1, 1)),
        dec.masks().with_values(site, torch.rand(C), delta=torch.tensor(0.5)),
    ):
        with tlpd.edited_weights(model, dec, masks):
            pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_patched_model_is_not_copied(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    with (
        tlpd.patched(model, dec, dec.masks().ablate(EDITED[0], 0)),
        pytest.raises(PatchConflictError, match="copies the model"),
    ):
        tlpd.edited_model(model, dec, dec.masks().ablate(EDITED[2], 0))


def test_edits_of_one_site_do_not_nest() -> None:
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    with tlpd.edited_weights(model, dec, dec.masks().ablate(EDITED[0], 0)):
        with pytest.raises(PatchConflictError):
            with tlpd.edited_weights(model, dec, dec.masks().ablate(EDITED[0], 1)):
                pass


# --- for good ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_an_edited_copy(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, "*")
    masks = some_masks(dec)
    plain, state = logits(model, tokens), copy.deepcopy(module_of(model).state_dict())
    with tlpd.edited_weights(model, dec, masks):
        expected = logits(model, tokens)
    made = tlpd.edited_model(model, dec, masks)
    assert type(made) is type(model) and (logits(made, tokens) - expected).abs().max() < tolerance(model)
    assert torch.equal(logits(model, tokens), plain)
    assert all(torch.equal(v, state[k]) for k, v in module_of(model).state_dict().items())
    with pytest.raises(tlpd.errors.TargetMismatchError):
        tlpd.check_target(made, dec)
    assert [p.requires_grad for p in module_of(made).parameters()] == [False] * len(list(module_of(made).parameters()))


@pytest.mark.parametrize(
    "make", [gpt2, llama, lambda: llama(tie_word_embeddings=True), lambda: gpt2(tie_word_embeddings=False)]
)
@pytest.mark.parametrize("sites", [EDITED, ["embed.W_E"], ["unembed.W_U"], ["embed.W_E", "unembed.W_U"]])
@pytest.mark.parametrize("through_nnsight", [False, True])
def test_a_transformers_model_saved_and_loaded(
    make: Any, sites: list[str], through_nnsight: bool, tmp_path: Path, tokens: Tensor
) -> None:
    hf = make()
    tied = hf.config.tie_word_embeddings
    model = nnsight(hf) if through_nnsight else hf
    dec = decomposition_of(model, sites)
    masks = some_masks(dec)
    with tlpd.edited_weights(model, dec, masks):
        expected = logits(model, tokens)
    made = module_of(tlpd.edited_model(model, dec, masks))
    made.save_pretrained(tmp_path)
    loaded = type(hf).from_pretrained(tmp_path, attn_implementation="eager", torch_dtype=hf.dtype).eval()
    assert (logits(loaded, tokens) - expected).abs().max() < tolerance(hf)
    assert hf.config.tie_word_embeddings == tied and (hf.lm_head.weight is hf.get_input_embeddings().weight) == tied
    assert loaded.config.tie_word_embeddings == (tied and sites == EDITED)


def test_a_hooked_transformer_saved_and_loaded(tokens: Tensor, tmp_path: Path) -> None:
    model = hooked()
    dec = decomposition_of(model, "*")
    masks = some_masks(dec)
    with tlpd.edited_weights(model, dec, masks):
        expected = logits(model, tokens)
    torch.save(tlpd.edited_model(model, dec, masks).state_dict(), tmp_path / "model.pt")
    loaded = hooked(seed=7)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert (logits(loaded, tokens) - expected).abs().max() < tolerance(model)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("sites", [EDITED, "*"])
def test_a_bridge_saved_and_loaded(make: Any, sites: Any, tokens: Tensor, tmp_path: Path) -> None:
    """By its state_dict into a new bridge, and as the transformers model underneath."""
    model = bridge(make())
    dec = decomposition_of(model, sites)
    masks = some_masks(dec)
    with tlpd.edited_weights(model, dec, masks):
        expected = logits(model, tokens)
    made = tlpd.edited_model(model, dec, masks)
    assert (logits(made, tokens) - expected).abs().max() < tolerance(model)
    loaded = bridge(make(seed=7, **({"tie_word_embeddings": False} if sites == "*" else {})))
    loaded.load_state_dict(copy.deepcopy(made.state_dict()))
    assert (logits(loaded, tokens) - expected).abs().max() < tolerance(model)


def test_gpt2s_fused_projection_stays_in_step_in_a_bridge(tokens: Tensor) -> None:
    """q, k and v of a bridge are views of c_attn, which is what a state_dict keeps."""
    model = bridge()
    dec = decomposition_of(model, EDITED)
    made = tlpd.edited_model(model, dec, some_masks(dec))
    fused = made.blocks[0].attn.qkv.original_component.weight
    for i, name in enumerate(("W_Q", "W_K", "W_V")):
        part = fused[:, 24 * i : 24 * i + 24]
        assert torch.equal(part, tlpd.site_weight(made, f"blocks.0.attn.{name}")), name


@pytest.mark.parametrize("change", ["loaded", "converted", "trained"])
def test_what_is_done_to_an_edited_weight_is_not_lost_without_a_word(change: str) -> None:
    model, other = gpt2(), gpt2(seed=3)
    dec = decomposition_of(model, "blocks.0.mlp.W_in")
    before = model.transformer.h[0].mlp.c_fc.weight
    kept = before.detach().clone()
    with pytest.raises(PatchConflictError, match="was changed"):
        with tlpd.edited_weights(model, dec, dec.masks().ablate("blocks.0.mlp.W_in", [0])):
            if change == "loaded":
                model.load_state_dict(other.state_dict())
            elif change == "converted":
                model.float()
            else:
                model(torch.arange(5).unsqueeze(0)).logits.sum().backward()
                torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.transformer.h[0].mlp.c_fc.weight is before and torch.equal(before, kept)
