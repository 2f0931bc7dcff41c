"""Loss terms against values worked out by hand and in numpy-style float64."""

import math
import subprocess
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import Importance, clamped, leaky
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, source_values, worst_sources
from tl_paramdecomp.methods.base import LossStep
from tl_paramdecomp.methods.losses import (
    Faithfulness,
    ImportanceMinimality,
    StochasticReconstruction,
    UnmaskedReconstruction,
    stochastic_values,
    subset_routes,
)


class OneMatrix(torch.nn.Module):
    """Logits are one linear map of a one-hot token: a model whose every loss can be worked out by hand."""

    def __init__(self, weight):
        super().__init__()
        self.out = torch.nn.Linear(*weight.shape, bias=False).to(weight.dtype)
        with torch.no_grad():
            self.out.weight.copy_(weight.T)

    def forward(self, x, attention_mask=None):
        return self.out(x)


def two_tokens():
    return torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)


def step_of(model, dec, x, g, *, attention_mask=None, progress=0.0, seed=0, measure="kl"):
    names = list(dec)
    importances = {name: Importance(g[name], g[name]) for name in names}
    with torch.no_grad():
        target = model(x)
    generator = torch.Generator().manual_seed(seed)
    return LossStep(adapt(model), dec, x, attention_mask, target, importances, generator, progress, measure)


def rank_one_parts(weight):
    """Row by row: component c is the c-th row of W."""
    return torch.eye(len(weight), dtype=weight.dtype), weight.clone()


@pytest.fixture
def setup():
    model = OneMatrix(two_tokens()).requires_grad_(False)
    dec = tlpd.from_factors(model, {"out.weight": rank_one_parts(two_tokens())})
    x = torch.eye(2, dtype=torch.float64).unsqueeze(0)  # one row of two positions
    return model, dec, x


def kl_by_hand(p_logits, q_logits):
    p = [math.exp(v) for v in p_logits]
    q = [math.exp(v) for v in q_logits]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_masks_of_one_reconstruct_exactly_and_zero_masks_give_the_uniform_kl(setup):
    model, dec, x = setup
    ones = step_of(model, dec, x, {"out.weight": torch.ones(1, 2, 2, dtype=torch.float64)})
    assert StochasticReconstruction(delta=False)(ones).abs() < 1e-7
    zero = ones.divergence(ones.run_masked({"out.weight": (torch.zeros(2, dtype=torch.float64), 0.0)}))
    expected = (kl_by_hand([1, -1], [0, 0]) + kl_by_hand([0.5, 2], [0, 0])) / 2
    assert abs(zero.item() - expected) < 1e-6


def test_padding_does_not_count(setup):
    model, dec, x = setup
    zeros = {"out.weight": (torch.zeros(2, dtype=torch.float64), 0.0)}
    g = {"out.weight": torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)}
    step = step_of(model, dec, x, g, attention_mask=torch.tensor([[1, 0]]))
    assert abs(step.divergence(step.run_masked(zeros)).item() - kl_by_hand([1, -1], [0, 0])) < 1e-6
    assert abs(ImportanceMinimality(p_start=1.0, p_end=1.0)(step).item() - 1.0) < 1e-6


def test_mean_square_is_a_mean_over_all_elements(setup):
    model, dec, x = setup
    step = step_of(model, dec, x, {"out.weight": torch.ones(1, 2, 2, dtype=torch.float64)}, measure="mse")
    zero = step.divergence(step.run_masked({"out.weight": (torch.zeros(2, dtype=torch.float64), 0.0)}))
    assert abs(zero.item() - (1 + 1 + 0.25 + 4) / 4) < 1e-6


def test_faithfulness_is_the_relative_or_mean_square_error():
    model = OneMatrix(two_tokens()).requires_grad_(False)
    V, U = rank_one_parts(two_tokens())
    U[1] = 0.0
    dec = tlpd.from_factors(model, {"out.weight": (V, U)})
    step = step_of(model, dec, torch.eye(2, dtype=torch.float64)[None], {"out.weight": torch.ones(1, 2, 2)})
    assert abs(Faithfulness()(step).item() - 4.25 / 6.25) < 1e-12
    assert abs(Faithfulness(relative=False)(step).item() - 4.25 / 4) < 1e-12
    assert UnmaskedReconstruction()(step) > 0.1


