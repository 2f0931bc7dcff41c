"""How well a model does a task: metrics of the logits at the answering positions, and one way to score a model as it stands.

Every metric gives one number per prompt and is computed in float32 at least. Logit difference: Wang et al., "Interpretability
in the wild", arXiv 2211.00593; probability difference over sets: Hanna et al., "How does GPT-2 compute greater-than?",
arXiv 2305.00586.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.identity import behind
from tl_paramdecomp.adapters.outputs import need_answers
from tl_paramdecomp.adapters.shortcuts import UNEMBEDDING
from tl_paramdecomp.adapters.wiring import find_module
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.errors import NormalisationError, ShapeError, TaskError
from tl_paramdecomp.settings import Count, fit
from tl_paramdecomp.sites import check_rows

TaskMetric = Callable[[Float[Tensor, "n vocab"], Task], Float[Tensor, " n"]]
"""From the logits at the answering positions to one number per prompt."""

Value = TypeVar("Value", float, Tensor)


class _Metric:
    """What most metrics have in common."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = False
    """Of a model without logits it would read hidden states as if they were."""

    def __init_subclass__(cls, name: str, **told: bool) -> None:
        for key, value in {"name": name, **told}.items():
            setattr(cls, key, value)

    def contrasts(self, task: Task) -> tuple[tuple[int, ...], ...]:
        """Wrong tokens of each prompt."""
        if not task.wrong:
            raise TaskError(
                f"The {self.name} contrasts answers with wrong tokens, and task {task.name!r} has none; use "
                "AnswerProbability or AnswerLoss, or give wrong tokens."
            )
        return task.wrong


@dataclass(frozen=True)
class LogitDifference(_Metric, name="logit difference"):
    """Mean logit of the answers minus mean logit of the wrong tokens: no logsumexp, linear in the logits.

    Raises:
        TaskError: The task has no wrong tokens.
    """

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        logits = _wide(logits, task)
        return _mean_at(logits, task.answers) - _mean_at(logits, self.contrasts(task))


@dataclass(frozen=True)
class AnswerProbability(_Metric, name="answer probability"):
    """Probability that the next token is one of the answers: a sum over them."""

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        return _log_probability(_wide(logits, task), task.answers).exp()


@dataclass(frozen=True)
class ProbabilityDifference(_Metric, name="probability difference"):
    """Probability of the answers minus probability of the wrong tokens, each summed: greater-than's own metric.

    Raises:
        TaskError: The task has no wrong tokens.
    """

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        logits = _wide(logits, task)
        right, wrong = (_log_probability(logits, of).exp() for of in (task.answers, self.contrasts(task)))
        return right - wrong


@dataclass(frozen=True)
class AnswerRank(_Metric, name="answer rank", higher_is_better=False, differentiable=False):
    """How many tokens have a larger logit than the best answer: 0 where an answer is first. Not differentiable."""

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        logits = _wide(logits, task).detach()
        values, real = _at(logits, task.answers)
        best = values.masked_fill(~real, -math.inf).amax(1, keepdim=True)
        return (logits > best).sum(1).to(logits.dtype).masked_fill(logits.isnan().any(1), math.nan)


@dataclass(frozen=True)
class AnswerLoss(_Metric, name="answer loss", higher_is_better=False):
    """Minus the log of the answers' summed probability, in nats."""

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        return -_log_probability(_wide(logits, task), task.answers)


@dataclass(frozen=True, eq=False)
class KLToClean(_Metric, name="KL to clean", higher_is_better=False):
    """KL(clean || run) of the next token, summed over the vocabulary, in nats.

    Attributes:
        clean_logits: Logits [n, vocab] of the model itself at the answering positions, one row for each prompt of the task
            (`answer_logits(model, task)`); no gradient goes into them.
    """

    clean_logits: Float[Tensor, "n vocab"]

    def __call__(self, logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, " n"]:
        if logits.shape != self.clean_logits.shape:
            raise ShapeError(
                f"KLToClean holds logits {list(self.clean_logits.shape)} and is given {list(logits.shape)}; for some of the "
                "prompts take metric.select(rows) along with task.select(rows)."
            )
        logits = _wide(logits, task)
        log_p, log_q = (torch.log_softmax(of, -1) for of in (self.clean_logits.detach().to(logits), logits))
        terms = log_p.exp() * (log_p - log_q)
        return terms.masked_fill(log_p == -math.inf, 0.0).sum(-1)  # what cannot come next costs nothing

    def select(self, rows: Any) -> "KLToClean":
        """The metric for some of the prompts."""
        return KLToClean(self.clean_logits[rows])


