"""Methods on a convolutional network: L3D's factored form against autograd's gradients, and steps of SPD."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tests.support.exactness import difference
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.methods.l3d import reconstruction
from tl_paramdecomp.methods.loss import ACTIVE, _l0
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction, subset_routes
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients, references
from tl_paramdecomp.methods.step import LossStep

K = 5


class CNN(nn.Module):
    """Convolutions of different resolutions, strides and dilations, one of them along a single axis, and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding="same")
        self.second = nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 0), bias=False)
        self.third = nn.Conv1d(4, 3, 3, dilation=2, padding=1)
        self.head = nn.Linear(3 * 10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(nn.functional.max_pool2d(torch.tanh(self.first(x)), 2, stride=1)))
        return self.head(torch.tanh(self.third(x.flatten(2))).flatten(1))


def cnn() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CNN().double()


def images(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(rows, 2, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def start(model: Any, **settings: Any) -> Any:
    """Subnetworks whose encoder is not the decoder."""
    made = tlpd.decompose(
        model, "*", tlpd.L3D(n_subnetworks=K, warm_start=0.0, **settings), images(), 0, progress=False
    )
    with torch.no_grad():
        for i, parameter in enumerate(made.encoder.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


def dense_gradients(model: Any, sites: list[str], x: Tensor, against: Tensor) -> Tensor:
    """Gradients [row, numbers] of each row's KL(reference || output): all weights as matrices, then all biases."""
    found = []
    for row, q in zip(x, against, strict=True):
        kl = (q * (q.log() - model(row.unsqueeze(0))[0].log_softmax(-1))).sum()
        layers = [model.get_submodule(name.removesuffix(".weight")) for name in sites]
        weights = torch.autograd.grad(kl, [layer.weight for layer in layers], retain_graph=True)
        biases = torch.autograd.grad(kl, [layer.bias for layer in layers if layer.bias is not None])
        found.append(torch.cat([w.flatten(1).T.flatten() for w in weights] + [b.flatten() for b in biases]))
    return torch.stack(found)


def dictionary(side: Any) -> Tensor:
    return torch.stack([
        torch.cat([side[name].matrix(k).flatten() for name in side]
                  + [side[name].bias[k] for name in side if side[name].bias is not None])
        for k in range(K)
    ])  # fmt: skip


@pytest.mark.parametrize("backend", ["factored", "dense"])
@pytest.mark.parametrize("rank", [1, 3])
def test_everything_is_what_dense_gradients_give(rank: int, backend: Any) -> None:
    """Coefficients, norms, loss and its gradients, to 1e-10 in float64; biases included."""
    model, x = cnn(), images()
    made = start(model, rank=rank).requires_grad_(True)
    sites = list(made.sites)
    assert sites == ["first.weight", "second.weight", "third.weight", "head.weight"]
    run = GradientPass(adapt(model), sites, x)
    assert {name: tuple(x.shape) for name, ((x, _),) in run.sites.items()} == {
        "first.weight": (4, 49, 18),
        "second.weight": (4, 12, 18),
        "third.weight": (4, 10, 12),
        "head.weight": (4, 30),
    }
    assert torch.equal(run.output, model(x))
    (places,) = run.places("one", generator())
    groups = list(all_gradients(run, [places], "sample", "kl", generator()))
    found = reconstruction(made, groups, 0.4, backend)
    found.loss.backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()

    flat = dense_gradients(model, sites, x, references(model(x).detach(), "sample", "kl", generator()))
    E, D = dictionary(made.encoder), dictionary(made.decoder)
    a = flat @ E.T
    kept = a.abs() >= a.abs().flatten().sort(descending=True).values[round(0.4 * a.numel()) - 1]
    loss = ((flat - (a * kept) @ D) ** 2).sum() / (flat**2).sum()
    loss.backward()
    scale = flat.norm(dim=1)
    assert ((found.coefficients - a).abs() / scale[:, None]).max() < 1e-10
    assert (found.squared_norms.sqrt() / scale - 1).abs().max() < 1e-10
    assert torch.equal(found.mask, kept) and abs(found.loss.item() - loss.item()) < 1e-10
    biggest = max(p.grad.abs().max() for p in made.parameters())
    for name, parameter in made.named_parameters():
        assert (ours[name] - parameter.grad).abs().max() < 1e-10 * biggest, name


def test_impacts_are_inner_products_with_gradients() -> None:
    """Forward mode passes through patches."""
    model, x = cnn().requires_grad_(False), images(2)
    made = tlpd.decompose(model, "*", tlpd.L3D(n_subnetworks=K, rank=2), images(), 1, 4, progress=False)
    found = tlpd.impacts(model, made, x, references=1)  # of two rows, each is the other's reference
    model.requires_grad_(True)
    q = model(x).detach().softmax(-1).flip(0)
    expected = (dense_gradients(model, list(made.sites), x, q) @ dictionary(made.encoder).detach().T).abs()
    assert difference(found, expected) < 1e-10


def test_moving_along_a_subnetwork_is_moving_the_weights() -> None:
    model, x = cnn().requires_grad_(False), images()
    made = start(model, rank=2)
    with tlpd.perturbed(model, made, {1: 0.5, 3: -0.2}):
        hooked = model(x)
    with tlpd.perturbed(model, made, {1: 0.5, 3: -0.2}, in_weights=True):
        assert difference(hooked, model(x)) < 1e-10
    assert difference(hooked, model(x)) > 1e-3


def test_l3d_learns_and_leaves_the_model() -> None:
    model, x = cnn().float().requires_grad_(False), images(64).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses: list[float] = []
    made = tlpd.decompose(
        model, "*", tlpd.L3D(n_subnetworks=12, lr=2e-2), x, 60, 16, progress=False, log_every=1,
        callbacks=[lambda info: losses.append(info.figures["reconstruction"])],
    )  # fmt: skip
    assert sum(losses[-10:]) < 0.8 * sum(losses[6:16])
    found = tlpd.evaluate_subnetworks(model, made, images(32, seed=2).float())
    assert found.bound is not None and found.bound <= found.batch_error < 1.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_spd_learns_and_leaves_the_model() -> None:
    model, x = cnn().float().requires_grad_(False), images(64).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = (Faithfulness(1.0), ImportanceMinimality(1e-3), StochasticReconstruction(1.0, sites="all"))
    seen: list[float] = []
    method = tlpd.SPD(n_components=20, losses=losses, measure="kl", start="random", lr=5e-3)
    made = tlpd.decompose(
        model, "*", method, x, 40, 8, progress=False, log_every=1,
        callbacks=[lambda info: seen.append(info.figures["loss"])],
    )  # fmt: skip
    assert sum(seen[-5:]) < sum(seen[:5])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    importances = tlpd.causal_importances(model, made, x[:4])
    assert importances["first.weight"].shape == (4, 49, 20)
    masks = tlpd.importance_masks(model, made, x[:4], kind="rounded")
    with tlpd.patched(model, made, masks):
        assert model(x[:4]).shape == (4, 6)


def test_subsets_are_drawn_for_each_image_and_counts_are_means_over_positions() -> None:
    model, x = cnn().float().requires_grad_(False), images(400).float()
    made = tlpd.decompose(model, "*", tlpd.SPD(), x, 0, progress=False)
    step = LossStep.of(adapt(model), made, x, None, generator())
    routes = subset_routes(step)
    rows = {"first.weight": (400, 49), "second.weight": (400, 12), "third.weight": (400, 10), "head.weight": (400,)}
    assert {name: tuple(route.shape) for name, route in routes.items()} == rows
    by_image = torch.stack([route.view(400, -1)[:, 0] for route in routes.values()])
    for i, route in enumerate(routes.values()):
        assert torch.equal(route.view(400, -1), by_image[i, :, None].expand(400, route[0].numel()))
    shares = torch.bincount(by_image.sum(0), minlength=5) / 400
    assert shares[0] == 0 and (shares[1:] - 0.25).abs().max() < 0.1  # four standard deviations
    expected = sum((g.lower > ACTIVE).sum().item() / g.lower[..., 0].numel() for g in step.importances.values())
    assert _l0(step).item() == pytest.approx(expected, rel=1e-6)


def test_padding_is_not_counted() -> None:
    model, mask = gpt2(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    made = tlpd.decompose(model, "blocks.0.mlp.*", tlpd.SPD(), torch.ones(2, 3, dtype=torch.int64), 0, progress=False)
    step = LossStep.of(adapt(model), made, torch.tensor([[1, 2, 3], [4, 5, 6]]), mask, generator())
    counts = sum((g.lower > ACTIVE).sum(-1).float() for g in step.importances.values())
    assert _l0(step).item() == pytest.approx((counts * mask).sum().item() / 3, rel=1e-6)
    assert counts.mean().item() != pytest.approx(_l0(step).item(), rel=1e-6)


def test_one_network_for_all_sites_needs_sites_of_as_many_positions() -> None:
    model, x = cnn().float().requires_grad_(False), images(16).float()
    with pytest.raises(ShapeError, match=r"\[8, 49\], \[8, 12\].*shared_mlp"):
        tlpd.decompose(model, "*", tlpd.VPD(), x, 1, 8, progress=False)
    tlpd.decompose(model, "first.weight", tlpd.VPD(), x, 1, 8, progress=False)


@pytest.mark.parametrize("preset", [tlpd.SPD(), tlpd.SPD.paper(), tlpd.SVD(training=None)], ids=["SPD", "paper", "SVD"])
def test_presets_run(preset: Any) -> None:
    model, x = cnn().float().requires_grad_(False), images(16).float()
    made = tlpd.decompose(model, "*", preset, x, 2, 8, progress=False)
    W = tlpd.site_weight(model, "second.weight")
    assert made["second.weight"].V.shape[0] == W.shape[0] and made["second.weight"].U.shape[1] == W.shape[1]
