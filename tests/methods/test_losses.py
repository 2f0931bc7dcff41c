"""Faithfulness and importance minimality against values by hand and float64 textbook forms, gradients included."""

import math
import subprocess
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import Importance
from tl_paramdecomp.components.sigmoids import clamped, leaky
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods import losses
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality, _SquaredRest
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction, UnmaskedReconstruction

from .forms import case, compare, padded


# --- faithfulness -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [1, 10**6])
def test_faithfulness_is_the_relative_or_mean_square_error(part, monkeypatch):
    """Whether each site is a part of its own or all are one."""
    monkeypatch.setattr(losses, "PART", part)
    of = case()
    book = of.book()
    squares = {name: book.rest(name).square().sum() for name in of.dec}
    weights = {name: tlpd.site_weight(of.model, name) for name in of.dec}
    relative = sum(squares[n] / weights[n].square().sum() for n in of.dec) / 3
    compare(of, Faithfulness()(of.step()), relative)
    mean = sum(squares.values()) / sum(w.numel() for w in weights.values())
    compare(of, Faithfulness(relative=False)(of.step()), mean)


@pytest.mark.parametrize("relative", [True, False])
def test_faithfulness_of_some_rows_is_that_of_the_drawn_ones_scaled_up(relative):
    of = case()
    draws, expected, book = of.draws(), torch.zeros((), dtype=torch.float64), of.book()
    total = sum(tlpd.site_weight(of.model, name).numel() for name in of.dec)
    for name in of.dec:
        weight = tlpd.site_weight(of.model, name)
        rows = torch.randperm(len(weight), generator=draws)[:4] if len(weight) > 4 else torch.arange(len(weight))
        per_row = book.rest(name).square().sum(1)
        scale = 1 / (3 * weight.square().sum()) if relative else 1 / total
        expected = expected + scale * len(weight) * per_row[rows].mean()
    compare(of, Faithfulness(relative=relative, rows=4)(of.step()), expected)


def test_faithfulness_of_some_rows_is_unbiased():
    """Mean of 800 draws of two rows against the whole, value and gradient: within four standard errors."""
    of = case()
    draws, whole = of.draws(), Faithfulness()(of.step())
    V = of.dec["layers.0.weight"].V
    exact = torch.autograd.grad(whole, V)[0]
    values, gradients, loss, step = [], [], Faithfulness(rows=2), of.step(generator=draws)
    for _ in range(800):
        value = loss(step)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, V)[0])
    values, gradients = torch.tensor(values, dtype=torch.float64), torch.stack(gradients)
    error = values.std() / len(values) ** 0.5
    print(
        f"faithfulness {whole.item():.4f}; of two rows {values.mean():.4f} +- {error:.4f}, one draw +- {values.std():.3f}"
    )
    assert abs(values.mean() - whole.item()) < 4 * error and values.std() > 0.05 * whole.item()
    errors = gradients.std(0) / len(values) ** 0.5
    ratio = (gradients.mean(0) - exact).abs() / errors
    print(f"gradient: {ratio.square().mean().sqrt():.2f} standard errors away on average, {ratio.max():.2f} at most")
    assert ratio.max() < 4.5 and ratio.square().mean().sqrt() < 1.5


def test_faithfulness_stays_in_float32_under_autocast():
    of = case()
    of.model.float(), of.dec.float()
    of.x = of.x.float()
    plain = Faithfulness()(of.step())
    with torch.autocast("cpu", torch.bfloat16):
        cast = Faithfulness()(of.step())
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


# --- importance minimality --------------------------------------------------------------------------------------------
def penalty_of(of, psi, beta=0.0, reference=None):
    """sum_l sum_c mean_c + beta mean_c log2(1 + a mean_c), a the positions there are unless said otherwise."""
    book, total = of.book(), 0.0
    for g in book.upper.values():
        rows = psi(g[book.scored])
        for c in range(rows.shape[1]):
            mean = rows[:, c].sum() / len(rows)
            total = total + mean + beta * mean * torch.log2(1 + (len(rows) if reference is None else reference) * mean)
    return total