@dataclass(frozen=True, eq=False)
class TokenLoss(_Metric, name="token loss", reads_logits=True, higher_is_better=False):
    """Cross entropy of next tokens for plain rows, in nats: from logits [batch, pos, vocab] to a mean per row.

    Attributes:
        tokens: Rows [batch, pos], or one that all rows of logits are of.
        attention_mask: 1 where a position counts; a prediction counts where both its token and the next one do.

    Raises:
        DtypeError, ShapeError: These are not token rows of two positions or more, or the logits are of others.
        TaskError: A row has no position that counts.
    """

    tokens: Int[Tensor, "rows pos"]
    attention_mask: Int[Tensor, "rows pos"] | None = None

    def __post_init__(self) -> None:
        check_rows(self.tokens, self.attention_mask)
        if self.tokens.shape[1] < 2:
            raise ShapeError(f"A next token needs rows of two positions; given {list(self.tokens.shape)}.")
        if not bool(self.counts.any(1).all()):
            raise TaskError("A row has no two neighbouring positions that count, and so no next token to predict.")

    @property
    def counts(self) -> Bool[Tensor, "rows pos_1"]:
        """Which predictions count: true at a position where it and the next one do."""
        if self.attention_mask is None:
            return torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        mask = self.attention_mask.bool()
        return mask[:, 1:] & mask[:, :-1]

    def by_position(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos_1"]:
        """Cross entropy of each next token, 0 where none counts."""
        if logits.shape[1] != self.tokens.shape[1] or len(self.tokens) not in (1, len(logits)):
            raise ShapeError(f"TokenLoss holds rows {list(self.tokens.shape)}; given logits {list(logits.shape)}.")
        targets = self.tokens[:, 1:, None].to(logits.device, torch.long).expand(len(logits), -1, -1)
        losses = -torch.log_softmax(_float32(logits[:, :-1]), -1).gather(-1, targets).squeeze(-1)
        return losses.masked_fill(~self.counts.to(logits.device), 0.0)

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return self.by_position(logits).sum(1) / self.counts.to(logits.device).sum(1)


def default_metric(task: Task) -> LogitDifference | ProbabilityDifference | AnswerProbability:
    """The metric that a task is usually measured by; for each of them, higher is better.

    `LogitDifference` where the task has wrong tokens; `ProbabilityDifference` for greater-than and wherever the sets
    differ in size from prompt to prompt, as means over such sets are not alike; `AnswerProbability` without wrong tokens.
    """
    if not task.wrong:
        return AnswerProbability()
    sizes = {(len(answers), len(wrong)) for answers, wrong in zip(task.answers, task.wrong)}
    return ProbabilityDifference() if task.name == "greater_than" or len(sizes) > 1 else LogitDifference()


def score(
    model: Any, task: Task, metric: TaskMetric | None = None, *, batch_size: int = 64, corrupt: bool = False
) -> Float[Tensor, " n"]:
    """A metric for each prompt, of the model as it stands: patches that are open count.

    Only the answering positions are unembedded, where the host allows that; the numbers are those of a full pass.

    Args:
        metric: None: `default_metric(task)`.
        batch_size: Prompts in one pass.
        corrupt: Run the corrupt prompts; answers and wrong tokens stay those of the clean ones.

    Raises:
        SettingError: The batch size is below 1.
        TaskError: The task has no corrupt prompts, or the metric needs wrong tokens and there are none.
    """
    metric = default_metric(task) if metric is None else metric
    # one that holds something for each prompt selects it
    select = getattr(metric, "select", lambda rows: metric)
    return torch.cat([select(rows)(out, some) for rows, some, out in _in_batches(model, task, batch_size, corrupt)])


def answer_logits(model: Any, task: Task, *, batch_size: int = 64, corrupt: bool = False) -> Float[Tensor, "n vocab"]:
    """Logits at the answering positions, of the model as it stands; arguments and errors as `score`'s."""
    return torch.cat([logits for *_, logits in _in_batches(model, task, batch_size, corrupt)])


def mean_scores(
    model: Any, task: Task, unpatched: Float[Tensor, "n vocab"] | None = None
) -> tuple[dict[str, float], Float[Tensor, "n vocab"]]:
    """Means over prompts of the task's metrics by name (with the KL from `unpatched` logits [n, vocab]); and the logits."""
    logits, metric = answer_logits(model, task, batch_size=len(task)), default_metric(task)
    found = {metric.name: metric(logits, task), AnswerProbability.name: AnswerProbability()(logits, task)}
    found["accuracy: answer likeliest"] = (AnswerRank()(logits, task) == 0).double()
    if task.wrong:
        found["accuracy: answer above wrong"] = (ProbabilityDifference()(logits, task) > 0).double()
    if unpatched is not None:
        found["KL of the next token"] = KLToClean(unpatched)(logits, task)
    return {name: values.mean().item() for name, values in found.items()}, logits


def normalised_faithfulness(value: Value, full: float, none: float, tolerance: float = 1e-3) -> Value:
    """Where a metric lies between a model with everything ablated and the full model: (value - none) / (full - none).

    1 for the full model, 0 for none of it; beyond [0, 1] is possible. Means over prompts go in, not single prompts'.

    Args:
        value: The metric of a circuit, or several.
        full: That of the full model.
        none: That of the model with everything ablated, or corrupt.
        tolerance: Smallest distance of `full` and `none`, as a part of the larger of them in size.

    Raises:
        NormalisationError: They are closer than that, or closer than 1e-6, or not finite; the message gives all three.
    """
    distance, size = abs(full - none), max(abs(full), abs(none))
    if not math.isfinite(distance) or distance <= max(1e-6, tolerance * size):
        shown = f"{value.numel()} values" if isinstance(value, Tensor) else f"{value:.6g}"
        raise NormalisationError(
            f"The metric is {full:.6g} for the full model and {none:.6g} for none of it: too close to put "
            f"{shown} between them. Report the raw numbers, or take prompts or a metric on which the two differ."
        )
    return (value - none) / (full - none)


# --- logits at answers ------------------------------------------------------------------------------------------------
def _wide(logits: Float[Tensor, "n vocab"], task: Task) -> Float[Tensor, "n vocab"]:
    """Logits in float32 at least, seen to be the task's."""
    if logits.ndim != 2 or len(logits) != len(task):
        raise ShapeError(
            f"Task {task.name!r} has {len(task)} prompts; a metric takes their logits [n, vocab], not {list(logits.shape)}. "
            "From logits of all positions: task.at_answer(logits)."
        )
    largest = max(max(of) for of in (*task.answers, *task.wrong))
    if largest >= logits.shape[1]:
        raise TaskError(
            f"Task {task.name!r} names token {largest}, and the model has {logits.shape[1]}: it was made with another "
            "tokenizer."
        )
    return _float32(logits)


def _float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at(
    logits: Float[Tensor, "n vocab"], ids: Sequence[tuple[int, ...]]
) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
    """Logits of each prompt's tokens, filled up to the largest set, and which of them are real."""
    width = max(map(len, ids))
    index = torch.tensor([[*of, *[of[0]] * (width - len(of))] for of in ids], device=logits.device)
    real = torch.tensor([[True] * len(of) + [False] * (width - len(of)) for of in ids], device=logits.device)
    return logits.gather(1, index), real


def _mean_at(logits: Float[Tensor, "n vocab"], ids: Sequence[tuple[int, ...]]) -> Float[Tensor, " n"]:
    values, real = _at(logits, ids)
    return values.masked_fill(~real, 0.0).sum(1) / real.sum(1)


def _log_probability(logits: Float[Tensor, "n vocab"], ids: Sequence[tuple[int, ...]]) -> Float[Tensor, " n"]:
    """Log of the summed probability of each prompt's tokens."""
    values, real = _at(logits, ids)
    return values.masked_fill(~real, -math.inf).logsumexp(1) - logits.logsumexp(1)


# --- running ----------------------------------------------------------------------------------------------------------
def _in_batches(
    model: Any, task: Task, batch_size: int, corrupt: bool
) -> Iterator[tuple[slice, Task, Float[Tensor, "some vocab"]]]:
    fit(batch_size, Count, "batch_size")
    if corrupt and task.corrupt is None:
        raise TaskError(f"Task {task.name!r} has no corrupt prompts to score.")
    adapter = adapt(model)
    need_answers(adapter, task)
    # patched first: whether passes may end early is tried out once, and would be remembered of the patched model
    whole = _unembedding_is_patched(adapter) or not adapter.splits_at_unembedding
    for start in range(0, len(task), batch_size):
        rows = slice(start, start + batch_size)
        some = task.select(rows).to(adapter.device)
        tokens = some.corrupt if corrupt and some.corrupt is not None else some.clean
        with torch.no_grad():
            out = some.at_answer((adapter.forward if whole else adapter.hidden)(tokens, some.attention_mask))
            out = out if whole else adapter.unembed(out)
        yield rows, some, out


def _unembedding_is_patched(adapter: ModelAdapter) -> bool:
    """Whether a function stands at the unembedding, ours or a user's hook: it would miss a pass that ends before."""
    wiring = adapter.wirings.get(UNEMBEDDING)
    if wiring is None:
        return False
    if any(behind(name) == UNEMBEDDING for found in adapter.interceptions for name in found.fns):
        return True
    # TransformerBridge wraps the module, and a user's hooks are on the wrapper
    paths = [path.split(".") for path in (wiring.owner, wiring.x.path, wiring.y.path)]
    around = {".".join(path[:i]) for path in paths for i in range(1, len(path) + 1)}
    parts = (part for path in around for part in find_module(adapter.root, path).modules())
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)
