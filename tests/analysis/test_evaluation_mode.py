"""Every public question is asked of the model without dropout, and the mode of each of the user's modules is put back."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd

from ..support.models import module_of

SITES = ["blocks.1.attn.W_V", "blocks.2.mlp.W_out"]
HOSTS = ["transformers", "transformer_bridge", "nnsight"]
QUIET: dict[str, Any] = {"progress": False}


class Given:
    """What questions are asked about, made in evaluation mode."""

    def __init__(self, host: str) -> None:
        try:
            self.model = tlpd.load_micro_gpt2(host)
        except tlpd.errors.UnsupportedModelError as error:
            pytest.skip(str(error))
        for module in module_of(self.model).modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        self.rows = tlpd.micro_gpt2_tokens(4)[:, :12]
        self.task = tlpd.make_task("ioi", "micro-gpt2", 2, split="validation")
        self.method = tlpd.SPD(n_components=3)
        self.dec = tlpd.decompose(self.model, SITES, self.method, self.rows, steps=1, batch_size=2, **QUIET)
        self.subnetworks = tlpd.decompose(
            self.model, SITES, tlpd.L3D(n_subnetworks=2, rank=1), self.rows, steps=1, batch_size=2, **QUIET
        )
        self.metric = tlpd.default_metric(self.task)


given = functools.cache(Given)
Question = Callable[[Given], Any]
QUESTIONS: dict[str, Question] = {
    "activation_means": lambda g: tlpd.activation_means(g.model, g.dec, g.rows),
    "answer_logits": lambda g: tlpd.answer_logits(g.model, g.task),
    "attention_scores": lambda g: tlpd.attention_scores(
        g.model,
        tlpd.decompose(g.model, "blocks.1.attn.W_[QK]", tlpd.SVD(training=None), g.rows, **QUIET),
        g.rows[:1],
        1,
        0,
    ),
    "attribute": lambda g: tlpd.attribute(g.model, g.dec, g.task, g.metric, **QUIET),
    "causal_importances": lambda g: tlpd.causal_importances(g.model, g.dec, g.rows),
    "causal_selectivity": lambda g: tlpd.causal_selectivity(g.model, g.subnetworks, g.rows, delta=0.1, top=1),
    "compare": lambda g: tlpd.compare(
        g.model,
        {"SPD": g.method},
        tlpd.ComparisonProtocol(
            tuple(SITES),
            1,
            batch_size=2,
            seeds=(0,),
            sparsities=(1.0,),
            evaluation=tlpd.EvaluationConfig(ladder=(1,), ablated=0, by_site=False),
        ),
        g.rows,
        g.rows,
        **QUIET,
    ),
    "component_acts": lambda g: tlpd.component_acts(g.model, g.dec, g.rows),
    "dataset_graph": lambda g: tlpd.dataset_graph(g.model, g.dec, g.task, g.metric, **QUIET),
    "decompose": lambda g: tlpd.decompose(g.model, SITES, g.method, g.rows, steps=2, batch_size=2, **QUIET),
    "delta_writes": lambda g: tlpd.delta_writes(g.model, g.dec, g.rows),
    "edges_into": lambda g: tlpd.edges_into(g.model, g.dec, g.rows[:1], (SITES[1], 0, 3)),
    "evaluate": lambda g: tlpd.evaluate(
        g.model, g.dec, g.rows, protocol=tlpd.EvaluationConfig(ladder=(1,), ablated=1), **QUIET
    ),
    "evaluate_circuit": lambda g: tlpd.evaluate_circuit(g.model, g.dec, g.task, {SITES[0]: [0]}),
    "evaluate_subnetworks": lambda g: tlpd.evaluate_subnetworks(g.model, g.subnetworks, g.rows),
    "find_circuit": lambda g: tlpd.find_circuit(g.model, g.dec, g.task, held_out=g.task, **QUIET),
    "impacts": lambda g: tlpd.impacts(g.model, g.subnetworks, g.rows),
    "importance_masks": lambda g: [
        [tuple(g_masks[name]) for name in g.dec]
        for kind in ("importance", "stochastic", "adversarial")
        for g_masks in [tlpd.importance_masks(g.model, g.dec, g.rows, kind, steps=1)]
    ],
    "logit_lens": lambda g: tlpd.logit_lens(g.model, g.dec, SITES[1], 0),
    "output_derivative": lambda g: tlpd.output_derivative(g.model, g.subnetworks, 0, g.rows),
    "per_head": lambda g: tlpd.per_head(g.model, g.dec, g.rows, SITES[0]),
    "prompt_graph": lambda g: tlpd.prompt_graph(g.model, g.dec, g.task.select([0]), g.metric),
    "score": lambda g: tlpd.score(g.model, g.task, g.metric),
    "sweep": lambda g: tlpd.sweep(g.model, g.dec, g.task, g.metric, **QUIET),
    "token_statistics": lambda g: tlpd.token_statistics(g.model, g.dec, g.rows),
    "top_contexts": lambda g: tlpd.top_contexts(g.model, g.dec, g.rows),
    "top_logits": lambda g: tlpd.top_logits(g.model, g.subnetworks, 0, g.rows),
    "tune_along": lambda g: tlpd.tune_along(g.model, g.subnetworks, [0], g.rows, steps=2, batch_size=2, **QUIET),
}
ASK_NOTHING = {
    "attached", "check_target", "edited_model", "edited_weights", "estimate_run", "find_sites", "from_factors", "fwd_hooks",
    "patch_trace", "patched", "patched_acts", "perturbed", "shuffled_weights", "site_weight",
}  # fmt: skip
"""They run nothing of their own accord, or give no figure of what ran."""


def test_every_public_question_is_here() -> None:
    functions = {name: getattr(tlpd, name) for name in tlpd.__all__ if inspect.isfunction(getattr(tlpd, name))}
    of_models = {name for name, f in functions.items() if next(iter(inspect.signature(f).parameters), "") == "model"}
    assert of_models == set(QUESTIONS) | ASK_NOTHING


def tensors(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All numbers in a result, each with where it stands."""
    if isinstance(found, Tensor | int | float):
        yield path, torch.as_tensor(found).detach()
    elif isinstance(found, nn.Module):
        yield from tensors(dict(found.state_dict()), path)
    elif dataclasses.is_dataclass(found):
        yield from tensors({each.name: getattr(found, each.name) for each in dataclasses.fields(found)}, path)
    elif isinstance(found, Mapping):
        for key, value in found.items():
            if not str(key).endswith(("seconds", "_in")):  # how long it took
                yield from tensors(value, f"{path}.{key}")
    elif isinstance(found, list | tuple):
        for i, value in enumerate(found):
            yield from tensors(value, f"{path}.{i}")


