"""What works inside `patched`: every way of calling a host, and what each way shows."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import NoMatchingSiteError, PatchConflictError, ShapeError, SiteNotFiredError

from ..support.models import BUILDERS, LENS, C, build, decomposition_of, gpt2, logits, module_of, plain, tolerance

EDITED = ["blocks.0.attn.W_K", "blocks.0.mlp.W_in", "blocks.1.attn.W_O", "blocks.1.mlp.W_out"]


def ablated(dec: tlpd.Decomposition, components: Any = (0, 2), sites: list[str] = EDITED) -> tlpd.Masks:
    masks = dec.masks()
    for site in sites:
        masks = masks.ablate(site, list(components))
    return masks


def edited_logits(model: Any, dec: tlpd.Decomposition, masks: tlpd.Masks, tokens: Tensor) -> Tensor:
    """The reference: the same masks in the weights."""
    with tlpd.edited_weights(model, dec, masks):
        return logits(model, tokens)


@pytest.mark.parametrize("host", BUILDERS)
def test_heads_against_edited_weights(host: str, tokens: Tensor) -> None:
    """One head's ablation, and all heads' together, by hook and by weight."""
    model = build(host)
    dec = decomposition_of(model, "blocks.*.attn.*")
    plain_logits = logits(model, tokens)
    for role in ("W_Q", "W_K", "W_V", "W_O"):
        name = f"blocks.0.attn.{role}"
        heads = dec.sites[name].n_heads
        assert heads == {
            "llama": (2 if role in ("W_K", "W_V") else 4),
            "gqa": (2 if role in ("W_K", "W_V") else 4),
        }.get("llama" if "llama" in host else "gqa" if "gqa" in host else "", 3)
        one, all_heads = dec.masks().ablate(name, [1, 3], head=1), dec.masks()
        for head in range(heads):
            all_heads = all_heads.ablate(name, [1, 3], head=head)
        with tlpd.patched(model, dec, one):
            hooked = logits(model, tokens)
        assert (hooked - edited_logits(model, dec, one, tokens)).abs().max() < tolerance(model), role
        assert (hooked - _by_hand(model, dec, name, [1, 3], 1, tokens)).abs().max() < tolerance(model), role
        assert (hooked - plain_logits).abs().max() > 1e-4, role
        with tlpd.patched(model, dec, all_heads):
            every = logits(model, tokens)
        assert (every - edited_logits(model, dec, dec.masks().ablate(name, [1, 3]), tokens)).abs().max() < tolerance(
            model
        )


def _by_hand(
    model: Any, dec: tlpd.Decomposition, name: str, components: list[int], head: int, tokens: Tensor
) -> Tensor:
    """Subtract one head's slice of V_c U_c from the weight, with the slice written out here."""
    V, U = dec[name].V.detach(), dec[name].U.detach()
    difference = V[:, components] @ U[components]
    axis, width = (0, V.shape[0]) if name.endswith("W_O") else (1, U.shape[1])
    d_head = width // dec.sites[name].n_heads
    kept = torch.zeros(width, dtype=V.dtype)
    kept[head * d_head : (head + 1) * d_head] = 1.0
    difference = difference * (kept[:, None] if axis == 0 else kept)
    whole = tlpd.from_factors(model, {name: (difference, torch.eye(U.shape[1], dtype=V.dtype))})
    return edited_logits(model, whole, whole.masks().ablate(name, slice(None)), tokens)


@pytest.mark.parametrize("host", LENS)
def test_the_cache_holds_patched_values(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, EDITED)
    masks = ablated(dec)
    with tlpd.edited_weights(model, dec, masks), torch.no_grad():
        expected_logits, expected = model.run_with_cache(tokens)
    with tlpd.patched(model, dec, masks), torch.no_grad():
        found_logits, found = model.run_with_cache(tokens)
    assert (found_logits - expected_logits).abs().max() < tolerance(model)
    assert set(found) == set(expected) and "blocks.1.hook_attn_out" in found and "blocks.1.hook_mlp_out" in found
    for key, value in expected.items():
        assert (found[key] - value).nan_to_num().abs().max() < tolerance(model), key