@pytest.mark.parametrize("make", [case, padded])
@pytest.mark.parametrize("p", [0.4, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("beta, reference", [(0.0, None), (0.5, None), (0.3, 1000)])
def test_power_penalty(make, p, beta, reference):
    of = make()
    loss = ImportanceMinimality(p_start=p, p_end=p, frequency=beta, frequency_reference=reference)
    compare(of, loss(of.step()), penalty_of(of, lambda g: (g + 1e-12) ** p, beta, reference))


@pytest.mark.parametrize("make", [case, padded])
@pytest.mark.parametrize("gamma", [1.0, 0.1])
@pytest.mark.parametrize("beta, reference", [(0.0, None), (0.5, None), (0.3, 1000)])
def test_smooth_l0_penalty(make, gamma, beta, reference):
    of = make()
    loss = ImportanceMinimality(
        penalty="smooth_l0", gamma_start=gamma, gamma_end=gamma, frequency=beta, frequency_reference=reference
    )
    expected = penalty_of(of, lambda g: g**2 / (g**2 + gamma**2) * (1 + gamma**2), beta, reference)
    compare(of, loss(of.step()), expected)


def with_upper(of, g):
    """A step with these importances to penalise, as leaves."""
    leaf = {name: torch.as_tensor(g, dtype=torch.float64).clone().requires_grad_() for name in list(of.dec)[:1]}
    step = of.step()
    step.importances = {name: Importance(t, t) for name, t in leaf.items()}
    return step, next(iter(leaf.values()))


def test_importance_minimality_by_hand():
    """Eight positions, three components, all importances one: 3 (1 + beta log2(1 + 8)); acceptance test 5."""
    step, _ = with_upper(case(), torch.ones(2, 4, 3))
    value = ImportanceMinimality(p_start=1.0, p_end=1.0, frequency=0.5)(step)
    assert abs(value.item() - 3 * (1 + 0.5 * math.log2(9))) < 1e-9 and abs(value.item() - 7.755) < 1e-3
    nothing, _ = with_upper(case(), torch.zeros(2, 4, 3))
    assert ImportanceMinimality(p_start=1.0, p_end=1.0, frequency=0.5)(nothing).abs() < 1e-10
    one, _ = with_upper(case(), torch.ones(2, 4, 3))
    assert abs(ImportanceMinimality(penalty="smooth_l0")(one).item() - 3) < 1e-12  # psi(1) = 1 at every gamma


def test_halves_of_a_batch_have_the_mean_of_the_whole_but_not_its_frequency_term():
    g = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def of_rows(rows, **settings):
        return ImportanceMinimality(p_start=1.3, p_end=1.3, **settings)(with_upper(case(), rows)[0]).item()

    halves = [of_rows(half) for half in (g[:1], g[1:])]
    assert abs(sum(halves) / 2 - of_rows(g)) < 1e-12
    halves = [of_rows(half, frequency=1.0) for half in (g[:1], g[:1])]
    assert of_rows(torch.cat([g[:1], g[:1]]), frequency=1.0) - sum(halves) / 2 > 0.1
    fixed = [of_rows(rows, frequency=1.0, frequency_reference=8) for rows in (g[:1], torch.cat([g[:1], g[:1]]))]
    assert abs(fixed[0] - fixed[1]) < 1e-12


def test_the_penalty_is_flat_at_zero_only_where_it_should_be():
    """p > 1 and smooth-L0 have slope 0 at g = 0, p = 1 slope 1."""
    for settings, slope in (({"p_start": 2.0, "p_end": 2.0}, 0.0), ({"p_start": 1.0, "p_end": 1.0}, 1.0),
                            ({"penalty": "smooth_l0"}, 0.0)):  # fmt: skip
        step, g = with_upper(case(), torch.zeros(1, 1, 1))
        ImportanceMinimality(**settings)(step).backward()
        assert abs(g.grad.item() - slope) < 1e-9


@pytest.mark.parametrize("progress, p", [(0.0, 2.0), (0.5, 1.2), (1.0, 0.4)])
def test_the_exponent_runs_linearly(progress, p):
    assert abs(ImportanceMinimality(p_start=2.0, p_end=0.4).sharpness(progress) - p) < 1e-12


def test_the_exponent_moves_between_begin_and_end():
    loss = ImportanceMinimality(p_start=2.0, p_end=1.0, gamma_start=1.0, gamma_end=0.2, begin=0.2, end=0.6)
    expected = {0.0: 2.0, 0.2: 2.0, 0.3: 1.75, 0.4: 1.5, 0.6: 1.0, 0.9: 1.0, 1.0: 1.0}
    assert all(abs(loss.sharpness(at) - p) < 1e-12 for at, p in expected.items())
    smooth = ImportanceMinimality(penalty="smooth_l0", gamma_start=1.0, gamma_end=0.2, begin=0.5, end=0.5)
    assert [smooth.sharpness(at) for at in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 0.2, 0.2]
    of = case(progress=0.3)
    compare(of, loss(of.step()), penalty_of(of, lambda g: (g + 1e-12) ** 1.75))


# --- the sigmoids, as the notes' acceptance test 4 has them -----------------------------------------------------------
def test_clamped_values_and_gradients():
    raw = torch.tensor([-1.0, 0.5, 2.0, 0.0, 1.0], requires_grad=True)
    lower, upper, _ = clamped(raw)
    assert lower.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    assert torch.allclose(upper, torch.tensor([0.0, 0.5, 1.01, 0.0, 1.0]))
    up = torch.autograd.grad(lower.sum(), raw, retain_graph=True)[0]
    down = torch.autograd.grad(-lower.sum(), raw, retain_graph=True)[0]
    assert up.tolist()[:3] == [0.0, 1.0, 0.0]
    assert torch.allclose(down[:3], torch.tensor([-0.01, -1.0, 0.0]))
    assert torch.allclose(torch.autograd.grad(upper.sum(), raw)[0][:3], torch.tensor([0.0, 1.0, 0.01]))


def test_leaky_really_leaks():
    raw = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    lower, upper, _ = leaky(raw)
    assert torch.allclose(lower, torch.tensor([-0.01, 0.5, 1.0]))
    assert torch.allclose(upper, torch.tensor([0.0, 0.5, 1.01]))
    assert torch.allclose(torch.autograd.grad(lower.sum(), raw)[0], torch.tensor([0.01, 1.0, 0.0]))


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [
    lambda: StochasticReconstruction(samples=0), lambda: ImportanceMinimality(p_end=0.0),
    lambda: ImportanceMinimality(gamma_end=0.0), lambda: ImportanceMinimality(begin=0.6, end=0.5),
    lambda: ImportanceMinimality(end=1.5), lambda: Faithfulness(rows=0), lambda: AdversarialReconstruction(steps=0),
    lambda: AdversarialReconstruction(step_size=0.0), lambda: PersistentAdversarialReconstruction(repeats=0),
    lambda: PersistentAdversarialReconstruction(ascents=-1), lambda: PersistentAdversarialReconstruction(ramp=2.0),
    lambda: PersistentAdversarialReconstruction(lr=0.0), lambda: tlpd.SPD(n_components=0), lambda: tlpd.SPD(lr=-1.0),
    lambda: tlpd.SPD(losses=()), lambda: tlpd.SPD(losses=(Faithfulness(1.0), Faithfulness(2.0))),
    lambda: tlpd.SPD(background_losses=(UnmaskedReconstruction(), UnmaskedReconstruction(2.0))),
    lambda: tlpd.SPD(kl_chunk=0),
])  # fmt: skip
def test_settings_without_meaning_are_refused(make):
    with pytest.raises(SettingError) as caught:
        make()
    assert len(str(caught.value)) > 25


def test_words_that_are_no_choice_are_refused():
    """Outside the tests no type checker stands in front of these."""
    cases = {
        "StochasticReconstruction(sites='some')": "some",
        "StochasticReconstruction(delta='gone')": "gone",
        "StochasticReconstruction(sampling='normal')": "normal",
        "ImportanceMinimality(penalty='l1')": "l1",
        "AdversarialReconstruction(scope='per_row')": "per_row",
        "AdversarialReconstruction(start='worst')": "worst",
        "PersistentAdversarialReconstruction(optimiser='sgd')": "sgd",
        "PersistentAdversarialReconstruction(parametrisation='tanh')": "tanh",
        "PersistentAdversarialReconstruction(scope='per_row')": "per_row",
        "HiddenActsReconstruction(masks='none')": "none",
        "HiddenActsReconstruction(at='middle')": "middle",
        "AttentionPatternReconstruction(masks='none')": "none",
        "SPD(measure='mae')": "mae",
        "ImportanceConfig(kind='mlp')": "mlp",
        "ImportanceConfig(sigmoid='relu')": "relu",
    }
    code = f"""
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp import SPD
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.adversary import *
from tl_paramdecomp.methods.internals import *
from tl_paramdecomp.methods.losses import *
from tl_paramdecomp.methods.reconstruction import *
for case in {list(cases)!r}:
    try:
        eval(case)
    except SettingError as error:
        print(error)
    else:
        print("accepted")
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = dict(zip(cases, shown.stdout.splitlines(), strict=True))
    assert {form: line for form, line in said.items() if cases[form] not in line} == {}


def test_the_value_is_right_in_float32_over_many_entries():
    """2.4 million entries against float64: a single running sum would be off by more than 1e-5."""
    V, U = torch.zeros(768, 1), torch.zeros(1, 3072)
    W = torch.randn(768, 3072, generator=torch.Generator().manual_seed(0))
    found = _SquaredRest.apply(V, U, W, 1.0).item()
    assert abs(found / W.double().square().sum().item() - 1) < 1e-6
