"""What a model predicts next: probabilities, and a metric of the logits at the last position."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.outputs import need_logits

RowMetric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
"""From logits to one number per row, such as the log probability of an answer at the last position."""


def answer_log_prob(answers: tuple[int, ...]) -> RowMetric:
    """Log of the probability that the next token is one of the answers, at the last position."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return torch.log_softmax(logits[:, -1].float(), -1)[:, list(answers)].logsumexp(-1)

    return metric


def next_token_probs(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, " vocab"]:
    """Probabilities of the next token, of the model as it stands.

    Raises:
        UnsupportedModelError: It gives no logits.
    """
    adapter = adapt(model)
    need_logits(adapter, "The next token's probabilities need", "ask for the outputs themselves")
    with torch.no_grad():
        return torch.softmax(adapter.forward(tokens)[0, -1].float(), -1)
