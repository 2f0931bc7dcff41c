"""Metrics of a task against plain hand-written forms, and scores of models against full passes, one prompt at a time."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.tasks import metrics
from tl_paramdecomp.analysis.tasks.makers import make_task
from tl_paramdecomp.analysis.tasks.metrics import (
    AnswerLoss,
    AnswerProbability,
    AnswerRank,
    KLToClean,
    LogitDifference,
    ProbabilityDifference,
    TokenLoss,
    answer_logits,
    default_metric,
    normalised_faithfulness,
    score,
)
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.errors import NormalisationError, SettingError, ShapeError, TaskError

from ..support import models
from ..support.models import BUILDERS, build, decomposition_of, logits, tolerance

VOCAB = 11
ALL = [LogitDifference(), AnswerProbability(), ProbabilityDifference(), AnswerRank(), AnswerLoss()]


def uneven() -> Task:
    """Prompts, answers and wrong tokens of different numbers."""
    return Task.from_tokens(
        "t", [[5, 6, 7], [8, 9], [1, 2, 3, 4]], [1, [2, 3], (4, 0, 10)], [[7, 5, 2, 9], [8], [9, 1]],
        [[5, 6, 1], [8, 2], [1, 2, 9, 4]],
    )  # fmt: skip


def numbers(n: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


# --- each metric by hand --------------------------------------------------------------------------------------------------
def by_hand(metric: Any, row: list[float], answers: tuple[int, ...], wrong: tuple[int, ...]) -> float:
    exps = [math.exp(x) for x in row]
    p = [e / sum(exps) for e in exps]
    return {
        "logit difference": sum(row[a] for a in answers) / len(answers) - sum(row[w] for w in wrong) / len(wrong),
        "answer probability": sum(p[a] for a in answers),
        "probability difference": sum(p[a] for a in answers) - sum(p[w] for w in wrong),
        "answer rank": min(sorted(row, reverse=True).index(row[a]) for a in answers),
        "answer loss": -math.log(sum(p[a] for a in answers)),
    }[metric.name]


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_metrics_are_what_they_say(metric: Any) -> None:
    task = uneven()
    for seed in range(5):
        given = numbers(3, seed=seed)
        expected = [by_hand(metric, row, a, w) for row, a, w in zip(given.tolist(), task.answers, task.wrong)]
        assert metric(given, task).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [m for m in ALL if m.differentiable], ids=lambda m: m.name)
def test_metrics_have_gradients(metric: Any) -> None:
    given = numbers(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: metric(x, uneven()), given)


def test_a_logit_difference_has_a_known_gradient() -> None:
    given = numbers(3).requires_grad_()
    LogitDifference()(given, uneven()).sum().backward()
    assert given.grad is not None and given.grad[1].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0, -1, 0, 0]


def test_the_rank_counts_larger_logits_only() -> None:
    task = Task.from_tokens("t", [[1], [1], [1]], [2, [0, 2], 2])
    given = torch.tensor([[5.0, 4.0, 3.0], [1.0, 4.0, 3.0], [3.0, 3.0, 3.0]])
    assert AnswerRank()(given, task).tolist() == [2, 1, 0]
    assert AnswerRank()(given.log() * torch.tensor([1.0, 1.0, math.nan]), task).isnan().all()


def test_kl_to_clean_by_hand_and_its_gradient() -> None:
    task, clean, run = uneven(), numbers(3, seed=1), numbers(3, seed=2)
    metric = KLToClean(clean)
    expected = []
    for p_row, q_row in zip(clean.softmax(-1).tolist(), run.softmax(-1).tolist()):
        expected.append(sum(p * math.log(p / q) for p, q in zip(p_row, q_row)))
    assert metric(run, task).tolist() == pytest.approx(expected, abs=1e-12)
    assert metric(clean, task).abs().max() < 1e-14
    run.requires_grad_()
    clean.requires_grad_()
    metric(run, task).sum().backward()
    assert clean.grad is None
    assert run.grad is not None and torch.allclose(run.grad, (run.softmax(-1) - clean.softmax(-1)).detach())
    some = metric.select([2, 0])(run[[2, 0]], task.select([2, 0]))
    assert some.tolist() == pytest.approx([expected[2], expected[0]])


def test_kl_to_clean_bears_tokens_that_cannot_come() -> None:
    clean = torch.tensor([[0.0, 1.0, -math.inf]])
    run = torch.tensor([[0.5, 1.0, -math.inf]], requires_grad=True)
    value = KLToClean(clean)(run, Task.from_tokens("t", [[1]], [0]))
    value.sum().backward()
    p, q = clean[0, :2].softmax(0), run[0, :2].softmax(0)
    assert value.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert run.grad is not None and not run.grad[0, :2].isnan().any()


@pytest.mark.parametrize("metric", ALL, ids=lambda m: m.name)
def test_half_precision_is_computed_in_float32(metric: Any) -> None:
    given = numbers(3).bfloat16()
    found = metric(given, uneven())
    assert found.dtype == torch.float32
    assert torch.allclose(found, metric(given.double(), uneven()).float(), atol=1e-5)


def test_token_loss_is_cross_entropy_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, 5), generator=generator)
    given = torch.randn(2, 5, VOCAB, generator=generator, dtype=torch.float64)
    metric = TokenLoss(tokens)
    expected = [[-math.log(given[r, i].softmax(-1)[tokens[r, i + 1]].item()) for i in range(4)] for r in range(2)]
    assert torch.allclose(metric.by_position(given), torch.tensor(expected, dtype=torch.float64))
    assert metric(given).tolist() == pytest.approx([sum(row) / 4 for row in expected])
    masked = TokenLoss(tokens, torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]))
    assert masked(given).tolist() == pytest.approx([sum(expected[0][:2]) / 2, sum(expected[1][1:]) / 3])
    with pytest.raises(ShapeError, match=r"rows \[2, 5\]; given logits \[2, 4, 11\]"):
        metric(given[:, :4])
    with pytest.raises(ShapeError, match="two positions"):
        TokenLoss(tokens[:, :1])
    with pytest.raises(TaskError, match="no two neighbouring"):
        TokenLoss(tokens, torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]))


def test_token_loss_is_a_row_metric_of_ablations() -> None:
    from tests.support.slow_ablations import ablation_effects

    model = build("gpt2")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    site = "blocks.0.mlp.W_in"
    effects = ablation_effects(model, decomposition_of(model, site), tokens, TokenLoss(tokens))[site]
    assert effects.shape == (models.C,) and bool((effects != 0).all())
    decomposition = decomposition_of(model, site)
    with tlpd.patched(model, decomposition, decomposition.masks().ablate(site, 3)):
        probs = logits(model, tokens)[0].softmax(-1)
    without = -sum(math.log(probs[i, tokens[0, i + 1]]) for i in range(4)) / 4
    probs = logits(model, tokens)[0].softmax(-1)
    whole = -sum(math.log(probs[i, tokens[0, i + 1]]) for i in range(4)) / 4
    assert effects[3].item() == pytest.approx(whole - without)


# --- defaults, refusals, normalisation ------------------------------------------------------------------------------------
def test_default_metrics() -> None:
    found = {
        name: default_metric(make_task(name, "micro-gpt2", n=4))
        for name in ("ioi", "pronoun", "greater_than", "induction")
    }
    assert found == {
        "ioi": LogitDifference(), "pronoun": LogitDifference(), "greater_than": ProbabilityDifference(),
        "induction": AnswerProbability(),
    }  # fmt: skip
    assert (
        default_metric(uneven()) == ProbabilityDifference()
        and default_metric(uneven().select([0])) == LogitDifference()
    )
    assert default_metric(make_task("greater_than", "micro-gpt2", n=1)) == ProbabilityDifference()
    assert all(metric.higher_is_better for metric in found.values())


@pytest.mark.parametrize("metric", [LogitDifference(), ProbabilityDifference()], ids=lambda m: m.name)
def test_contrasts_need_wrong_tokens(metric: Any) -> None:
    with pytest.raises(
        TaskError, match=f"{metric.name} contrasts answers with wrong tokens, and task 'induction' has none"
    ):
        metric(numbers(2, 50), make_task("induction", 50, n=2))


@pytest.mark.parametrize("metric", [*ALL, KLToClean(numbers(3))], ids=lambda m: m.name)
def test_logits_must_be_the_tasks(metric: Any) -> None:
    for given in (numbers(2), numbers(3)[0], numbers(3)[:, None]):
        with pytest.raises(
            (ShapeError, TypeError), match=r"(has 3 prompts|KLToClean holds logits|jaxtyping|Type-check)"
        ):
            metric(given, uneven())
    if metric.name != "KL to clean":
        with pytest.raises(TaskError, match="names token 10, and the model has 8"):
            metric(numbers(3, 8), uneven())


def test_normalised_faithfulness() -> None:
    assert normalised_faithfulness(2.5, 4.0, 1.0) == pytest.approx(0.5)
    assert normalised_faithfulness(4.0, 4.0, 1.0) == 1.0 and normalised_faithfulness(1.0, 4.0, 1.0) == 0.0
    assert normalised_faithfulness(0.5, 0.0, 2.0) == pytest.approx(0.75)
    several = normalised_faithfulness(torch.tensor([1.0, 2.5, 5.5]), 4.0, 1.0)
    assert several.tolist() == pytest.approx([0.0, 0.5, 1.5])


@pytest.mark.parametrize("full, none", [(3.0, 3.0), (3.0, 3.002), (0.0, 5e-7), (math.nan, 1.0), (math.inf, 1.0)])
def test_denominators_near_zero_are_refused_with_the_raw_numbers(full: float, none: float) -> None:
    with pytest.raises(NormalisationError, match=rf"{full:.6g} for the full model and {none:.6g} .* 1\.25 "):
        normalised_faithfulness(1.25, full, none)
    with pytest.raises(ArithmeticError, match="2 values"):
        normalised_faithfulness(torch.zeros(2), full, none)


def test_the_tolerance_can_be_moved() -> None:
    assert normalised_faithfulness(3.001, 3.002, 3.0, tolerance=1e-4) == pytest.approx(0.5)
    with pytest.raises(NormalisationError):
        normalised_faithfulness(1.0, 4.0, 3.0, tolerance=0.5)


# --- scores of models -----------------------------------------------------------------------------------------------------
@functools.cache
def tiny_task() -> Task:
    """Prompts of lengths 3 to 9 over the tiny models' vocabulary, whose answers and wrong tokens differ in number."""
    generator = torch.Generator().manual_seed(4)
    clean, corrupt, answers, wrong = [], [], [], []
    for i in range(7):
        length = 3 + (5 * i) % 7
        clean.append(torch.randint(0, models.VOCAB, (length,), generator=generator))
        corrupt.append(torch.randint(0, models.VOCAB, (length,), generator=generator))
        drawn = torch.randperm(models.VOCAB, generator=generator)[:5].tolist()
        answers.append(drawn[: 1 + i % 3])
        wrong.append(drawn[3 : 4 + i % 2])
    return Task.from_tokens("tiny", clean, answers, wrong, corrupt, pad_token=17)