def test_importance_minimality_by_hand():
    """Eight positions, three components, all importances one: 3 (1 + beta log2(1 + 8))."""
    model = OneMatrix(torch.eye(3, dtype=torch.float64))
    dec = tlpd.from_factors(model, {"out.weight": rank_one_parts(torch.eye(3, dtype=torch.float64))})
    step = step_of(model, dec, torch.zeros(2, 4, 3, dtype=torch.float64), {"out.weight": torch.ones(2, 4, 3)})
    assert (
        abs(ImportanceMinimality(p_start=1.0, p_end=1.0, frequency=0.5)(step).item() - 3 * (1 + 0.5 * math.log2(9)))
        < 1e-5
    )
    halves = step_of(
        model, dec, torch.zeros(2, 4, 3).double(), {"out.weight": torch.full((2, 4, 3), 0.25)}, progress=0.5
    )
    assert abs(ImportanceMinimality(p_start=2.0, p_end=0.4)(halves).item() - 3 * 0.25**1.2) < 1e-5


@pytest.mark.parametrize("progress, p", [(0.0, 2.0), (0.5, 1.2), (1.0, 0.4)])
def test_the_exponent_runs_linearly(progress, p):
    assert abs(ImportanceMinimality(p_start=2.0, p_end=0.4).exponent(progress) - p) < 1e-12


def test_clamped_values_and_gradients():
    raw = torch.tensor([-1.0, 0.5, 2.0, 0.0, 1.0], requires_grad=True)
    lower, upper = clamped(raw)
    assert lower.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0] and torch.allclose(
        upper, torch.tensor([0.0, 0.5, 1.01, 0.0, 1.0])
    )
    up = torch.autograd.grad(lower.sum(), raw, retain_graph=True)[0]
    down = torch.autograd.grad(-lower.sum(), raw, retain_graph=True)[0]
    assert up.tolist()[:3] == [0.0, 1.0, 0.0]
    assert torch.allclose(down[:3], torch.tensor([-0.01, -1.0, 0.0]))
    assert torch.allclose(torch.autograd.grad(upper.sum(), raw)[0][:3], torch.tensor([0.0, 1.0, 0.01]))


def test_leaky_really_leaks():
    raw = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    lower, upper = leaky(raw)
    assert torch.allclose(lower, torch.tensor([-0.01, 0.5, 1.0])) and torch.allclose(
        upper, torch.tensor([0.0, 0.5, 1.01])
    )
    assert torch.allclose(torch.autograd.grad(lower.sum(), raw)[0], torch.tensor([0.01, 1.0, 0.0]))


def many_sites(n=4, width=3):
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(n))).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (torch.randn(width, 5, generator=generator).double(), torch.randn(5, width, generator=generator).double())
        for name in tlpd.find_sites(model)
    }
    return model, tlpd.from_factors(model, factors)


def test_subset_routes_pick_each_site_with_the_expected_share():
    """P(site routed) = (n + 1) / (2 n); over 5 seeds of 20,000 positions each, within 0.01, and never none."""
    model, dec = many_sites()
    shares = []
    for seed in range(5):
        g = {name: torch.zeros(1, 20_000, 5) for name in dec}
        step = step_of(model, dec, torch.zeros(1, 20_000, 3).double(), g, seed=seed)
        routes = torch.stack(list(subset_routes(step).values())).float()
        assert routes.sum(0).min() >= 1
        shares += routes.mean((1, 2)).tolist()
    print(f"share of positions routed through a site: {min(shares):.4f} to {max(shares):.4f}, expected 0.625")
    assert all(abs(share - 0.625) < 0.01 for share in shares)


def test_sites_routed_past_are_the_model_bit_for_bit():
    model, dec = many_sites()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    step = step_of(model, dec, x, {name: torch.rand(2, 6, 5, dtype=torch.float64) for name in dec})
    values = stochastic_values(step, delta=True, subset=True)
    routes = {name: (m < 1).any(-1) for name, (m, _) in values.items()}
    untouched = ~torch.stack([*routes.values()]).any(0)
    everywhere_off = {name: (torch.ones_like(m), torch.ones_like(d)) for name, (m, d) in values.items()}
    assert torch.equal(step.run_masked(everywhere_off), step.target)
    assert untouched.sum() == 0
    for name, (m, d) in values.items():
        assert torch.equal(m[~routes[name]], torch.ones_like(m[~routes[name]]))
        assert torch.equal(d[~routes[name]], torch.ones_like(d[~routes[name]]))


