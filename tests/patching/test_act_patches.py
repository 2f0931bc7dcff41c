"""Patched component activations against edited weights, patched outputs, masks and sums written out by hand."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    DtypeError,
    HeadIndexError,
    NoMatchingSiteError,
    PatchConflictError,
    PositionIndexError,
    SettingError,
    ShapeError,
    TargetMismatchError,
)
from tl_paramdecomp.patching.act_patches import ActPatches, act_patches, derangement, patched_acts
from tl_paramdecomp.patching.interventions import activation_means, delta_writes
from tl_paramdecomp.sites import SiteCall

from ..support.exactness import no_hooks_left
from ..support.models import (
    BUILDERS,
    LENS,
    VOCAB,
    C,
    build,
    decomposition_of,
    dtype_of,
    gpt2,
    logits,
    module_of,
    plain,
    tolerance,
)
from .test_generation import NEW, PROMPT, generate, with_tokenizer

W_Q, W_O, W_IN, W_OUT = "blocks.0.attn.W_Q", "blocks.1.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.mlp.W_out"
SITES = [W_Q, W_O, W_IN, W_OUT]


def run(model: Any, dec: tlpd.Decomposition, patches: ActPatches, tokens: Tensor) -> Tensor:
    with patched_acts(model, dec, patches):
        return logits(model, tokens)


def masked(model: Any, dec: tlpd.Decomposition, masks: tlpd.Masks, tokens: Tensor) -> Tensor:
    with tlpd.patched(model, dec, masks):
        return logits(model, tokens)


def other(tokens: Tensor) -> Tensor:
    """Another prompt, aligned with the first."""
    return (tokens * 7 + 3) % VOCAB


def outputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What every site writes."""
    found: dict[str, Tensor] = {}

    def keep(name: str, call: SiteCall) -> Tensor:
        found[name] = call.y.clone()
        return call.y

    adapter = adapt(model)
    with adapter.intercept({name: functools.partial(keep, name) for name in adapter.sites}):
        logits(model, tokens)
    return found


def output_patched(model: Any, name: str, y: Tensor, tokens: Tensor) -> Tensor:
    """Activation patching of one site's output."""
    with adapt(model).intercept({name: lambda call: y.expand_as(call.y)}):
        return logits(model, tokens)


def weight_edited(model: Any, dec: tlpd.Decomposition, name: str, change: Tensor, tokens: Tensor) -> Tensor:
    with adapt(model).replaced_weights({name: tlpd.site_weight(model, name).detach() + change}):
        return logits(model, tokens)


def close(model: Any, a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < tolerance(model))


# --- what it amounts to -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_all_of_another_prompt_is_activation_patching_of_the_output(host: str, tokens: Tensor) -> None:
    """Every kind of site: embeddings, grouped heads, parts of a fused matrix, gates, the unembedding."""
    model = build(host)
    dec = decomposition_of(model)
    acts, rest, there = (f(*a) for f, a in (
        (tlpd.component_acts, (model, dec, other(tokens))),
        (delta_writes, (model, dec, other(tokens))),
        (outputs, (model, other(tokens))),
    ))  # fmt: skip
    before = logits(model, tokens)
    for name in dec:
        patches = act_patches(dec).from_acts(name, slice(None), acts).delta(name, rest)
        found = run(model, dec, patches, tokens)
        expected = output_patched(model, name, there[name], tokens)
        assert close(model, found, expected), name
        assert name.startswith("pos_embed") or (expected - before).abs().max() > 1e-4, name
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("host", BUILDERS)
def test_own_activations_change_nothing(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model)
    acts, rest, patches = tlpd.component_acts(model, dec, tokens), delta_writes(model, dec, tokens), act_patches(dec)
    for name in dec:
        patches = patches.from_acts(name, [0, 3], acts, positions=[1, -1]).from_acts(name, slice(None), acts[name])
        patches = patches.delta(name, rest).delta(name, 1.0).scale(name, [1, 2], 1)
    assert close(model, run(model, dec, patches, tokens), logits(model, tokens))


