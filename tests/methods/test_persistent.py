"""The adversary that survives from step to step, against plain leaves moved by torch.optim.Adam on dense masked weights."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.adversary import SCOPES, PersistentAdversarialReconstruction

from .forms import case, padded
from .test_adversary import dense_masks, shape_of

RAMP, LR = 0.4, 0.05


class Plain:
    """Free leaves for every site, and the optimiser that moves them uphill."""

    def __init__(self, of, draws, scope, repeats, optimiser, parametrisation, lr=LR, betas=(0.5, 0.99), ramp=RAMP):
        self.scope, self.optimiser, self.parametrisation, self.lr, self.ramp = (
            scope,
            optimiser,
            parametrisation,
            lr,
            ramp,
        )
        self.leaves = {}
        for name, g in of.book().lower.items():
            shape = (*shape_of(scope, tuple(of.x.shape[:2]), repeats), g.shape[-1] + 1)
            start = torch.rand(shape, generator=draws, dtype=torch.float64)
            if parametrisation == "sigmoid":
                start = start.clamp(1e-3, 1 - 1e-3)
                start = (start / (1 - start)).log()
            self.leaves[name] = start.requires_grad_()
        self.adam = torch.optim.Adam(self.leaves.values(), lr=lr, betas=betas, eps=1e-8, maximize=True)

    def sources(self, rows):
        """In [0, 1] and of the batch's shape."""
        found = {}
        for name, leaf in self.leaves.items():
            s = 1 / (1 + (-leaf).exp()) if self.parametrisation == "sigmoid" else leaf
            if self.scope == "repeat_across_batch":
                s = torch.stack([s[i % len(s)] for i in range(rows[0])])
            if self.scope == "per_batch_per_position":
                s = s[: rows[0]]
            if self.scope != "single_source":
                s = s[..., : rows[1], :]
            found[name] = s
        return found

    def value(self, of, book, delta="masked", routes=None, fixed=True):
        """The loss; `fixed`: its importances are constants."""
        g = {name: t.detach() if fixed else t for name, t in book.lower.items()}
        return book.distance(book.run(dense_masks(book, self.sources(of.x.shape[:2]), delta, g), routes))

    def move(self, value, progress):
        """One move, with the gradient of this value."""
        share = min(1.0, progress / self.ramp) if self.ramp else 1.0
        gradients = torch.autograd.grad(value, list(self.leaves.values()), retain_graph=True)
        if self.optimiser == "adam":
            for leaf, gradient in zip(self.leaves.values(), gradients, strict=True):
                leaf.grad = gradient
            self.adam.param_groups[0]["lr"] = self.lr * share
            self.adam.step()
        with torch.no_grad():
            for leaf, gradient in zip(self.leaves.values(), gradients, strict=True):
                if self.optimiser == "sign":
                    leaf += self.lr * share * gradient.sign()
                if self.parametrisation == "clamp":
                    leaf.clamp_(0, 1)


def stored(memory, plain, name="persistent_adversarial"):
    """Largest difference between the sources in memory and the plain ones."""
    return max((memory[f"{name}/{site}/source"] - leaf).abs().max().item() for site, leaf in plain.leaves.items())


def step_in_training(loss, step):
    """What `SPD` does with a loss: each part's gradient before the next is asked for."""
    for part in loss.alone(step):
        (loss.coefficient * part).backward()
    return part


