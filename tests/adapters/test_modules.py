"""Plain torch modules: every linear map and embedding under its dotted path."""

import copy

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt

from ..support.exactness import (
    C,
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    patched_run,
    random_decomposition,
)
from ..support.hosts import off_trivial, run


class Tower(nn.Module):
    """Embedding, a residual MLP with a bias-free map, and a read-out of the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.stack = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6, bias=False)) for _ in range(2)]
        )
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.stack:
            x = x + layer(x)
        return self.head(x[:, -1])


class Autoencoder(nn.Module):
    """A convolution-free MLP on float vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(7, 3), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(self.down(x)))


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return off_trivial(kind().to(torch.float64)).requires_grad_(False)


def inputs(kind: type[nn.Module], shape: tuple[int, ...] = (4,)) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 13, (2, 5)) if kind is Tower else torch.randn(*shape, 7, dtype=torch.float64)


@pytest.mark.parametrize("kind", [Tower, Autoencoder])
def test_every_site_against_hand_edited_weights(kind: type[nn.Module]) -> None:
    model, x = make(kind), inputs(kind)
    decomposition = random_decomposition(model)
    expected = [
        "table.weight",
        "stack.0.0.weight",
        "stack.0.2.weight",
        "stack.1.0.weight",
        "stack.1.2.weight",
        "head.weight",
    ]
    assert list(decomposition) == (expected if kind is Tower else ["down.weight", "up.weight"])
    plain = run(model, x)
    with tlpd.patched(model, decomposition, decomposition.masks()):
        assert torch.equal(run(model, x), plain)
    assert_ablation_is_an_edited_weight(model, x, decomposition, 1e-10, [[name] for name in decomposition])
    edited = copy.deepcopy(model)
    for name in decomposition:
        module = edited.get_submodule(name.removesuffix(".weight"))
        delta = gone(decomposition, name)
        module.weight -= delta if isinstance(module, nn.Embedding) else delta.T
    assert difference(patched_run(model, decomposition, ablate(decomposition), x), run(edited, x)) < 1e-10


def test_a_model_that_is_one_linear_map() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(7, 4).to(torch.float64).requires_grad_(False), inputs(Autoencoder)
    decomposition = random_decomposition(model)
    assert list(decomposition) == ["weight"]
    assert_ablation_is_an_edited_weight(model, x, decomposition, 1e-12)
    expected = nn.functional.linear(x, model.weight - gone(decomposition, "weight").T, model.bias)
    assert difference(patched_run(model, decomposition, ablate(decomposition), x), expected) < 1e-12


def test_module_on_nnsight() -> None:
    from nnsight import NNsight

    model, x = make(Autoencoder), inputs(Autoencoder)
    decomposition = random_decomposition(model)
    wrapped = NNsight(copy.deepcopy(model))
    assert torch.equal(run(wrapped, x), run(model, x))
    masks = ablate(decomposition)
    assert torch.equal(patched_run(wrapped, decomposition, masks, x), patched_run(model, decomposition, masks, x))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3, 5)])
def test_ones_on_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    model, x = make(Autoencoder), inputs(Autoencoder, shape)
    decomposition = random_decomposition(model)
    assert_ablation_is_an_edited_weight(model, x, decomposition, 1e-10)
    if len(shape) == 2:
        assert_no_mask_is_the_model(model, x, decomposition, shape)
        assert_no_mask_is_the_model(model, x, decomposition)


def test_masks_with_more_axes_than_the_output_are_refused() -> None:
    model, x = make(Autoencoder), inputs(Autoencoder)
    decomposition = random_decomposition(model)
    masks = decomposition.masks().with_values("down.weight", torch.ones(2, 3, C, dtype=torch.float64) * 0.5)
    with pytest.raises(tlpd.errors.ShapeError), tlpd.patched(model, decomposition, masks):
        model(x)


def test_a_map_called_twice_is_edited_twice_and_has_no_single_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(torch.tanh(self.step(x)))

    model, x = make(Twice), inputs(Autoencoder, (4, 5))
    decomposition = random_decomposition(model)
    assert_ablation_is_an_edited_weight(model, x, decomposition, 1e-10)
    with pytest.raises(tlpd.errors.UnsupportedSiteError, match="more than once"):
        adapt(model).capture(x, ["step.weight"])


def test_a_map_that_the_forward_does_not_reach_is_reported() -> None:
    model, x = make(Autoencoder), inputs(Autoencoder)
    model.spare = nn.Linear(7, 7).to(torch.float64)
    decomposition = random_decomposition(model)
    with pytest.raises(tlpd.errors.SiteNotFiredError, match=r"spare\.weight"):
        patched_run(model, decomposition, ablate(decomposition), x)


def test_a_weight_inside_a_fused_function_is_refused() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    sites = tlpd.find_sites(attention)
    assert set(sites) == {"linear1.weight", "linear2.weight"}
    with pytest.raises(tlpd.errors.UnsupportedSiteError, match="without being called"):
        tlpd.find_sites(attention, "self_attn.out_proj.weight")
    decomposition = random_decomposition(attention)
    with torch.no_grad():
        assert_ablation_is_an_edited_weight(attention, torch.randn(2, 5, 8), decomposition, 1e-5)
