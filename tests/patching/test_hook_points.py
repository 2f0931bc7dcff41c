"""TransformerLens' own tools on components: plain `fwd_hooks` pairs, and components as hook points."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import PatchConflictError, SiteNotFiredError, UnsupportedModelError, UnsupportedSiteError

from ..support.models import LENS, VOCAB, C, bridge, build, decomposition_of, gpt2, hooked, logits, tokenizer, tolerance

SITES = ["blocks.0.attn.W_Q", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.attn.W_V", "blocks.1.mlp.W_out"]
KEY = "hook_component_acts"


def all_kinds(dec: tlpd.Decomposition) -> tlpd.Masks:
    return (
        dec.masks()
        .ablate(SITES[0], [0, 1], head=1)
        .scale(SITES[1], 2, 0.3, positions=[1, -1])
        .keep_only(SITES[2], [0, 1], delta=0.4)
        .with_values(
            SITES[3], torch.linspace(0, 1, 2 * 7 * C).reshape(2, 7, C), delta=torch.linspace(0, 1, 14).reshape(2, 7)
        )
        .ablate(SITES[4], slice(None))
    )


# --- fwd_hooks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", LENS)
def test_pairs_do_what_patched_does(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    masks = all_kinds(dec)
    with tlpd.patched(model, dec, masks):
        expected = logits(model, tokens)
    pairs = tlpd.fwd_hooks(model, dec, masks)
    assert all(isinstance(name, str) and name in model.hook_dict for name, _ in pairs)
    with torch.no_grad():
        assert (model.run_with_hooks(tokens, fwd_hooks=pairs) - expected).abs().max() < tolerance(model)
        with model.hooks(fwd_hooks=pairs):
            assert (model(tokens) - expected).abs().max() < tolerance(model)
            _, cache = model.run_with_cache(tokens)
        with tlpd.patched(model, dec, masks):
            _, expected_cache = model.run_with_cache(tokens)
    for key in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_v", "blocks.0.mlp.hook_post"):
        assert (cache[key] - expected_cache[key]).abs().max() < tolerance(model), key
    assert not torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("host", LENS)
def test_pairs_carry_gradients_and_no_mask_gives_no_pairs(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    assert tlpd.fwd_hooks(model, dec, dec.masks()) == []
    masks = all_kinds(dec)
    with tlpd.patched(model, dec, masks):
        expected = torch.autograd.grad(model(tokens).pow(2).mean(), list(dec.parameters()))
    pairs = tlpd.fwd_hooks(model, dec, masks)
    found = torch.autograd.grad(model.run_with_hooks(tokens, fwd_hooks=pairs).pow(2).mean(), list(dec.parameters()))
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).abs().max() < tolerance(model) * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_pairs_by_position_refuse_decoding_steps(host: str, tokens: Tensor) -> None:
    model = build(host)
    if host == "hooked":
        model.set_tokenizer(tokenizer())
    dec = decomposition_of(model, SITES)
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
        "return_type": "tokens",
    }
    everywhere, somewhere = (dec.masks().ablate(SITES[2], 1, positions=p) for p in (None, 1))
    with torch.no_grad(), model.hooks(fwd_hooks=tlpd.fwd_hooks(model, dec, everywhere)):
        rows = model.generate(tokens, **settings)
    with tlpd.patched(model, dec, everywhere), torch.no_grad():
        assert torch.equal(model.generate(tokens, **settings), rows)
    with torch.no_grad(), model.hooks(fwd_hooks=tlpd.fwd_hooks(model, dec, somewhere)):
        with pytest.raises(SiteNotFiredError, match=r"decoding step.*patched"):
            model.generate(tokens, **settings)


def test_pairs_need_transformer_lens(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, SITES)
    with pytest.raises(UnsupportedModelError, match=r"fwd_hooks is for TransformerLens.*patched"):
        tlpd.fwd_hooks(model, dec, dec.masks())
    with pytest.raises(UnsupportedModelError, match=r"attached is for TransformerLens.*component_acts"):
        with tlpd.attached(model, dec):
            pass


def test_a_site_without_hook_points_says_so() -> None:
    model = hooked()
    dec = decomposition_of(model, "embed.W_E")
    with pytest.raises(UnsupportedSiteError, match=r"embed\.W_E.*patched"):
        tlpd.fwd_hooks(model, dec, dec.masks().ablate("embed.W_E", 0))


# --- attached ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", LENS)
def test_activations_are_cached_and_nothing_changes(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model)
    plain, names = logits(model, tokens), list(model.hook_dict)
    acts = tlpd.component_acts(model, dec, tokens)
    with torch.no_grad(), tlpd.attached(model, dec) as same:
        assert same is model
        found, cache = model.run_with_cache(tokens)
        assert torch.equal(found, plain)
        for site in dec:
            key = f"{site}.{KEY}"
            assert key in model.hook_dict
            assert cache[key].shape[1:] == (7, C) and (cache[key] - acts[site]).abs().max() < tolerance(model)
        _, some = model.run_with_cache(tokens, names_filter=f"{SITES[0]}.{KEY}")
        assert list(some) == [f"{SITES[0]}.{KEY}"]
    assert list(model.hook_dict) == names and torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("host", LENS)
@pytest.mark.parametrize("in_place", [True, False])
def test_edits_of_activations_are_masks(host: str, in_place: bool, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)

    def halve(acts: Tensor, hook: Any) -> Tensor | None:
        edited = acts if in_place else acts.clone()
        edited[:, 2, 3] = edited[:, 2, 3] * 0.5
        return None if in_place else edited

    masks = dec.masks()
    for site in SITES:
        masks = masks.scale(site, 3, 0.5, positions=2)
    with tlpd.patched(model, dec, masks):
        expected = logits(model, tokens)
    with torch.no_grad(), tlpd.attached(model, dec):
        found = model.run_with_hooks(tokens, fwd_hooks=[(f"{site}.{KEY}", halve) for site in SITES])
        assert torch.equal(logits(model, tokens), model(tokens))
    assert (found - expected).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", LENS)
def test_without_the_error_term_a_site_is_its_bias_and_components(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    masks = dec.masks()
    for site in SITES:
        masks = masks.keep_only(site, slice(None), delta=0.0)
    with tlpd.edited_weights(model, dec, masks):
        expected = logits(model, tokens)
    with tlpd.attached(model, dec, use_error_term=False):
        assert (logits(model, tokens) - expected).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", ["hooked", "bridge"])
@pytest.mark.parametrize("use_error_term", [True, False])
def test_gradients_at_hook_points(host: str, use_error_term: bool, tokens: Tensor) -> None:
    """Of a loss by an activation: backward hooks and autograd against a finite difference along a random direction."""
    model = build(host)
    dec = decomposition_of(model, SITES)
    key = f"{SITES[2]}.{KEY}"
    direction = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(0)).double()
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(acts: Tensor, hook: Any) -> None:
        acts.retain_grad()
        kept.append(acts)

    def loss_at(step: float) -> float:
        def move(acts: Tensor, hook: Any) -> Tensor:
            return acts + step * direction

        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=[(key, move)]).pow(2).mean().item()

    with tlpd.attached(model, dec, use_error_term):
        model.run_with_hooks(tokens, fwd_hooks=[(key, keep)]).pow(2).mean().backward()
        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        with model.hooks(bwd_hooks=[(key, lambda grad, hook: seen.append(grad.clone()))]):
            model(tokens).pow(2).mean().backward()
    assert ((kept[0].grad * direction).sum() - slope).abs() < 1e-6 * max(1.0, abs(slope))
    assert torch.allclose(seen[0], kept[0].grad)
    if use_error_term:  # unedited, the model is itself: the factors cannot matter
        dec.zero_grad()
        with tlpd.attached(model, dec):
            model(tokens).pow(2).mean().backward()
        assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in dec.parameters())


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_activation_patching_with_transformer_lens_own_tool(host: str, tokens: Tensor) -> None:
    """`generic_activation_patch` addresses `blocks.{layer}.hook_{name}`: with layer "0.mlp.W_in" that is our hook point."""
    pd = pytest.importorskip("pandas")
    from transformer_lens import patching

    model = build(host)
    dec = decomposition_of(model, SITES)
    clean, corrupted = tokens, (tokens + 7) % VOCAB

    def metric(out: Tensor) -> Tensor:
        return out[:, -1, 3].sum() - out[:, -1, 5].sum()

    def put_back(acts: Tensor, index: list, clean_acts: Tensor) -> Tensor:
        _, position, component = index
        acts[:, position, component] = clean_acts[:, position, component]
        return acts

    layers = [site.removeprefix("blocks.") for site in SITES]
    index = pd.DataFrame([(layer, p, 1) for layer in layers for p in (0, 6)], columns=["layer", "pos", "component"])
    with torch.no_grad(), tlpd.attached(model, dec):
        _, cache = model.run_with_cache(clean)
        found = patching.generic_activation_patch(
            model, corrupted, cache, metric, put_back, "component_acts", index_df=index.copy()
        )
    expected = []
    clean_acts, own = tlpd.component_acts(model, dec, clean), tlpd.component_acts(model, dec, corrupted)
    for layer, p, c in index.itertuples(index=False):
        site = f"blocks.{layer}"
        ratio = torch.ones(2, 7, C).double()
        ratio[:, p, c] = clean_acts[site][:, p, c] / own[site][:, p, c]
        with tlpd.patched(model, dec, dec.masks().with_values(site, ratio)):
            expected.append(metric(logits(model, corrupted)))
    assert (found.flatten().double() - torch.stack(expected)).abs().max() < 1e-4  # the tool keeps float32
    assert (torch.stack(expected) - metric(logits(model, corrupted))).abs().max() > 1e-3


@pytest.mark.parametrize("host", LENS)
def test_patching_a_prompts_own_activations_is_nothing(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    keys = [f"{site}.{KEY}" for site in SITES]
    with torch.no_grad(), tlpd.attached(model, dec):
        plain, cache = model.run_with_cache(tokens)
        again = model.run_with_hooks(tokens, fwd_hooks=[(key, lambda acts, hook: cache[hook.name]) for key in keys])
    assert torch.equal(again, plain)


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_activations_of_another_prompt_move_the_sites_output_along_its_components(host: str, tokens: Tensor) -> None:
    """y of the one prompt plus (h of the other - h) U, by a hand-written hook on the output."""
    model = build(host)
    site, y_hook = "blocks.1.mlp.W_out", "blocks.1.hook_mlp_out"
    dec = decomposition_of(model, site)
    other = (tokens + 7) % VOCAB
    h, h_other = (tlpd.component_acts(model, dec, t)[site] for t in (tokens, other))
    moved = (h_other - h) @ dec[site].U.detach()
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(y_hook, lambda y, hook: y + moved)])
        with tlpd.attached(model, dec):
            found = model.run_with_hooks(tokens, fwd_hooks=[(f"{site}.{KEY}", lambda acts, hook: h_other)])
    assert (found - expected).abs().max() < tolerance(model) and (expected - logits(model, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("host", LENS)
def test_hook_points_are_gone_afterwards(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    key, plain = f"{SITES[0]}.{KEY}", logits(model, tokens)

    def here(name: str) -> bool:  # by filter: a bridge of TransformerLens 3 looks for names given to add_hook elsewhere
        return name == key

    with pytest.raises(RuntimeError, match="mine"), tlpd.attached(model, dec):
        model.add_hook(here, lambda acts, hook: acts * 0)
        raise RuntimeError("mine")
    assert key not in model.hook_dict and torch.equal(logits(model, tokens), plain)
    with torch.no_grad(), contextlib.suppress(KeyError, ValueError, AssertionError):  # or ignored, by a bridge of 3.x
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(key, lambda acts, hook: acts * 0)]), plain)
    with tlpd.attached(model, dec):  # the hook added before went with its point
        assert torch.equal(logits(model, tokens), plain)
        model.add_hook(here, lambda acts, hook: acts * 0)
        assert not torch.equal(logits(model, tokens), plain)
        model.reset_hooks()
        assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("host", LENS)
def test_attached_beside_patched(host: str, tokens: Tensor) -> None:
    model = build(host)
    one, two = decomposition_of(model, SITES[:2]), decomposition_of(model, SITES[2:])
    masks = one.masks().keep_only(SITES[0], 1, delta=0.2)
    with torch.no_grad(), tlpd.patched(model, one, masks):
        patched = logits(model, tokens)
        with tlpd.attached(model, two):
            found, cache = model.run_with_cache(tokens)
            acts = tlpd.component_acts(model, two, tokens)
        assert torch.equal(found, patched)
        assert (cache[f"{SITES[3]}.{KEY}"] - acts[SITES[3]]).abs().max() < tolerance(model)
        with pytest.raises(PatchConflictError):
            with tlpd.attached(model, one):
                pass
    with tlpd.attached(model, one), pytest.raises((PatchConflictError, UnsupportedModelError)):
        with tlpd.attached(model, one):
            pass


def test_activations_of_position_embeddings_cover_the_batch(tokens: Tensor) -> None:
    """A bridge looks positions up once for all rows."""
    model = bridge()
    dec = decomposition_of(model, "pos_embed.W_pos")
    with torch.no_grad(), tlpd.attached(model, dec):
        found, cache = model.run_with_cache(tokens)
        assert torch.equal(found, model(tokens))
    assert cache[f"pos_embed.W_pos.{KEY}"].shape[1:] == (7, C)