def one_by_one(model: Any, task: Task, corrupt: bool = False) -> Tensor:
    """Answer logits from full passes over single unpadded prompts, the way the model's user calls it."""
    prompts = task.corrupt if corrupt else task.clean
    assert prompts is not None
    return torch.stack([logits(model, row[None, : int(last) + 1])[0, -1] for row, last in zip(prompts, task.last)])


@pytest.mark.parametrize("host", BUILDERS)
def test_scores_are_those_of_unpadded_prompts_one_by_one(host: str) -> None:
    model, task = build(host), tiny_task()
    assert adapt(model).splits_at_unembedding
    for corrupt in (False, True):
        expected = one_by_one(model, task, corrupt)
        for batch_size in (64, 3, 1):
            found = answer_logits(model, task, batch_size=batch_size, corrupt=corrupt)
            assert (found - expected).abs().max() < tolerance(model)
        for metric in (LogitDifference(), ProbabilityDifference(), AnswerLoss()):
            found = score(model, task, metric, batch_size=2, corrupt=corrupt)
            assert torch.allclose(found, metric(expected, task), atol=10 * tolerance(model))
    clean = KLToClean(one_by_one(model, task))
    assert torch.allclose(
        score(model, task, clean, batch_size=3, corrupt=True), clean(expected, task), atol=10 * tolerance(model)
    )


