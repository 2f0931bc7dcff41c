"""Which rows a model can read: how many tokens it has, how many positions, and whether padding makes a difference."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters.shortcuts import probe_tokens
from tl_paramdecomp.errors import DataError, UnsupportedModelError
from tl_paramdecomp.sites import check_dense, check_mask_values

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter

ROUNDING, FLOAT32 = 8.0, 1e-4
"""Largest difference of two ways to read a row, relative to its largest logit: in units of the dtype's rounding, and at least,
as hosts compute some of it in float32 whatever the dtype is. Wrong positions make a larger one."""
N_PADDED = 2  # padded positions with which a model is tried out


@dataclass(frozen=True)
class Limits:
    """What rows must keep to; nothing where nothing is known of the model."""

    vocabulary: int | None = None  # tokens that the model has
    context: int | None = None  # positions of the longest row that it reads
    reads_tokens: bool = False
    """Whether rows are token ids; otherwise numbers that are no integers are a toy model's inputs."""

    @classmethod
    def of(cls, adapter: "ModelAdapter") -> "Limits":
        """Those of a model."""
        return cls(adapter.vocabulary_size, adapter.context_length, adapter.reads_tokens)

    def refuse(
        self,
        tokens: Shaped[Tensor, "rows ..."],
        what: str,
        attention_mask: Int[Tensor, "rows pos"] | None = None,
        row: int = 0,
    ) -> None:
        """See that the model can read rows (else DataError); `what` they are from, of which the first is its `row`.

        Where the attention mask is 0 stands a token all the same.
        """
        check_dense(tokens, what)
        if attention_mask is not None:
            check_mask_values(attention_mask)
        integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if self.reads_tokens and (not integers or tokens.ndim != 2 or not tokens.numel()):
            raise DataError(
                f"{what} holds {tokens.dtype} {list(tokens.shape)}, and the model reads token ids: integers [rows, pos], one "
                "token a row and one row at least."
            )
        if self.reads_tokens and tokens.dtype not in (torch.long, torch.int32):
            raise DataError(f"{what} holds {tokens.dtype}, which no embedding takes; give tokens.long().")
        if self.context is not None and tokens.ndim == 2 and tokens.shape[1] > self.context:
            longest = 0 if attention_mask is None else int(attention_mask[:, self.context :].any(1).int().argmax())
            raise DataError(
                f"{what} has in row {row + longest} {tokens.shape[1]} positions, and the model reads {self.context}; give "
                f"shorter rows, or cut them: token_batches(..., length={self.context})."
            )
        if self.vocabulary is None or not integers or not tokens.numel():
            return
        low, high = (int(value) for value in torch.aminmax(tokens.long()))
        if low >= 0 and high < self.vocabulary:
            return
        place = [int(i) for i in ((tokens.long() < 0) | (tokens.long() >= self.vocabulary)).nonzero()[0]]
        padding = attention_mask is not None and len(place) == 2 and not bool(attention_mask[place[0], place[1]])
        instead = "give rows made with the model's own tokenizer."
        if padding:
            instead = "where the attention mask is 0 the model looks it up too: put one of its tokens there, such as 0."
        raise DataError(
            f"{what} has in row {row + place[0]}{f', at position {place[1]},' if len(place) > 1 else ''} token "
            f"{int(tokens[tuple(place)])}, and the model has tokens 0 to {self.vocabulary - 1}; {instead}"
        )


UNLIMITED = Limits()  # where nobody says who reads the rows


# --- padding ----------------------------------------------------------------------------------------------------------
def starts_later(mask: Shaped[Tensor, "batch pos"], between: bool = False) -> bool:
    """Whether something that counts comes after something that does not: padding on the left or between, or `between` alone."""
    later = (mask[:, :-1] == 0) & (mask[:, 1:] != 0)
    return bool((later & ((mask != 0).cumsum(-1)[:, :-1] > 0) if between else later).any())


def positions_of(mask: Shaped[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Each token's place among those of its row that count; 0 where nothing counts yet."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class PaddingTrials:
    """What was found when one model's reading of padded rows was tried out; each is tried when such a row first comes."""

    def __init__(self) -> None:
        self._pads_left: bool | None = None
        self._bridged = 0  # columns of the widest rows whose gaps made no difference

    def check(self, adapter: "ModelAdapter", mask: Int[Tensor, "batch pos"]) -> None:
        """See that a model reads rows that are padded on the left, or between, as alone (else UnsupportedModelError).

        Local attention counts the columns of a gap, and so do some biases by distance, whatever the positions are.
        """
        kind, columns = type(adapter.model).__name__, mask.shape[1]
        if self._pads_left is None:
            tokens = _short(adapter, N_PADDED)
            self._pads_left = _reads_apart(adapter, tokens[:, :0], N_PADDED, tokens)
        if not self._pads_left:
            raise UnsupportedModelError(
                f"{kind} reads rows that are padded on the left otherwise than alone; pad them on the right "
                "(tokenizer.padding_side = 'right')."
            )
        if columns <= self._bridged or not starts_later(mask, between=True):
            return
        tokens = _short(adapter, 1)
        if not _reads_apart(adapter, tokens[:, :1], max(columns - tokens.shape[1], 1), tokens[:, 1:]):
            raise UnsupportedModelError(
                f"{kind} reads rows with gaps in their attention mask otherwise than without: its attention counts the "
                "columns between two tokens. Leave the masked tokens out, and pad at the end."
            )
        self._bridged = columns


def _short(adapter: "ModelAdapter", n_padded: int) -> Int[Tensor, "batch pos"]:
    tokens, room = probe_tokens(adapter), adapter.context_length
    return tokens if room is None else tokens[:, : max(room - n_padded, 1)]


def _reads_apart(
    adapter: "ModelAdapter", before: Int[Tensor, "batch left"], n_padded: int, after: Int[Tensor, "batch right"]
) -> bool:
    """Whether rows with so many padded columns between two parts give a model's own logits where they count."""
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