@pytest.mark.parametrize("host", BUILDERS)
def test_no_patch_is_the_model_bit_for_bit(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    before = logits(model, tokens)
    with patched_acts(model, dec, act_patches(dec).zero(W_IN, [])):
        assert no_hooks_left(module_of(model)) if host == "gpt2" else True
        assert torch.equal(logits(model, tokens), before)
    nowhere = act_patches(dec).set(W_IN, 0, 3.0, positions=torch.zeros(7, dtype=torch.bool))
    assert torch.equal(run(model, dec, nowhere, tokens), before)


@pytest.mark.parametrize("host", BUILDERS)
@pytest.mark.parametrize("positions", [None, [1, -1], slice(2, 5)], ids=str)
def test_zero_and_scale_are_those_of_masks(host: str, positions: Any, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model)
    patches, masks = act_patches(dec), dec.masks()
    for name in dec:
        patches = patches.zero(name, [0, 2], positions=positions).scale(name, [2, 3], -0.5, positions=positions)
        masks = masks.ablate(name, [0, 2], positions=positions).scale(name, [3], -0.5, positions=positions)
    found = run(model, dec, patches, tokens)
    assert close(model, found, masked(model, dec, masks, tokens)) and not torch.equal(found, logits(model, tokens))
    removed, kept = act_patches(dec).delta(W_OUT, 0.25), dec.masks().with_values(W_OUT, 1.0, delta=0.25)
    assert close(model, run(model, dec, removed, tokens), masked(model, dec, kept, tokens))


@pytest.mark.parametrize("host", BUILDERS)
def test_heads_are_those_of_masks_and_sum_to_the_whole(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, "blocks.*.attn.*")
    for role in ("W_Q", "W_K", "W_V", "W_O"):
        name, heads = f"blocks.0.attn.{role}", dec.sites[f"blocks.0.attn.{role}"].n_heads or 0
        one = act_patches(dec).zero(name, [1, 3], head=1).scale(name, 0, 2.0)
        masks = dec.masks().ablate(name, [1, 3], head=1).scale(name, 0, 2.0)
        assert close(model, run(model, dec, one, tokens), masked(model, dec, masks, tokens)), role
        value, every = torch.linspace(-1, 1, 14).double().reshape(2, 7, 1), act_patches(dec)
        whole = act_patches(dec).set(name, [2], value).zero(name, 4)
        for head in range(heads):
            share = value / heads if role == "W_O" else value
            every = every.set(name, [2], share, head=head).zero(name, 4, head=head)
        assert close(model, run(model, dec, every, tokens), run(model, dec, whole, tokens)), role


def test_one_heads_value_by_hand(tokens: Tensor) -> None:
    """A query head that is written with another activation, and one head's part of what W_O reads."""
    model = build("gpt2")
    dec = decomposition_of(model, [W_Q, W_O])
    U = dec[W_Q].U.detach()
    h = tlpd.component_acts(model, dec, tokens)[W_Q]
    y = outputs(model, tokens)[W_Q]
    y[..., 8:16] += (5.0 - h[..., 3:4]) * U[3, 8:16]
    found = run(model, dec, act_patches(dec).set(W_Q, 3, 5.0, head=1), tokens)
    assert close(model, found, output_patched(model, W_Q, y, tokens))
    x = adapt(model).capture(tokens, [W_O]).inputs[W_O]
    part = dec[W_O].head_acts(adapt(model).capture(other(tokens), [W_O]).inputs[W_O]).detach()
    y = outputs(model, tokens)[W_O]
    y = y + (part[..., 2, 3:4] - x[..., 16:] @ dec[W_O].V[16:, 3:4].detach()) * dec[W_O].U[3].detach()
    found = run(model, dec, act_patches(dec).from_acts(W_O, 3, part, head=2), tokens)
    assert close(model, found, output_patched(model, W_O, y, tokens))


@pytest.mark.parametrize("host", BUILDERS)
def test_redirected_vectors_are_edited_weights(host: str, tokens: Tensor) -> None:
    """W + V_c (U'_c - U_c)^T and W + (V'_c - V_c) U_c^T, of every kind of site."""
    model = build(host)
    dec = decomposition_of(model)
    for name in ["embed.W_E", *(n for n in SITES), "blocks.1.attn.W_V"]:
        V, U, generator = dec[name].V.detach(), dec[name].U.detach(), torch.Generator().manual_seed(3)
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64).to(V) * 0.3 for n in (U.shape[1], V.shape[0]))
        write = run(model, dec, act_patches(dec).write(name, 2, u), tokens)
        assert close(model, write, weight_edited(model, dec, name, torch.outer(V[:, 2], u - U[2]), tokens)), name
        read = run(model, dec, act_patches(dec).read(name, -1, v), tokens)
        assert close(model, read, weight_edited(model, dec, name, torch.outer(v - V[:, 4], U[4]), tokens)), name
        both = run(model, dec, act_patches(dec).write(name, 2, u).read(name, 2, v).scale(name, 2, 0.5), tokens)
        change = 0.5 * torch.outer(v, u) - torch.outer(V[:, 2], U[2])
        assert close(model, both, weight_edited(model, dec, name, change, tokens)), name
        assert (both - logits(model, tokens)).abs().max() > 1e-4


