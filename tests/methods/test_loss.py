"""How the terms of a step are taken: what a loss may know of the whole batch, and how many clean passes are held for it."""

import weakref
from dataclasses import dataclass

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.methods.step import LossStep

from .forms import padded


@dataclass(frozen=True)
class Spread(Loss):
    """Sum over components of the squared mean importance of the whole batch, with the gradient of each position's part."""

    coefficient: float = 1.0
    loops: int = 1
    name: str = "spread"

    def prepare(self, batch):
        for _ in range(self.loops):
            found = batch.total(self.means)
        return found

    def parts(self, step, shared):
        for name, mean in self.means(step).items():
            yield (mean * shared[name]).sum() / step.place.weight

    def finish(self, batch, shared):
        batch.memory["seen"] = torch.tensor(len(shared))

    def means(self, step):
        scored = step.scored.unsqueeze(-1)
        return {
            name: step.place.weight * (g.lower * scored).sum((0, 1)) / scored.sum()
            for name, g in step.importances.items()
        }


def taken(of, loops, accumulate):
    of.dec.zero_grad()
    memory, numbers = {}, RandomNumbers(0, "cpu", 0, accumulate > 1, "global")
    batch = Batch(of.x, of.attention_mask)
    step = TrainingStep(adapt(of.model), of.dec, batch, numbers, 0.5, memory, accumulate=accumulate)
    report = tlpd.SPD(losses=(Spread(loops=loops),)).gradients(step)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in of.dec.parameters()]
    return report.terms["spread"].item(), report.figures()["l0"].item(), grads, memory


@pytest.mark.parametrize("loops", [1, 3])
def test_a_loss_of_the_whole_batch_is_the_same_in_microbatches(loops, monkeypatch):
    """Against the formula; a microbatch's clean pass is made once for each loop and once for the gradients, one at a time."""
    of, alive, made, most = padded(), weakref.WeakSet(), [], []
    make = LossStep.of.__func__

    def counted(cls, *args, **kwargs):
        most.append(len(alive))
        step = make(cls, *args, **kwargs)
        alive.add(step.divergence)
        made.append(step.place)
        return step

    monkeypatch.setattr(LossStep, "of", classmethod(counted))
    value, l0, grads, memory = taken(of, loops, 1)
    assert len(made) == 1
    book = of.book()
    means = {name: g[book.scored].mean(0) for name, g in book.lower.items()}
    expected = sum((m.detach() * m).sum() for m in means.values())
    assert abs(value - expected.item()) < 1e-12 and memory["seen"] == 3
    for ours, theirs in zip(grads, torch.autograd.grad(expected, list(of.dec.parameters()), allow_unused=True)):
        assert (ours - (0 if theirs is None else theirs)).abs().max() < 1e-12

    del made[:], most[:]
    parted, parted_l0, parted_grads, parted_memory = taken(of, loops, 4)
    assert len(made) == 4 * (loops + 1) and max(most) == 0, "one clean pass at a time"
    assert abs(parted - value) < 1e-12 and abs(parted_l0 - l0) < 1e-6 and parted_memory == memory
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(grads, parted_grads, strict=True))
