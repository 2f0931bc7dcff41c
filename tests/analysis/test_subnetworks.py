"""Moving along subnetworks, their impacts and their evaluation, against edited weights, backward passes and dense gradients."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import build, gpt2, llama, logits, plain
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis import subnetworks
from tl_paramdecomp.analysis.subnetworks import evaluate_subnetworks, impacts, output_derivative
from tl_paramdecomp.components.subnetworks import SampleGradient
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    PatchConflictError,
    SettingError,
    ShapeError,
    TargetMismatchError,
)
from tl_paramdecomp.methods.l3d import reconstruction
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients
from tl_paramdecomp.patching.subnetworks import perturbed


def tokens(rows=3, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def made_of(model, sites="*", data=None, **settings):
    data = tokens() if data is None else data
    return tlpd.decompose(model, sites, tlpd.L3D(n_subnetworks=4, rank=2, **settings), data, steps=0, progress=False)


# --- perturbed --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["gpt2", "llama", "hooked", "hooked-gqa", "bridge", "nnsight"])
def test_hooks_and_weights_agree_on_every_host(host):
    """Biases, embeddings and fused weights included; and both differ from the model."""
    model = build(host)
    made = made_of(model)
    before = {n: p.detach().clone() for n, p in adapt(model).root.named_parameters()}
    plainly = logits(model, tokens())
    with perturbed(model, made, {0: 0.4, -1: -0.7}):
        by_hooks = logits(model, tokens())
    with perturbed(model, made, {0: 0.4, -1: -0.7}, in_weights=True):
        by_weights = logits(model, tokens())
    size = (plainly - by_hooks).abs().max()
    assert size > 1e-2 and (by_hooks - by_weights).abs().max() < 1e-4 * max(1.0, size.item())
    assert torch.equal(logits(model, tokens()), plainly)
    assert all(torch.equal(before[n], p) for n, p in adapt(model).root.named_parameters())


def test_moving_is_adding_to_the_weight():
    """At one site, against an edited weight and bias."""
    model, name = gpt2(), "blocks.0.mlp.W_in"
    made = made_of(model, ["blocks.0.mlp.*"])
    direction = made.subnetwork(1)[name]
    with perturbed(model, made, {1: 0.5}, sites=name):
        found = logits(model, tokens())
    with torch.no_grad():
        layer = model.transformer.h[0].mlp.c_fc
        layer.weight.add_(0.5 * direction.weight)
        layer.bias.add_(0.5 * direction.bias)
        assert (logits(model, tokens()) - found).abs().max() < 1e-10


def test_nothing_moved_is_the_model_and_moves_add_up():
    model = gpt2()
    made = made_of(model)
    with perturbed(model, made, {}), perturbed(model, made, {2: 0.0}):
        assert (logits(model, tokens()) - logits(gpt2(), tokens())).abs().max() < 1e-12
    with perturbed(model, made, {0: 0.3}), perturbed(model, made, {1: 0.2}):
        nested = logits(model, tokens())
    with perturbed(model, made, {0: 0.3, 1: 0.2}):
        assert (logits(model, tokens()) - nested).abs().max() < 1e-10
    with perturbed(model, made, {0: 0.3}), pytest.raises(PatchConflictError), perturbed(model, made, {0: 0.2}):
        pass


def test_gradients_reach_deltas():
    """Their value at 0 is the inner product of the loss's gradient with the direction."""
    model = gpt2().requires_grad_(False)
    made = made_of(model).requires_grad_(False)
    delta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad(), perturbed(model, made, {3: delta}):
        model(tokens()).logits.log_softmax(-1)[..., 7].sum().backward()
    h, values = 1e-5, []
    for sign in (1.0, -1.0):
        with perturbed(model, made, {3: sign * h}):
            values.append(logits(model, tokens()).log_softmax(-1)[..., 7].sum())
    assert delta.grad.item() == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=1e-5)