@pytest.mark.parametrize("host", models.GPT2_LIKE)
@pytest.mark.parametrize("site", ["blocks.1.attn.W_V", "blocks.0.mlp.W_out", "unembed.W_U"])
def test_patches_that_are_open_count(host: str, site: str) -> None:
    model, task = build(host), tiny_task()
    decomposition = decomposition_of(model, site)
    before = answer_logits(model, task)
    masks = decomposition.masks().ablate(site, [0, 2])
    with tlpd.patched(model, decomposition, masks):
        expected = one_by_one(model, task)
        found, scores = answer_logits(model, task), score(model, task, batch_size=4)
    assert (found - expected).abs().max() < tolerance(model)
    assert torch.allclose(scores, ProbabilityDifference()(expected, task), atol=10 * tolerance(model))
    assert (found - before).abs().max() > 0.01
    assert torch.equal(answer_logits(model, task), before)


@pytest.mark.parametrize("host", ["hooked", "bridge", "gpt2"])
def test_a_users_hook_at_the_unembedding_counts(host: str) -> None:
    model, task = build(host), tiny_task()
    answer_logits(model, task)  # how its passes may end is known before the hook comes
    module = model.lm_head if host == "gpt2" else model.unembed
    handle = module.register_forward_hook(lambda module, args, output: output * 2)
    try:
        assert (answer_logits(model, task) - one_by_one(model, task)).abs().max() < tolerance(model)
    finally:
        handle.remove()
    if host != "gpt2":
        with model.hooks([("unembed.hook_out", lambda tensor, hook: tensor * 2)]):
            assert (answer_logits(model, task) - one_by_one(model, task)).abs().max() < tolerance(model)


