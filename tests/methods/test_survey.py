"""What is measured of the target before training, against edited weights and whole passes."""

import dataclasses
import json
import math

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import VOCAB, gpt2, llama, plain
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.loss import ZERO_MASK, LossBatch
from tl_paramdecomp.methods.losses import STEER_EVERY, ImportanceMinimality
from tl_paramdecomp.methods.survey import second_moments, zero_mask_distance


def rows_of(n=4, length=6, seed=1):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def batches(i):
    return Batch(rows_of(8, 16, seed=i), None)


def phase(_, n):
    return range(n)


def test_z_is_the_distance_from_a_model_whose_weights_are_zero():
    model, sites = gpt2(), "blocks.1.mlp.*"
    found = zero_mask_distance(adapt(model), tlpd.find_sites(model, sites), batches, "kl")
    tokens = torch.cat([batches(i).tokens for i in range(found["positions"] // (8 * 16))])
    with torch.no_grad():
        target = torch.log_softmax(model(tokens).logits, -1)
        for layer in (model.transformer.h[1].mlp.c_fc, model.transformer.h[1].mlp.c_proj):
            layer.weight.zero_()
        without = torch.log_softmax(model(tokens).logits, -1)
    expected = (target.exp() * (target - without)).sum(-1).mean().item()
    assert found["positions"] == 1024 and found["distance"] == pytest.approx(expected, rel=1e-9)


def following_z(**settings):
    losses = tuple(
        ImportanceMinimality(None, **settings) if loss.name == "importance_minimality" else loss
        for loss in tlpd.SPD().losses
    )
    return tlpd.SPD(losses=losses)


def test_z_is_kept_with_what_is_trained_and_agrees_with_the_evaluation():
    model, rows = llama(), rows_of(64, 16)
    made = tlpd.decompose(model, "blocks.1.mlp.*", following_z(), rows, steps=1, batch_size=64, progress=False)
    z = made.info[ZERO_MASK]
    assert z["measure"] == "kl" and z["positions"] == 1024
    short = tlpd.EvaluationConfig(ladder=(1,), restarts=1, ablated=0, by_site=False, samples=1)
    found = tlpd.evaluate(model, made, rows, rows=64, protocol=short, progress=False)
    zero = [row["kl"] for row in found.masks if row["masks"] == "zero" and row["delta"] == "absent"]
    assert z["distance"] == pytest.approx(zero[0], rel=1e-4)  # the first is of the whole model
    method = tlpd.SVD(training=following_z())
    basis = tlpd.decompose(model, "blocks.1.mlp.*", method, rows, steps=1, batch_size=64, progress=False)
    assert basis.info[ZERO_MASK] == z


def test_rows_are_not_made_for_a_z_that_nothing_needs():
    model, made = llama(), []

    def rows(step):
        made.append(step)
        return rows_of(4, 6, seed=step)

    dec = tlpd.decompose(model, "blocks.1.mlp.*", tlpd.SPD(), rows, steps=2, progress=False)
    assert made == [0, 1] and ZERO_MASK not in dec.info


def test_sites_that_change_nothing_are_named():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
    with pytest.raises(SettingError, match=r"blocks.1.mlp.W_out changes no output .*nothing to explain"):
        tlpd.decompose(model, "blocks.1.mlp.W_out", following_z(), rows_of(), steps=1, batch_size=4, progress=False)


def test_rows_of_which_nothing_counts_are_named():
    model = llama()
    nothing = Batch(rows_of(), torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(DataError, match="No position of the first"):
        zero_mask_distance(adapt(model), tlpd.find_sites(model, "blocks.1.mlp.*"), lambda i: nothing, "kl")


def test_a_second_stream_alone_may_ask_for_z():
    method, other = tlpd.SPD.targeted(n_components=3), ImportanceMinimality(None)
    background = tuple(other if loss.name == other.name else loss for loss in method.background_losses)
    changed = dataclasses.replace(method, background_losses=background)
    settings = {"steps": 1, "batch_size": 4, "progress": False, "background": rows_of(8, seed=3)}
    made = tlpd.decompose(llama(), "blocks.1.mlp.*", changed, rows_of(8), **settings)
    assert made.info[ZERO_MASK]["distance"] > 0.0


@pytest.mark.parametrize("pattern", ["blocks.0.mlp.*", ["embed.W_E", "blocks.0.attn.W_Q"], "*"])
def test_moments_of_shortened_passes_are_those_of_whole_ones(pattern):
    model = llama()
    adapter, sites = adapt(model), tlpd.find_sites(model, pattern)
    found = second_moments(adapter, sites, batches, 3, phase)
    tokens = torch.cat([batches(i).tokens for i in range(3)])
    inputs = adapter.capture(tokens, list(sites)).inputs
    for name, x in inputs.items():
        if sites[name].kind == "embedding":
            expected = torch.bincount(x.expand(tokens.shape).flatten(), minlength=sites[name].d_in).double()
        else:
            expected = x.flatten(0, -2).double().T @ x.flatten(0, -2).double()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def test_a_whitened_start_is_the_whitened_basis_and_needs_data():
    model = llama()
    start = tlpd.decompose(
        model, "blocks.1.mlp.*", tlpd.SPD(start="whitened"), rows_of(64, 16), steps=0, progress=False
    )
    basis = tlpd.decompose(
        model, "blocks.1.mlp.*", tlpd.WhitenedSVD(training=None, batches=64), rows_of(64, 16), progress=False
    )
    for name in start:
        site = start[name].site
        assert start[name].n_components == min(site.d_in, site.d_out)
        torch.testing.assert_close(start[name].product(), tlpd.site_weight(model, name), rtol=1e-4, atol=1e-5)
        strong = (start[name].V.norm(dim=0) * start[name].U.norm(dim=1))[:3]
        torch.testing.assert_close(
            strong, (basis[name].V.norm(dim=0) * basis[name].U.norm(dim=1))[:3], rtol=1e-3, atol=1e-5
        )
    with pytest.raises(DataError, match="whitened"):
        tlpd.decompose(model, "blocks.1.mlp.*", tlpd.SPD(start="whitened"), steps=0)


# --- the coefficient --------------------------------------------------------------------------------------------------
def batch_of(info=None):
    return LossBatch([], ("a", "b"), {}, 0.5, {ZERO_MASK: {"distance": 3.0}} if info is None else info)


def test_a_coefficient_follows_from_z():
    assert ImportanceMinimality(2e-3).weight(batch_of({})) == 2e-3
    assert ImportanceMinimality(None, share=1e-3).weight(batch_of()) == pytest.approx(1e-3 * 3.0 / 2)
    assert ImportanceMinimality(None, share=1e-3).sparser(4.0).weight(batch_of()) == pytest.approx(4e-3 * 3.0 / 2)
    assert ImportanceMinimality(None, keep=0.9).sparser(2.0).keep == pytest.approx(0.8)
    with pytest.raises(SettingError, match="follows from Z"):
        ImportanceMinimality(None).weight(batch_of({}))
    for wrong in ({"keep": 0.0}, {"keep": 1.0}, {"coefficient": 1e-3, "keep": 0.9}):
        with pytest.raises(SettingError, match="keep is the share"):
            ImportanceMinimality(**{"coefficient": None, **wrong})


@pytest.mark.parametrize("lost, sign", [(0.4, -1.0), (0.01, 1.0)])
def test_the_coefficient_is_steered_towards_what_is_to_be_kept(monkeypatch, lost, sign):
    loss, batch = ImportanceMinimality(None, keep=0.9), batch_of()
    monkeypatch.setattr(LossBatch, "total", lambda self, values: {"": torch.tensor(3.0 * lost)})
    weights = []
    for _ in range(3 * STEER_EVERY):
        loss.prepare(batch)
        weights.append(loss.weight(batch))
    assert len(set(weights)) == 3  # it moves at the first step and every few after it
    assert all(math.copysign(1.0, b - a) == sign for a, b in zip(weights, weights[STEER_EVERY:]))
    for _ in range(1000):
        loss.prepare(batch)
    assert 1e-3 < loss.weight(batch) / weights[0] < 1e3  # within bounds, however long


def test_steering_settles_where_it_should_and_goes_on_to_the_bit(tmp_path):
    model, rows = llama(), rows_of(64, 16)
    method, settings = following_z(keep=0.8), {"steps": 40, "batch_size": 8, "progress": False, "log_every": 1}

    def stop(info):
        return tlpd.STOP if info.step == 20 else None

    made = tlpd.decompose(model, "blocks.1.mlp.*", method, rows, run_dir=tmp_path / "a", **settings)
    tlpd.decompose(model, "blocks.1.mlp.*", method, rows, run_dir=tmp_path / "b", callbacks=[stop], **settings)
    again = tlpd.decompose(model, "blocks.1.mlp.*", method, rows, run_dir=tmp_path / "b", **settings)
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    coefficients = [line["importance_minimality_coefficient"] for line in lines]
    assert len(set(coefficients)) > 5 and coefficients[0] == pytest.approx(
        ImportanceMinimality(None).share * made.info[ZERO_MASK]["distance"] / 3, rel=0.3
    )


def test_outputs_that_are_no_logits_have_a_z_of_their_own():
    model = plain()
    sites = tlpd.find_sites(model)
    x = torch.randn(64, next(iter(sites.values())).d_in, dtype=torch.float64)
    found = zero_mask_distance(adapt(model), sites, lambda i: Batch(x, None), "mse")
    assert found["measure"] == "mse" and found["distance"] > 0.0
