"""The adversary that starts anew at every step, against a plain ascent loop on dense masked weights in float64."""

import pytest
import torch

from tl_paramdecomp.methods.adversary import (
    SCOPES,
    AdversarialReconstruction,
    source_masks,
    start_sources,
    worst_sources,
)
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction

from .forms import case, compare, padded


def shape_of(scope, rows, repeats=1):
    """Leading shape of sources of a scope."""
    return {
        "single_source": (),
        "broadcast_across_batch": rows[1:],
        "repeat_across_batch": (repeats, *rows[1:]),
        "per_batch_per_position": rows,
    }[scope]


def dense_masks(book, sources, delta="masked", importances=None):
    """m = g + (1 - g) s and d = s of the last channel."""
    masks = {}
    for name, s in sources.items():
        g = book.lower[name] if importances is None else importances[name]
        d = {"absent": 0.0, "kept": 1.0}.get(delta, s[..., -1])
        masks[name] = (g + (1 - g) * s[..., :-1], d)
    return masks


def ascend(book, sources, steps, size, routes=None, delta="masked"):
    """Projected sign ascent, one leaf for each site; components and importances are constants."""
    fixed = {name: g.detach() for name, g in book.lower.items()}
    for _ in range(steps):
        leaves = {name: s.detach().requires_grad_() for name, s in sources.items()}
        book.distance(book.run(dense_masks(book, leaves, delta, fixed), routes)).backward(inputs=list(leaves.values()))
        sources = {name: (s + size * s.grad.sign()).detach().clamp(0, 1) for name, s in leaves.items()}
    return sources


def adversarial(of, steps, size, sites, scope, start, delta="masked"):
    """The whole loss by the textbook."""
    book, draws = of.book(), of.draws()
    groups = [[name] for name in book.names] if sites == "layerwise" else [book.names]
    values = []
    for names in groups:
        routes = book.routes(draws) if sites == "subset" else None
        sources = {}
        for name in names:
            shape = (*shape_of(scope, tuple(of.x.shape[:2])), book.lower[name].shape[-1] + 1)
            value = {"ones": torch.ones(shape), "zeros": torch.zeros(shape)}.get(start)
            sources[name] = torch.rand(shape, generator=draws, dtype=torch.float64) if value is None else value.double()
        worst = ascend(book, sources, steps, size, routes, delta)
        values.append(book.distance(book.run(dense_masks(book, worst, delta), routes)))
    return sum(values) / len(values)


@pytest.mark.parametrize("steps, size", [(1, 1.0), (2, 0.3), (3, 0.1)])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope(scope, steps, size):
    of = padded()
    loss = AdversarialReconstruction(steps=steps, step_size=size, scope=scope)
    compare(of, loss(of.step()), adversarial(of, steps, size, "all", scope, "random"))


@pytest.mark.parametrize("measure", ["kl", "mse"])
@pytest.mark.parametrize("scope", ["single_source", "per_batch_per_position"])
@pytest.mark.parametrize("sites", ["layerwise", "subset"])
def test_sites_one_at_a_time_or_some(sites, scope, measure):
    of = case(measure=measure)
    loss = AdversarialReconstruction(steps=2, step_size=0.2, sites=sites, scope=scope)
    compare(of, loss(of.step()), adversarial(of, 2, 0.2, sites, scope, "random"))


@pytest.mark.parametrize("start, delta", [
    ("random", "masked"), ("random", "absent"), ("random", "kept"), ("zeros", "masked"), ("zeros", "absent"),
    ("zeros", "kept"), ("ones", "absent"),
])  # fmt: skip
def test_starts_and_uses_of_the_delta_component(start, delta):
    of = case()
    loss = AdversarialReconstruction(steps=2, step_size=0.4, start=start, delta=delta)
    compare(of, loss(of.step()), adversarial(of, 2, 0.4, "all", "single_source", start, delta))


@pytest.mark.parametrize("delta", ["masked", "kept"])
def test_from_ones_with_the_delta_component_the_adversary_does_not_leave_the_target(delta):
    """Everything whole is the target itself, where the divergence has its minimum and no slope."""
    of = case()
    assert AdversarialReconstruction(steps=3, start="ones", delta=delta)(of.step()).item() == 0.0