def test_a_patched_unembedding_is_not_remembered_as_the_models_own() -> None:
    model = build("gpt2")
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    answer_logits(model, tiny_task())
    handle.remove()
    assert adapt(model).splits_at_unembedding


@pytest.mark.parametrize("host", models.GPT2_LIKE)
def test_both_ways_to_the_logits_agree(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build(host), tiny_task()
    short = answer_logits(model, task)
    full: list[int] = []
    adapter = adapt(model)
    forward = adapter.forward
    monkeypatch.setattr(metrics, "_unembedding_is_patched", lambda adapter: True)
    monkeypatch.setattr(adapter, "forward", lambda *args: full.append(1) or forward(*args))
    monkeypatch.setattr(adapter, "unembed", None)
    assert (answer_logits(model, task) - short).abs().max() < tolerance(model) and full


def test_only_the_answering_positions_are_unembedded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build("gpt2"), tiny_task()
    adapter, seen = adapt(model), []
    unembed = adapter.unembed
    monkeypatch.setattr(adapter, "unembed", lambda x: seen.append(tuple(x.shape)) or unembed(x))
    score(model, task, batch_size=4)
    assert seen == [(4, 24), (3, 24)]


def test_scores_leave_no_graph_and_the_callers_grad_mode() -> None:
    model = models.gpt2()
    found = score(model, tiny_task())
    assert not found.requires_grad and torch.is_grad_enabled()


def test_scores_that_make_no_sense() -> None:
    model = build("gpt2")
    with pytest.raises(SettingError, match="given 0"):
        score(model, tiny_task(), batch_size=0)
    with pytest.raises(TaskError, match="no corrupt prompts"):
        score(model, Task.from_tokens("t", [[1, 2]], [3]), AnswerLoss(), corrupt=True)
    with pytest.raises(TaskError, match="names token 70, and the model has 61"):
        score(model, Task.from_tokens("t", [[1, 2]], [70]), AnswerLoss())


# --- micro-gpt2 -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["transformers", "transformer_bridge", "hooked_transformer", "nnsight"])
def test_micro_gpt2_solves_its_tasks(host: str) -> None:
    """And corrupt prompts take most of the metric away."""
    try:
        model = tlpd.load_micro_gpt2(host)
    except tlpd.errors.UnsupportedModelError as error:
        pytest.skip(str(error))
    for name, least in {"ioi": 0.95, "pronoun": 0.95, "greater_than": 0.95, "induction": 0.95}.items():
        task = make_task(name, model, n=100)
        clean, corrupt = score(model, task), score(model, task, corrupt=True)
        if name == "induction":
            right = score(model, task, AnswerRank()) == 0
        else:
            right = clean > 0
        assert right.double().mean() >= least, name
        # after year 01 every later year is still right, but so are those before it
        lost = 0.3 if name == "greater_than" else 0.9
        assert corrupt.mean() < (1 - lost) * clean.mean(), name
        assert 0 < normalised_faithfulness(clean.mean().item() * 0.9, clean.mean().item(), corrupt.mean().item()) < 1
    task = make_task("greater_than", model, n=100)
    assert score(model, task, AnswerProbability()).mean() > 0.9
    reference = answer_logits(model, task)
    assert score(model, task, KLToClean(reference)).max() < 1e-5
    assert score(model, task, KLToClean(reference), corrupt=True).mean() > 0.1
