"""Padded token rows: where their tokens stand, and whether a model reads them as it reads them alone."""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters.shortcuts import probe_tokens
from tl_paramdecomp.errors import UnsupportedModelError

ROUNDING, FLOAT32 = 8.0, 1e-4
"""Largest difference of two ways to read a row, relative to its largest logit: in units of the dtype's rounding, and at least,
as hosts compute some of it in float32 whatever the dtype is. Wrong positions make a larger one."""
N_PADDED = 2
"""Padded positions with which a model is tried out."""


def starts_later(mask: Shaped[Tensor, "batch pos"]) -> bool:
    """Whether something that counts comes after something that does not: padding on the left, or between."""
    return bool(((mask[:, :-1] == 0) & (mask[:, 1:] != 0)).any())


def positions_of(mask: Shaped[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Each token's place among those of its row that count; 0 where nothing counts yet."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def has_gaps(mask: Shaped[Tensor, "batch pos"]) -> bool:
    """Whether what does not count stands between tokens that do."""
    begun = (mask != 0).cumsum(-1)[:, :-1] > 0
    return bool(((mask[:, :-1] == 0) & (mask[:, 1:] != 0) & begun).any())


class PaddingTrials:
    """What was found when one model's reading of padded rows was tried out; each is tried when such a row first comes."""

    def __init__(self) -> None:
        self._pads_left: bool | None = None
        self._bridged = 0
        """Columns of the widest rows whose gaps made no difference."""

    def check(self, adapter: Any, mask: Int[Tensor, "batch pos"]) -> None:
        """See that a model reads rows that are padded on the left, or between, as it reads them alone.

        Raises:
            UnsupportedModelError: It does not.
        """
        if self._pads_left is None:
            self._pads_left = _pads_left(adapter)
        if not self._pads_left:
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} reads rows that are padded on the left otherwise than alone; pad them on "
                "the right (tokenizer.padding_side = 'right')."
            )
        columns = mask.shape[1]
        if columns <= self._bridged or not has_gaps(mask):
            return
        if not _bridges_gaps(adapter, columns):
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} reads rows with gaps in their attention mask otherwise than without: its "
                "attention counts the columns between two tokens. Leave the masked tokens out, and pad at the end."
            )
        self._bridged = columns


def _pads_left(adapter: Any) -> bool:
    """Whether rows padded on the left give a model's own logits where they count; tried out on a few tokens."""
    tokens = _short(adapter, N_PADDED)
    return _reads_apart(adapter, tokens[:, :0], N_PADDED, tokens)


def _bridges_gaps(adapter: Any, columns: int) -> bool:
    """Whether rows with gaps, of so many columns, give a model's own logits where they count; tried out on a few tokens.

    Local attention counts the columns of a gap, and so do some biases by distance, whatever the positions are.
    """
    tokens = _short(adapter, 1)
    return _reads_apart(adapter, tokens[:, :1], max(columns - tokens.shape[1], 1), tokens[:, 1:])


def _short(adapter: Any, n_padded: int) -> Int[Tensor, "batch pos"]:
    tokens, room = probe_tokens(adapter), adapter.context_length
    return tokens if room is None else tokens[:, : max(room - n_padded, 1)]


def _reads_apart(
    adapter: Any, before: Int[Tensor, "batch left"], n_padded: int, after: Int[Tensor, "batch right"]
) -> bool:
    padding = after.new_zeros(len(after), n_padded)
    rows = torch.cat([before, padding, after], 1)
    mask = torch.cat([torch.ones_like(before), padding, torch.ones_like(after)], 1)
    with torch.no_grad(), adapter.undisturbed():
        alone, padded = adapter.run(torch.cat([before, after], 1)), adapter.run(rows, mask)
    if alone.ndim != 3:
        return True
    kept = torch.cat([padded[:, : before.shape[1]], padded[:, before.shape[1] + n_padded :]], 1)
    bound = max(ROUNDING * torch.finfo(alone.dtype).eps, FLOAT32) * alone.abs().max().item()
    return (kept - alone).abs().max().item() <= bound