@contextlib.contextmanager
def modes(root: nn.Module, every: int) -> Iterator[dict[str, bool]]:
    """Every so many-th module in training mode."""
    for i, module in enumerate(root.modules()):
        module.training = i % every == 0
    try:
        yield modes_of(root)
    finally:
        root.eval()


def modes_of(root: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in root.named_modules()}


EVERYWHERE = (
    "activation_means", "attribute", "causal_importances", "component_acts", "delta_writes", "edges_into", "importance_masks",
    "logit_lens", "score", "sweep", "token_statistics", "top_contexts",
)  # fmt: skip
"""Questions that run the model themselves, held on every host; what others are made of is held on one."""


@pytest.mark.parametrize(
    ("host", "name"), [(host, name) for host in HOSTS for name in (QUESTIONS if host == HOSTS[0] else EVERYWHERE)]
)
def test_a_question_in_training_mode_has_the_answer_of_evaluation_mode(host: str, name: str) -> None:
    about, ask = given(host), QUESTIONS[name]
    root = module_of(about.model)
    expected = dict(tensors(ask(about)))
    assert expected
    with modes(root, 2) as before:
        assert any(isinstance(module, nn.Dropout) and module.training for module in root.modules())
        found = dict(tensors(ask(about)))
        assert modes_of(root) == before
    assert found.keys() == expected.keys()
    for where, value in expected.items():
        assert torch.allclose(found[where], value, rtol=0, atol=0, equal_nan=True), where


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != "logit_lens"])
def test_the_mode_is_put_back_after_an_error(name: str) -> None:
    """The model fails in the middle of a pass."""
    about = given("transformers")
    root = module_of(about.model)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = root.get_submodule("transformer.h.1").register_forward_hook(fail)
    try:
        with modes(root, 3) as before, pytest.raises(RuntimeError, match="in the middle"):
            QUESTIONS[name](about)
        with modes(root, 3):
            assert modes_of(root) == before
    finally:
        handle.remove()
    with modes(root, 2) as before:
        tlpd.component_acts(about.model, about.dec, about.rows)
        assert modes_of(root) == before


@pytest.mark.parametrize("host", HOSTS)
def test_contexts_leave_the_mode_to_the_user(host: str) -> None:
    about = given(host)
    root, masks = module_of(about.model), about.dec.masks().ablate(SITES[0], 0)
    opened = [
        tlpd.patched(about.model, about.dec, masks),
        tlpd.patched_acts(about.model, about.dec, tlpd.act_patches(about.dec).scale(SITES[0], 0, 2.0)),
        tlpd.edited_weights(about.model, about.dec, masks),
        tlpd.perturbed(about.model, about.subnetworks, {0: 0.1}),
    ]
    if host == "transformer_bridge":
        opened.append(tlpd.attached(about.model, about.dec))
    for context in opened:
        with modes(root, 2) as before, context:
            assert modes_of(root) == before
            tlpd.score(about.model, about.task, about.metric)
            assert modes_of(root) == before
