"""Weights that modules compute from others: read, patched, edited for a while and for good, or refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.evaluation.controls import shuffled_weights
from tl_paramdecomp.errors import TargetMismatchError, UnsupportedSiteError

from ..support.computed import WAYS, Squashed
from ..support.models import VOCAB, bridge, decomposition_of, gpt2, hooked, llama, logits, module_of, nnsight

HOSTS: dict[str, tuple[Callable[[], Any], Callable[[Any], nn.Module], str]] = {
    "gpt2": (gpt2, lambda m: m.transformer.h[0].mlp.c_fc, "blocks.0.mlp.W_in"),
    "fused": (gpt2, lambda m: m.transformer.h[1].attn.c_attn, "blocks.1.attn.W_K"),
    "embedding": (gpt2, lambda m: m.transformer.wte, "embed.W_E"),
    "unembedding": (gpt2, lambda m: m.lm_head, "unembed.W_U"),
    "llama": (lambda: llama(torch.float64), lambda m: m.model.layers[0].mlp.up_proj, "blocks.0.mlp.W_in"),
    "nnsight": (nnsight, lambda m: m._module.transformer.h[0].mlp.c_fc, "blocks.0.mlp.W_in"),
    "bridge": (bridge, lambda m: getattr(m.blocks[0].mlp, "in").original_component, "blocks.0.mlp.W_in"),
    "bridge's q": (bridge, lambda m: m.blocks[0].attn.q.original_component, "blocks.0.attn.W_Q"),
}
"""A model, the module whose weight is computed, and the site that is edited."""


def edits(dec: tlpd.Decomposition, site: str) -> list[tlpd.Masks]:
    """One by a few components, one by the delta component as well."""
    C = dec[site].n_components
    return [
        dec.masks().ablate(site, [0, 1]),
        dec.masks().with_values(site, torch.linspace(0, 1, C).double(), delta=0.3),
    ]


def by_hand(weight: Tensor, dec: tlpd.Decomposition, site: str, masks: tlpd.Masks) -> Tensor:
    """W' = V diag(m) U + d (W - V U)."""
    pair, c = masks[site], dec[site]
    m, d = pair.m.flatten().to(weight.dtype), pair.d.flatten().to(weight.dtype)
    return ((c.V * m) @ c.U + d * (weight - c.V @ c.U)).detach()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_edit_of_a_computed_weight_holds(host: str, way: str, tokens: Tensor) -> None:
    """Against the same model with the weight, worked out in closed form and edited by hand, as a plain parameter."""
    make, holder, site = HOSTS[host]
    if (host, way) == ("bridge's q", "prune"):
        pytest.skip("torch's prune takes no weight that is a transposed view")
    model = make()
    WAYS[way].apply(holder(model), "weight")
    module_of(model).eval().requires_grad_(False)
    weight = WAYS[way].value(holder(model), "weight")
    found = tlpd.site_weight(model, site)
    twin = make()
    module_of(twin).requires_grad_(False)
    own = holder(twin)
    own._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)  # alone, where it is tied
    assert (tlpd.site_weight(twin, site) - found).abs().max() < 1e-12 * found.abs().max()
    dec, plain = decomposition_of(model, site), logits(model, tokens)
    assert (logits(twin, tokens) - plain).abs().max() < 1e-10
    with tlpd.patched(model, dec, dec.masks()):
        assert torch.equal(logits(model, tokens), plain)
    for masks in edits(dec, site):
        own._parameters["weight"] = nn.Parameter(weight.clone(), requires_grad=False)
        twin_weight = by_hand(tlpd.site_weight(twin, site), dec, site, masks)
        write(twin, site, twin_weight)
        expected = logits(twin, tokens)
        with tlpd.patched(model, dec, masks):
            assert (logits(model, tokens) - expected).abs().max() < 1e-10
        with tlpd.edited_weights(model, dec, masks):
            assert (logits(model, tokens) - expected).abs().max() < 1e-10
            assert (tlpd.site_weight(model, site) - twin_weight).abs().max() < 1e-12 * twin_weight.abs().max()
        assert torch.equal(logits(model, tokens), plain)
        made = tlpd.edited_model(model, dec, masks)
        assert (logits(made, tokens) - expected).abs().max() < 1e-10
        assert type(holder(made)) is type(own) and list(holder(made)._parameters)[-1:] != []
        assert torch.equal(logits(model, tokens), plain)
        tlpd.check_target(model, dec)


