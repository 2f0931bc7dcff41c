"""One parameter that several maps use: an edit changes the named map alone, for a while and for good in a saved copy."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import UnsupportedSiteError

from ..support.models import bridge, decomposition_of, gpt2, hooked, llama, logits, module_of, nnsight


def check(model: Any, twin: Any, site: str, tokens: Tensor) -> tlpd.Decomposition:
    """An edit of one site, three ways, against `twin`, where nothing is shared; returns what was decomposed."""
    module_of(model).requires_grad_(False)
    module_of(twin).requires_grad_(False)
    dec, plain = decomposition_of(model, site), logits(model, tokens)
    state = copy.deepcopy(module_of(model).state_dict())
    masks = dec.masks().ablate(site, [0, 1])
    assert (logits(twin, tokens) - plain).abs().max() < 1e-10
    with tlpd.edited_weights(twin, dec, masks):
        expected = logits(twin, tokens)
    assert (expected - plain).abs().max() > 1e-6
    for context in (tlpd.patched, tlpd.edited_weights):
        with context(model, dec, masks):
            assert (logits(model, tokens) - expected).abs().max() < 1e-10, context.__name__
    assert (logits(tlpd.edited_model(model, dec, masks), tokens) - expected).abs().max() < 1e-10
    assert torch.equal(logits(model, tokens), plain)
    assert all(torch.equal(value, state[key]) for key, value in module_of(model).state_dict().items())
    return dec


# --- plain modules ----------------------------------------------------------------------------------------------------
class Named(nn.Module):
    """Two maps side by side, whose outputs add up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + torch.tanh(self.b(x * 2))


def shared(how: str) -> nn.Module:
    model = Named().double()
    if how == "parameter":
        model.b.weight = model.a.weight
    elif how == "storage":
        model.b.weight = nn.Parameter(model.a.weight.detach())
    elif how == "transposed":
        model.b.weight = nn.Parameter(model.a.weight.detach().T)
    elif how == "rows":
        whole = torch.randn(9, 6).double()
        model.a.weight, model.b.weight = nn.Parameter(whole[:6]), nn.Parameter(whole[3:])
    else:  # a parameter that no module owns twice, but something else keeps
        model.b.weight = model.a.weight
        model.both = [model.a.weight]
    return model


@pytest.mark.parametrize("site", ["a.weight", "b.weight"])
@pytest.mark.parametrize("how", ["parameter", "storage", "transposed", "rows", "kept elsewhere"])
def test_two_linear_maps(how: str, site: str, tmp_path: Path) -> None:
    x, twin = torch.randn(3, 6).double(), Named().double()
    model = shared(how)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    dec = check(model, twin, site, x)
    made = tlpd.edited_model(model, dec, dec.masks().ablate(site, [0, 1]))
    torch.save(made.state_dict(), tmp_path / "made.pt")
    twin.load_state_dict(torch.load(tmp_path / "made.pt", weights_only=True))
    assert (twin(x) - made(x)).abs().max() < 1e-12
    tied = tlpd.find_sites(model)["b.weight"].tied_to
    assert tied == ("a.weight" if how in ("parameter", "kept elsewhere") else None)


def test_a_shared_parameter_behind_a_parametrization() -> None:
    """The one computes its weight from the other's parameter, which an edit of either leaves as it is."""

    class Negative(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return -w

    x = torch.randn(3, 6).double()
    for site in ("a.weight", "b.weight"):
        model, twin = shared("parameter"), Named().double()
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
        twin.b.weight.data.neg_()
        nn.utils.parametrize.register_parametrization(model.b, "weight", Negative())
        check(model, twin, site, x)


def test_a_module_in_two_places_is_one_site() -> None:
    layer = nn.Linear(6, 6).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert list(tlpd.find_sites(model)) == ["0.weight"]


@pytest.mark.parametrize("host", ["transformers", "nnsight", "bridge", "hooked"])
def test_a_module_in_two_blocks_is_no_site_of_one(host: str) -> None:
    hf = hooked() if host == "hooked" else gpt2()
    blocks = hf.blocks if host == "hooked" else hf.transformer.h
    blocks[1].mlp = blocks[0].mlp
    model = {"nnsight": nnsight, "bridge": bridge}.get(host, lambda m: m)(hf)
    with pytest.raises(UnsupportedSiteError, match="more than one block.*more than once"):
        tlpd.find_sites(model, "blocks.0.mlp.W_in")
    with pytest.raises(UnsupportedSiteError, match=r"blocks\.1\.mlp\.W_in"):
        tlpd.find_sites(model, "blocks.1.mlp.W_in")
    assert {"blocks.0.attn.W_O", "blocks.1.attn.W_O"} < tlpd.find_sites(model).keys()


# --- language models --------------------------------------------------------------------------------------------------
def tie_blocks(hf: Any) -> Any:
    """Let the second block use the parameters of the first, as ALBERT's layers do."""
    blocks = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
    for first, second in zip(blocks[0].modules(), blocks[1].modules(), strict=True):
        for name in first._parameters:
            second._parameters[name] = first._parameters[name]
    return hf


def untied(hf: Any) -> Any:
    """The same model with a parameter of its own for every name but the embedding's."""
    made = copy.deepcopy(hf)
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, nn.Embedding) and module is not made.lm_head:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    return made


