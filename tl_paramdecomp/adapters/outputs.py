"""What a model gives: logits over a vocabulary, or something else."""

from typing import TYPE_CHECKING

from tl_paramdecomp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter


def need_logits(adapter: "ModelAdapter", what: str, instead: str) -> None:
    """See that a model's outputs are logits, of which next tokens have probabilities; else UnsupportedModelError.

    `what` needs them, with its verb; `instead` works without.
    """
    if not adapter.gives_logits:
        raise UnsupportedModelError(
            f"{what} logits over a vocabulary, and {type(adapter.core).__name__} gives hidden states or scores of classes; "
            f"{instead}, or give the model with its language-model head."
        )


def need_answers(adapter: "ModelAdapter", prompts: object, metric: object = None) -> None:
    """`need_logits` where prompts are a task's, with answers; metrics of other prompts are of whatever the model gives."""
    if hasattr(prompts, "at_answer"):
        need_logits(adapter, "Answers of a task are scored by", "give token rows and a metric of the outputs")
    if getattr(metric, "reads_logits", False):
        need_logits(adapter, "The loss of next tokens needs", "give a metric of the outputs")
