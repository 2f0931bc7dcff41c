"""Identities inserted before linear weights, against models whose weight is edited by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import (
    HeadIndexError,
    NoMatchingSiteError,
    PatchConflictError,
    TargetMismatchError,
    UnsupportedSiteError,
)
from tl_paramdecomp.methods.divergence import MeanSquare
from tl_paramdecomp.methods.losses import Faithfulness
from tl_paramdecomp.methods.random_streams import as_streams
from tl_paramdecomp.methods.step import LossStep

from ..support.models import (
    BUILDERS,
    LENS,
    C,
    bridge,
    build,
    gpt2,
    hooked,
    hooked_gqa,
    llama,
    logits,
    nnsight,
    plain,
    tokenizer,
)

INNER = {
    "hooked": hooked, "hooked-gqa": hooked_gqa, "bridge": gpt2, "bridge-llama": lambda: llama(torch.float64),
    "nnsight": gpt2, "nnsight-llama": lambda: llama(torch.float64), "gpt2": gpt2, "llama": lambda: llama(torch.float64),
}  # fmt: skip
"""The float64 model under every host."""
SITES = [
    "blocks.0.attn.W_Q", "blocks.0.attn.W_V", "blocks.1.attn.W_O", "blocks.0.mlp.W_in", "blocks.1.mlp.W_out",
    "unembed.W_U",
]  # fmt: skip
INTO = {"W_Q": "q_proj", "W_V": "v_proj", "W_O": "o_proj", "W_in": "up_proj", "W_out": "down_proj"}


def make(host: str, weights: dict[str, Tensor] | None = None) -> Any:
    """A frozen float64 model on a host, some of its weights W [d_in, d_out] written by hand; two of one host are alike."""
    model = INNER[host]().requires_grad_(False)
    for site, matrix in (weights or {}).items():
        set_weight(model, site, matrix)
    return bridge(model) if host in ("bridge", "bridge-llama") else nnsight(model) if "nnsight" in host else model


def before(site: str) -> str:
    return f"{site}.pre_identity"


def set_weight(model: Any, site: str, matrix: Tensor) -> None:
    """Write W [d_in, d_out] of a site into the parameters of a HookedTransformer or transformers model."""
    lens = hasattr(model, "unembed")
    if site == "unembed.W_U":
        module, name = (model.unembed, "W_U") if lens else (model.lm_head, "weight")
        module._parameters[name] = nn.Parameter(
            matrix if lens else matrix.T.contiguous(), requires_grad=False
        )  # untied
        return
    _, layer, part, role = site.split(".")
    if lens:
        parameters = getattr(model.blocks[int(layer)], part)._parameters
        old = parameters.get(role, parameters.get(f"_{role}"))
        if role in ("W_Q", "W_V"):
            matrix = matrix.reshape(old.shape[1], old.shape[0], old.shape[2]).permute(1, 0, 2)
        old.copy_(matrix.reshape(old.shape))
    elif hasattr(model, "transformer"):
        block = model.transformer.h[int(layer)]
        modules = {"W_O": block.attn.c_proj, "W_in": block.mlp.c_fc, "W_out": block.mlp.c_proj}
        start = {"W_Q": 0, "W_V": 48}.get(role, 0)
        modules.get(role, block.attn.c_attn).weight[:, start : start + matrix.shape[1]] = matrix
    else:
        block = model.model.layers[int(layer)]
        getattr(block.self_attn if part == "attn" else block.mlp, INTO[role]).weight.copy_(matrix.T)


def random_decomposition(model: Any, names: list[str], n: int = C) -> tlpd.Decomposition:
    generator, factors = torch.Generator().manual_seed(3), {}
    for name, site in tlpd.find_sites(model, names).items():
        V, U = (torch.randn(*shape, generator=generator).double() * 0.3 for shape in ((site.d_in, n), (n, site.d_out)))
        factors[name] = (V, U)
    return tlpd.from_factors(model, factors)


def masks_of(dec: tlpd.Decomposition) -> tlpd.Masks:
    """Constant masks that change every component and the delta component."""
    masks = dec.masks()
    for i, (name, components) in enumerate(dec.items()):
        m = torch.linspace(0.1 * i, 0.9, components.n_components, dtype=torch.float64)
        masks = masks.with_values(name, m, delta=0.6 - 0.1 * i)
    return masks


def edited(dec: tlpd.Decomposition, masks: tlpd.Masks, name: str, weight: Tensor) -> Tensor:
    """V diag(m) U + d (W - V U)."""
    V, U = dec[name].V.detach(), dec[name].U.detach()
    return (V * masks[name].m.flatten()) @ U + masks[name].d.flatten() * (weight - V @ U)


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-11 * expected.abs().max())


def far(found: Tensor, other: Tensor) -> bool:
    return bool((found - other).abs().max() > 1e-3 * other.abs().max())


# --- against an edited weight ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("host", INNER)
def test_constant_masks_of_an_identity_are_an_edited_weight(host: str, site: str, tokens: Tensor) -> None:
    model = make(host)
    dec = random_decomposition(model, [before(site)])
    masks, weight = masks_of(dec), tlpd.site_weight(model, site)
    clean = logits(model, tokens)
    assert torch.equal(clean, logits(make(host, {site: weight}), tokens))
    by_hand = make(host, {site: edited(dec, masks, before(site), eye(len(weight))) @ weight})
    expected = logits(by_hand, tokens)
    with tlpd.patched(model, dec, masks):
        found = logits(model, tokens)
    assert close(found, expected)
    assert far(found, clean)
    assert torch.equal(logits(model, tokens), clean)


@pytest.mark.parametrize("host", INNER)
def test_an_identity_and_its_site_together_are_the_product_of_both(host: str, tokens: Tensor) -> None:
    model = make(host)
    dec = random_decomposition(model, [each for site in SITES for each in (site, before(site))])
    assert list(dec) == list(tlpd.find_sites(model, list(dec)))
    masks = masks_of(dec)
    weights = {site: tlpd.site_weight(model, site) for site in SITES}
    products = {
        site: edited(dec, masks, before(site), eye(len(weight))) @ edited(dec, masks, site, weight)
        for site, weight in weights.items()
    }
    expected = logits(make(host, products), tokens)
    clean = logits(model, tokens)
    with tlpd.patched(model, dec, masks):
        assert close(logits(model, tokens), expected)
    with tlpd.edited_weights(model, dec, masks):
        assert close(logits(model, tokens), expected)
    assert close(logits(tlpd.edited_model(model, dec, masks), tokens), expected)
    assert torch.equal(logits(model, tokens), clean)
    assert far(expected, clean)


@pytest.mark.parametrize("host", BUILDERS)
def test_ones_are_the_model_bit_for_bit(host: str, tokens: Tensor) -> None:
    model = build(host)
    factors = {}
    for site in SITES:
        d, dtype = tlpd.site_weight(model, site).shape[0], tlpd.site_weight(model, site).dtype
        factors[before(site)] = (torch.randn(d, C, dtype=dtype), torch.randn(C, d, dtype=dtype))
    dec = tlpd.from_factors(model, factors)
    ones, clean = dec.masks(), logits(model, tokens)
    for name in dec:
        ones = ones.with_values(name, torch.ones(2, 7, C), delta=torch.ones(2, 7))
    for masks in (dec.masks(), ones):
        with tlpd.patched(model, dec, masks):
            assert torch.equal(logits(model, tokens), clean)


def test_masks_by_position_on_a_module_worked_out_by_hand() -> None:
    """Also for a mask with more rows than the model's own, and with the site's own function behind the identity."""
    model: Any = plain().requires_grad_(False)
    names = ["0.weight.pre_identity", "2.weight.pre_identity", "2.weight"]
    dec = random_decomposition(model, names)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    m = {name: torch.rand(2, 3, C, dtype=torch.float64) for name in names}
    d = {name: torch.rand(2, 3, dtype=torch.float64) for name in names}
    masks = dec.masks()
    for name in names:
        masks = masks.with_values(name, m[name], delta=d[name])

    def site(name: str, x: Tensor, weight: Tensor) -> Tensor:
        V, U = dec[name].V, dec[name].U
        return (m[name] * (x @ V)) @ U + d[name].unsqueeze(-1) * (x @ (weight - V @ U))

    first, second = model[0], model[2]
    hidden = torch.tanh(site(names[0], x, eye(6)) @ first.weight.T + first.bias)
    expected = site("2.weight", site(names[1], hidden, eye(6)), second.weight.T)
    with tlpd.patched(model, dec, masks):
        assert close(model(x), expected)
        assert close(model(x[:1].expand(2, 3, 6)), model(x[:1]))


def test_gradients_are_those_of_the_dense_form() -> None:
    model: Any = plain()
    dec = random_decomposition(model, ["2.weight.pre_identity", "2.weight"])
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    m = {name: torch.rand(5, C, dtype=torch.float64) for name in dec}
    masks = dec.masks()
    for name in dec:
        masks = masks.with_values(name, m[name], delta=0.3)
    leaves = [x, *model.parameters(), *dec.parameters()]
    with tlpd.patched(model, dec, masks):
        found = torch.autograd.grad(model(x).square().sum(), leaves)
    first, inserted = dec["2.weight.pre_identity"], dec["2.weight"]
    h = torch.tanh(model[0](x))
    h = (m["2.weight.pre_identity"] * (h @ first.V)) @ first.U + 0.3 * (h - h @ first.V @ first.U)
    y = (m["2.weight"] * (h @ inserted.V)) @ inserted.U + 0.3 * (h @ (model[2].weight.T - inserted.V @ inserted.U))
    expected = torch.autograd.grad(y.square().sum(), leaves)
    assert len(found) == 8
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("host", ["hooked", "bridge", "gpt2"])
def test_generation_is_that_of_the_edited_model(host: str, tokens: Tensor) -> None:
    model, site = make(host), "blocks.0.attn.W_V"
    dec = random_decomposition(model, [before(site)])
    masks, weight = masks_of(dec), tlpd.site_weight(model, site)
    by_hand = make(host, {site: edited(dec, masks, before(site), eye(len(weight))) @ weight})
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    if host != "gpt2":
        kwargs |= {"verbose": False, "stop_at_eos": False}
    if host == "hooked":  # the second major version decodes only with a tokenizer at hand
        model.tokenizer = by_hand.tokenizer = tokenizer()
    expected = by_hand.generate(tokens, **kwargs)
    with tlpd.patched(model, dec, masks):
        assert torch.equal(model.generate(tokens, **kwargs), expected)
    assert not torch.equal(model.generate(tokens, **kwargs), expected)


# --- the other ways in -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", [h for h in INNER if h in LENS])
def test_plain_hooks_and_hook_points_reach_identities(host: str, tokens: Tensor) -> None:
    model = make(host)
    sites = ["blocks.0.attn.W_Q", "blocks.1.attn.W_O", "blocks.0.mlp.W_in"]
    dec = random_decomposition(model, [each for site in sites for each in (before(site), site)])
    masks = masks_of(dec)
    with tlpd.patched(model, dec, masks):
        expected = logits(model, tokens)
    assert close(model.run_with_hooks(tokens, fwd_hooks=tlpd.fwd_hooks(model, dec, masks)).detach(), expected)

    name, point = before(sites[2]), f"{before(sites[2])}.hook_component_acts"
    with tlpd.patched(model, dec, dec.masks().ablate(name, 1)):
        ablated = logits(model, tokens)

    def zero(acts: Tensor, hook: Any) -> Tensor:
        acts[..., 1] = 0
        return acts

    with tlpd.attached(model, dec):
        _, cache = model.run_with_cache(tokens)
        assert cache[point].shape == (2, 7, C)
        assert close(model.run_with_hooks(tokens, fwd_hooks=[(point, zero)]).detach(), ablated)


@pytest.mark.parametrize("host", ["nnsight", "nnsight-llama"])
def test_a_trace_reaches_identities(host: str, tokens: Tensor) -> None:
    lm = make(host)
    dec = random_decomposition(lm, [each for site in SITES for each in (before(site), site)][:-1])
    masks = masks_of(dec)
    with tlpd.patched(lm, dec, masks):
        expected = logits(lm, tokens)
    with torch.no_grad():
        with lm.trace(tokens):
            tlpd.patch_trace(lm, dec, masks)
            found = lm.output.logits.save()
    assert close(found, expected)


def test_component_activations_are_those_of_the_sites_own_input(tokens: Tensor) -> None:
    model = make("gpt2")
    dec = random_decomposition(model, ["blocks.0.mlp.W_in", before("blocks.0.mlp.W_in")])
    acts = tlpd.component_acts(model, dec, tokens)
    x = adapt(model).capture(tokens, ["blocks.0.mlp.W_in"]).inputs["blocks.0.mlp.W_in"]
    for name in dec:
        assert close(acts[name], (x @ dec[name].V).detach())
    masks = tlpd.importance_masks(model, dec, tokens, "random")
    assert set(masks.changed()) == set(dec)


def test_an_identity_begins_where_its_site_does() -> None:
    model = make("gpt2")
    adapter = adapt(model)
    assert [adapter.block_of(before(site)) for site in SITES] == [adapter.block_of(site) for site in SITES]
    assert adapter.block_of(before("blocks.1.attn.W_O")) == 1


# --- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_only_names_and_globs_with_the_ending_select_identities(host: str) -> None:
    model = build(host)
    ordinary = tlpd.find_sites(model)
    assert not [name for name in ordinary if "pre_identity" in name]
    assert tlpd.find_sites(model, "blocks*") == {n: s for n, s in ordinary.items() if n.startswith("blocks")}
    assert tlpd.find_sites(model, lambda site: True) == ordinary
    linear = [name for name, site in ordinary.items() if site.kind == "linear"]
    assert list(tlpd.find_sites(model, "*.pre_identity")) == [before(name) for name in linear]
    mixed = tlpd.find_sites(model, ["blocks.*.mlp.W_in.pre_identity", "blocks.0.mlp.*"])
    expected = [n for n in ordinary if n.startswith("blocks.0.mlp")]
    expected.insert(expected.index("blocks.0.mlp.W_in"), "blocks.0.mlp.W_in.pre_identity")
    assert list(mixed) == [*expected, "blocks.1.mlp.W_in.pre_identity"]
    site = mixed["blocks.0.mlp.W_in.pre_identity"]
    assert (site.d_in, site.d_out, site.kind, site.has_bias) == (24, 24, "linear", False)
    assert adapt(model).bias(site.name) is None
    assert torch.equal(
        tlpd.site_weight(model, site.name), torch.eye(24, dtype=tlpd.site_weight(model, linear[0]).dtype)
    )


def test_an_alias_with_the_ending_names_an_identity() -> None:
    model = make("gpt2")
    alias = "transformer.h.0.mlp.c_fc.weight.pre_identity"
    assert list(tlpd.find_sites(model, alias)) == ["blocks.0.mlp.W_in.pre_identity"]
    dec = tlpd.from_factors(model, {alias: (torch.ones(24, 1).double(), torch.ones(1, 24).double())})
    assert dec[alias] is dec["blocks.0.mlp.W_in.pre_identity"]


def test_unknown_names_give_the_nearest_ones() -> None:
    model = make("gpt2")
    with pytest.raises(NoMatchingSiteError, match=r"blocks\.0\.mlp\.W_in\.pre_identity"):
        tlpd.find_sites(model, "blocks.0.mlp.W_inn.pre_identity")
    with pytest.raises(NoMatchingSiteError, match=r"blocks\.0\.mlp\.W_in\.pre_identity"):
        tlpd.site_weight(model, "blocks.0.mlp.W_inn.pre_identity")
    with pytest.raises(NoMatchingSiteError) as caught:
        tlpd.find_sites(model, "blocks.0.mlp.W_inn")
    assert "pre_identity" not in str(caught.value)
    with pytest.raises(NoMatchingSiteError):
        tlpd.find_sites(model, [])


def test_an_embedding_has_no_identity_before_it() -> None:
    with pytest.raises(UnsupportedSiteError, match="looks rows up"):
        tlpd.find_sites(make("gpt2"), "embed.W_E.pre_identity")


def test_an_identity_has_no_heads() -> None:
    dec = random_decomposition(make("gpt2"), [before("blocks.0.attn.W_O")])
    with pytest.raises(HeadIndexError):
        dec.masks().ablate(before("blocks.0.attn.W_O"), 0, head=1)


# --- files and other models ------------------------------------------------------------------------------------------
def test_a_saved_identity_opens_on_another_host_and_not_on_another_model(tmp_path: Path, tokens: Tensor) -> None:
    model, lm = make("gpt2"), make("nnsight")
    dec = random_decomposition(model, [before("blocks.0.mlp.W_in")])
    masks = masks_of(dec)
    with tlpd.patched(model, dec, masks):
        expected = logits(model, tokens)
    loaded = tlpd.Decomposition.load(dec.save(tmp_path / "saved"))
    assert loaded.sites == dec.sites
    tlpd.check_target(lm, loaded)
    with tlpd.patched(lm, loaded, masks_of(loaded)):
        assert torch.equal(logits(lm, tokens), expected)
    model.transformer.h[0].mlp.c_fc.weight[3, 5] += 1e-3
    for refused in (lambda: tlpd.check_target(model, loaded), lambda: tlpd.patched(model, loaded, masks).__enter__()):
        with pytest.raises(TargetMismatchError, match=r"blocks\.0\.mlp\.W_in holds another weight"):
            refused()
    with pytest.raises(TargetMismatchError, match="not a site of this model"):
        tlpd.check_target(plain(), loaded)


@pytest.mark.parametrize("factor", [1.001, -1.0])
def test_a_rescaled_or_turned_weight_is_another_model(factor: float) -> None:
    model = make("gpt2")
    dec = random_decomposition(model, [before("blocks.0.mlp.W_in")])
    model.transformer.h[0].mlp.c_fc.weight.mul_(factor)
    with pytest.raises(TargetMismatchError):
        tlpd.check_target(model, dec)


def test_a_rounded_weight_is_the_same_model() -> None:
    model = make("gpt2")
    dec = random_decomposition(model, [before(site) for site in SITES])
    tlpd.check_target(model.to(torch.bfloat16), dec)
    model.transformer.h[0].mlp.c_fc.weight.mul_(1.05)
    with pytest.raises(TargetMismatchError, match="blocks.0.mlp.W_in holds another weight"):
        tlpd.check_target(model, dec)


def test_faithfulness_is_relative_to_the_identity() -> None:
    model = make("gpt2")
    dec = random_decomposition(model, [before("blocks.0.mlp.W_in")])
    x = torch.zeros(1, 1)
    step = LossStep(adapt(model), dec, x, None, {}, {}, MeanSquare(x, None), as_streams(torch.Generator()))
    expected = (eye(24) - dec[before("blocks.0.mlp.W_in")].product()).square().sum() / 24
    assert close(Faithfulness()(step), expected)


# --- two contexts ----------------------------------------------------------------------------------------------------
def test_an_identity_and_its_site_are_not_patched_by_two_contexts() -> None:
    model = make("gpt2")
    names = ["blocks.0.mlp.W_in", before("blocks.0.mlp.W_in")]
    dec = random_decomposition(model, names)
    for outer, inner in (names, reversed(names)):
        with (
            tlpd.patched(model, dec, dec.masks().ablate(outer, 0)),
            pytest.raises(PatchConflictError, match="identity before it"),
            tlpd.patched(model, dec, dec.masks().ablate(inner, 1)),
        ):
            pass


def test_two_contexts_of_one_identity_add_up(tokens: Tensor) -> None:
    model, name = make("gpt2"), before("blocks.0.mlp.W_in")
    dec = random_decomposition(model, [name])
    with tlpd.patched(model, dec, dec.masks().ablate(name, [0, 1])):
        expected = logits(model, tokens)
    with tlpd.patched(model, dec, dec.masks().ablate(name, 0)), tlpd.patched(model, dec, dec.masks().ablate(name, 1)):
        assert close(logits(model, tokens), expected)


@pytest.mark.parametrize("order", [0, 1])
def test_an_identity_is_patched_before_an_edited_weight(order: int, tokens: Tensor) -> None:
    model, site = make("gpt2"), "blocks.0.mlp.W_in"
    dec = random_decomposition(model, [site, before(site)])
    masks, weight = masks_of(dec), tlpd.site_weight(model, site)
    by_hand = make("gpt2", {site: edited(dec, masks, before(site), eye(24)) @ edited(dec, masks, site, weight)})
    own, inserted = (dec.masks().with_values(n, masks[n].m, delta=masks[n].d) for n in (site, before(site)))
    contexts = [lambda: tlpd.edited_weights(model, dec, own), lambda: tlpd.patched(model, dec, inserted)]
    with contexts[order](), contexts[1 - order]():
        assert close(logits(model, tokens), logits(by_hand, tokens))
    with (
        tlpd.edited_weights(model, dec, inserted),
        pytest.raises(PatchConflictError),
        tlpd.patched(model, dec, own),
    ):
        pass


# --- training --------------------------------------------------------------------------------------------------------
def test_an_identity_is_decomposed_along_with_its_site(tokens: Tensor) -> None:
    model, site = make("gpt2"), "blocks.0.mlp.W_in"
    method = tlpd.SPD(n_components={"*.pre_identity": 24, "*": 30})
    dec = tlpd.decompose(model, [site, before(site)], method, tokens, steps=2, batch_size=2, progress=False)
    assert list(dec) == [before(site), site]
    assert dec.n_components == {before(site): 24, site: 30}
    tlpd.check_target(model, dec)
    assert (dec[before(site)].product() - eye(24)).norm() < 0.1
    assert set(tlpd.importance_masks(model, dec, tokens).changed()) == set(dec)
