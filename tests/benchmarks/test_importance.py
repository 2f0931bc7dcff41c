"""What causal importances cost: the forms of the package beside those one would write first."""

import pytest
import torch
from torch.nn.functional import gelu

from tests.benchmarks.timing import ratio
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.importance import ComponentMLP, ImportanceConfig, VectorMLP
from tl_paramdecomp.components.sigmoids import SIGMOID_LEAK, clamped
from tl_paramdecomp.sites import WeightSite

pytestmark = pytest.mark.benchmark
SHAPES = {"TMS 40-10": (4096, 200), "small language model": (512, 172), "GPT-2 small": (512, 768)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agree(slow, fast):
    for a, b in zip(slow, fast, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


class _Where(torch.autograd.Function):
    """Both sigmoids as they are defined."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0), torch.where(x > 1, 1 + SIGMOID_LEAK * (x - 1), x.relu())

    @staticmethod
    def backward(ctx, to_lower, to_upper):
        (x,) = ctx.saved_tensors
        below, above = SIGMOID_LEAK * to_lower.clamp(max=0.0), SIGMOID_LEAK * to_upper
        return torch.where(x <= 0, below, torch.where(x <= 1, to_lower + to_upper, above))


@pytest.mark.parametrize("name", SHAPES)
def test_both_sigmoids(report, name):
    raw = (0.7 * normal(*SHAPES[name]) + 0.3).requires_grad_(True)
    upstream = normal(*SHAPES[name], seed=1), normal(*SHAPES[name], seed=2).abs()

    def run(pair):
        return torch.autograd.grad(pair, raw, upstream)

    agree(run(_Where.apply(raw)), run(clamped(raw)[:2]))
    measured = ratio(lambda: run(_Where.apply(raw)), lambda: run(clamped(raw)[:2]))
    report(f"where / one function for both sigmoids, {name} {SHAPES[name]}, forward and backward", measured)


@pytest.mark.parametrize("name", SHAPES)
def test_component_networks(report, name):
    rows, C = SHAPES[name]
    components = Components(WeightSite("w", 4, 4), normal(4, C), normal(C, 4))
    network = ComponentMLP(components, 16, ImportanceConfig(), torch.Generator().manual_seed(0))
    h, upstream = normal(rows, C).requires_grad_(True), normal(rows, C, seed=1)
    wanted = [h, *network.parameters()]

    def broadcast():
        hidden = gelu(h.unsqueeze(-1) * network.w_in + network.b_in)
        return torch.autograd.grad((hidden * network.w_out).sum(-1) + network.b_out, wanted, upstream)

    def pieces():
        return torch.autograd.grad(network(h), wanted, upstream)

    agree(broadcast(), pieces())
    what = f"broadcast / piecewise component networks, {name} {SHAPES[name]}, hidden 16, forward and backward"
    report(what, ratio(broadcast, pieces, rounds=7))


def test_vector_networks(report):
    rows, d_in, C, hidden = 512, 64, 172, 12
    components = Components(WeightSite("w", d_in, 4), normal(d_in, C), normal(C, 4))
    network = VectorMLP(components, hidden, ImportanceConfig(normalise=False), torch.Generator().manual_seed(0))
    x, upstream = normal(rows, d_in), normal(rows, C, seed=1)
    wanted = list(network.parameters())

    def each():
        matrices = network.w_in.unflatten(1, (C, hidden))
        acts = gelu(torch.einsum("ni,ich->nch", x, matrices) + network.b_in.view(C, hidden))
        return torch.autograd.grad(torch.einsum("nch,ch->nc", acts, network.w_out) + network.b_out, wanted, upstream)

    def at_once():
        return torch.autograd.grad(network(x), wanted, upstream)

    agree(each(), at_once())
    report("einsum / one matrix product for the first layers of vector networks", ratio(each, at_once))