def follow(of, loss, n_steps=4, optimiser="adam", parametrisation="clamp", delta="masked"):
    """Some steps of changing components, beside the plain form; value and gradient at each, and then the sources."""
    generator, draws, memory, plain = of.draws(), of.draws(), {}, None
    change = torch.Generator().manual_seed(9)
    for i in range(n_steps):
        now = of.but(x=of.x.roll(i, 0), progress=i / 5)
        book = now.book()
        if plain is None:
            plain = Plain(
                now, draws, loss.scope, loss.repeats, optimiser, parametrisation, loss.lr, loss.betas, loss.ramp
            )
        for _ in range(loss.ascents):
            plain.move(plain.value(now, book, delta), now.progress)
        routes = book.routes(draws) if loss.sites == "subset" else None
        expected = plain.value(now, book, delta, routes, fixed=False)
        of.dec.zero_grad()
        value = step_in_training(loss, now.step(memory, generator))
        grads = torch.autograd.grad(
            loss.coefficient * expected, list(of.dec.parameters()), retain_graph=True, allow_unused=True
        )
        assert abs(value.item() - expected.item()) < 1e-11
        for p, g in zip(of.dec.parameters(), grads, strict=True):
            assert (p.grad - g).abs().max() < 1e-11 if g is not None else p.grad is None
        plain.move(expected, now.progress)
        assert stored(memory, plain) < 1e-11, i
        with torch.no_grad():
            for p in of.dec.parameters():
                p += 0.05 * torch.randn(p.shape, generator=change, dtype=p.dtype)
    assert memory["persistent_adversarial//moves"].item() == n_steps * (loss.ascents + 1)
    return memory


