"""Reconstruction terms against dense masked weights in float64: the same random numbers, values and gradients."""

import math

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.methods.random_streams import as_streams
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
    routed,
    stochastic_masks,
    subset_routes,
)
from tl_paramdecomp.methods.step import LossStep

from .forms import case, compare, padded

SITES = ("all", "layerwise", "subset")


def mean_over(book, draws, sites, draw, samples=1):
    """Mean of the distance over samples and, one site at a time, over sites."""
    found = []
    for _ in range(samples):
        masks = draw()
        if sites == "layerwise":
            found += [book.distance(book.run({name: mask})) for name, mask in masks.items()]
        else:
            routes = book.routes(draws) if sites == "subset" else None
            found.append(book.distance(book.run(masks, routes)))
    return sum(found) / len(found)


@pytest.mark.parametrize("make", [case, padded])
@pytest.mark.parametrize("measure", ["kl", "mse"])
@pytest.mark.parametrize("delta", ["masked", "absent", "kept"])
@pytest.mark.parametrize("sites", SITES)
def test_stochastic_reconstruction(make, measure, sites, delta):
    of = make(measure=measure)
    book, draws = of.book(), of.draws()
    expected = mean_over(book, draws, sites, lambda: book.stochastic(draws, delta))
    compare(of, StochasticReconstruction(sites=sites, delta=delta)(of.step()), expected)


@pytest.mark.parametrize("sigmoid", ["clamped", "leaky"])
@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
@pytest.mark.parametrize("sites", SITES)
def test_stochastic_reconstruction_of_two_samples(sites, sampling, sigmoid):
    of = case(sigmoid=sigmoid)
    book, draws = of.book(), of.draws()
    expected = mean_over(book, draws, sites, lambda: book.stochastic(draws, "masked", sampling), samples=2)
    compare(of, StochasticReconstruction(sites=sites, sampling=sampling, samples=2)(of.step()), expected)


@pytest.mark.parametrize("make", [case, padded])
@pytest.mark.parametrize("sites", SITES)
def test_importance_masked_reconstruction(make, sites):
    of = make()
    book, draws = of.book(), of.draws()
    expected = mean_over(book, draws, sites, lambda: {name: (g, 0.0) for name, g in book.lower.items()})
    compare(of, ImportanceMaskedReconstruction(sites=sites)(of.step()), expected)


@pytest.mark.parametrize("make", [case, padded])
def test_unmasked_reconstruction(make):
    of = make()
    book = of.book()
    compare(
        of, UnmaskedReconstruction()(of.step()), book.distance(book.run({n: (torch.ones(()), 0.0) for n in of.dec}))
    )


def test_binomial_masks_are_whole_ablations_half_of_the_time():
    """m is 1 or g; over 5 seeds of 3000 numbers the share of ablations is 1/2 within 0.03."""
    shares = []
    for seed in range(5):
        step = case(rows=250, widths=(5, 4), counts=(3,)).but(seed=seed).step()
        (mask,) = stochastic_masks(step, sampling="binomial").values()
        assert (
            set(mask.q.unique().tolist()) == {0.0, 1.0} and (mask.g != step.importances["layers.0.weight"].lower).any()
        )
        shares.append(mask.q.mean().item())
    print("share of ablations by seed:", [round(share, 3) for share in shares])
    assert all(abs(share - 0.5) < 0.03 for share in shares)


def test_stochastic_masks_stay_between_importance_and_one_and_are_uniform_there():
    """(m - g) / (1 - g) has mean 1/2, variance 1/12 and no value twice; so has d."""
    of = case(rows=400)
    step = of.step()
    for name, mask in stochastic_masks(step).items():
        g = step.importances[name].lower
        assert (mask.m >= g).all() and (mask.m <= 1).all() and (mask.d >= 0).all() and (mask.d <= 1).all()
        r = ((mask.m - g) / (1 - g))[g < 0.99]
        for t in (r, mask.d):
            assert abs(t.mean() - 0.5) < 4 / math.sqrt(12 * t.numel()) and abs(t.var() - 1 / 12) < 0.01
            assert len(t.unique()) > 0.999 * t.numel()


# --- exactness: acceptance tests 1 and 2 ------------------------------------------------------------------------------
def whole_masks(step, g=1.0, q=0.0, a=0.0):
    return {
        name: InterpolatedMask(
            torch.full_like(i.lower, g), torch.full_like(i.lower, q), torch.full_like(i.lower[..., 0], a)
        )
        for name, i in step.importances.items()
    }