def write(twin: Any, site: str, weight: Tensor) -> None:
    """Put W into a plain model by hand, in torch's own layouts."""
    root = getattr(twin, "_module", twin)
    if site == "embed.W_E":
        root.transformer.wte.weight.copy_(weight)
    elif site == "unembed.W_U":
        root.lm_head.weight.copy_(weight.T)
    elif site == "blocks.1.attn.W_K":
        root.transformer.h[1].attn.c_attn.weight[:, 24:48] = weight
    elif site == "blocks.0.attn.W_Q":
        root.blocks[0].attn.q.original_component.weight.copy_(weight.T)
    elif hasattr(root, "model") and hasattr(root.model, "layers"):
        root.model.layers[0].mlp.up_proj.weight.copy_(weight.T)
    elif hasattr(root, "blocks"):
        getattr(root.blocks[0].mlp, "in").original_component.weight.copy_(weight)
    else:
        root.transformer.h[0].mlp.c_fc.weight.copy_(weight)


@pytest.mark.parametrize("attribute", ["W_in", "W_Q"])
def test_a_hooked_transformer_with_a_parametrization(attribute: str, tokens: Tensor) -> None:
    model, twin = hooked(), hooked()
    part = "mlp" if attribute == "W_in" else "attn"
    site = f"blocks.0.{part}.{attribute}"
    holder, own = getattr(model.blocks[0], part), getattr(twin.blocks[0], part)
    WAYS["user's"].apply(holder, attribute)
    model.requires_grad_(False)
    twin.requires_grad_(False)
    assert list(tlpd.find_sites(model)) == list(tlpd.find_sites(twin))
    getattr(own, attribute).copy_(WAYS["user's"].value(holder, attribute))
    dec, plain = decomposition_of(model, site), logits(model, tokens)
    for masks in edits(dec, site):
        with tlpd.edited_weights(twin, dec, masks):
            expected = logits(twin, tokens)
        for context in (tlpd.patched, tlpd.edited_weights):
            with context(model, dec, masks):
                assert (logits(model, tokens) - expected).abs().max() < 1e-10
        assert (logits(tlpd.edited_model(model, dec, masks), tokens) - expected).abs().max() < 1e-10
        assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_plain_modules(kind: str, way: str, tmp_path: Path) -> None:
    """And the copy, saved and loaded into a model whose weights are plain."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        first: nn.Module = {
            "linear": lambda: nn.Linear(6, 5),
            "conv": lambda: nn.Conv2d(2, 5, 3, padding=1),
            "embedding": lambda: nn.Embedding(9, 5),
        }[kind]()
        return nn.Sequential(first, nn.Tanh()).double()

    x = {"linear": torch.randn(3, 6).double(), "conv": torch.randn(2, 2, 4, 4).double(), "embedding": torch.arange(9)}
    model = make()
    WAYS[way].apply(model[0], "weight")
    model.eval()  # the computed tensors carry their graphs
    dec = tlpd.from_factors(model, {"0.weight": factors(model)})
    masks = dec.masks().ablate("0.weight", [0])
    weight = WAYS[way].value(model[0], "weight").detach()
    change = dec["0.weight"].component(0).detach()
    twin = make()
    twin.load_state_dict(
        {**twin.state_dict(), "0.weight": weight - (change.T if kind != "embedding" else change).reshape(weight.shape)}
    )
    expected = twin(x[kind])
    for context in (tlpd.patched, tlpd.edited_weights):
        with context(model, dec, masks):
            assert (model(x[kind]) - expected).abs().max() < 1e-12
    made = tlpd.edited_model(model, dec, masks)
    assert (made(x[kind]) - expected).abs().max() < 1e-12
    assert made[0].weight.requires_grad
    torch.save(made.state_dict(), tmp_path / "made.pt")
    loaded = make()
    loaded.load_state_dict(torch.load(tmp_path / "made.pt", weights_only=True))
    assert torch.equal(loaded(x[kind]), made(x[kind]))


def factors(model: nn.Module) -> tuple[Tensor, Tensor]:
    site = tlpd.find_sites(model)["0.weight"]
    return torch.randn(site.d_in, 3).double() * 0.3, torch.randn(3, site.d_out).double() * 0.3


@pytest.mark.parametrize("way", ["user's", "prune"])
def test_a_computed_bias_counts(way: str, tokens: Tensor) -> None:
    """With the delta component at 0, what is written is V diag(m) U and the bias that a forward pass adds."""
    model = gpt2()
    layer = model.transformer.h[0].mlp.c_fc
    WAYS[way].apply(layer, "bias")
    model.requires_grad_(False)
    site = "blocks.0.mlp.W_in"
    dec = decomposition_of(model, site)
    masks = dec.masks().keep_only(site, [], delta=0.0)
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with tlpd.patched(model, dec, masks):
        by_hook = logits(model, tokens)
    assert torch.equal(kept[0], WAYS[way].value(layer, "bias").expand_as(kept[0]))
    with tlpd.edited_weights(model, dec, masks):
        assert (logits(model, tokens) - by_hook).abs().max() < 1e-10
    assert (logits(tlpd.edited_model(model, dec, masks), tokens) - by_hook).abs().max() < 1e-10


def test_two_sites_of_one_computed_matrix(tokens: Tensor) -> None:
    model, twin = gpt2(), gpt2()
    layer = model.transformer.h[0].attn.c_attn
    WAYS["user's"].apply(layer, "weight")
    twin.transformer.h[0].attn.c_attn.weight.data = WAYS["user's"].value(layer, "weight").detach()
    dec = decomposition_of(model, ["blocks.0.attn.W_Q", "blocks.0.attn.W_V"])
    masks = dec.masks().ablate("blocks.0.attn.W_Q", 0).ablate("blocks.0.attn.W_V", 1)
    with tlpd.edited_weights(twin, dec, masks):
        expected = logits(twin, tokens)
    with tlpd.edited_weights(model, dec, masks):
        assert (logits(model, tokens) - expected).abs().max() < 1e-10
    assert (logits(tlpd.edited_model(model, dec, masks), tokens) - expected).abs().max() < 1e-10


def test_what_is_computed_from_changes_and_is_noticed(tokens: Tensor) -> None:
    for way in WAYS:
        model = nn.Sequential(nn.Linear(6, 5)).double().eval()
        WAYS[way].apply(model[0], "weight")
        dec = tlpd.from_factors(model, {"0.weight": factors(model)})
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "bias" not in name).mul_(torch.rand(1).double() + 1.5)
        if "spectral" not in way:  # which scaling leaves alone
            with pytest.raises(TargetMismatchError), tlpd.patched(model, dec, dec.masks()):
                pass


def test_shuffled_weights_reach_computed_ones(tokens: Tensor) -> None:
    model = gpt2(tie_word_embeddings=False)
    layer = model.transformer.h[0].mlp.c_fc
    WAYS["user's"].apply(layer, "weight")
    WAYS["prune"].apply(model.transformer.h[1].mlp.c_fc, "weight")
    model.requires_grad_(False)
    twin = gpt2(tie_word_embeddings=False)
    twin.transformer.h[0].mlp.c_fc.weight.data = WAYS["user's"].value(layer, "weight")
    twin.transformer.h[1].mlp.c_fc.weight.data = WAYS["prune"].value(model.transformer.h[1].mlp.c_fc, "weight")
    plain = logits(model, tokens)
    with shuffled_weights(twin), shuffled_weights(model):
        assert (logits(model, tokens) - logits(twin, tokens)).abs().max() < 1e-10
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("make", [gpt2, lambda: llama(torch.float64, tie_word_embeddings=True)])
@pytest.mark.parametrize("site", ["blocks.0.mlp.W_in", "unembed.W_U"])
def test_a_transformers_copy_saved_and_loaded(make: Any, site: str, tmp_path: Path, tokens: Tensor) -> None:
    """The unembedding's weight is computed from the table that it was tied to; loading must not tie it again."""
    hf = make()
    names = {
        "blocks.0.mlp.W_in": ("transformer.h.0.mlp.c_fc", "model.layers.0.mlp.up_proj"),
        "unembed.W_U": ("lm_head",),
    }
    layer = next(module for name, module in hf.named_modules() if name in names[site])
    WAYS["user's"].apply(layer, "weight")
    dec = decomposition_of(hf, site)
    masks = dec.masks().ablate(site, [0, 1])
    with tlpd.patched(hf, dec, masks):
        expected = logits(hf, tokens)
    made = tlpd.edited_model(hf, dec, masks)
    made.save_pretrained(tmp_path)
    loaded = type(hf).from_pretrained(tmp_path, attn_implementation="eager", torch_dtype=hf.dtype).eval()
    assert (logits(loaded, tokens) - expected).abs().max() < 1e-10


