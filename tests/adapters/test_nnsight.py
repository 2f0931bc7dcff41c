"""nnsight: traces inside `patched` see and change what passes the patched modules."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from ..support.exactness import ablate, difference, gone, patched_run, random_decomposition
from ..support.families import FAMILIES, build, subtract
from ..support.hosts import on_host, run


def envoy(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def edited_twin(family: str, decomposition: Any) -> Any:
    original = build(family)
    for name in decomposition:
        subtract(original, FAMILIES[family].places()[name], gone(decomposition, name))
    return on_host(original, "nnsight")


SITES = [
    ("gpt2", "blocks.1.mlp.W_in"),
    ("gpt2", "blocks.0.attn.W_K"),
    ("gpt2", "blocks.1.attn.W_O"),
    ("llama", "blocks.1.mlp.W_gate"),
    ("llama", "blocks.0.attn.W_V"),
    ("pythia", "blocks.1.attn.W_Q"),
]


@pytest.mark.parametrize(("family", "name"), SITES)
def test_output_read_in_a_trace_is_the_patched_value(family: str, name: str, tokens: Tensor) -> None:
    model = on_host(build(family), "nnsight")
    decomposition = random_decomposition(model, name)
    path = FAMILIES[family].places()[name].path
    twin = edited_twin(family, decomposition)
    with torch.no_grad():
        with tlpd.patched(model, decomposition, ablate(decomposition)):
            with model.trace(tokens):
                inside = envoy(model, path).output.save()
                logits = model.output.logits.save()
        with twin.trace(tokens):
            expected = envoy(twin, path).output.save()
            expected_logits = twin.output.logits.save()
    assert difference(inside, expected) < 1e-12
    assert difference(logits, expected_logits) < 1e-10


@pytest.mark.parametrize(("family", "name"), SITES)
def test_an_input_assigned_in_a_trace_counts(family: str, name: str, tokens: Tensor) -> None:
    model = on_host(build(family), "nnsight")
    decomposition = random_decomposition(model, name)
    path = FAMILIES[family].places()[name].path
    twin = edited_twin(family, decomposition)
    with torch.no_grad():
        with tlpd.patched(model, decomposition, ablate(decomposition)):
            with model.trace(tokens):
                module = envoy(model, path)
                module.input = module.input * 0.5 + 1.0
                inside = model.output.logits.save()
        with twin.trace(tokens):
            module = envoy(twin, path)
            module.input = module.input * 0.5 + 1.0
            expected = twin.output.logits.save()
    assert difference(inside, expected) < 1e-10
    assert difference(inside, run(twin, tokens)) > 1e-4, "the assignment does nothing"


@pytest.mark.parametrize(("family", "name"), SITES)
def test_an_output_assigned_in_a_trace_wins(family: str, name: str, tokens: Tensor) -> None:
    model = on_host(build(family), "nnsight")
    decomposition = random_decomposition(model, name)
    path = FAMILIES[family].places()[name].path
    logits = []
    for masks in (decomposition.masks(), ablate(decomposition)):
        with torch.no_grad(), tlpd.patched(model, decomposition, masks):
            with model.trace(tokens):
                module = envoy(model, path)
                module.output = torch.ones_like(module.output)
                out = model.output.logits.save()
        logits.append(out)
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia"])
def test_patch_trace_agrees_with_the_context(family: str, tokens: Tensor) -> None:
    model = on_host(build(family), "nnsight")
    decomposition = random_decomposition(model)
    masks = ablate(decomposition)
    plain = run(model, tokens)
    with torch.no_grad():
        with model.trace(tokens):
            tlpd.patch_trace(model, decomposition, masks)
            traced = model.output.logits.save()
    assert difference(traced, patched_run(model, decomposition, masks, tokens)) < 1e-10
    assert difference(traced, plain) > 1e-3
    assert torch.equal(run(model, tokens), plain)


def test_invokes_of_one_trace_are_all_patched(tokens: Tensor) -> None:
    model = on_host(build("gpt2"), "language_model")
    decomposition = random_decomposition(model, "blocks.0.mlp.*")
    masks = ablate(decomposition)
    expected = patched_run(model, decomposition, masks, tokens)
    with torch.no_grad(), tlpd.patched(model, decomposition, masks):
        with model.trace() as tracer:
            with tracer.invoke(tokens[:1]):
                first = model.output.logits.save()
            with tracer.invoke(tokens[1:]):
                second = model.output.logits.save()
    assert difference(torch.cat([first, second]), expected) < 1e-10