@pytest.mark.parametrize("host", LENS)
def test_the_users_hooks_see_and_edit_patched_values(host: str, tokens: Tensor) -> None:
    """Theirs run after ours on outputs and before ours on inputs, as in a model whose weights are edited."""
    model = build(host)
    dec = decomposition_of(model, EDITED)
    masks = ablated(dec)
    seen: list[Tensor] = []

    def double(activation: Tensor, hook: Any) -> Tensor:
        seen.append(activation.clone())
        return activation * 2

    def zero_in_place(activation: Tensor, hook: Any) -> None:
        activation[:, 0] = 0.0

    hooks = [
        ("blocks.1.hook_attn_out", double),
        ("blocks.0.mlp.hook_post", zero_in_place),
        ("blocks.0.hook_resid_mid", double),
    ]
    with tlpd.edited_weights(model, dec, masks), torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    expected_seen, seen = seen, []
    with tlpd.patched(model, dec, masks), torch.no_grad():
        found = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with model.hooks(fwd_hooks=hooks):
            again = model(tokens)
    assert (found - expected).abs().max() < tolerance(model) and torch.equal(found, again)
    for ours, theirs in zip(seen, expected_seen):
        assert (ours - theirs).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", LENS)
@pytest.mark.parametrize("reset", [{}, {"including_permanent": True}, {"clear_contexts": False}])
def test_resetting_hooks_does_not_unpatch(host: str, reset: dict, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, EDITED)
    with tlpd.patched(model, dec, ablated(dec)):
        before = logits(model, tokens)
        model.reset_hooks(**reset)
        after = logits(model, tokens)
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda a, hook: a)])
        assert torch.equal(before, after) and torch.equal(logits(model, tokens), before)
    assert not torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("host", ["hooked", "hooked-gqa", "bridge"])
def test_passes_that_stop_or_start_at_a_layer(host: str, tokens: Tensor) -> None:
    """They need not reach every site, and what they compute is patched."""
    model = build(host)
    dec = decomposition_of(model, EDITED)
    masks = ablated(dec)

    def run() -> list[Tensor]:
        with torch.no_grad():
            stopped = model(tokens, stop_at_layer=1)
            _, cache = model.run_with_cache(tokens, stop_at_layer=1)
            resumed = model(stopped, start_at_layer=1)
        return [stopped, cache["blocks.0.hook_mlp_out"], resumed, logits(model, tokens)]

    try:
        with tlpd.edited_weights(model, dec, masks):
            expected = run()
    except (NotImplementedError, TypeError) as error:
        pytest.skip(f"this host cannot: {error}")
    with tlpd.patched(model, dec, masks):
        found = run()
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", BUILDERS)
def test_modes_of_autograd(host: str, tokens: Tensor) -> None:
    """no_grad and inference_mode first, gradients after them with the same masks."""
    model = build(host)
    dec = decomposition_of(model, EDITED)
    masks = ablated(dec)
    with torch.inference_mode(), tlpd.patched(model, dec, masks):
        inferred = logits(model, tokens)
    with tlpd.patched(model, dec, masks):
        assert torch.equal(logits(model, tokens), inferred)
    with torch.enable_grad(), tlpd.patched(model, dec, masks):
        out = module_of(model)(tokens)
        out = getattr(out, "logits", out)
        out.pow(2).mean().backward()
    assert (out.detach() - inferred).abs().max() < tolerance(model)
    for site in EDITED:
        grads = dec[site].V.grad, dec[site].U.grad
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        changed = [g.abs().sum(dim).nonzero().flatten().tolist() for g, dim in zip(grads, (0, 1))]
        assert changed == [[0, 2], [0, 2]], "only what is subtracted has a gradient"


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_inputs_and_factors_are_those_of_the_edited_model(training: bool, tokens: Tensor) -> None:
    """By functional_call with a dense weight that depends on the factors; one site before and one after the other."""
    model = gpt2().requires_grad_(False)
    names = {
        "blocks.0.mlp.W_in": "transformer.h.0.mlp.c_fc.weight",
        "blocks.1.attn.W_O": "transformer.h.1.attn.c_proj.weight",
    }
    dec = decomposition_of(model, list(names))
    masks = dec.masks().keep_only("blocks.0.mlp.W_in", [1, 2], delta=0.7).scale("blocks.1.attn.W_O", 0, -1.5)
    embeds = model.transformer.wte(tokens).clone()
    model.train(training)  # dropout is 0

    def gradients(call: Any) -> list[Tensor]:
        x = embeds.clone().requires_grad_(True)
        leaves = [x, *dec.parameters()]
        return list(torch.autograd.grad(call(x).logits.pow(3).mean(), leaves))

    def edited(x: Tensor) -> Any:
        weights = {}
        for name, m, d in (("blocks.0.mlp.W_in", [0, 1, 1, 0, 0], 0.7), ("blocks.1.attn.W_O", [-1.5, 1, 1, 1, 1], 1.0)):
            V, U = dec[name].V, dec[name].U
            weights[names[name]] = (V * torch.tensor(m).double()) @ U + d * (tlpd.site_weight(model, name) - V @ U)
        return torch.func.functional_call(model, weights, (), {"inputs_embeds": x})

    with tlpd.patched(model, dec, masks):
        found = gradients(lambda x: model(inputs_embeds=x))
    for ours, theirs in zip(found, gradients(edited)):
        assert (ours - theirs).abs().max() < 1e-9 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_gradient_checkpointing(inside: bool, tokens: Tensor) -> None:
    """A pass recomputed inside the context is the patched one; recomputed outside of it is refused by torch."""
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    masks = ablated(dec)
    model.train()

    def loss() -> Tensor:
        return model(tokens, use_cache=False).logits.pow(2).mean()

    with tlpd.patched(model, dec, masks):
        expected = torch.autograd.grad(loss(), list(dec.parameters()))
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        dec.zero_grad()
        checkpointed = loss()
        if inside:
            checkpointed.backward()
    if not inside:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            checkpointed.backward()
        return
    for parameter, grad in zip(dec.parameters(), expected):
        assert (parameter.grad - grad).abs().max() < 1e-12