def test_a_bridge_saves_its_computed_query(tokens: Tensor) -> None:
    model = bridge()
    WAYS["user's"].apply(model.blocks[0].attn.q.original_component, "weight")
    module_of(model).requires_grad_(False)
    dec = decomposition_of(model, "blocks.0.attn.W_Q")
    made = tlpd.edited_model(model, dec, dec.masks().ablate("blocks.0.attn.W_Q", [0, 1]))
    loaded = bridge(gpt2(seed=7))
    loaded.load_state_dict(copy.deepcopy(made.state_dict()))
    assert (logits(loaded, tokens) - logits(made, tokens)).abs().max() < 1e-10
    assert hasattr(made.blocks[0].attn.q, "hook_in")


@pytest.mark.parametrize("way", ["user's", "old weight_norm"])
def test_a_computed_gain_of_a_norm(way: str) -> None:
    """Read, and replaced for a while, as one that is a parameter."""
    norm = nn.LayerNorm(6).double()
    norm.weight.data = torch.linspace(0.5, 2, 6).double()
    model = nn.Sequential(nn.Linear(6, 6).double(), norm)
    WAYS[way].apply(norm, "weight")
    model.requires_grad_(False)
    adapter, x = adapt(model), torch.randn(3, 6).double()
    plain, gain = model(x), WAYS[way].value(norm, "weight")
    assert list(adapter.norms.sites) == ["1.weight"] and (adapter.gain("1.weight") - gain).abs().max() < 1e-12
    with adapter.replaced_weights({"1.weight": gain * 3}):
        assert (model(x) - norm.bias - 3 * (plain - norm.bias)).abs().max() < 1e-12
    assert torch.equal(model(x), plain)


