"""Tasks, attribution, sweeps and circuits on micro-gpt2: what must agree agrees, and on every host."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.evaluation.measures import spearman

SITES = ["blocks.1.attn.W_V", "blocks.2.mlp.W_out"]
HOSTS = ["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]


@pytest.fixture(scope="module")
def parts():
    model = tlpd.load_micro_gpt2()
    made = tlpd.decompose(model, SITES, tlpd.SVD(training=None), progress=False)
    return model, made, tlpd.make_task("ioi", "micro-gpt2", 6, split="validation")


@pytest.mark.parametrize("direction, value", [("noising", "corrupt"), ("denoising", None)])
def test_exact_attribution_is_the_sweep(parts, direction, value):
    model, made, task = parts
    metric = tlpd.default_metric(task)
    found = tlpd.attribute(
        model, made, task, metric, method="ablation", direction=direction, by_position=False, progress=False
    )
    swept = tlpd.sweep(model, made, task, metric, value=value, direction=direction, progress=False)
    for site in SITES:
        exact = found.by_component()[site].mean(0)
        assert (exact - swept.effect(site).flatten()).abs().max() < 1e-3 * exact.abs().max()


def test_gradients_predict_what_the_sweep_measures(parts):
    """To first order only: the last norm follows, and large components move it, so that ranks agree and sizes need not."""
    model, made, task = parts
    metric = tlpd.default_metric(task)
    predicted = tlpd.attribute(model, made, task.clean, lambda logits: metric(task.at_answer(logits), task),
                               attention_mask=task.attention_mask)  # fmt: skip
    swept = tlpd.sweep(model, made, task, metric, progress=False)
    site = "blocks.2.mlp.W_out"
    a, b = predicted.by_component()[site].mean(0), swept.effect(site).flatten()
    assert spearman(a, b) > 0.8


def test_patching_the_corrupt_prompt_back_in_is_the_corrupt_prompt(parts):
    """Every component and the delta component of a site set to the corrupt prompt's, at every position."""
    model, made, task = parts
    site = "blocks.1.attn.W_V"
    acts = tlpd.component_acts(model, made, task.corrupt, task.attention_mask)
    patches = tlpd.act_patches(made).from_acts(site, slice(None), acts)
    patches = patches.delta(site, tlpd.delta_writes(model, made, task.corrupt, task.attention_mask))
    kept = {}
    c_attn = model.transformer.h[1].attn.c_attn
    handle = c_attn.register_forward_hook(lambda module, args, y: kept.setdefault("y", y))
    with torch.no_grad():
        model(task.corrupt, attention_mask=task.attention_mask)
        handle.remove()
        width = c_attn.nf // 3
        handle = c_attn.register_forward_hook(
            lambda module, args, y: torch.cat([y[..., : 2 * width], kept["y"][..., 2 * width :]], -1)
        )
        expected = tlpd.score(model, task)
        handle.remove()
    with tlpd.patched_acts(model, made, patches):
        assert (tlpd.score(model, task) - expected).abs().max() < 1e-3


def test_every_host_gives_the_same_circuit(parts):
    _, made, task = parts
    circuits = []
    for host in HOSTS:
        try:
            opened = tlpd.load_micro_gpt2(host)
        except tlpd.errors.UnsupportedModelError:
            continue
        found = tlpd.find_circuit(opened, made, task, faithfulness=0.6, stochastic=None, progress=False)
        circuits.append(found)
    first = circuits[0]
    for other in circuits[1:]:
        assert other.components == first.components
        assert other.faithfulness["ablated"] == pytest.approx(first.faithfulness["ablated"], abs=1e-3)
    assert len(circuits) >= 3