@pytest.mark.parametrize("optimiser", ["adam", "sign"])
@pytest.mark.parametrize("parametrisation", ["clamp", "sigmoid"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_optimiser_and_parametrisation(scope, parametrisation, optimiser):
    """Sources, value and gradient over four steps, against torch's own Adam."""
    loss = PersistentAdversarialReconstruction(
        0.3, scope=scope, repeats=2 if scope == "repeat_across_batch" else 1, optimiser=optimiser, lr=LR, ramp=RAMP,
        parametrisation=parametrisation,
    )  # fmt: skip
    follow(padded(), loss, optimiser=optimiser, parametrisation=parametrisation)


@pytest.mark.parametrize("measure", ["kl", "mse"])
@pytest.mark.parametrize("ascents", [0, 1, 2])
@pytest.mark.parametrize("sites", ["all", "subset"])
def test_ascents_and_sites(sites, ascents, measure):
    loss = PersistentAdversarialReconstruction(sites=sites, ascents=ascents, lr=LR, ramp=0.0, betas=(0.8, 0.9))
    follow(case(measure=measure), loss)


@pytest.mark.parametrize("delta", ["absent", "kept"])
def test_delta_component_absent_or_kept(delta):
    follow(case(), PersistentAdversarialReconstruction(delta=delta, lr=LR, scope="single_source"), delta=delta)


def test_the_coefficient_does_not_change_the_sources_path():
    """Nor does coefficient 0 harm them: they then move by their ascents."""
    paths = {}
    for coefficient in (1.0, 1e-3, 7.3, 0.0):
        of, memory = case(), {}
        loss = PersistentAdversarialReconstruction(coefficient, lr=LR, ramp=0.0)
        generator = of.draws()
        for _ in range(3):
            step_in_training(loss, of.step(memory, generator))
        paths[coefficient] = memory
    for site in of.dec:
        key = f"persistent_adversarial/{site}/source"
        assert all((paths[c][key] - paths[1.0][key]).abs().max() < 1e-9 for c in (1e-3, 7.3))
        assert paths[0.0][key].isfinite().all()
    assert paths[0.0]["persistent_adversarial//moves"].item() == 6


@pytest.mark.parametrize("parametrisation", ["clamp", "sigmoid"])
@pytest.mark.parametrize("scope", SCOPES)
def test_as_a_metric_it_moves_by_its_ascents_only(scope, parametrisation):
    of, memory = case(), {}
    loss = PersistentAdversarialReconstruction(scope=scope, parametrisation=parametrisation, ascents=2, ramp=0.0)
    with torch.no_grad():
        loss(of.step(memory))
    assert memory["persistent_adversarial//moves"].item() == 2
    with torch.no_grad():
        loss(of.step(memory))
    assert memory["persistent_adversarial//moves"].item() == 4
    assert all(p.grad is None for p in of.dec.parameters())


def test_sources_stay_in_the_unit_interval_and_hurt_more_and_more():
    """24 moves at a fixed decomposition, 5 seeds: the divergence at the end above that of random sources by a tenth."""
    gains = []
    for seed in range(5):
        of, memory = case(seed=seed), {}
        loss = PersistentAdversarialReconstruction(ascents=1, lr=0.05, ramp=0.0, scope="single_source")
        values = [step_in_training(loss, of.step(memory)).item() for _ in range(12)]
        gains.append(values[-1] / values[0])
        sources = [memory[f"persistent_adversarial/{site}/source"] for site in of.dec]
        assert all((s >= 0).all() and (s <= 1).all() for s in sources)
    print("divergence at the end / after the first move:", [round(gain, 2) for gain in gains])
    assert min(gains) > 1.1


def test_a_smaller_batch_uses_the_first_sources_and_a_larger_one_says_so():
    of, memory = case(), {}
    loss = PersistentAdversarialReconstruction(ramp=0.0)
    step_in_training(loss, of.step(memory))
    before = {k: t.clone() for k, t in memory.items()}
    step_in_training(loss, of.but(x=of.x[:2, :2]).step(memory))
    key = "persistent_adversarial/layers.0.weight/source"
    assert memory[key].shape == (4, 3, 5) and not torch.equal(memory[key][:2, :2], before[key][:2, :2])
    with pytest.raises(DataError, match=r"made for rows \[4, 3\], but this batch has \[4, 6\]"):
        loss(of.but(x=torch.cat([of.x, of.x], 1)).step(memory))
    with pytest.raises(DataError, match=r"made for rows \[4, 3\]"):
        loss(of.but(x=torch.cat([of.x, of.x])).step(memory))
    single = PersistentAdversarialReconstruction(scope="single_source")
    memory = {}
    single(of.step(memory))
    single(of.but(x=torch.cat([of.x, of.x])).step(memory))


def test_repeats_must_divide_the_batch():
    of, memory = case(), {}
    with pytest.raises(SettingError, match="repeats=3 does not divide"):
        PersistentAdversarialReconstruction(scope="repeat_across_batch", repeats=3)(of.step(memory))
    loss = PersistentAdversarialReconstruction(scope="repeat_across_batch", repeats=2)
    loss(of.step(memory))
    with pytest.raises(DataError, match="do not divide"):
        loss(of.but(x=of.x[:3]).step(memory))


def test_two_streams_have_sources_of_their_own():
    """The same loss on a behaviour's rows and on the others: each as if it were alone, whatever their batches' shapes."""
    from tl_paramdecomp.adapters import adapt
    from tl_paramdecomp.data.batch import Batch
    from tl_paramdecomp.methods.method import TrainingStep

    of, memory = case(), {}
    loss = PersistentAdversarialReconstruction(0.5, ramp=0.0)
    method = tlpd.SPD(losses=(loss,), background_losses=(loss,))
    large = Batch(torch.cat([of.x, of.x]), None)
    for _ in range(2):
        method.gradients(TrainingStep(adapt(of.model), of.dec, Batch(of.x, None), of.draws(), 0.5, memory, large))
    shapes = {k: tuple(t.shape) for k, t in memory.items() if k.endswith("layers.0.weight/source")}
    assert sorted(shapes.values()) == [(4, 3, 5), (8, 3, 5)]
    assert [t.item() for k, t in memory.items() if k.endswith("moves")] == [6, 6]
    alone: dict = {}
    one, draws = tlpd.SPD(losses=(loss,)), None
    for _ in range(2):
        draws = of.draws()
        one.gradients(TrainingStep(adapt(of.model), of.dec, Batch(of.x, None), draws, 0.5, alone))
    assert all(torch.equal(memory[k], t) for k, t in alone.items())