# --- what cannot be ---------------------------------------------------------------------------------------------------
class Dropped(nn.Module):
    """Another weight at each look, in training mode."""

    def forward(self, w: Tensor) -> Tensor:
        return nn.functional.dropout(w, 0.5, self.training)


class Counting(nn.Module):
    """A weight that depends on how often it was looked at."""

    looks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("looks", torch.zeros(()))

    def forward(self, w: Tensor) -> Tensor:
        self.looks += 1
        return w * self.looks


@pytest.mark.parametrize("way", ["spectral_norm", "old spectral_norm", "dropped"])
def test_weights_that_change_as_they_are_read_are_refused_in_training(way: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    if way == "dropped":
        parametrize.register_parametrization(model[0], "weight", Dropped())
    else:
        WAYS[way].apply(model[0], "weight")
    model.eval()
    dec, before = decomposition_of(model, "0.weight"), copy.deepcopy(model.state_dict())
    model.train()
    state = torch.random.get_rng_state()
    for use in (tlpd.patched, tlpd.edited_weights, tlpd.edited_model):
        with pytest.raises(UnsupportedSiteError, match=r"0\.weight.*another tensor each time.*eval mode"):
            with use(model, dec, dec.masks().ablate("0.weight", 0)):
                pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state) or way == "dropped"
    model.eval()
    with tlpd.patched(model, dec, dec.masks()):
        pass


def test_a_weight_that_counts_its_looks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double().eval()
    part = Counting()
    parametrize.register_parametrization(model[0], "weight", part)
    before = part.looks.clone()
    with pytest.raises(UnsupportedSiteError, match="Counting"):
        tlpd.site_weight(model, "0.weight")
    assert torch.equal(part.looks, before)
    assert tlpd.site_weight(model, "1.weight").shape == (5, 4)


def test_weights_set_by_unknown_hands_are_refused() -> None:
    """A hook of the user's own that leaves a tensor where the parameter was: stale between two passes."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    raw = model[0]._parameters.pop("weight")
    model[0].register_parameter("raw", raw)
    model[0].weight = raw.detach() * 2

    def refresh(module: Any, args: Any) -> None:
        module.weight = torch.sin(module.raw)

    model[0].register_forward_pre_hook(refresh)
    with pytest.raises(UnsupportedSiteError, match=r"no parameter but an attribute.*parametrize"):
        tlpd.find_sites(model, "0.weight")
    assert list(tlpd.find_sites(model)) == ["1.weight"]


def test_what_a_parametrization_is_made_of_is_no_site() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6, bias=False).double()

        def forward(self, w: Tensor) -> Tensor:
            return self.mix(w)

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    parametrize.register_parametrization(model[0], "weight", Mixed())
    assert list(tlpd.find_sites(model)) == ["0.weight", "1.weight"]
    assert Squashed(torch.ones(2)).scale.shape == (2,) and VOCAB
