"""SPD's start, its settings as JSON, and the gradient of a whole step against a dense form."""

import json

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError
from tl_paramdecomp.methods.settings import from_settings, to_settings
from tl_paramdecomp.methods.starts import initial_factors
from tl_paramdecomp.sites import WeightSite


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("d_in, d_out", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("start, C", [("neurons", 9), ("neurons", 12), ("svd", 5), ("svd", 12), ("auto", 9)])
def test_exact_starts_sum_to_the_weight(d_in, d_out, start, C):
    weight = torch.randn(d_in, d_out, generator=generator(), dtype=torch.float64)
    V, U = initial_factors(WeightSite("blocks.0.mlp.W_in", d_in, d_out), weight, C, start, generator())
    assert V.shape == (d_in, C) and U.shape == (C, d_out)
    assert (V @ U - weight).abs().max() < 1e-12


def test_neuron_components_are_balanced_and_single_neurons():
    weight = torch.randn(4, 9, generator=generator(), dtype=torch.float64)
    V, U = initial_factors(WeightSite("w", 4, 9), weight, 9, "neurons", generator())
    assert torch.allclose(V.norm(dim=0), U.norm(dim=1))
    assert ((U != 0).sum(1) == 1).all()


def test_too_few_components_for_neurons_say_so():
    with pytest.raises(SettingError, match="one component for each of the 9 neurons"):
        initial_factors(WeightSite("w", 4, 9), torch.zeros(4, 9), 5, "neurons", generator())


def test_random_starts_have_the_published_spread():
    """V over sqrt(d_in), or sqrt(d_out) in the published code's form; U over sqrt(C): within 2 % over 10^6 draws."""
    weight = torch.zeros(1000, 400)
    for start, fan in (("random", 1000), ("random_fan_out", 400)):
        V, U = initial_factors(WeightSite("w", 1000, 400), weight, 1000, start, generator())
        assert abs(V.std().item() * fan**0.5 - 1) < 0.02 and abs(U.std().item() * 1000**0.5 - 1) < 0.02


def mlp():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    return model.requires_grad_(False)


def test_warm_up_brings_random_factors_to_the_weight():
    model = mlp()
    method = tlpd.SPD(n_components=16, start="random", warm_up_steps=300)
    dec = method.initialise(adapt(model), tlpd.find_sites(model), generator(), lambda what, total: range(total))
    for name in dec:
        weight = tlpd.site_weight(model, name)
        assert (dec[name].product() - weight).norm() < 0.02 * weight.norm()
        assert dec[name].V.grad is None


def test_components_by_pattern():
    model = mlp()
    sites = tlpd.find_sites(model)
    assert tlpd.SPD(n_components={"0.*": 7, "*": 3}).counts(sites) == {"0.weight": 7, "2.weight": 3}
    assert tlpd.SPD().counts(sites) == {"0.weight": 8, "2.weight": 8}
    with pytest.raises(NoMatchingSiteError, match="says nothing of 2.weight"):
        tlpd.SPD(n_components={"0.*": 7}).counts(sites)
    with pytest.raises(NoMatchingSiteError, match=r"1\.\*"):
        tlpd.SPD(n_components={"1.*": 7, "*": 2}).counts(sites)


@pytest.mark.parametrize("method", [tlpd.SPD(), tlpd.SPD.paper(), tlpd.SPD(n_components={"a": 3}, autocast="bfloat16")])
def test_settings_survive_json(method):
    assert from_settings(json.loads(json.dumps(to_settings(method)))) == method


@pytest.mark.parametrize("settings", [{"type": "SDP"}, {"type": "SPD", "n_component": 3}])
def test_foreign_settings_are_refused(settings):
    with pytest.raises(SettingError):
        from_settings(settings)


def test_a_steps_gradient_is_that_of_the_dense_textbook_form():
    """The published losses on a two-layer model, written out densely with the same masks, in float64."""
    model = mlp().double()
    method = tlpd.SPD.paper(n_components=6, measure="mse", losses=(
        tlpd.methods.losses.Faithfulness(1.0, relative=False),
        tlpd.methods.losses.StochasticReconstruction(1.0, delta=True),
        tlpd.methods.losses.ImportanceMinimality(3e-3, p_start=1.5, p_end=1.5),
    ))  # fmt: skip
    dec = method.initialise(adapt(model), tlpd.find_sites(model), generator(), lambda what, total: range(total))
    dec.requires_grad_(True)
    x = torch.randn(10, 6, generator=generator(), dtype=torch.float64)
    report = method.losses_of(adapt(model), dec, x, None, torch.Generator().manual_seed(7), 0.0)
    report.total.backward()
    found = {name: (dec[name].V.grad.clone(), dec[name].U.grad.clone()) for name in dec}
    dec.zero_grad()

    draws = torch.Generator().manual_seed(7)
    inputs = {"0.weight": x, "2.weight": torch.relu(model[0](x))}
    masks, penalty, wrong, size = {}, 0.0, 0.0, 0
    for name, site_input in inputs.items():
        h = site_input @ dec[name].V
        net = dec.importance.networks[name.replace(".", "/")]
        raw = (torch.nn.functional.gelu(h[..., None] * net.w_in + net.b_in) * net.w_out).sum(-1) + net.b_out
        lower = torch.where(raw < 0, 0.01 * raw, raw.clamp(max=1.0))
        upper = torch.where(raw > 1, 1 + 0.01 * (raw - 1), raw.clamp(min=0.0))
        penalty = penalty + ((upper + 1e-12) ** 1.5).sum(-1).mean()
        q = torch.rand(lower.shape, generator=draws, dtype=torch.float64)
        r = torch.rand(lower.shape[:-1], generator=draws, dtype=torch.float64)
        masks[name] = (lower + (1 - lower) * (1 - q), 1 - r)
        rest = tlpd.site_weight(model, name) - dec[name].V @ dec[name].U
        wrong, size = wrong + rest.square().sum(), size + rest.numel()
    out = x
    for name, layer, after in (("0.weight", model[0], torch.relu), ("2.weight", model[2], lambda t: t)):
        (m, d), V, U = masks[name], dec[name].V, dec[name].U
        out = after((m * (out @ V)) @ U + d[:, None] * (out @ (layer.weight.T - V @ U)) + layer.bias)
    dense = wrong / size + (out - model(x)).square().mean() + 3e-3 * penalty
    assert abs(dense.item() - report.total.item()) < 1e-6  # divergences are taken in float32
    dense.backward()
    for name, (v, u) in found.items():
        assert (dec[name].V.grad - v).abs().max() < 1e-5 * v.abs().max()
        assert (dec[name].U.grad - u).abs().max() < 1e-5 * u.abs().max()
