"""Which rows a model can read: how many tokens it has, how many positions, and whether it reads tokens at all."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.errors import DataError
from tl_paramdecomp.sites import check_dense, check_mask_values

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter


@dataclass(frozen=True)
class Limits:
    """What rows must keep to; nothing where nothing is known of the model."""

    vocabulary: int | None = None
    """Tokens that the model has."""
    context: int | None = None
    """Positions of the longest row that it reads."""
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
        """See that the model can read rows.

        Args:
            tokens: The rows.
            what: Where they are from, for messages.
            attention_mask: 1 where a position counts; what stands at the others must be a token all the same.
            row: Number of the first of them in what they are from.

        Raises:
            DataError: A row is too long, no token ids, or holds an id that the model has not; names the row, the number and
                the limit. Or there is nothing to look at: no values, or a mask of anything but 0 and 1.
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
        raise DataError(
            f"{what} has in row {row + place[0]}{f', at position {place[1]},' if len(place) > 1 else ''} "
            f"token {int(tokens[tuple(place)])}, and the model has tokens 0 to {self.vocabulary - 1}; "
            + (
                "where the attention mask is 0 the model looks it up all the same: put any of its tokens there, such as 0."
                if padding
                else "give rows made with the model's own tokenizer."
            )
        )


UNLIMITED = Limits()
"""Where nobody says who reads the rows."""
