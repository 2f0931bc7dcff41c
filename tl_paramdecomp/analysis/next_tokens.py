"""What a model predicts next: probabilities, metrics of the last logits, continuations, and how far masks move it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.lens import LensAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.data.tokenizer import context_of
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.divergence import KL
from tl_paramdecomp.methods.step import KL_NEEDS
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.sites import check_rows

RowMetric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
"""From logits to one number per row, such as the log probability of an answer at the last position."""
NextTokens = Sequence[tuple[str, float]]
"""Likeliest next tokens as text, with their probabilities."""


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


def top_tokens(probs: Float[Tensor, " vocab"], tokenizer: Any, n: int) -> NextTokens:
    """The n likeliest tokens."""
    values, indices = probs.topk(min(n, len(probs)))
    return [(tokenizer.decode([i]), p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


def next_token_kl(before: Float[Tensor, " vocab"], after: Float[Tensor, " vocab"]) -> float:
    """KL of the second distribution from the first, in nats."""
    return (before * (before.clamp(min=1e-30).log() - after.clamp(min=1e-30).log())).sum().item()


def greedy_continuation(model: Any, tokens: Int[Tensor, "1 pos"], n: int) -> list[int]:
    """The likeliest next tokens, of the model as it stands, by the host's own `generate`, which ends with a text."""
    adapter = adapt(model)
    room, length = context_of(adapter.root), tokens.shape[1]
    if n < 1 or (room is not None and length + n > room):
        at_most = "" if room is None else f", and at most {room - length} behind this prompt"
        raise SettingError(f"--generate is at least 1{at_most}; given {n}.")
    with torch.no_grad():
        if isinstance(adapter, LensAdapter):
            ends = adapter.model.tokenizer is not None
            quiet = {"do_sample": False, "verbose": False, "stop_at_eos": ends, "return_type": "tokens"}
            out = adapter.model.generate(tokens, max_new_tokens=n, prepend_bos=False, **quiet)
        else:
            settings = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
            out = adapter.root.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)  # type: ignore[operator]
    return out[0, length:].tolist()
