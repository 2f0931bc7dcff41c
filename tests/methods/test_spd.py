"""SPD's start, its settings as JSON, and its schedules."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
)
from tl_paramdecomp.methods.starts import initial_factors
from tl_paramdecomp.settings import from_settings, kinds_of, to_settings
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


# --- settings ---------------------------------------------------------------------------------------------------------
ALL_LOSSES = (
    Faithfulness(3.0, relative=False, rows=7),
    ImportanceMinimality(None, "smooth_l0", 2.5, 0.3, 0.9, 0.2, 0.1, 0.6, 0.5, 4096, 2e-3, 0.9),
    StochasticReconstruction(0.3, "layerwise", "kept", 3, "binomial"),
    ImportanceMaskedReconstruction(0.1, "subset"),
    UnmaskedReconstruction(0.2),
    HiddenActsReconstruction(0.4, "importance", "inputs", False),
    AttentionPatternReconstruction(0.6, "importance"),
    AdversarialReconstruction(0.7, 3, 0.4, "layerwise", "broadcast_across_batch", "zeros", "absent", "other"),
    PersistentAdversarialReconstruction(0.8, "repeat_across_batch", 2, "subset", 1, "sign", 0.1, (0.1, 0.2), 0.5, "sigmoid",
                                        "kept", "another"),
)  # fmt: skip


def test_the_settings_below_name_every_loss_and_leave_no_field_at_its_default():
    assert {type(loss).__name__ for loss in ALL_LOSSES} == {
        name for name, cls in kinds_of(Loss).items() if cls.__module__.startswith("tl_paramdecomp.")
    }
    for loss in ALL_LOSSES:
        default, given = to_settings(type(loss)()), to_settings(loss)
        alike = {key for key in given if given[key] == default[key]} - {"type", "name"}
        assert not alike, (type(loss).__name__, alike)


@pytest.mark.parametrize("method", [
    tlpd.SPD(), tlpd.SPD.paper(), tlpd.SPD.targeted(n_components=4), tlpd.VPD(), tlpd.VPD(lr=1e-4, kl_chunk=64),
    tlpd.VPD(importance=ImportanceConfig.vpd()), tlpd.SPD(n_components={"a": 3}, autocast="bfloat16"),
    tlpd.SVD(), tlpd.WhitenedSVD(training=None, batches=3, ridge=0.1), tlpd.NeuronBasis(training=tlpd.VPD()),
    tlpd.RandomBasis(training=tlpd.SPD(lr=1e-4)), tlpd.SPD(losses=ALL_LOSSES, background_losses=ALL_LOSSES[:3]),
    tlpd.SPD(tied={"b.weight": "a.weight"}),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_settings_survive_json(method):
    back = from_settings(json.loads(json.dumps(to_settings(method))))
    assert back == method and type(back) is type(method)


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: type(loss).__name__)
def test_every_loss_survives_json(loss):
    assert from_settings(json.loads(json.dumps(to_settings(loss)))) == loss


@pytest.mark.parametrize("settings", [{"type": "SDP"}, {"type": "SPD", "n_component": 3}])
def test_foreign_settings_are_refused(settings):
    with pytest.raises(SettingError):
        from_settings(settings)


# --- forms and schedules ----------------------------------------------------------------------------------------------
def test_the_published_forms_have_their_published_terms():
    names = [[loss.name for loss in method.losses] for method in (tlpd.SPD.paper(), tlpd.VPD())]
    assert names[0] == ["faithfulness", "stochastic_all", "stochastic_layerwise", "importance_minimality"]
    assert names[1] == ["faithfulness", "stochastic_subset", "persistent_adversarial", "importance_minimality"]
    assert tlpd.VPD().importance.kind == "global_transformer" and tlpd.SPD.paper().importance.sigmoid == "leaky"
    assert tlpd.SPD.paper(lr=0.5).lr == 0.5


@pytest.mark.parametrize("steps", [2, 10, 101])
def test_the_learning_rate_rises_then_falls_along_a_cosine_to_its_end_at_the_last_step(steps):
    """Acceptance test 6."""
    method = tlpd.SPD(ramp_steps=0, final_lr=0.2)
    rates = [method.learning_rate_factor(step, steps) for step in range(steps)]
    assert rates[0] == 1.0 and abs(rates[-1] - 0.2) < 1e-12 and rates == sorted(rates, reverse=True)
    if steps == 101:
        assert abs(rates[50] - 0.6) < 1e-12 and abs(rates[25] - (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)) < 1e-12
    ramped = replace(method, ramp_steps=4, final_lr=1.0)
    assert [ramped.learning_rate_factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert replace(method, ramp_steps=0, final_lr=1.0).learning_rate_factor(7, 10) == 1.0


def test_importance_and_components_are_groups_of_their_own():
    model = mlp()
    method = tlpd.SPD(n_components=8, lr=0.1, lr_importance=0.2, clip=0.3, clip_importance=None)
    dec = method.initialise(adapt(model), tlpd.find_sites(model), generator(), lambda what, total: range(total))
    components, importance = method.parameter_groups(dec)
    assert (components.lr, components.clip, importance.lr, importance.clip) == (0.1, 0.3, 0.2, None)
    assert {id(p) for p in components.parameters} == {id(t) for c in dec.values() for t in (c.V, c.U)}
    assert {id(p) for p in (*components.parameters, *importance.parameters)} == {id(p) for p in dec.parameters()}