def test_masks_of_one_with_the_delta_component_are_the_target_bit_for_bit_on_any_route():
    of = case()
    step = of.step()
    target = of.model(of.x)
    assert torch.equal(step.run_masked(whole_masks(step)), target)
    assert torch.equal(step.run_masked(routed(whole_masks(step), subset_routes(step))), target)
    assert StochasticReconstruction(delta="kept")(full_importance(of)).item() == 0.0
    assert (
        ImportanceMaskedReconstruction()(full_importance(of)) > 1e-3
    )  # without the delta component it is not the target


def full_importance(of):
    step = of.step()
    step.importances = {n: i._replace(lower=torch.ones_like(i.lower)) for n, i in step.importances.items()}
    return step


def test_components_that_sum_to_the_weight_leave_the_delta_component_nothing():
    of = case(counts=(5, 6, 6))
    with torch.no_grad():
        for name, components in of.dec.items():
            weight = tlpd.site_weight(of.model, name)
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            components.V.zero_()[:, : len(values)] = left * values
            components.U.zero_()[: len(values)] = right
    assert UnmaskedReconstruction()(of.step()) < 1e-15
    step = of.step()
    with_it, without = (StochasticReconstruction(delta=delta) for delta in ("kept", "absent"))
    assert (with_it(step) > 1e-4) and (with_it(of.step()) - without(of.step())).abs() < 1e-14


def test_unmasked_reconstruction_is_small_after_a_warm_up():
    of = case()
    method = tlpd.SPD(n_components=8, start="random", warm_up_steps=400)
    adapter = adapt(of.model)
    made = method.initialise(
        adapter, tlpd.find_sites(of.model), torch.Generator().manual_seed(0), lambda _, n: range(n)
    )
    step = of.but(dec=made).step()
    before = UnmaskedReconstruction()(of.step())
    assert UnmaskedReconstruction()(step) < 1e-3 * before


def test_sites_routed_past_are_the_model_bit_for_bit_and_have_no_gradient():
    of = case()
    step = of.step()
    nowhere = {name: torch.zeros(of.x.shape[:2], dtype=torch.bool) for name in of.dec}
    out = step.run_masked(routed(stochastic_masks(step), nowhere))
    assert torch.equal(out, of.model(of.x))
    grads = torch.autograd.grad(out.square().sum(), list(of.dec.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_a_position_routed_past_every_site_but_one_runs_that_one_alone():
    of = case()
    step = of.step()
    masks = stochastic_masks(step)
    for name in of.dec:
        routes = {n: torch.full(of.x.shape[:2], n == name) for n in of.dec}
        assert torch.equal(step.run_masked(routed(masks, routes)), step.run_masked({name: masks[name]}))


def test_a_site_without_masks_runs_the_targets_own_weight():
    of = case()
    assert torch.equal(of.step().run_masked({}), of.model(of.x))
    name, calls = "layers.1.weight", []
    handle = of.model.layers[1].register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    step = of.step()
    clean = calls.pop()
    step.run_masked({n: m for n, m in whole_masks(step, 0.0, 1.0, 1.0).items() if n != name})
    handle.remove()
    assert not torch.equal(calls[0], clean)  # what it reads is perturbed all the same


# --- routing: acceptance tests 3 and 7 --------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 4])
def test_subset_routes_pick_each_site_with_the_expected_share(n):
    """P(site routed) = (n + 1) / (2 n); over 5 seeds of 20,000 positions each, within 0.01, and never none."""
    shares, widths = [], (2,) * (n + 1)
    for seed in range(5):
        of = case(rows=200, positions=100, widths=widths, counts=(1,) * n).but(seed=seed)
        routes = torch.stack(list(subset_routes(of.step()).values())).double()
        assert routes.sum(0).min() >= 1
        shares += routes.mean((1, 2)).tolist()
        sizes = torch.stack([(routes.sum(0) == k + 1).double().mean() for k in range(n)])
        assert (sizes - 1 / n).abs().max() < 0.015
    expected = (n + 1) / (2 * n)
    print(f"{n} sites: share routed through each {min(shares):.4f} to {max(shares):.4f}, expected {expected:.4f}")
    assert all(abs(share - expected) < 0.01 for share in shares)


def test_layerwise_is_the_mean_over_single_sites_with_one_draw_of_masks():
    of = case(measure="mse")
    whole = StochasticReconstruction(sites="layerwise", delta="absent")(of.step())
    step = of.step()
    singles = [step.divergence.of(step.run_masked({n: m})) for n, m in stochastic_masks(step, "absent").items()]
    assert torch.allclose(whole, torch.stack(singles).mean(), rtol=1e-13)


def test_with_one_site_subset_layerwise_and_all_are_the_same():
    of = case(widths=(5, 3), counts=(4,))
    values = [StochasticReconstruction(sites=sites)(of.step()).item() for sites in SITES]
    assert values[0] == values[1] == values[2]


def test_layerwise_passes_begin_at_the_masked_sites_block():
    """Skipping the blocks before it changes neither value nor gradient, whatever the site."""
    from tests.support.models import VOCAB, decomposition_of, gpt2

    model = gpt2().requires_grad_(False)
    dec = decomposition_of(model, ["blocks.*.mlp.W_in", "blocks.1.attn.W_O", "embed.W_E", "unembed.W_U"])
    dec.requires_grad_(True)
    tokens = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    generator, found = torch.Generator(), []
    blocks = sum(1 for _ in model.transformer.h)
    for keep in (False, True):
        inputs = adapt(model).capture(tokens, list(dec), None, keep)
        assert len(inputs.blocks) == (blocks if keep else 0)
        from tl_paramdecomp.components.importance import Importance
        from tl_paramdecomp.methods.divergence import KL

        draw = torch.Generator().manual_seed(0)
        g = {n: torch.rand(2, 5, c.n_components, generator=draw, dtype=torch.float64) for n, c in dec.items()}
        importances = {n: Importance(t, t) for n, t in g.items()}
        step = LossStep(adapt(model), dec, tokens, None, inputs.inputs, importances, KL(inputs.output, None),
                        as_streams(generator.manual_seed(5)), 1.0, {}, inputs.blocks)  # fmt: skip
        value = StochasticReconstruction(sites="layerwise")(step)
        found.append((value, torch.autograd.grad(value, list(dec.parameters()))))
    assert abs(found[0][0] - found[1][0]) < 1e-13
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found[0][1], found[1][1], strict=True))


