"""Convolutions of plain modules as linear maps of patches: exact, or refused by name."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import PositionIndexError, ShapeError, UnsupportedModelError, UnsupportedSiteError

from ..support.exactness import (
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    part_kept,
    patched_run,
    random_decomposition,
)
from ..support.families import build
from ..support.hosts import off_trivial, run

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 2},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "strided and dilated": {"kernel_size": 2, "stride": 3, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, of even size and dilated": {"kernel_size": 4, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid", "bias": False},
    "one": {"kernel_size": 1},
    "whole image": {"kernel_size": 9},
}
UNEVEN = {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (2, 1), "padding": (3, 1)}
CASES = [(nn.Conv1d, kind) for kind in GEOMETRIES.values()] + [
    (nn.Conv2d, kind) for kind in (*GEOMETRIES.values(), UNEVEN)
]
KINDS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}


class CNN(nn.Module):
    """Convolutions of two resolutions, whose outputs are viewed as rows, and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(x.view(len(x), -1))


def exact(module: nn.Module) -> Any:
    torch.manual_seed(0)
    return off_trivial(copy.deepcopy(module).to(torch.float64)).requires_grad_(False)


def cnn() -> Any:
    torch.manual_seed(0)
    return exact(CNN())


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution with another matrix [d_in, d_out] for its kernel."""
    kernel = weight.T.reshape(module.weight.shape)
    return KINDS[type(module)](x, kernel, module.bias, module.stride, module.padding, module.dilation)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize(("kind", "geometry"), CASES)
def test_a_patch_is_an_edited_kernel(kind: Any, geometry: dict[str, Any], unbatched: bool) -> None:
    module = exact(kind(3, 5, **geometry))
    x = images(*(() if unbatched else (2,)), 3, *((9,) if kind is nn.Conv1d else (9, 10)))
    if geometry["kernel_size"] == 9 and kind is nn.Conv2d:
        x = x[..., :9]
    decomposition = random_decomposition(module)
    W = tlpd.site_weight(module, "weight")
    assert torch.equal(W, module.weight.flatten(1).T)
    assert tlpd.find_sites(module)["weight"].has_bias == geometry.get("bias", True)
    expected = by_hand(module, x, W - gone(decomposition, "weight"))
    assert difference(patched_run(module, decomposition, ablate(decomposition), x), expected) < 1e-10
    masks, taken = part_kept(decomposition, "weight")
    assert difference(patched_run(module, decomposition, masks, x), by_hand(module, x, W - taken(W))) < 1e-10
    with tlpd.edited_weights(module, decomposition, ablate(decomposition)):
        assert difference(module(x), expected) < 1e-10
    assert_no_mask_is_the_model(module, x, decomposition, (1,) if unbatched else (1, 1))
    assert difference(expected, module(x)) > 1e-3, "the patch does nothing"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("kind", "geometry"), CASES)
def test_patches_times_the_matrix_are_the_output(kind: Any, geometry: dict[str, Any]) -> None:
    module = exact(kind(3, 5, **geometry))
    x = images(2, 3, *((9,) if kind is nn.Conv1d else (9, 9)))
    patches = adapt(module).capture(x, ["weight"]).inputs["weight"]
    y = patches @ tlpd.site_weight(module, "weight") + (0 if module.bias is None else module.bias)
    assert difference(y, module(x).flatten(2).transpose(1, 2)) < 1e-12


def test_patches_are_those_of_unfold() -> None:
    module = exact(nn.Conv2d(3, 5, 3, stride=2, dilation=2, padding=1))
    x = images(2, 3, 9, 10)
    patches = adapt(module).capture(x, ["weight"]).inputs["weight"]
    assert torch.equal(patches, F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2))


@pytest.mark.parametrize("nnsight", [False, True])
def test_a_network_of_several_resolutions(nnsight: bool) -> None:
    from nnsight import NNsight

    module, x = cnn(), images(3, 2, 7, 7)
    model = NNsight(module) if nnsight else module
    decomposition = random_decomposition(model)
    assert {name: (site.d_in, site.d_out) for name, site in tlpd.find_sites(model).items()} == {
        "first.weight": (18, 3),
        "second.weight": (27, 4),
        "head.weight": (36, 5),
    }
    assert_no_mask_is_the_model(model, x, decomposition, (1,))
    assert_ablation_is_an_edited_weight(model, x, decomposition, 1e-10, [[name] for name in decomposition])
    edited = cnn()
    for name in ("first", "second"):
        layer = edited.get_submodule(name)
        layer.weight -= gone(decomposition, f"{name}.weight").T.reshape(layer.weight.shape)
    edited.head.weight -= gone(decomposition, "head.weight").T
    assert difference(patched_run(model, decomposition, ablate(decomposition), x), run(edited, x)) < 1e-10


def test_outputs_keep_their_memory_layout() -> None:
    """Hosts view contiguous images as rows; images with channels last stay so."""
    module = exact(nn.Conv2d(3, 5, 3))
    decomposition = random_decomposition(module)
    for form in (torch.contiguous_format, torch.channels_last):
        x = images(2, 3, 9, 9).contiguous(memory_format=form)
        assert module(x).is_contiguous(memory_format=form)
        assert patched_run(module, decomposition, ablate(decomposition), x).is_contiguous(memory_format=form)
        with adapt(module).intercept({"weight": lambda call: call.y.contiguous().clone()}):
            again = module(x)
        assert torch.equal(again, F.conv2d(x, module.weight, module.bias)) and again.is_contiguous(memory_format=form)


def test_kernels_with_channels_last_are_read_and_written() -> None:
    module = exact(nn.Conv2d(3, 5, 3))
    twin = copy.deepcopy(module).to(memory_format=torch.channels_last)
    decomposition = random_decomposition(module)
    masks, x = ablate(decomposition), images(2, 3, 9, 9)
    expected = patched_run(module, decomposition, masks, x)
    assert difference(patched_run(twin, decomposition, masks, x), expected) < 1e-10
    with tlpd.edited_weights(twin, decomposition, masks):
        assert difference(twin(x), expected) < 1e-10
    for model in (module, twin):
        assert difference(tlpd.edited_model(model, decomposition, masks)(x), expected) < 1e-10


def test_positions_are_those_of_patches() -> None:
    module, x = cnn(), images(2, 2, 7, 7)
    decomposition = random_decomposition(module)
    outputs: list[Tensor] = []
    for name, layer, positions in (("first.weight", module.first, [0, -1]), ("second.weight", module.second, 4)):
        masks = decomposition.masks().ablate(name, 1, positions=positions)
        handle = layer.register_forward_hook(lambda m, a, y: outputs.append(y))
        run(module, x), patched_run(module, decomposition, masks, x)
        handle.remove()
    changed = [(after - before).abs().sum((0, 1)).flatten() for before, after in zip(outputs[::2], outputs[1::2])]
    assert [c.nonzero().flatten().tolist() for c in changed] == [[0, 48], [4]]
    with pytest.raises(PositionIndexError, match="positions 0 to 8"):
        patched_run(module, decomposition, decomposition.masks().ablate("second.weight", 1, positions=9), x)


def test_traces_and_identities_reach_patches() -> None:
    from nnsight import NNsight

    module, x = cnn(), images(2, 2, 7, 7)
    decomposition = random_decomposition(module)
    masks = ablate(decomposition).ablate("first.weight", 0, positions=-1).ablate("second.weight", 0, positions=[2, -3])
    expected, wrapped = patched_run(module, decomposition, masks, x), NNsight(copy.deepcopy(module))
    with torch.no_grad(), wrapped.trace(x):
        tlpd.patch_trace(wrapped, decomposition, masks)
        traced = wrapped.output.save()
    assert difference(traced, expected) < 1e-12
    identities = random_decomposition(module, "*.pre_identity")
    assert identities["second.weight.pre_identity"].V.shape[0] == 27
    assert_ablation_is_an_edited_weight(module, x, identities, 1e-10)


class TokensAndConvolution(nn.Module):
    """Token rows, an embedding, and a convolution with fewer positions than the rows have columns."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(11, 6), nn.Conv1d(6, 4, 3, stride=2), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.table(tokens).mT).mean(-1))


