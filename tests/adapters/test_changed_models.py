"""Models that change after the first look: their structure, and their weights by ways that torch does not count."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import TargetMismatchError

from ..support.models import BUILDERS, build, decomposition_of, logits, module_of


def fresh(model: nn.Module) -> dict[str, Any]:
    """Sites as a first look at the same model finds them."""
    return dict(tlpd.find_sites(copy.deepcopy(model)))


# --- structure -------------------------------------------------------------------------------------------------------
def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4)).double().requires_grad_(False)


def add_bias(model: Any) -> None:
    model[0].bias = nn.Parameter(torch.randn(5, dtype=torch.float64), requires_grad=False)


def remove_bias(model: Any) -> None:
    model[1].bias = None


def other_width(model: Any) -> None:
    model[1] = nn.Linear(5, 9).double().requires_grad_(False)


def another_layer(model: Any) -> None:
    model.append(nn.Linear(4, 3).double().requires_grad_(False))


def swap_for_one_and_remove_one(model: Any) -> None:
    """As many modules as before."""
    model[1] = nn.Tanh()
    model[0] = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)).double().requires_grad_(False)
    del model[1]


def a_table_in_place_of_a_map(model: Any) -> None:
    model[0] = nn.Embedding(6, 5).double().requires_grad_(False)


CHANGES = [add_bias, remove_bias, other_width, another_layer, swap_for_one_and_remove_one, a_table_in_place_of_a_map]


@pytest.mark.parametrize("change", CHANGES)
def test_sites_are_those_of_a_first_look(change: Callable[[Any], None]) -> None:
    model = two_layers()
    before = dict(tlpd.find_sites(model))
    change(model)
    assert dict(tlpd.find_sites(model)) == fresh(model) != before


@pytest.mark.parametrize("change", [add_bias, remove_bias, other_width])
def test_a_patch_after_the_change_is_an_edited_weight(change: Callable[[Any], None]) -> None:
    model = two_layers()
    tlpd.find_sites(model)
    change(model)
    dec = decomposition_of(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    masks = dec.masks()
    for name in dec:
        masks = masks.keep_only(name, [0, 1], delta=0.4)
    with tlpd.patched(model, dec, masks):
        found = model(x)
    right = x
    for layer, name in zip(model, dec, strict=True):
        V, U = dec[name].V, dec[name].U
        W = V[:, :2] @ U[:2] + 0.4 * (layer.weight.T - V @ U)
        right = right @ W + (0 if layer.bias is None else layer.bias)
    assert (found - right).abs().max() < 1e-12


def resized(model: Any) -> None:
    model.resize_token_embeddings(70, mean_resizing=False)


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)


def a_block_fewer(model: Any) -> None:
    del model.transformer.h[1]


@pytest.mark.parametrize("change", [resized, untied, a_block_fewer])
@pytest.mark.parametrize("host", ["gpt2", "nnsight"])
def test_language_models_that_change(host: str, change: Callable[[Any], None]) -> None:
    model = build(host)
    before = dict(tlpd.find_sites(model))
    change(module_of(model))
    found = dict(tlpd.find_sites(model))
    assert found == fresh(module_of(model))
    assert [site.tied_to for site in found.values()] != [site.tied_to for site in before.values()] or found != before


def test_weights_that_are_tied_later() -> None:
    model = build("llama")
    assert tlpd.find_sites(model)["unembed.W_U"].tied_to is None
    model.lm_head.weight = model.model.embed_tokens.weight
    assert tlpd.find_sites(model)["unembed.W_U"].tied_to == "embed.W_E"


@pytest.mark.parametrize("host", ["hooked", "bridge"])
def test_lens_models_whose_modules_change(host: str, tokens: Tensor) -> None:
    """Attention of another block in place of the first: the sites read it."""
    model = build(host)
    tlpd.find_sites(model)
    root = module_of(model)
    root.blocks[0], root.blocks[1] = copy.deepcopy(root.blocks[1]), copy.deepcopy(root.blocks[0])
    again = tlpd.site_weight(model, "blocks.0.mlp.W_in")
    assert torch.equal(again, tlpd.site_weight(build(host), "blocks.1.mlp.W_in"))


# --- numbers ---------------------------------------------------------------------------------------------------------
def merged(weight: Tensor) -> None:
    """What merging a low-rank adapter does."""
    g = torch.Generator().manual_seed(0)
    down = torch.randn(weight.shape[0], 2, generator=g, dtype=weight.dtype)
    rest = torch.randn(2, weight[0].numel(), generator=g, dtype=weight.dtype)
    weight.data.add_(1e-3 * (down @ rest).view_as(weight))


def scaled(weight: Tensor) -> None:
    weight.data.mul_(1.01)


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] += 0.5


def other_storage(weight: Tensor) -> None:
    weight.data = weight.data + 0.5


@pytest.mark.parametrize("change", [merged, scaled, through_numpy, other_storage])
@pytest.mark.parametrize("host", BUILDERS)
def test_a_change_past_the_count_of_torch_is_noticed(
    host: str, change: Callable[[Tensor], None], tokens: Tensor
) -> None:
    model = build(host)
    dec = decomposition_of(model, "blocks.0.*")
    masks = dec.masks().ablate("blocks.0.mlp.W_in", [0])
    with tlpd.patched(model, dec, masks):
        first = logits(model, tokens)
    plain, counted = logits(model, tokens), 0
    for name, parameter in module_of(model).named_parameters():
        before, version = parameter.detach().clone(), parameter._version
        if ".0." not in name or parameter.ndim < 2:
            continue
        change(parameter)
        assert parameter._version == version, "torch counts it"
        if torch.equal(
            logits(model, tokens), plain
        ):  # a bias of zeros; what a bridge keeps beside what it multiplies by
            parameter.data.copy_(before)
            continue
        counted += 1
        with pytest.raises(TargetMismatchError), tlpd.patched(model, dec, masks):
            pass
        with pytest.raises(TargetMismatchError):
            tlpd.component_acts(model, dec, tokens)
        parameter.data.copy_(before)
        with tlpd.patched(model, dec, masks):
            assert torch.equal(logits(model, tokens), first)
    assert counted >= 4


def test_a_single_entry_is_noticed_by_check_target() -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.*")
    tlpd.check_target(model, dec)
    model.transformer.h[1].mlp.c_proj.weight.data[3, 5] += 1e-6
    with pytest.raises(TargetMismatchError, match=r"blocks\.1\.mlp\.W_out"):
        tlpd.check_target(model, dec)


def test_a_bias_changed_through_data_is_noticed() -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.0.mlp.W_in")
    tlpd.component_acts(model, dec, torch.zeros(1, 3, dtype=torch.long))
    model.transformer.h[0].mlp.c_fc.bias.data.add_(0.1)
    with pytest.raises(TargetMismatchError, match="bias"), tlpd.patched(model, dec, dec.masks()):
        pass


@pytest.mark.parametrize("host", ["hooked", "llama"])
def test_a_cap_on_the_logits_that_is_set_later(host: str, tokens: Tensor) -> None:
    from tl_paramdecomp.adapters import adapt

    model = build(host)
    assert adapt(model).splits_at_unembedding
    if host == "hooked":
        model.cfg.output_logits_soft_cap = 2.0
    else:  # its forward caps nothing: the setting changes nothing
        model.config.final_logit_softcapping = 2.0
    adapter = adapt(model)
    assert (adapter.unembed(adapter.hidden(tokens)) - adapter.forward(tokens)).abs().max() < 1e-4
