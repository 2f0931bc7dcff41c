"""A whole training step: the sum of its terms, and what taking their gradients part by part leaves in the parameters."""

import weakref

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import VOCAB, gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
)
from tl_paramdecomp.methods.step import LossStep

from .forms import case

LOSSES = (
    Faithfulness(3.0),
    StochasticReconstruction(0.5, sites="subset", samples=2),
    StochasticReconstruction(0.7, sampling="binomial"),
    StochasticReconstruction(1.3, sites="layerwise"),
    ImportanceMaskedReconstruction(0.2),
    UnmaskedReconstruction(0.3),
    HiddenActsReconstruction(0.4),
    AttentionPatternReconstruction(0.6, masks="importance"),
    AdversarialReconstruction(0.9, steps=2, step_size=0.2, sites="layerwise"),
    PersistentAdversarialReconstruction(1.1, ascents=1, ramp=0.0),
    ImportanceMinimality(0.05, frequency=0.3),
)
"""Every kind of loss, in one objective."""
SITES = ["blocks.1.attn.W_Q", "blocks.*.mlp.W_in"]


def test_a_steps_gradient_is_that_of_the_dense_textbook_form():
    """The published losses on a small model, written out densely with the same masks, in float64."""
    of = case(sigmoid="leaky", measure="mse", progress=0.0)
    method = tlpd.SPD.paper(measure="mse", losses=(
        Faithfulness(1.0, relative=False), StochasticReconstruction(1.0), ImportanceMinimality(3e-3, p_start=1.5),
        StochasticReconstruction(0.4, sites="layerwise", delta="absent"),
    ))  # fmt: skip
    step = TrainingStep(adapt(of.model), of.dec, Batch(of.x, None), of.draws(), 0.0)
    report = method.gradients(step)
    book, draws = of.book(), of.draws()
    squares = sum(book.rest(n).square().sum() for n in of.dec) / sum(
        tlpd.site_weight(of.model, n).numel() for n in of.dec
    )
    penalty = sum(((g + 1e-12) ** 1.5).flatten(0, 1).sum(-1).mean() for g in book.upper.values())
    joint = book.distance(book.run(book.stochastic(draws)))
    alone = [book.distance(book.run({n: mask})) for n, mask in book.stochastic(draws, "absent").items()]
    terms = {
        "faithfulness": squares,
        "stochastic_all": joint,
        "importance_minimality": penalty,
        "stochastic_layerwise": sum(alone) / 3,
    }
    assert report.terms.keys() == terms.keys()
    assert all(abs(report.terms[k] - value) < 1e-12 for k, value in terms.items())
    dense = squares + joint + 3e-3 * penalty + 0.4 * terms["stochastic_layerwise"]
    assert abs(report.total - dense) < 1e-6
    for p, g in zip(of.dec.parameters(), torch.autograd.grad(dense, list(of.dec.parameters())), strict=True):
        assert (p.grad - g).abs().max() < 1e-12


def start(model, kind="shared_mlp", losses=LOSSES, **changes):
    config = ImportanceConfig(kind, hidden=8, heads=2, layers=1)
    settings = {"n_components": 5, "warm_up_steps": 0, "start": "random", "importance": config, "losses": losses}
    method = tlpd.SPD(**(settings | changes))
    made = method.initialise(
        adapt(model), tlpd.find_sites(model, SITES), torch.Generator().manual_seed(0), lambda _, n: range(n)
    )
    tokens = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return method, made.requires_grad_(True), Batch(tokens, mask)


def part_by_part(model, method, made, batch):
    made.zero_grad()
    generator = torch.Generator().manual_seed(8)
    report = method.gradients(TrainingStep(adapt(model), made, batch, generator, 0.5))
    return report, [None if p.grad is None else p.grad.clone() for p in made.parameters()], generator.get_state()


