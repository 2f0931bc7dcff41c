"""Padded token rows: where their tokens stand, and whether a model reads them as it reads them alone."""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters.shortcuts import probe_tokens, same

N_PADDED = 2
"""Padded positions with which a model is tried out."""


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
