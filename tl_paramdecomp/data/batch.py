"""The rows of one step, and how tensors are made of what users have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.errors import DataError
from tl_paramdecomp.sites import check_dense

TOKEN_COLUMNS = ("tokens", "input_ids")
"""Names that token rows have beside an attention mask."""


SMALL_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)
"""Number types in which tokens are stored, and which no embedding takes."""


class Batch(NamedTuple):
    """Rows of one step."""

    tokens: Shaped[Tensor, "batch ..."]
    """Token rows [batch, pos]; for a model that is no language model, its inputs."""
    attention_mask: Int[Tensor, "batch pos"] | None
    """1 where a position counts, 0 at padding; None where all count."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Batch":
        """Rows of a dict with `tokens` or `input_ids`, and perhaps an `attention_mask`, such as tokenizers give.

        Raises:
            DataError: It holds no such rows, or a mask of another shape.
        """
        column = next((c for c in TOKEN_COLUMNS if c in fields), None)
        if column is None:
            raise DataError(f"A batch needs 'tokens' or 'input_ids'; given {sorted(map(str, fields))}.")
        tokens, mask = as_tensor(fields[column], repr(column)), fields.get("attention_mask")
        mask = None if mask is None else as_tensor(mask, "'attention_mask'")
        if tokens.ndim < 2:
            raise DataError(f"A batch of token rows is [batch, pos]; given {list(tokens.shape)} as {column!r}.")
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise DataError(
                f"The attention mask is {list(mask.shape)}, and the rows beside it, {column!r}, {list(tokens.shape)}."
            )
        return cls(tokens, mask)

    def rows(self, some: slice) -> "Batch":
        """Some of the rows."""
        return Batch(self.tokens[some], None if self.attention_mask is None else self.attention_mask[some])

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.tokens.to(device), mask)


def as_tensor(values: Any, what: str) -> Tensor:
    """Numbers of any form as a tensor; integers that no embedding takes become 64-bit ones.

    Raises:
        DataError: They are no numbers, or their rows differ in length.
    """
    try:
        found = torch.as_tensor(values)
        check_dense(found, what)
        return found.long() if found.dtype in SMALL_INTEGERS else found
    except DataError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} holds {type(values).__name__} that is no array of numbers ({error}); give token rows of equal length, or "
            "rows one by one, which are padded."
        ) from error