@pytest.mark.parametrize("scope", SCOPES)
def test_shapes_of_sources(scope):
    """Acceptance: one source per component and one for the delta component, shared as the scope says."""
    sources = start_sources(case().step(), None, scope, "random", repeats=2)
    shapes = {name: tuple(s.shape) for name, s in sources.items()}
    leading = shape_of(scope, (4, 3), 2)
    assert shapes == {f"layers.{i}.weight": (*leading, n + 1) for i, n in enumerate((4, 5, 3))}


def lowered(of, most):
    """A step whose importances are at most `most`."""
    step = of.step()
    step.importances = {n: i._replace(lower=most * i.lower.detach()) for n, i in step.importances.items()}
    return step


@pytest.mark.parametrize("scope", SCOPES)
def test_the_adversary_only_raises_the_divergence_and_leaves_no_gradient(scope):
    """8 sign steps against their own random start, 5 seeds: higher on every one; sources stay in [0, 1]."""
    gains = []
    for seed in range(5):
        of = case(seed=seed, measure="mse")
        step = lowered(of, 0.3)
        start = start_sources(step, None, scope)
        sources = worst_sources(step, start, 8, 0.2)
        assert all((s >= 0).all() and (s <= 1).all() and s.shape == start[n].shape for n, s in sources.items())
        before, after = (step.divergence.of(step.run_masked(source_masks(step, s))).item() for s in (start, sources))
        gains.append(after / before)
        assert all(p.grad is None for p in of.dec.parameters())
    print(f"{scope}: divergence after the adversary / at its start:", [round(gain, 2) for gain in gains])
    assert min(gains) > 1.0


def test_the_adversary_is_worse_than_chance():
    """Six sign steps of two scopes against the mean of 10 stochastic draws on the same batch, 5 seeds."""
    ratios = {"single_source": [], "per_batch_per_position": []}
    for seed in range(5):
        of = case(seed=seed)
        step = of.step()
        with torch.no_grad():
            chance = sum(StochasticReconstruction()(step).item() for _ in range(10)) / 10
        for scope in ratios:
            ratios[scope].append(AdversarialReconstruction(steps=6, step_size=0.3, scope=scope)(step).item() / chance)
    print("adversarial / stochastic, by scope:", {k: [round(r, 2) for r in v] for k, v in ratios.items()})
    assert all(min(values) > 1.0 for values in ratios.values())
    assert all(a > b for a, b in zip(ratios["per_batch_per_position"], ratios["single_source"], strict=True))


def test_importance_one_leaves_the_adversary_only_the_delta_component():
    of = case()
    step = of.step()
    step.importances = {n: i._replace(lower=torch.ones_like(i.lower)) for n, i in step.importances.items()}
    for mask in source_masks(step, worst_sources(step, start_sources(step), 2, 0.5)).values():
        assert torch.equal(mask.m, torch.ones_like(mask.m))
    kept = AdversarialReconstruction(steps=3, delta="kept")(step)
    assert kept.item() == 0.0 and AdversarialReconstruction(steps=3)(step) > 1e-4


def test_one_at_a_time_attacks_each_site_by_itself():
    """With sources of zeros and no effective step the mean over sites of their complete removal."""
    of = case()
    step = lowered(of, 0.0)
    value = AdversarialReconstruction(steps=1, step_size=1e-12, sites="layerwise", start="zeros", delta="absent")(step)
    book, zero = of.book(), torch.zeros(())
    expected = sum(book.distance(book.run({name: (zero, 0.0)})) for name in book.names) / 3
    assert (value - expected).abs() < 1e-9


def test_as_a_metric_it_needs_no_gradients():
    of = case()
    with torch.no_grad():
        metric = AdversarialReconstruction(steps=3, step_size=0.3)(of.step())
    assert torch.equal(metric, AdversarialReconstruction(steps=3, step_size=0.3)(of.step()).detach())
