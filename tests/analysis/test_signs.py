"""One sign: whatever reports an effect of a component reports the number with it minus the number without it.

By hand: the metric of the model, minus the metric with the component masked by `patched`, on every host.
"""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.circuits.units import TaskRuns, component_units, mask_gradients
from tl_paramdecomp.analysis.effects.sweep import Sweep
from tl_paramdecomp.analysis.evaluation.measures import spearman
from tl_paramdecomp.errors import DecompositionFileError
from tl_paramdecomp.experiments.demo import TASKS, _ask

from ..support.models import BUILDERS, VOCAB, build, decomposition_of, dtype_of, gpt2, logits
from ..support.saved_folders import sealed_lines

W_OUT, W_O, W_V, W_U = "blocks.1.mlp.W_out", "blocks.0.attn.W_O", "blocks.1.attn.W_V", "unembed.W_U"
SITES = [W_O, W_V, W_OUT, W_U]
A, B = 3, 5


def difference(found: Tensor) -> Tensor:
    """Linear in the logits."""
    return found[:, -1, A] - found[:, -1, B]


def log_prob(found: Tensor) -> Tensor:
    return torch.log_softmax(found[:, -1], -1)[:, A]


def without(
    model: Any, dec: tlpd.Decomposition, metric: Any, tokens: Tensor, site: str, c: int, **where: Any
) -> Tensor:
    with tlpd.patched(model, dec, dec.masks().ablate(site, c, **where)):
        return metric(logits(model, tokens))


def agree(found: Tensor | float, wanted: Tensor, model: Any) -> None:
    """In value, and so in sign: what is compared is well away from 0."""
    bound = 1e-8 if dtype_of(model) == torch.float64 else 2e-4
    assert wanted.abs().max() > 50 * bound
    assert (torch.as_tensor(found) - wanted).abs().max() < bound * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("host", BUILDERS)