@pytest.mark.parametrize("host", BUILDERS)
def test_autocast(host: str, tokens: Tensor) -> None:
    model = build(host)
    module_of(model).float()
    if host.startswith("hooked"):
        model.cfg.dtype = torch.float32  # its norms cast to it
    dec = decomposition_of(model, "blocks.*")
    ones = dec.masks()
    for site in dec:
        ones = ones.with_values(site, torch.ones(*tokens.shape, C), delta=torch.ones(tokens.shape))
    with torch.autocast("cpu", torch.bfloat16):
        plain_logits = logits(model, tokens)
        with tlpd.patched(model, dec, ones):
            assert torch.equal(logits(model, tokens), plain_logits)
        with tlpd.patched(model, dec, ablated(dec)):
            coarse = logits(model, tokens)
    fine = edited_logits(model, dec, ablated(dec), tokens)
    assert coarse.dtype == plain_logits.dtype
    assert (coarse.float() - fine).abs().max() < 0.15 * fine.abs().max()


@pytest.mark.parametrize("host", ["hooked", "bridge", "nnsight", "gpt2"])
def test_bf16_models(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, "blocks.*")
    fine = edited_logits(model, dec, ablated(dec), tokens)
    module_of(model).to(torch.bfloat16)
    if host == "hooked":
        model.cfg.dtype = torch.bfloat16
    dec.float()
    with tlpd.patched(model, dec, ablated(dec)):
        assert (logits(model, tokens).double() - fine).abs().max() < 0.2 * fine.abs().max()


@pytest.mark.parametrize("host", BUILDERS)
def test_an_exception_in_the_users_code_or_the_forward_pass(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, EDITED)
    before, patched_before = logits(model, tokens), None
    with tlpd.patched(model, dec, ablated(dec)):
        patched_before = logits(model, tokens)
        with pytest.raises(Exception, match="."):  # each host fails in its own way
            logits(model, torch.full_like(tokens, 10_000))
        assert torch.equal(logits(model, tokens), patched_before), "a failed pass leaves nothing behind"
    assert torch.equal(logits(model, tokens), before)


def test_a_deep_copy_of_a_model_that_was_patched(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    with tlpd.patched(model, dec, ablated(dec)):
        expected = logits(model, tokens)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, tokens), logits(model, tokens))
    with tlpd.patched(copied, dec, ablated(dec)):
        assert torch.equal(logits(copied, tokens), expected) and not torch.equal(logits(model, tokens), expected)


