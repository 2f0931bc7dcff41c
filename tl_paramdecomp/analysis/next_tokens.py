"""What a model predicts next: probabilities, a metric of the logits at the last position, and how far masks move it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.methods.base import KL_NEEDS
from tl_paramdecomp.methods.divergence import KL
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.sites import check_rows

RowMetric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
"""From logits to one number per row, such as the log probability of an answer at the last position."""


def answer_log_prob(answers: tuple[int, ...]) -> RowMetric:
    """Log of the probability that the next token is one of the answers, at the last position."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return torch.log_softmax(logits[:, -1].float(), -1)[:, list(answers)].logsumexp(-1)

    return metric


def next_token_probs(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, " vocab"]:
    """Probabilities of the next token, of the model as it stands."""
    adapter = adapt(model)
    need_logits(adapter, "The next token's probabilities need", "ask for the outputs themselves")
    with torch.no_grad():
        return torch.softmax(adapter.forward(tokens)[0, -1].float(), -1)


@torch.no_grad()
def kl_divergence(
    target: Float[Tensor, "batch pos vocab"],
    output: Float[Tensor, "batch pos vocab"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> float:
    """KL(target || output) in nats, summed over the vocabulary, mean over the positions that count."""
    return KL(target, None if attention_mask is None else attention_mask.bool()).of(output).item()


def masked_kl(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    masks: Masks,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> float:
    """KL of the model with masked components from the model itself, on these tokens."""
    check_rows(tokens, attention_mask)
    adapter = adapt(model)
    need_logits(adapter, KL_NEEDS, "evaluate compares outputs by their mean square")
    with torch.no_grad():
        target = adapter.forward(tokens, attention_mask)
        with patched(model, decomposition, masks):
            return kl_divergence(target, adapter.forward(tokens, attention_mask), attention_mask)