def test_exact_effects_are_with_minus_without(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec, c = decomposition_of(model, SITES, n=3), 1
    plain, quiet = log_prob(logits(model, tokens)), {"progress": False}
    whole = tlpd.attribute(model, dec, tokens, log_prob, method="ablation", by_position=False, **quiet)
    apart = tlpd.attribute(model, dec, tokens, log_prob, method="ablation", sites=W_OUT, positions=[6], **quiet)
    swept = tlpd.sweep(model, dec, tokens, log_prob, **quiet)
    for site in SITES:
        by_hand = plain - without(model, dec, log_prob, tokens, site, c)
        agree(whole.values[site][:, 0, c], by_hand, model)
        agree(swept.effect(site)[c], by_hand.mean(), model)
    at_last = plain - without(model, dec, log_prob, tokens, W_OUT, c, positions=6)
    agree(apart.values[W_OUT][:, 0, c], at_last, model)
    each = tlpd.sweep(model, dec, tokens, log_prob, sites=W_OUT, positions="each", **quiet)
    agree(each.effect(W_OUT)[6, c], at_last.mean(), model)
    for site, head in ((W_O, 2), (W_V, 1)):
        by_head = tlpd.sweep(model, dec, tokens, log_prob, sites=site, by_head=True, **quiet)
        by_hand = plain - without(model, dec, log_prob, tokens, site, c, head=head)
        agree(by_head.effect(site)[head, c], by_hand.mean(), model)


@pytest.mark.parametrize("host", BUILDERS)
def test_estimates_are_with_minus_without(host: str, tokens: Tensor) -> None:
    """At the unembedding all that follows is linear, and an estimate is exact; before it, its sign is that of small steps."""
    model = build(host)
    dec, c, eps = decomposition_of(model, SITES, n=3), 1, 1e-2
    plain = difference(logits(model, tokens))
    by_hand = plain - without(model, dec, difference, tokens, W_U, c)
    agree(tlpd.attribute(model, dec, tokens, difference).by_component()[W_U][:, c], by_hand, model)
    graph = tlpd.prompt_graph(model, dec, tokens[:1], difference, nodes=[(W_U, c, 6)])
    (edge,) = graph.into("metric")
    agree(edge["value"], by_hand[0], model)
    agree(graph.nodes[0]["attribution"], by_hand[0], model)
    found = tlpd.edges_into(model, dec, tokens, (W_U, 0, 6), sites=[W_OUT, W_U], frozen_norms=False).values[W_OUT]
    activation = tlpd.component_acts(model, dec, tokens)[W_U][:, 6, 0]
    with tlpd.patched(model, dec, dec.masks().scale(W_OUT, c, 1 - eps, positions=6)):
        moved = tlpd.component_acts(model, dec, tokens)[W_U][:, 6, 0]
    change = (activation - moved) / eps
    assert change.abs().max() > 1e-2 and (found[:, 6, c] - change).abs().max() < 0.05 * change.abs().max()


def test_other_values_and_directions_have_the_same_sign(tokens: Tensor) -> None:
    """The component's clean activation minus what stands in its place, in either run; along a path, in between. At the
    unembedding what it adds does not depend on the run, so that all of them are one number."""
    model, corrupt = gpt2().requires_grad_(False), (tokens * 3 + 1) % VOCAB
    dec, c, quiet = decomposition_of(model, [W_U], n=3), 1, {"corrupt": corrupt, "progress": False}
    clean_acts, corrupt_acts = (tlpd.component_acts(model, dec, rows) for rows in (tokens, corrupt))
    plain = difference(logits(model, tokens))
    with tlpd.patched_acts(model, dec, tlpd.act_patches(dec).from_acts(W_U, c, corrupt_acts)):
        by_hand = plain - difference(logits(model, tokens))
    with tlpd.patched_acts(model, dec, tlpd.act_patches(dec).from_acts(W_U, c, clean_acts)):
        restored = difference(logits(model, corrupt))
    agree(restored - difference(logits(model, corrupt)), by_hand, model)
    for direction, value in (("noising", "corrupt"), ("denoising", None)):
        found = tlpd.sweep(model, dec, tokens, difference, direction=direction, value=value, **quiet)
        agree(found.effect(W_U)[c], by_hand.mean(), model)
        for method in ("ablation", "gradient"):
            found = tlpd.attribute(model, dec, tokens, difference, method=method, direction=direction, **quiet)
            agree(found.by_component()[W_U][:, c], by_hand, model)
    path = tlpd.attribute(model, dec, tokens, difference, method="integrated", **quiet)
    agree(path.by_component()[W_U][:, c], by_hand, model)
    with tlpd.patched_acts(model, dec, tlpd.act_patches(dec).set(W_U, c, 2.5)):
        by_hand = plain - difference(logits(model, tokens))
    found = tlpd.sweep(model, dec, tokens, difference, value=2.5, progress=False)
    agree(found.effect(W_U)[c], by_hand.mean(), model)


def test_units_of_circuits_are_with_minus_without() -> None:
    model = tlpd.load_micro_gpt2()
    dec = tlpd.decompose(model, W_OUT, tlpd.SVD(training=None), progress=False)
    task = tlpd.make_task("ioi", model, 4)
    metric = tlpd.default_metric(task)
    swept = tlpd.sweep(model, dec, task, metric, progress=False).effect(W_OUT)
    best = int(swept.argmax())
    everything = tlpd.evaluate_circuit(model, dec, task, {W_OUT: range(dec[W_OUT].n_components)})
    scale = everything.model - everything.none
    assert scale > 0 and max(everything.drops) * scale == pytest.approx(float(swept.max()), rel=1e-3)
    one = tlpd.evaluate_circuit(model, dec, task, {W_OUT: [best]})
    with tlpd.patched(model, dec, dec.masks().keep_only(W_OUT, [best])):
        kept = tlpd.score(model, task).mean()
    with tlpd.patched(model, dec, dec.masks().keep_only(W_OUT, [])):
        bare = tlpd.score(model, task).mean()
    assert one.drops == [pytest.approx(float(kept - bare) / scale, rel=1e-3)]
    runs = TaskRuns(tlpd.adapters.adapt(model), dec, component_units(dec), task, metric)
    with runs.frozen():
        assert spearman(mask_gradients(runs), swept) > 0.8


def test_moving_along_a_subnetwork_is_moved_minus_unmoved() -> None:
    model, rows = gpt2(), torch.arange(12).view(2, 6)
    made = tlpd.decompose(model, W_OUT, tlpd.L3D(n_subnetworks=3), rows, 2, 2, progress=False)
    slopes = tlpd.output_derivative(model, made, 1, rows)
    plain = logits(model, rows)
    with tlpd.perturbed(model, made, {1: 1e-5}):
        change = (logits(model, rows) - plain) / 1e-5
    assert (slopes - change).abs().max() < 1e-3 * change.abs().max()
    top = tlpd.top_logits(model, made, 1, rows, 3)
    assert (top.slopes - change[:, -1].gather(-1, top.indices)).abs().max() < 1e-3 * change.abs().max()


def test_the_demo_ablates_what_speaks_most_for_the_answer() -> None:
    from io import StringIO

    from rich.console import Console

    model = tlpd.load_micro_gpt2()
    dec = tlpd.decompose(model, "blocks.1.attn.W_O", tlpd.SVD(training=None), progress=False)
    (prompt,) = tlpd.micro_gpt2_prompts("ioi", 1)
    losses = {}
    for c in range(dec["blocks.1.attn.W_O"].n_components):
        with tlpd.patched(model, dec, dec.masks().ablate("blocks.1.attn.W_O", c)):
            losses[c] = float(
                logits(model, prompt.tokens[None])[0, -1].log_softmax(-1)[list(prompt.answers)].logsumexp(0)
            )
    console = Console(file=StringIO(), width=110)
    _ask(console, model, dec, prompt, torch.Generator().manual_seed(0))
    assert prompt.task in TASKS
    assert f"What matters most: component {min(losses, key=losses.get)} of" in console.file.getvalue()  # type: ignore


def test_a_sweep_of_the_other_sign_does_not_load(tmp_path: Any) -> None:
    """Files of before say nothing of their sign; those of today say it, and nothing else than what it is."""
    model = gpt2()
    rows = torch.arange(6)[None]
    found = tlpd.sweep(model, decomposition_of(model, W_OUT, n=2), rows, difference, progress=False)
    path = found.save(tmp_path / "sweep.json")
    kept = json.loads(path.read_text())
    assert kept["sign"] == "with minus without" and Sweep.load(path) == found
    for sign in (None, "without minus with", "", 1):
        path.write_bytes(sealed_lines({**kept, "sign": sign}))
        with pytest.raises(DecompositionFileError):
            Sweep.load(path)
    del kept["sign"]
    path.write_bytes(sealed_lines(kept))
    with pytest.raises(DecompositionFileError, match="other sign"):
        Sweep.load(path)