# --- several at once --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_nested_contexts_on_other_sites(host: str, tokens: Tensor) -> None:
    model = build(host)
    one, two = decomposition_of(model, EDITED[:2], seed=0), decomposition_of(model, EDITED[2:], seed=1)
    both = decomposition_of(model, EDITED)
    first = one.masks().keep_only(EDITED[0], 1).ablate(EDITED[1], 2)
    second = two.masks().ablate(EDITED[2], 1).keep_only(EDITED[3], [0, 1], delta=0.5)
    with tlpd.edited_weights(model, one, first), tlpd.edited_weights(model, two, second):
        expected = logits(model, tokens)
    for contexts in (((one, first), (two, second)), ((two, second), (one, first))):
        with tlpd.patched(model, *contexts[0]), tlpd.patched(model, *contexts[1]):
            assert (logits(model, tokens) - expected).abs().max() < tolerance(model)
    with tlpd.patched(model, one, first), tlpd.edited_weights(model, two, second):
        assert (logits(model, tokens) - expected).abs().max() < tolerance(model)
    with tlpd.edited_weights(model, one, first), tlpd.patched(model, two, second):
        assert (logits(model, tokens) - expected).abs().max() < tolerance(model)
    with tlpd.edited_weights(model, both, both.masks().ablate(EDITED[0], 0)):  # other sites of the same decomposition
        with tlpd.patched(model, both, both.masks().ablate(EDITED[2], 0)):
            found = logits(model, tokens)
    together = both.masks().ablate(EDITED[0], 0).ablate(EDITED[2], 0)
    assert (found - edited_logits(model, both, together, tokens)).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", BUILDERS)