def test_what_cannot_be_moved_is_refused():
    model = gpt2()
    made = made_of(model)
    with pytest.raises(ComponentIndexError, match="no subnetwork 4"), perturbed(model, made, {4: 1.0}):
        pass
    with pytest.raises(TargetMismatchError), perturbed(gpt2(seed=5), made, {0: 1.0}):
        pass
    with pytest.raises(SettingError, match="once"), perturbed(model, made, {3: 1.0, -1: 1.0}):
        pass
    with pytest.raises(ShapeError, match="one number"), perturbed(model, made, {0: torch.ones(1)}):
        pass
    with pytest.raises(SettingError, match="at least 1"):
        impacts(model, made, tokens(), references=0)


def test_an_inserted_identity_is_moved_in_both_ways():
    model, name = gpt2(), "blocks.0.mlp.W_in.pre_identity"
    made = made_of(model, name, biases=False)
    with perturbed(model, made, {0: 0.5}):
        by_hooks = logits(model, tokens())
    with perturbed(model, made, {0: 0.5}, in_weights=True):
        assert (logits(model, tokens()) - by_hooks).abs().max() < 1e-9


# --- impacts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, near", [(gpt2, 1e-9), (lambda: llama(torch.float64), 1e-5)], ids=["gpt2", "llama"])
def test_impacts_are_coefficients_of_backward_passes(family, near):
    """Mean over references of |<E_k, g>|, position by position, with the same references; Llama's norms compute in float32."""
    model = family()
    made = made_of(model)
    found = impacts(model, made, tokens(), references=3, seed=4)
    n, T = tokens().shape
    generator = torch.Generator().manual_seed(4)
    flat = logits(model, tokens()).flatten(0, 1)
    others = [
        (torch.arange(n * T) + torch.randint(1, n * T, (n * T,), generator=generator)) % (n * T) for _ in range(3)
    ]
    run = GradientPass(adapt(model), list(made.sites), tokens())
    expected = torch.zeros(n, T, 4, dtype=torch.float64)
    for other in others:
        q = flat[other].softmax(-1).view(n, T, -1)
        for p in range(T):
            z = run.at(torch.full((n,), p))
            gradients = run.gradients(z, z.detach().softmax(-1) - q[:, p], keep=True)
            expected[:, p] += made.encoder.inner(gradients).detach().abs() / 3
    assert found.shape == (n, T, 4) and ((found - expected).abs() / expected).max() < near


def test_impacts_leave_padding_out():
    model = gpt2()
    made = made_of(model)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = impacts(model, made, tokens(), attention_mask=mask)
    assert (found[mask == 0] == 0).all() and (found[mask == 1] > 0).all()
    changed = torch.where(mask == 1, tokens(), 3)
    assert torch.allclose(impacts(model, made, changed, attention_mask=mask), found, atol=1e-12)


def test_the_derivative_of_outputs_is_the_limit_of_moving():
    model = gpt2()
    made = made_of(model)
    found = output_derivative(model, made, 2, tokens())
    h, sides = 1e-5, []
    for sign in (1.0, -1.0):
        with perturbed(model, made, {2: sign * h}):
            sides.append(logits(model, tokens()))
    assert (found - (sides[0] - sides[1]) / (2 * h)).abs().max() < 1e-6 * found.abs().max()


def test_subnetworks_from_elsewhere_say_no_divergence():
    made = made_of(gpt2())
    made.info.pop("run")
    with pytest.raises(SettingError, match="No run of L3D"):
        impacts(gpt2(), made, tokens())
    with pytest.raises(DataError, match="given 1"):
        impacts(gpt2(), made_of(gpt2()), tokens(1, 1))