def test_stochastic_masks_stay_between_importance_and_one():
    model, dec = many_sites()
    g = {name: torch.rand(2, 6, 5, dtype=torch.float64) for name in dec}
    for name, (m, d) in stochastic_values(step_of(model, dec, torch.zeros(2, 6, 3).double(), g), delta=True).items():
        assert (m >= g[name]).all() and (m <= 1).all() and (d >= 0).all() and (d <= 1).all()


def test_layerwise_is_the_mean_over_single_sites():
    model, dec = many_sites()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    g = {name: torch.rand(2, 6, 5, dtype=torch.float64) for name in dec}
    whole = StochasticReconstruction(sites="layerwise", delta=False)(step_of(model, dec, x, g, measure="mse"))
    step = step_of(model, dec, x, g, measure="mse")
    singles = [step.divergence(step.run_masked({n: pair})) for n, pair in stochastic_values(step, delta=False).items()]
    assert torch.allclose(whole, torch.stack(singles).mean())


def test_the_adversary_only_raises_the_divergence_and_leaves_no_gradient():
    """20 sign steps against their own random start, 5 seeds: higher on every one; sources stay in [0, 1]."""
    model, dec = many_sites()
    dec.requires_grad_(True)
    gains = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
        g = {name: 0.3 * torch.rand(2, 6, 5, generator=generator, dtype=torch.float64) for name in dec}
        start = step_of(model, dec, x, g, seed=seed, measure="mse")
        with torch.no_grad():
            before = start.divergence(start.run_masked(source_values(start, worst_sources(start, 0, 0.1)))).item()
        step = step_of(model, dec, x, g, seed=seed, measure="mse")
        sources = worst_sources(step, 20, 0.1)
        assert all((s >= 0).all() and (s <= 1).all() for s in sources.values())
        with torch.no_grad():
            gains.append(step.divergence(step.run_masked(source_values(step, sources))).item() / before)
    print("divergence after the adversary / at its start:", [round(gain, 2) for gain in gains])
    assert min(gains) > 1.0
    assert all(p.grad is None for p in dec.parameters())


def test_importance_one_leaves_the_adversary_only_the_delta_component():
    model, dec = many_sites()
    step = step_of(model, dec, torch.zeros(1, 2, 3).double(), {name: torch.ones(1, 2, 5).double() for name in dec})
    for m, _ in source_values(step, worst_sources(step, 2, 0.5)).values():
        assert torch.equal(m, torch.ones_like(m))


@pytest.mark.parametrize("make", [
    lambda: StochasticReconstruction(samples=0), lambda: ImportanceMinimality(p_end=0.0),
    lambda: AdversarialReconstruction(steps=0), lambda: tlpd.SPD(n_components=0), lambda: tlpd.SPD(lr=-1.0),
    lambda: tlpd.SPD(losses=()), lambda: tlpd.SPD(losses=(Faithfulness(1.0), Faithfulness(2.0))),
])  # fmt: skip
def test_settings_without_meaning_are_refused(make):
    with pytest.raises(SettingError) as caught:
        make()
    assert len(str(caught.value)) > 25


def test_words_that_are_no_choice_are_refused():
    """Outside the tests no type checker stands in front of these."""
    cases = (
        "StochasticReconstruction(sites='some')",
        "SPD(measure='mae')",
        "ImportanceConfig(kind='mlp')",
        "ImportanceConfig(sigmoid='relu')",
    )
    code = f"""
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.losses import StochasticReconstruction
from tl_paramdecomp.methods.spd import SPD
for case in {cases!r}:
    try:
        eval(case)
    except SettingError as error:
        print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [
        word in line for word, line in zip(("some", "mae", "mlp", "relu"), shown.stdout.splitlines(), strict=True)
    ] == [True] * 4
