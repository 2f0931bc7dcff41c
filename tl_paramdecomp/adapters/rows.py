"""Token rows that a model can read: the numbers in them, how long they are, and which side of them is padded."""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters.shortcuts import probe_tokens, same
from tl_paramdecomp.errors import DataError, DtypeError

N_PADDED = 2
"""Padded positions with which a model is tried out."""


def check_tokens(
    tokens: Shaped[Tensor, "batch ..."], only_tokens: bool, vocabulary: int | None, context: int | None
) -> None:
    """Refuse rows that a model cannot read.

    Args:
        tokens: Token rows [batch, pos], or what else a plain module takes.
        only_tokens: The model reads nothing but token ids.
        vocabulary: Its token ids are below this; None: nothing is known.
        context: Positions of the longest row; None: no limit.

    Raises:
        DtypeError: The model reads token ids, and these are no whole numbers.
        DataError: A row is too long, or holds a number that is no token id.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        if only_tokens:
            raise DtypeError(f"Token ids are whole numbers (torch.long); given {tokens.dtype} {list(tokens.shape)}.")
        return
    if context is not None and tokens.ndim == 2 and tokens.shape[1] > context:
        raise DataError(
            f"These rows have {tokens.shape[1]} positions, and the model reads at most {context}; cut them: "
            f"tokens[:, :{context}]."
        )
    if vocabulary is None or not tokens.numel():
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        place = (tokens == wrong).nonzero()[0].tolist()
        where = f"row {place[0]}, position {place[1]}" if len(place) == 2 else f"entry {place}"
        raise DataError(
            f"{where} holds {wrong}, and the model's token ids are 0 to {vocabulary - 1}. Tokenise with the model's own "
            "tokenizer; where a position is padded give any token id and an attention mask that is 0 there."
        )


def starts_later(mask: Shaped[Tensor, "batch pos"]) -> bool:
    """Whether something that counts comes after something that does not: padding on the left, or between."""
    return bool(((mask[:, :-1] == 0) & (mask[:, 1:] != 0)).any())


def positions_of(mask: Shaped[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Each token's place among those of its row that count; 0 where nothing counts yet."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def pads_left(adapter: Any) -> bool:
    """Whether rows padded on the left give a model's own logits where they count; tried out on a few tokens."""
    tokens, room = probe_tokens(adapter), adapter.context_length
    tokens = tokens if room is None else tokens[:, : max(room - N_PADDED, 1)]
    padding = tokens.new_zeros(len(tokens), N_PADDED)
    mask = torch.cat([padding, torch.ones_like(tokens)], 1)
    with torch.no_grad(), adapter.undisturbed():
        alone, padded = adapter.run(tokens), adapter.run(torch.cat([padding, tokens], 1), mask)
    return alone.ndim != 3 or same(padded[:, N_PADDED:], alone)