# --- evaluation -------------------------------------------------------------------------------------------------------
def test_the_bound_is_the_truncated_svd_of_dense_gradients():
    """And the error of any dictionary lies above it; an untrained one's near 1."""
    model = gpt2()
    made = made_of(model, "blocks.*.mlp.*", positions="last", reference="mean")
    found = evaluate_subnetworks(model, made, tokens(9), rows_at_once=4)
    groups = []
    for rows in (tokens(9)[:4], tokens(9)[4:]):  # no row is left by itself
        run = GradientPass(adapt(model), list(made.sites), rows)
        groups += all_gradients(run, run.places("last", torch.Generator()), "mean", "kl", torch.Generator())
    flat = [
        [torch.cat([g.dense(slice(None), made.sites[n].d_in).flatten(1), g.g.sum(1)], 1) for n, g in group.items()]
        for group in groups
    ]
    dense = torch.cat([torch.cat(parts, 1) for parts in flat])
    s = torch.linalg.svdvals(dense).square()
    assert found.bound == pytest.approx((s[4:].sum() / s.sum()).item(), rel=1e-9)
    assert found.samples == 9 and found.batch_error > found.bound and 0.9 < found.batch_error < 1.1
    assert found.batch_error == pytest.approx(reconstruction(made, groups, 0.1).loss.item(), rel=1e-9)
    assert sum(found.active) * 9 == pytest.approx(round(0.1 * 36)) and found.dead == found.active.count(0.0)
    with pytest.raises(DataError, match="no rows"):
        evaluate_subnetworks(model, made, tokens(0))


def test_pairs_of_gradients_are_the_same_in_both_forms(monkeypatch):
    """Formed some columns at a time, from factors, and as dense matrices."""
    x, g = torch.randn(7, 6, 5, dtype=torch.float64), torch.randn(7, 6, 4, dtype=torch.float64)
    parts = [SampleGradient(x[:3], g[:3]), SampleGradient(x[3:], g[3:])]
    dense = torch.cat([(x.transpose(1, 2) @ g).flatten(1), g.sum(1)], 1)
    monkeypatch.setattr(subnetworks, "CHUNK", 70)  # two columns at a time
    assert (subnetworks._pairwise(parts, True) - dense @ dense.T).abs().max() < 1e-10
    formed, factored = subnetworks._pairwise_formed(x, g), subnetworks._pairwise_factored(x, g)
    assert (formed - factored).abs().max() < 1e-10 < formed.abs().min()


def test_a_model_without_positions():
    model = plain()
    rows = torch.randn(6, 6, dtype=next(model.parameters()).dtype)
    made = tlpd.decompose(model, "*", tlpd.L3D(n_subnetworks=3, divergence="mse"), rows, steps=0, progress=False)
    found = evaluate_subnetworks(model, made, rows)
    assert found.samples == 6 and impacts(model, made, rows).shape == (6, 3)


@pytest.mark.parametrize("divergence", ["mse", "paper_code"])
def test_impacts_of_other_divergences_are_those_of_backward_passes(divergence):
    model = plain()
    rows = torch.randn(6, 6, dtype=next(model.parameters()).dtype)
    method = tlpd.L3D(n_subnetworks=3, divergence=divergence)
    made = tlpd.decompose(model, "*", method, rows, steps=0, progress=False)
    found = impacts(model, made, rows, references=4, seed=2)
    generator, expected = torch.Generator().manual_seed(2), torch.zeros(6, 3, dtype=rows.dtype)
    run = GradientPass(adapt(model), list(made.sites), rows)
    output = run.output.detach()
    for _ in range(4):
        other = output[(torch.arange(6) + torch.randint(1, 6, (6,), generator=generator)) % 6]
        leaf = output.clone().requires_grad_(True)
        value = (leaf - other).square() if divergence == "mse" else leaf * (leaf - other)
        (cotangent,) = torch.autograd.grad(value.mean(-1).sum(), leaf)
        expected += made.encoder.inner(run.gradients(run.output, cotangent, keep=True)).detach().abs() / 4
    assert (found - expected).abs().max() < 1e-10 * expected.max()
