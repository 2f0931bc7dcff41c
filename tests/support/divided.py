"""Training steps whose batches are divided: every loss and preset on a small model, for whoever divides them."""

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
)
from tl_paramdecomp.parallel import ALONE
from tl_paramdecomp.patching.target import frozen

from .models import VOCAB, gpt2

SITES = ["blocks.0.mlp.W_in", "blocks.1.attn.W_Q", "blocks.1.mlp.W_out"]
ROWS, LENGTH = 8, 5
SMALL = ImportanceConfig("shared_mlp", hidden=8)

LOSSES = {
    "faithfulness": Faithfulness(3.0),
    "faithfulness on some rows": Faithfulness(3.0, rows=4),
    "stochastic": StochasticReconstruction(),
    "stochastic subset": StochasticReconstruction(sites="subset", samples=2),
    "stochastic layerwise": StochasticReconstruction(sites="layerwise", delta="kept"),
    "stochastic binomial": StochasticReconstruction(sampling="binomial", delta="absent"),
    "importance masked": ImportanceMaskedReconstruction(),
    "unmasked": UnmaskedReconstruction(),
    "hidden acts": HiddenActsReconstruction(),
    "hidden acts of inputs": HiddenActsReconstruction(at="inputs", relative=False),
    "attention patterns": AttentionPatternReconstruction(),
    "adversarial": AdversarialReconstruction(steps=2, step_size=0.3),
    "adversarial layerwise": AdversarialReconstruction(sites="layerwise", scope="broadcast_across_batch"),
    "adversarial of every position": AdversarialReconstruction(sites="subset", scope="per_batch_per_position"),
    "adversarial repeated": AdversarialReconstruction(scope="repeat_across_batch", delta="kept"),
    "persistent single": PersistentAdversarialReconstruction(0.7, scope="single_source", ramp=0.0),
    "persistent broadcast": PersistentAdversarialReconstruction(
        0.7, scope="broadcast_across_batch", parametrisation="sigmoid", ramp=0.0
    ),
    "persistent repeated": PersistentAdversarialReconstruction(
        0.7, scope="repeat_across_batch", repeats=2, optimiser="sign", lr=0.1, ramp=0.0
    ),
    "persistent of every position": PersistentAdversarialReconstruction(0.7, sites="subset", ascents=1, ramp=0.0),
    "importance power": ImportanceMinimality(0.1),
    "importance frequency": ImportanceMinimality(0.1, frequency=0.5),
    "importance smooth frequency": ImportanceMinimality(
        0.1, penalty="smooth_l0", frequency=0.5, frequency_reference=1000
    ),
}
"""Each loss by itself, in each of its forms that look at the batch differently."""


def methods():
    """Every loss by itself, and every preset."""
    small = {"n_components": 6, "importance": SMALL, "warm_up_steps": 0, "start": "random"}
    found = {name: tlpd.SPD(losses=(loss,), **small) for name, loss in LOSSES.items()}
    found |= {
        "SPD": tlpd.SPD(**small),
        "drawn rows beside an adversary": tlpd.SPD(
            losses=(Faithfulness(3.0, rows=4), AdversarialReconstruction()), **small
        ),
        "SPD in chunks": tlpd.SPD(kl_chunk=3, **small),
        "SPD by mean squares": tlpd.SPD(measure="mse", **small),
        "SPD.paper": tlpd.SPD.paper(n_components=6),
        "SPD.targeted": tlpd.SPD.targeted(**small),
        "VPD": tlpd.VPD(**small | {"importance": ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1)}),
        "SVD": tlpd.SVD(tlpd.SPD(importance=SMALL)),
        "NeuronBasis": tlpd.NeuronBasis(tlpd.VPD(importance=SMALL)),
        "RandomBasis": tlpd.RandomBasis(tlpd.SPD(importance=SMALL)),
        "WhitenedSVD": tlpd.WhitenedSVD(tlpd.SPD(importance=SMALL), batches=1),
    }
    l3d = {"n_subnetworks": 6, "active": 0.3, "warm_start": 0.0}
    found |= {
        "L3D": tlpd.L3D(revive_every=2, **l3d),
        "L3D everywhere": tlpd.L3D(positions="all", reference="mean", gains=True, **l3d),
        "L3D from uniform": tlpd.L3D(reference="uniform", positions="last", **l3d),
        "L3D in pairs": tlpd.L3D(reference="pairs", **l3d),
        "L3D.paper_code": tlpd.L3D.paper_code(n_subnetworks=6, active=0.3),
    }
    return found


def batches(padded=True):
    """Rows, with padding at the ends of some, and none that count in all of one half's; and a second stream."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, ROWS, LENGTH), generator=generator)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, 3:], mask[3, 2:], mask[6, 4:] = 0, 0, 0
    return Batch(tokens[0], mask if padded else None), Batch(tokens[1], None)


def train(name, processes=ALONE, accumulate=1, steps=3, replicate=None, padded=True):
    """Some steps of plain gradient descent; the gradients and figures of each, and what is remembered at the end.

    Args:
        name: Of `methods`.
        processes: The processes among which batches are divided.
        accumulate: Micro-batches of each.
        steps: How many.
        replicate: From decomposition, to a function that takes a step's gradients and averages them over processes.
        padded: Whether some positions do not count.
    """
    method, model = methods()[name], gpt2().requires_grad_(False)
    batch, other = batches(padded)
    adapter, seen = adapt(model), []
    with frozen(model):
        made = method.initialise(
            adapter,
            tlpd.find_sites(model, SITES),
            torch.Generator().manual_seed(0),
            lambda _, n: range(n),
            lambda _: batch,
        )
        made.requires_grad_(False)
        for p in [p for group in method.parameter_groups(made) for p in group.parameters]:
            p.requires_grad_(True)
        numbers = RandomNumbers(3, "cpu", processes.rank, divided=True, scope="global")
        take = method.gradients if replicate is None else replicate(method, made)
        parameters = [p for group in method.parameter_groups(made) for p in group.parameters]  # shards, by now
        memory = {}
        for i in range(steps):
            made.zero_grad()
            background = other if name == "SPD.targeted" else None
            step = TrainingStep(adapter, made, batch, numbers, 0.5, memory, background, processes, accumulate, i)
            report = take(step)
            figures = {k: v.item() for k, v in (report.terms | report.figures()).items()}
            seen.append((figures, {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}))
            with torch.no_grad():
                for p in parameters:
                    if p.grad is not None:
                        p -= 0.01 * p.grad / p.grad.norm().clamp(min=1e-12)
            method.after_step(step)
    return seen, memory, made


def difference(a, b):
    """Largest relative difference of gradients and figures over the steps of two runs."""
    worst = 0.0
    for (figures, grads), (others, other_grads) in zip(a, b, strict=True):
        assert figures.keys() == others.keys()
        for k, value in figures.items():
            worst = max(worst, abs(value - others[k]) / max(abs(value), 1e-6))
        scale = max(float(g.norm()) for g in grads.values())
        for k in grads.keys() | other_grads.keys():  # one that is missing is 0
            zero = torch.zeros_like(grads.get(k, other_grads.get(k)))
            g, other = grads.get(k, zero), other_grads.get(k, zero)
            worst = max(worst, float((g - other).norm()) / max(float(g.norm()), 1e-3 * scale, 1e-12))
    return worst
