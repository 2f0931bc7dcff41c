"""Targets in bfloat16 and float16: components, importances and their gradients stay in float32."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.divided import LOSSES, batches, methods
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.patching.target import frozen

SITES = ["blocks.0.mlp.W_in", "blocks.1.mlp.W_out"]
HALVES = [torch.bfloat16, torch.float16]


def gradients(model, method):
    batch, other = batches()
    with frozen(model):
        made = method.initialise(
            adapt(model),
            tlpd.find_sites(model, SITES),
            torch.Generator().manual_seed(0),
            lambda _, n: range(n),
            lambda _: batch,
        )
        made.requires_grad_(True)
        background = other if getattr(method, "background_losses", ()) else None
        step = TrainingStep(adapt(model), made, batch, torch.Generator().manual_seed(1), 0.5, {}, background)
        report = method.gradients(step)
    return made, report, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", methods())
def test_components_stay_in_float32(name, dtype):
    made, report, grads = gradients(gpt2().to(dtype).requires_grad_(False), methods()[name])
    assert all(p.dtype == torch.float32 for p in made.parameters())
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    assert all(value.isfinite() for value in report.terms.values())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("loss", ["stochastic", "unmasked", "importance masked"])
def test_gradients_are_those_of_the_same_weights_in_float32(loss, dtype, tolerance):
    """Within what the forward pass's own rounding gives; components, whose gradient no threshold cuts."""
    half = gpt2().to(dtype).requires_grad_(False)
    method = tlpd.SPD(n_components=6, losses=(LOSSES[loss],), warm_up_steps=0, start="random")
    found = gradients(half, method)[2]
    wide = gradients(gpt2().to(dtype).float().requires_grad_(False), method)[2]
    worst = max(
        float((g - wide[name]).norm() / wide[name].norm())
        for name, g in found.items()
        if name.startswith("_components")
    )
    print(f"{loss}, {dtype}: {worst:.4f}")
    assert worst < tolerance


def test_small_gradients_do_not_vanish_in_float16():
    """A mean over 2^16 times as many positions has gradients below 6e-8, float16's smallest number."""
    from dataclasses import replace

    small = [replace(LOSSES["stochastic"], coefficient=2.0**-k) for k in (0, 14)]
    found = []
    for loss in small:
        method = tlpd.SPD(n_components=6, losses=(loss,), warm_up_steps=0, start="random")
        grads = gradients(gpt2(torch.float16).requires_grad_(False), method)[2]
        found.append({n: g / loss.coefficient for n, g in grads.items() if n.startswith("_components")})
    worst = max(float((found[1][n] - g).norm() / g.norm()) for n, g in found[0].items())
    print(f"relative difference: {worst:.4f}")
    assert worst < 0.05
