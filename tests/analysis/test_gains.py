"""Impacts, derivatives and evaluation of subnetworks over gains, against backward passes, finite moves and dense gradients."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import gpt2, logits
from tests.support.norms import normed
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.subnetworks import evaluate_subnetworks, impacts, output_derivative
from tl_paramdecomp.methods.l3d import reconstruction
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients
from tl_paramdecomp.patching.subnetworks import perturbed

HOSTS = ["gpt2", "gpt2-nnsight", "gpt2-bridge", "gemma2", "hooked", "hooked-gqa"]


def tokens(rows=3, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def made_of(model, sites="blocks.0.mlp.W_in", **settings):
    method = tlpd.L3D(n_subnetworks=4, gains=True, **settings)
    return tlpd.decompose(model, sites, method, tokens(), steps=0, progress=False)


def gains_alone(made):
    """The same subnetworks with nothing at the site."""
    with torch.no_grad():
        for side in (made.encoder, made.decoder):
            for parameter in side["blocks.0.mlp.W_in"].parameters():
                parameter.zero_()
    return made


@pytest.mark.parametrize("name", HOSTS)
def test_impacts_are_coefficients_of_backward_passes(name):
    model = normed(name).model
    made = gains_alone(made_of(model))
    found = impacts(model, made, tokens(), references=2, seed=4)
    n, T = tokens().shape
    generator = torch.Generator().manual_seed(4)
    flat = logits(model, tokens()).flatten(0, 1)
    others = [
        (torch.arange(n * T) + torch.randint(1, n * T, (n * T,), generator=generator)) % (n * T) for _ in range(2)
    ]
    run = GradientPass(adapt(model), list(made.decoder), tokens())
    expected = torch.zeros(n, T, 4, dtype=torch.float64)
    for other in others:
        q = flat[other].softmax(-1).view(n, T, -1)
        for p in range(T):
            z = run.at(torch.full((n,), p))
            gradients = run.gradients(z, z.detach().softmax(-1) - q[:, p], keep=True)
            expected[:, p] += made.encoder.inner(gradients).detach().abs() / 2
    near = 1e-4 if name == "gemma2" else 1e-8  # its attention computes in float32
    assert expected.min() > 0 and ((found - expected).abs() / expected).max() < near


@pytest.mark.parametrize("name", HOSTS)
def test_the_derivative_of_outputs_is_the_limit_of_moving(name):
    model = normed(name).model
    made = gains_alone(made_of(model))
    found = output_derivative(model, made, 2, tokens())
    h, near = (1e-2, 1e-2) if name == "gemma2" else (1e-5, 1e-6)  # its attention computes in float32
    sides = []
    for sign in (1.0, -1.0):
        with perturbed(model, made, {2: sign * h}, in_weights=True):
            sides.append(logits(model, tokens()))
    assert found.abs().max() > 1e-3
    assert (found - (sides[0] - sides[1]) / (2 * h)).abs().max() < near * found.abs().max()


@pytest.mark.parametrize("biases", [True, False])
def test_the_bound_counts_gains(biases):
    model = gpt2()
    made = made_of(model, "blocks.0.mlp.W_in", positions="last", reference="mean", biases=biases)
    found = evaluate_subnetworks(model, made, tokens(9), rows_at_once=4)
    groups = []
    for rows in (tokens(9)[:4], tokens(9)[4:]):
        run = GradientPass(adapt(model), list(made.decoder), rows)
        groups += all_gradients(run, run.places("last", torch.Generator()), "mean", "kl", torch.Generator())
    flat = []
    for group in groups:
        site = group["blocks.0.mlp.W_in"]
        parts = [site.dense(slice(None), 24).flatten(1), *(group[n].gain for n in made.norms)]
        flat.append(torch.cat(parts + ([site.g.sum(1), *(group[n].bias for n in made.norms)] if biases else []), 1))
    s = torch.linalg.svdvals(torch.cat(flat)).square()
    assert found.bound == pytest.approx((s[4:].sum() / s.sum()).item(), rel=1e-9)
    assert found.batch_error == pytest.approx(reconstruction(made, groups, 0.1).loss.item(), rel=1e-9)