def test_ablations_of_one_site_combine(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec, other = decomposition_of(model, EDITED), decomposition_of(model, EDITED, seed=3)
    site = EDITED[0]
    with (
        tlpd.patched(model, dec, dec.masks().ablate(site, 0)),
        tlpd.patched(model, dec, dec.masks().scale(site, 2, 0.5)),
    ):
        found = logits(model, tokens)
    together = dec.masks().ablate(site, 0).scale(site, 2, 0.5)
    assert (found - edited_logits(model, dec, together, tokens)).abs().max() < tolerance(model)
    with (
        tlpd.patched(model, dec, dec.masks().ablate(site, 0)),
        tlpd.patched(model, other, other.masks().ablate(site, 0)),
    ):
        found = logits(model, tokens)
    removed = dec[site].component(0) + other[site].component(0)
    whole = tlpd.from_factors(model, {site: (removed, torch.eye(removed.shape[1], dtype=removed.dtype))})
    expected = edited_logits(model, whole, whole.masks().ablate(site, slice(None)), tokens)
    assert (found - expected).abs().max() < tolerance(model)


@pytest.mark.parametrize("context", ["patched", "edited_weights"])
def test_patches_without_a_common_meaning(context: str, tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, EDITED)
    site = EDITED[0]
    keeps, deltas = dec.masks().ablate(site, 0), dec.masks().keep_only(site, 1, delta=0.5)
    pairs = [(keeps, deltas), (deltas, keeps), (deltas, deltas), (keeps, dec.masks().scale(site, [0, 1], 0.5))]
    for outer, inner in pairs:
        with tlpd.patched(model, dec, outer):
            expected = logits(model, tokens)
            with pytest.raises(PatchConflictError, match=rf"{site}.*already patched.*one set of masks"):
                with getattr(tlpd, context)(model, dec, inner):
                    pass
            assert torch.equal(logits(model, tokens), expected)
    with tlpd.patched(model, dec, deltas):  # nothing of the refused ones is left
        pass


def test_conflicts_are_seen_through_nnsight(tokens: Tensor) -> None:
    lm = build("nnsight")
    dec = decomposition_of(lm, EDITED)
    masks = dec.masks().keep_only(EDITED[0], 1)
    with tlpd.patched(lm, dec, masks), pytest.raises(PatchConflictError):
        with tlpd.patched(lm._module, dec, masks):
            pass


# --- sites that do not fire -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["gpt2", "nnsight", "bridge", "hooked"])
def test_a_module_replaced_inside_the_context(host: str, tokens: Tensor) -> None:
    model = build(host)
    module = module_of(model)
    path, name = {"hooked": ("blocks.0", "mlp"), "bridge": ("blocks.0.mlp.in", "_original_component")}.get(
        host, ("transformer.h.0.mlp", "c_fc")
    )
    owner = module.get_submodule(path)
    dec = decomposition_of(model, "blocks.0.mlp.W_in")
    if host == "bridge" and name not in owner._modules:
        name = "original_component"
    old = owner._modules[name]
    with tlpd.patched(model, dec, dec.masks().ablate("blocks.0.mlp.W_in", 0)):
        try:
            owner._modules[name] = copy.deepcopy(old)
            for hooks in (owner._modules[name]._forward_hooks, owner._modules[name]._forward_pre_hooks):
                hooks.clear()
            for child in owner._modules[name].modules():
                child._forward_hooks.clear(), child._forward_pre_hooks.clear()
            with pytest.raises(SiteNotFiredError, match=r"blocks\.0\.mlp\.W_in") as caught:
                logits(model, tokens)
        finally:
            owner._modules[name] = old
        assert "no effect" in str(caught.value) or "input never passed" in str(caught.value)
        logits(model, tokens)


def test_a_layer_skipped_inside_the_context(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, "blocks.1.*")
    blocks = model.transformer.h
    with tlpd.patched(model, dec, dec.masks().ablate("blocks.1.mlp.W_in", 0)):
        model.transformer.h = blocks[:1]
        with pytest.raises(SiteNotFiredError, match="without passing blocks.1.mlp.W_in"):
            logits(model, tokens)


def test_sites_without_a_patch_need_not_fire(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model)
    model.transformer.h = model.transformer.h[:1]
    with tlpd.patched(model, decomposition_of(model, "blocks.0.*"), dec.masks().ablate("blocks.0.mlp.W_in", 0)):
        logits(model, tokens)


# --- plain modules, and masks that do not fit -------------------------------------------------------------------------
def test_a_plain_module_without_positions() -> None:
    model = plain()
    x = torch.randn(3, 6).double()
    dec = decomposition_of(model, "*")
    assert list(dec) == ["0.weight", "2.weight"]
    masks = dec.masks().keep_only("0.weight", [0, 1], delta=0.2).ablate("2.weight", 4)
    V, U = dec["0.weight"].V[:, :2], dec["0.weight"].U[:2]
    W, product = model[0].weight.T, dec["0.weight"].product()
    hidden = torch.tanh(x @ (V @ U + 0.2 * (W - product)) + model[0].bias)
    expected = hidden @ (model[2].weight.T - dec["2.weight"].component(4))
    with tlpd.patched(model, dec, masks):
        assert (model(x) - expected).abs().max() < 1e-12
    per_row = torch.rand(3, C).double()
    with tlpd.patched(model, dec, dec.masks().with_values("0.weight", per_row)):
        found = model[0](x)
    assert (found - (model[0](x) + ((per_row - 1) * (x @ dec["0.weight"].V)) @ dec["0.weight"].U)).abs().max() < 1e-12
    with (
        tlpd.patched(model, dec, dec.masks().ablate("0.weight", 0, positions=1)),
        pytest.raises(ShapeError, match="no position"),
    ):
        model(x)


@pytest.mark.parametrize("host", BUILDERS)
def test_masks_that_do_not_fit_the_rows(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, EDITED)
    before = logits(model, tokens)
    for values in (torch.ones(3, 7, C), torch.ones(2, 6, C), torch.ones(6, C)):
        with tlpd.patched(model, dec, dec.masks().with_values(EDITED[0], values)):
            with pytest.raises(ShapeError, match=EDITED[0]):
                logits(model, tokens)
    assert torch.equal(logits(model, tokens), before)


def test_masks_of_another_decomposition(tokens: Tensor) -> None:
    model = gpt2()
    dec, other = decomposition_of(model, EDITED[:1]), decomposition_of(model, EDITED, n=C + 1)
    for masks in (other.masks().ablate(EDITED[0], 5), other.masks().ablate(EDITED[1], 0)):
        with pytest.raises(NoMatchingSiteError, match=r"its own masks\(\)"):
            with tlpd.patched(model, dec, masks):
                pass


def test_a_module_used_by_two_names_is_one_site() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    dec = decomposition_of(model)
    assert len(dec) == 1
    x = torch.randn(2, 4)
    masks = dec.masks().ablate(next(iter(dec)), 0)
    with tlpd.patched(model, dec, masks):
        found = model(x)
    assert (found - edited_logits(model, dec, masks, x)).abs().max() < 1e-5