def test_redirected_at_positions_the_last_one_given_holds(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, [W_IN])
    u, w, v = torch.ones(96).double(), torch.arange(96).double() / 96, torch.ones(24).double()
    patches = act_patches(dec).write(W_IN, 1, u, positions=[1, 2]).write(W_IN, 1, w, positions=[2, 5])
    patches = patches.read(W_IN, 1, v, positions=[2, 3])
    x, y = adapt(model).capture(tokens, [W_IN]).inputs[W_IN], outputs(model, tokens)[W_IN]
    V, U = dec[W_IN].V.detach()[:, 1], dec[W_IN].U.detach()[1]
    for p, (reads, writes) in {1: (V, u), 2: (v, w), 3: (v, U), 5: (V, w)}.items():
        y[:, p] += torch.outer(x[:, p] @ reads, writes) - torch.outer(x[:, p] @ V, U)
    assert close(model, run(model, dec, patches, tokens), output_patched(model, W_IN, y, tokens))


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_means_and_resampling_by_hand(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    many = torch.randint(0, VOCAB, (5, 7), generator=torch.Generator().manual_seed(4))
    padding = torch.ones(5, 7, dtype=torch.long)
    padding[1, 4:] = 0
    acts = tlpd.component_acts(model, dec, many, padding)
    weight = padding.to(dtype_of(model)).unsqueeze(-1)
    overall = activation_means(model, dec, many, attention_mask=padding, rows_at_once=2)
    places = activation_means(model, dec, [(many[:2], padding[:2]), (many[2:], padding[2:])], by_position=True)
    for name in SITES:
        assert (overall[name] - (acts[name] * weight).sum((0, 1)) / weight.sum()).abs().max() < 1e-5
        assert (places[name] - (acts[name] * weight).sum(0) / weight.sum(0)).abs().max() < 1e-5
    values = {"mean": overall[W_IN][[1, 3]], "places": places[W_IN][:, [1, 3]], "rows": acts[W_IN][:2, :, [1, 3]]}
    swapped = tlpd.component_acts(model, dec, tokens)[W_IN].flip(0)[..., [1, 3]]  # two rows change places
    made = {
        "mean": act_patches(dec).mean(W_IN, [1, 3], overall),
        "places": act_patches(dec).mean(W_IN, [1, 3], places),
        "rows": act_patches(dec).from_acts(W_IN, [1, 3], acts[W_IN][:2]),
        "resample": act_patches(dec).resample(W_IN, [1, 3], seed=4),
    }
    h, U = tlpd.component_acts(model, dec, tokens)[W_IN][..., [1, 3]], dec[W_IN].U.detach()[[1, 3]]
    for key, value in (values | {"resample": swapped}).items():
        expected = output_patched(model, W_IN, outputs(model, tokens)[W_IN] + (value - h) @ U, tokens)
        assert close(model, run(model, dec, made[key], tokens), expected), key


def test_resampling_takes_each_other_row_once() -> None:
    for n in (2, 3, 8):
        order = derangement(n, 5)
        assert sorted(order.tolist()) == list(range(n)) and all(order[i] != i for i in range(n))
        assert torch.equal(order, derangement(n, 5))
    assert any(not torch.equal(derangement(8, 5), derangement(8, seed)) for seed in range(3))


@pytest.mark.parametrize("host", BUILDERS)
def test_values_are_put_in_their_places(host: str, tokens: Tensor) -> None:
    """Edits in the order given, on rows and positions of their own, several sites at once."""
    model = build(host)
    dec = decomposition_of(model, [W_IN, W_OUT])
    rows = torch.zeros(2, 7, dtype=torch.bool)
    rows[1, 3] = True
    value = torch.arange(28, dtype=torch.float64).reshape(2, 7, 2) / 10
    patches = act_patches(dec).set(W_IN, [3, 1], value).set(W_IN, 1, 0.7, positions=rows).scale(W_IN, [0, 1], 2, 4)
    a = tlpd.component_acts(model, dec, tokens)[W_IN].clone()
    before = a.clone()
    a[..., [3, 1]] = value.to(a)
    a[1, 3, 1] = 0.7
    a[:, 4, [0, 1]] *= 2
    y = outputs(model, tokens)[W_IN] + (a - before) @ dec[W_IN].U.detach()
    assert close(model, run(model, dec, patches, tokens), output_patched(model, W_IN, y, tokens))
    two = run(model, dec, patches.set(W_OUT, 4, 1.5), tokens)
    with patched_acts(model, dec, act_patches(dec).set(W_OUT, 4, 1.5)):
        assert close(model, two, output_patched(model, W_IN, y, tokens))


def test_resampling_takes_what_the_model_has_there(tokens: Tensor) -> None:
    """Not what an edit before it left: two rows change places, whatever was put in first."""
    model = gpt2()
    dec = decomposition_of(model, [W_IN])
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[0] = True
    swapped = act_patches(dec).set(W_IN, 1, 5.0, positions=first).resample(W_IN, 1)
    assert close(model, run(model, dec, swapped, tokens), run(model, dec, act_patches(dec).resample(W_IN, 1), tokens))


def test_values_by_position_where_the_last_columns_alone_are_unembedded(tokens: Tensor) -> None:
    model, value = gpt2(), torch.rand(7, 2).double()
    dec = decomposition_of(model, ["unembed.W_U"])
    with patched_acts(model, dec, act_patches(dec).set("unembed.W_U", [0, 2], value)):
        assert close(model, logits(model, tokens, logits_to_keep=2), logits(model, tokens)[:, -2:])


def test_values_are_copies_and_gradients_reach_them(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, SITES)
    names = dict(zip("auvd", [(2, 7, 2), (96,), (24,), (1, 24)]))
    leaves = {key: torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True) for key, shape in names.items()}

    def out(shift: float = 0.0, which: str = "", at: tuple = ()) -> Tensor:
        given = {key: leaf.clone() for key, leaf in leaves.items()}
        if which:
            given[which][at] += shift
        patches = act_patches(dec).set(W_OUT, [1, 3], given["a"], positions=slice(1, None)).set(W_Q, 0, 0.3, head=1)
        patches = patches.write(W_IN, 0, given["u"]).read(W_IN, 0, given["v"]).delta(W_O, given["d"])
        for tensor in given.values():
            tensor.data.zero_()
        with patched_acts(model, dec, patches):
            return model(tokens).logits.pow(2).mean()

    found = dict(zip(names, torch.autograd.grad(out(), list(leaves.values()))))
    for which, at in {"a": (1, 2, 0), "u": (5,), "v": (6,), "d": (0, 3)}.items():
        with torch.no_grad():
            slope = (out(1e-5, which, at) - out(-1e-5, which, at)) / 2e-5
        assert abs(found[which][at] - slope) < 1e-7 * max(1.0, abs(slope)) and abs(slope) > 1e-9, which
    assert not found["a"][:, 0].any(), "position 0 is left alone"


