"""What a model gives: logits over a vocabulary, or something else."""

from typing import TYPE_CHECKING

from tl_paramdecomp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter


def need_logits(adapter: "ModelAdapter", what: str, instead: str) -> None:
    """See that a model's outputs are logits, of which next tokens have probabilities.

    Args:
        adapter: The model's.
        what: What needs them, with its verb, for the message.
        instead: What works without.

    Raises:
        UnsupportedModelError: They are hidden states, or scores of classes.
    """
    if not adapter.gives_logits:
        raise UnsupportedModelError(
            f"{what} logits over a vocabulary, and {type(adapter.core).__name__} gives hidden states or scores of classes; "
            f"{instead}, or give the model with its language-model head."
        )


def need_answers(adapter: "ModelAdapter", prompts: object, metric: object = None) -> None:
    """See that a model can answer prompts, where they are a task's; metrics of other prompts are of whatever it gives.

    Raises:
        UnsupportedModelError: Its outputs are no logits.
    """
    if hasattr(prompts, "at_answer"):
        need_logits(adapter, "Answers of a task are scored by", "give token rows and a metric of the outputs")
    if getattr(metric, "reads_logits", False):
        need_logits(adapter, "The loss of next tokens needs", "give a metric of the outputs")