def test_convolutions_over_token_rows_have_positions_of_their_own() -> None:
    module, tokens = exact(TokensAndConvolution()), torch.arange(16).remainder(11).view(2, 8)
    decomposition = random_decomposition(module)
    assert_ablation_is_an_edited_weight(module, tokens, decomposition, 1e-10)
    masks = decomposition.masks().ablate("conv.weight", 1, positions=-1).ablate("table.weight", 1, positions=-1)
    assert difference(patched_run(module, decomposition, masks, tokens), run(module, tokens)) > 1e-3
    with pytest.raises(PositionIndexError, match="positions 0 to 2"):
        patched_run(module, decomposition, decomposition.masks().ablate("conv.weight", 1, positions=3), tokens)


def test_unbatched_images_have_no_position_axis() -> None:
    module = exact(nn.Conv2d(3, 5, 3))
    decomposition = random_decomposition(module)
    with pytest.raises(ShapeError, match="no position axis"):
        patched_run(module, decomposition, decomposition.masks().ablate("weight", 1, positions=0), images(3, 9, 9))


# refusals ------------------------------------------------------------------------------------------------------------
class Standardised(nn.Conv2d):
    """A convolution that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


class Scaled(nn.Conv2d):
    """One that does more inside."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


REFUSED = {
    "2 groups": functools.partial(nn.Conv2d, 4, 6, 3, groups=2),
    "4 groups": functools.partial(nn.Conv1d, 4, 4, 3, groups=4),
    "'reflect'": functools.partial(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"),
    "'circular'": functools.partial(nn.Conv1d, 4, 6, 3, padding=1, padding_mode="circular"),
    "transposed": functools.partial(nn.ConvTranspose2d, 4, 6, 3),
    "none of nn.Conv1d and nn.Conv2d": functools.partial(nn.Conv3d, 4, 6, 3),
    "first forward pass": functools.partial(nn.LazyConv2d, 6, 3),
    "Standardised has a forward of its own": functools.partial(Standardised, 4, 6, 3),
    "Scaled has a forward of its own": functools.partial(Scaled, 4, 6, 3),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_matrix_of_patches_is_refused_by_name(reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), REFUSED[reason]())
    assert list(tlpd.find_sites(model)) == ["0.weight"]
    with pytest.raises(UnsupportedSiteError, match=rf"1\.weight .*{reason}"):
        tlpd.find_sites(model, "1.weight")
    with pytest.raises(UnsupportedModelError, match=f"no linear map.*{reason}"):
        tlpd.find_sites(REFUSED[reason]())


def test_a_lazy_convolution_is_a_site_once_it_was_run() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LazyConv2d(6, 3))
    assert list(tlpd.find_sites(model)) == ["0.weight"]
    model(torch.randn(1, 1, 9, 9))
    assert list(tlpd.find_sites(model)) == ["0.weight", "1.weight"]


def test_a_convolution_that_changed_after_it_was_read_is_noticed() -> None:
    model = exact(nn.Conv2d(3, 5, 3))
    decomposition = random_decomposition(model)
    model.stride = (2, 2)
    with pytest.raises(ShapeError, match="was the module changed"):
        patched_run(model, decomposition, ablate(decomposition), images(2, 3, 9, 9))


def test_language_models_have_no_convolutions_among_their_sites() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1)).eval()
    assert isinstance(model.backbone.layers[0].mixer.conv1d, nn.Conv1d)
    assert not any("conv" in name for name in (*tlpd.find_sites(model), *adapt(model).refused))
    with_one = build("gpt2")
    with_one.extra = nn.Conv2d(3, 4, 3)
    assert list(tlpd.find_sites(with_one)) == list(tlpd.find_sites(build("gpt2")))
    with pytest.raises(UnsupportedSiteError, match="a convolution is not one matrix product"):
        tlpd.find_sites(with_one, "extra.weight")