# --- ways of running --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", LENS)
def test_caches_and_hooks_see_patched_values(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    u = torch.linspace(-1, 1, dec[W_OUT].U.shape[1]).to(dec[W_OUT].U)
    V, U = dec[W_OUT].V.detach(), dec[W_OUT].U.detach()
    weight = tlpd.site_weight(model, W_OUT).detach() + torch.outer(V[:, 1], u - U[1])
    hooks = [("blocks.1.hook_mlp_out", lambda value, hook: value * 2)]
    with adapt(model).replaced_weights({W_OUT: weight}), torch.no_grad():
        expected, cache = model.run_with_cache(tokens)
        hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with patched_acts(model, dec, act_patches(dec).write(W_OUT, 1, u)), torch.no_grad():
        found, ours = model.run_with_cache(tokens)
        assert close(model, found, expected)
        assert close(model, ours["blocks.1.hook_mlp_out"], cache["blocks.1.hook_mlp_out"])
        assert close(model, model.run_with_hooks(tokens, fwd_hooks=hooks), hooked)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("host", ["hooked", "bridge", "nnsight", "gpt2"])
def test_generation(host: str, cache: bool, tokens: Tensor) -> None:
    """One long pass with the positions spelled out: plain values steer decoded tokens too, values by position do not."""
    model, names = with_tokenizer(host), [*SITES, "embed.W_E", "pos_embed.W_pos"]
    dec = decomposition_of(model, names)
    value, long = torch.rand(2, PROMPT, 2).double(), slice(0, PROMPT)
    patches, whole = act_patches(dec), act_patches(dec)
    for name in names:
        patches = patches.set(name, [0, 1], value).set(name, 2, 1.5).zero(name, 3, positions=-1).resample(name, 4)
        padded = torch.cat([value, torch.zeros(2, NEW - 1, 2)], 1)
        whole = whole.set(name, [0, 1], padded, positions=long).set(name, 2, 1.5)
        whole = whole.zero(name, 3, positions=PROMPT - 1).resample(name, 4)
    rest = torch.rand(2, PROMPT, 24).double()
    patches = patches.delta(W_O, rest).read(W_IN, 1, torch.ones(24).double(), positions=[PROMPT + 1])
    whole = whole.delta(W_O, torch.cat([rest, torch.zeros(2, NEW - 1, 24)], 1), positions=long)
    whole = whole.read(W_IN, 1, torch.ones(24).double(), positions=[PROMPT + 1])
    with patched_acts(model, dec, patches):
        generated = generate(model, host, tokens[:, :PROMPT], cache)
    expected = run(model, dec, whole, generated.rows[:, :-1])
    for k, step in enumerate(generated.steps):
        assert (expected[:, -NEW + k] - step).abs().max() < tolerance(model), f"step {k}"


@pytest.mark.parametrize("host", ["nnsight", "nnsight-llama"])
def test_inside_a_trace(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model)
    patches = act_patches(dec)
    for name in dec:
        patches = patches.set(name, [0, 1], torch.rand(2, 7, 2)).resample(name, 3).zero(name, 4, positions=-1)
    patches = patches.zero(W_Q, 2, head=1).delta(W_OUT, 0.5)
    expected = run(model, dec, patches, tokens)
    with torch.no_grad():
        with model.trace(tokens):
            tlpd.patch_trace(model, dec, patches)
            found = model.output.logits.save()
    assert close(model, found, expected) and not torch.equal(found, logits(model, tokens))


def test_inserted_identities_and_plain_modules(tokens: Tensor) -> None:
    model = build("gpt2")
    inserted = f"{W_IN}.pre_identity"
    generator = torch.Generator().manual_seed(2)
    V, U = (torch.randn(24, 5, generator=generator).double() for _ in range(2))
    dec = tlpd.from_factors(model, {inserted: (V, U.T), W_IN: (V, torch.randn(5, 96, generator=generator).double())})
    acts, rest = tlpd.component_acts(model, dec, other(tokens)), delta_writes(model, dec, other(tokens))
    found = run(model, dec, act_patches(dec).from_acts(inserted, slice(None), acts).delta(inserted, rest), tokens)
    assert close(model, found, output_patched(model, W_IN, outputs(model, other(tokens))[W_IN], tokens))
    module, x = plain(), torch.randn(4, 6).double()
    dec = decomposition_of(module, "0.weight")
    a, h = torch.rand(4, 2).double(), (x @ dec["0.weight"].V.detach())[:, [0, 2]]
    with patched_acts(module, dec, act_patches(dec).set("0.weight", [0, 2], a)), torch.no_grad():
        written = module[0](x)
    with torch.no_grad():
        assert (written - module[0](x) - (a - h) @ dec["0.weight"].U[[0, 2]]).abs().max() < 1e-10
    with pytest.raises(ShapeError, match="no position axis"):
        activation_means(module, dec, x, by_position=True)


# --- contexts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_contexts_add_up_or_conflict_and_leave_nothing(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    before, root = logits(model, tokens), module_of(model)
    weights = {name: p.clone() for name, p in root.named_parameters()}
    both = run(model, dec, act_patches(dec).set(W_IN, 1, 2.0).zero(W_IN, 2), tokens)
    with patched_acts(model, dec, act_patches(dec).set(W_IN, 1, 2.0)):
        assert close(model, masked(model, dec, dec.masks().ablate(W_IN, 2), tokens), both)
        for conflicting in (act_patches(dec).read(W_IN, 1, dec[W_IN].V[:, 0]), act_patches(dec).delta(W_IN, 0.0)):
            with pytest.raises(PatchConflictError, match="already patched"):
                run(model, dec, conflicting, tokens)
        with pytest.raises(PatchConflictError, match="already patched"):
            masked(model, dec, dec.masks().ablate(W_IN, [0, 1]), tokens)
    with pytest.raises(PositionIndexError, match="0 to 6"):
        run(model, dec, act_patches(dec).zero(W_IN, 0, positions=9), tokens)
    assert torch.equal(logits(model, tokens), before)
    assert all(torch.equal(p, weights[name]) for name, p in root.named_parameters())


def test_patches_are_values(tokens: Tensor) -> None:
    dec = decomposition_of(build("gpt2"), SITES)
    first = act_patches(dec).zero(W_IN, 0)
    second = first.set("transformer.h.0.mlp.c_fc.weight", 1, 2.0).delta(W_OUT, 0.0)
    assert list(first.changed()) == [W_IN] and first.changed()[W_IN].touched == {0}
    assert (
        second.changed()[W_IN].touched == {0, 1} and repr(second) == f"ActPatches(4 sites, 2 patched: {W_IN}, {W_OUT})"
    )


ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "site": (NoMatchingSiteError, "mlp.W_inn", lambda p: p.zero("blocks.0.mlp.W_inn", 0)),
    "component": (ComponentIndexError, "components 0 to 4.*given 5", lambda p: p.zero(W_IN, 5)),
    "components to read": (
        ComponentIndexError,
        "given 2 components",
        lambda p: p.read(W_IN, torch.tensor([0, 1]), torch.ones(24)),
    ),
    "head of no heads": (HeadIndexError, "does not divide into heads", lambda p: p.zero(W_IN, 0, head=0)),
    "head": (HeadIndexError, "query heads 0 to 2; given 3", lambda p: p.zero(W_Q, 0, head=3)),
    "value": (ShapeError, r"broadcast to \[batch, pos, 2\]; given \[3\]", lambda p: p.set(W_IN, [0, 1], torch.ones(3))),
    "axes": (ShapeError, "given .1, 1, 1, 1.", lambda p: p.set(W_IN, 0, torch.ones(1, 1, 1, 1))),
    "complex": (DtypeError, "real numbers", lambda p: p.set(W_IN, 0, torch.ones(1).cfloat())),
    "acts": (ShapeError, r"\[..., C=5\]; given \[2, 7, 4\]", lambda p: p.from_acts(W_IN, 0, torch.ones(2, 7, 4))),
    "head acts": (ShapeError, "heads=3.*head_acts", lambda p: p.from_acts(W_O, 0, torch.ones(2, 7, 5), head=1)),
    "acts of others": (NoMatchingSiteError, "among those of x", lambda p: p.from_acts(W_IN, 0, {"x": torch.ones(5)})),
    "vector": (ShapeError, r"a vector \[96\]; given \[24\]", lambda p: p.write(W_IN, 0, torch.ones(24))),
    "delta": (ShapeError, r"d_out=96\]; given \[5\]", lambda p: p.delta(W_IN, torch.ones(5))),
    "delta of others": (NoMatchingSiteError, "no delta writes", lambda p: p.delta(W_IN, {})),
    "whole and part": (SettingError, "the other heads' parts", lambda p: p.set(W_O, 0, 1.0).zero(W_O, [1, 0], head=1)),
}
LATER: dict[str, tuple[type[Exception], str, Any]] = {
    "lengths": (ShapeError, "cover 6 positions, but the prompt has 7", lambda p: p.set(W_IN, 0, torch.ones(6, 1))),
    "acts' length": (ShapeError, "as many tokens", lambda p: p.from_acts(W_IN, 0, torch.ones(2, 9, 5))),
    "rows": (ShapeError, r"\[3, 7, 1\], but .* rows \[2, 7\]", lambda p: p.set(W_IN, 0, torch.ones(3, 7, 1))),
    "delta's length": (ShapeError, "cover 3 positions", lambda p: p.delta(W_IN, torch.ones(3, 96))),
    "position": (PositionIndexError, "Position 7", lambda p: p.zero(W_IN, 0, positions=7)),
    "mask": (ShapeError, "boolean mask", lambda p: p.zero(W_IN, 0, positions=torch.ones(5, dtype=torch.bool))),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_is_refused(case: str) -> None:
    error, words, make = ERRORS[case]
    with pytest.raises(error, match=words):
        make(act_patches(decomposition_of(gpt2(), SITES)))


@pytest.mark.parametrize("case", LATER)
def test_what_does_not_fit_a_pass_is_refused(case: str, tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, SITES)
    error, words, make = LATER[case]
    before = logits(model, tokens)
    with pytest.raises(error, match=words):
        run(model, dec, make(act_patches(dec)), tokens)
    assert torch.equal(logits(model, tokens), before)


def test_wrong_models_batches_and_means(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, SITES)
    with pytest.raises(DataError, match="this batch has one row"):
        run(model, dec, act_patches(dec).resample(W_IN, 0), tokens[:1])
    with pytest.raises(TargetMismatchError):
        run(gpt2(seed=4), dec, act_patches(dec).zero(W_IN, 0), tokens)
    llama_site = "blocks.0.mlp.W_gate"  # a site that this host does not have
    gated = build("llama")
    with pytest.raises(TargetMismatchError, match="not a site of this model"):
        run(model, decomposition_of(gated, llama_site), act_patches(decomposition_of(gated, llama_site)), tokens)
    few = decomposition_of(model, SITES, n=C - 1)
    with pytest.raises(NoMatchingSiteError, match="5 components of blocks.0.mlp.W_in"):
        run(model, few, act_patches(dec).zero(W_IN, 0), tokens)
    with pytest.raises(DataError, match="no rows"):
        activation_means(model, dec, [])
    with pytest.raises(ShapeError, match="rows of one length"):
        activation_means(model, dec, [tokens, tokens[:, :5]], by_position=True)
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[:, 6] = 0
    with pytest.raises(DataError, match="No row counts"):
        activation_means(model, dec, tokens, by_position=True, attention_mask=padded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**39])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    dec = decomposition_of(build("gpt2"), "blocks.0.mlp.W_in")
    for change in (act_patches(dec).set, act_patches(dec).scale):
        with pytest.raises(SettingError, match="finite"):
            change("blocks.0.mlp.W_in", 0, value)
    with pytest.raises(SettingError, match="finite"):
        act_patches(dec).delta("blocks.0.mlp.W_in", value)