@pytest.mark.parametrize("host", ["transformers", "nnsight", "bridge"])
@pytest.mark.parametrize("site", ["blocks.0.mlp.W_in", "blocks.1.mlp.W_in", "blocks.1.attn.W_O", "blocks.0.attn.W_K"])
def test_blocks_that_share_all_parameters(host: str, site: str, tokens: Tensor) -> None:
    wrap = {"transformers": lambda m: m, "nnsight": nnsight, "bridge": bridge}[host]
    for hf in (tie_blocks(gpt2()), tie_blocks(llama(torch.float64))):
        apart = untied(hf)
        if host == "bridge" and site.endswith("W_K") and hasattr(hf, "transformer"):
            model = wrap(hf)
            dec = decomposition_of(model, site)
            masks = dec.masks().ablate(site, 0)
            with pytest.raises(
                UnsupportedSiteError, match=r"blocks\.0\.attn\.W_K and blocks\.1\.attn\.W_K read the same"
            ):
                tlpd.edited_model(model, dec, masks)
            continue
        check(wrap(hf), wrap(apart), site, tokens)


def test_tied_sites_are_named() -> None:
    sites = tlpd.find_sites(tie_blocks(gpt2()))
    assert {name: site.tied_to for name, site in sites.items() if site.tied_to} == {
        **{name: name.replace("blocks.1", "blocks.0") for name in sites if name.startswith("blocks.1.")},
        "unembed.W_U": "embed.W_E",
    }


@pytest.mark.parametrize("site", ["blocks.0.attn.W_Q", "blocks.0.attn.W_K"])
def test_an_attention_that_ties_queries_and_keys(site: str, tokens: Tensor, tmp_path: Path) -> None:
    hf = llama(torch.float64, num_key_value_heads=4)
    attention = hf.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    dec = check(hf, untied(hf), site, tokens)
    made = tlpd.edited_model(hf, dec, dec.masks().ablate(site, [0, 1]))
    made.save_pretrained(tmp_path)
    loaded = type(hf).from_pretrained(tmp_path, attn_implementation="eager", torch_dtype=hf.dtype).eval()
    assert (logits(loaded, tokens) - logits(made, tokens)).abs().max() < 1e-10


@pytest.mark.parametrize("site", ["blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.1.mlp.W_in"])
def test_a_hooked_transformer_that_ties(site: str, tokens: Tensor) -> None:
    model = hooked()
    attention = model.blocks[0].attn
    attention.W_K = attention.W_Q
    model.blocks[1].mlp.W_in = model.blocks[0].mlp.W_in
    twin = hooked()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    check(model, twin, site, tokens)


@pytest.mark.parametrize("site", ["blocks.0.mlp.W_in", "blocks.1.mlp.W_out", "embed.W_E"])
def test_ties_that_a_class_declares_are_not_made_again(site: str, tokens: Tensor, tmp_path: Path) -> None:
    """transformers ties what a class declares whenever a model is loaded."""
    from transformers import LlamaForCausalLM

    if not hasattr(LlamaForCausalLM, "get_expanded_tied_weights_keys"):
        pytest.skip("before transformers 5 a class declares ties by code")

    class Shared(LlamaForCausalLM):
        _tied_weights_keys = {  # noqa: RUF012
            "lm_head.weight": "model.embed_tokens.weight",
            "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
        }

    plain = llama(torch.float64, tie_word_embeddings=True)
    hf = Shared(plain.config).double().eval()
    hf.load_state_dict(plain.state_dict())
    hf.tie_weights()
    first, second = (block.mlp for block in hf.model.layers)
    assert first.up_proj.weight is second.up_proj.weight
    dec = check(hf, untied(hf), site, tokens)
    made = tlpd.edited_model(hf, dec, dec.masks().ablate(site, [0, 1]))
    made.save_pretrained(tmp_path)
    loaded = Shared.from_pretrained(tmp_path, attn_implementation="eager", torch_dtype=hf.dtype).eval()
    assert (logits(loaded, tokens) - logits(made, tokens)).abs().max() < 1e-10
    assert first.up_proj.weight is second.up_proj.weight and hf.config.tie_word_embeddings


def test_a_bridges_transformers_model_is_not_tied_again(tokens: Tensor) -> None:
    model = bridge()
    dec = decomposition_of(model, "embed.W_E")
    made = tlpd.edited_model(model, dec, dec.masks().ablate("embed.W_E", 0))
    assert made.original_model.config.tie_word_embeddings is False and model.original_model.config.tie_word_embeddings