def all_at_once(model, method, made, batch, autocast=False):
    """Autograd of the plain sum of coefficients times losses."""
    generator = torch.Generator().manual_seed(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step = LossStep.of(adapt(model), made, *batch, generator, 0.5, method.measure)
        values = {loss.name: loss(step) for loss in method.losses}
        total = sum(loss.coefficient * values[loss.name] for loss in method.losses)
    grads = torch.autograd.grad(total, list(made.parameters()), allow_unused=True)
    return values, grads, generator.get_state()


@pytest.mark.parametrize("kind", ["component_mlp", "shared_mlp", "global_transformer"])
def test_gradients_part_by_part_are_those_of_the_sum(kind):
    """The cut at the importances and taking each part's gradient at once change nothing: 1e-12 in float64."""
    model = gpt2().requires_grad_(False)
    method, made, batch = start(model, kind)
    report, found, state = part_by_part(model, method, made, batch)
    values, expected, other = all_at_once(model, method, made, batch)
    assert torch.equal(state, other)
    assert report.terms.keys() == values.keys()
    assert all(abs(report.terms[name] - value) < 1e-12 for name, value in values.items())
    assert abs(report.total - sum(loss.coefficient * values[loss.name] for loss in LOSSES)) < 1e-5
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-12 and a.any()


@pytest.mark.parametrize("kind", ["component_mlp", "shared_mlp"])
def test_frozen_importances(kind):
    """With the importance function's parameters frozen V and U still get theirs, through the gate too where it reads them."""
    model = gpt2().requires_grad_(False)
    method, made, batch = start(model, kind)
    made.importance.requires_grad_(False)
    step = LossStep.of(adapt(model), made, *batch, torch.Generator(), 0.5)
    assert next(iter(step.importances.values())).lower.requires_grad == (kind == "component_mlp")
    _, found, _ = part_by_part(model, method, made, batch)
    trained = [(p, g) for p, g in zip(made.parameters(), found, strict=True) if p.requires_grad]
    assert all(g is None for p, g in zip(made.parameters(), found, strict=True) if not p.requires_grad)
    generator = torch.Generator().manual_seed(8)
    step = LossStep.of(adapt(model), made, *batch, generator, 0.5)
    total = sum(loss.coefficient * loss(step) for loss in method.losses)
    expected = torch.autograd.grad(total, [p for p, _ in trained])
    assert all((a - b).abs().max() < 1e-12 for (_, a), b in zip(trained, expected, strict=True))


def test_frozen_components():
    """Only the importance function is trained: V and U stay without gradients."""
    model = gpt2().requires_grad_(False)
    method, made, batch = start(model)
    for components in made.values():
        components.requires_grad_(False)
    _, found, _ = part_by_part(model, method, made, batch)
    assert all(
        (g is not None and bool(g.any())) == p.requires_grad for p, g in zip(made.parameters(), found, strict=True)
    )


def test_autocast():
    """The same bfloat16 passes as a plain sum under autocast; gradients near those of float32 (cosine above 0.98)."""
    model = gpt2(torch.float32).requires_grad_(False)
    losses = tuple(loss for loss in LOSSES if loss.name != "adversarial")  # its signs turn with any rounding
    method, made, batch = start(model, losses=losses, autocast="bfloat16")
    _, found, _ = part_by_part(model, method, made, batch)
    _, expected, _ = all_at_once(model, method, made, batch, autocast=True)
    _, wide, _ = all_at_once(model, method, made, batch)
    cosines = []
    for a, b, c in zip(found, expected, wide, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 1e-2 * b.norm()
        cosines.append(torch.nn.functional.cosine_similarity(a.flatten(), c.flatten(), 0).item())
    print(f"cosine of bfloat16 and float32 gradients: {min(cosines):.4f} to {max(cosines):.4f}")
    assert min(cosines) > 0.98


def test_gradients_add_to_what_is_there():
    model = gpt2().requires_grad_(False)
    method, made, batch = start(model)
    _, once, _ = part_by_part(model, method, made, batch)
    method.gradients(TrainingStep(adapt(model), made, batch, torch.Generator().manual_seed(8), 0.5))
    assert all((p.grad - 2 * g).abs().max() < 1e-11 for p, g in zip(made.parameters(), once, strict=True))


def test_figures_count_active_components_over_scored_positions():
    model = gpt2().requires_grad_(False)
    method, made, batch = start(model)
    report, _, _ = part_by_part(model, method, made, batch)
    step = LossStep.of(adapt(model), made, *batch, torch.Generator(), 0.5)
    counts = sum((g.lower > 0.1).sum(-1).double() for g in step.importances.values())
    assert abs(report.figures()["l0"] - counts[batch.attention_mask == 1].mean()) < 1e-6


class Held:
    """What autograd keeps for a backward pass, so that one can see it go."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("loss", [
    StochasticReconstruction(sites="layerwise"), StochasticReconstruction(samples=4),
    AdversarialReconstruction(steps=2, sites="layerwise"),
])  # fmt: skip
def test_one_parts_activations_are_gone_when_the_next_is_made(loss):
    """What backward needs of a forward pass is held for one part at a time."""
    model = gpt2().requires_grad_(False)
    _, made, batch = start(model)
    step = LossStep.of(adapt(model), made, *batch, torch.Generator().manual_seed(0)).cut()
    held, left, most = weakref.WeakSet(), [], []

    def pack(tensor):
        held.add(kept := Held(tensor))
        return kept

    def take(part):
        most.append(len(held))
        part.backward()
        left.append(len(held))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for part in loss.alone(step):
            take(part)
    print(f"tensors kept for backward, by part: {most}; after it: {left}")
    assert len(most) > 2 and min(most) > 0 and max(left) == 0