# --- embedding sites and biases: acceptance test 9 --------------------------------------------------------------------
def test_an_embedding_site_is_a_one_hot_times_v():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)
            self.out = torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.out(self.table(x))

    torch.manual_seed(0)
    model = Table().double().requires_grad_(False)
    sites = tlpd.find_sites(model)
    factors = {n: (torch.randn(s.d_in, 3).double(), torch.randn(3, s.d_out).double()) for n, s in sites.items()}
    dec = tlpd.from_factors(model, factors)
    x = torch.tensor([[0, 3, 3], [6, 2, 0]])
    one_hot = torch.nn.functional.one_hot(x, 7).double()
    assert torch.equal(dec["table.weight"].acts(x), one_hot @ dec["table.weight"].V)
    from tl_paramdecomp.components.importance import Importance
    from tl_paramdecomp.methods.divergence import KL

    g = {n: torch.rand(2, 3, 3).double() for n in dec}
    step = LossStep(adapt(model), dec, x, None, {}, {n: Importance(t, t) for n, t in g.items()}, KL(model(x), None),
                    as_streams(torch.Generator().manual_seed(2)))  # fmt: skip
    masks = stochastic_masks(step)
    h = one_hot
    for name, layer in (("table.weight", None), ("out.weight", model.out)):
        V, U, weight = dec[name].V, dec[name].U, tlpd.site_weight(model, name)
        m, d = masks[name].m, masks[name].d
        h = h @ weight - h @ weight + (m * (h @ V)) @ U + d[..., None] * (h @ (weight - V @ U))
        h = h if layer is None else h + layer.bias
    assert (step.run_masked(masks) - h).abs().max() < 1e-12


@pytest.mark.parametrize("masks", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.3, 0.6, 0.7)])
def test_the_bias_is_added_once_whatever_the_masks(masks):
    """The last layer's output moves with its bias one to one."""
    of = case()
    step = of.step()
    last = {"layers.2.weight": whole_masks(step, *masks)["layers.2.weight"]}
    out = step.run_masked(last)
    of.model.layers[2].bias += 1.5
    assert (step.run_masked(last) - out - 1.5).abs().max() < 1e-12
