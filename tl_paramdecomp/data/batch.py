"""The rows of one step, and how they are parsed of what users have."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    def of(cls, item: Any) -> "Batch":
        """Rows of a tensor or array, a pair of them and their attention mask, or a dict such as tokenizers give; DataError
        where it holds no such rows, or a mask of another shape."""
        found, column = _parsed(item)
        if found.tokens.ndim < 2:
            told = "" if column is None else f" as {column!r}"
            raise DataError(f"A batch of token rows is [batch, pos]; given {list(found.tokens.shape)}{told}.")
        return found

    def rows(self, some: slice) -> "Batch":
        """Some of the rows."""
        return Batch(self.tokens[some], None if self.attention_mask is None else self.attention_mask[some])

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(self.tokens.to(device), mask)


class Row(NamedTuple):
    """One row, and what of it counts."""

    tokens: Shaped[Tensor, " ..."]
    attention_mask: Int[Tensor, " pos"] | None


def row_or_batch(item: Any) -> "Row | Batch":
    """An item of data as the row or the batch that it is, else DataError."""
    found, _ = _parsed(item)
    if not found.tokens.ndim:
        raise DataError(f"A batch of token rows is [batch, pos]; given {list(found.tokens.shape)}.")
    return Row(*found) if found.tokens.ndim == 1 else found


def _parsed(item: Any) -> tuple[Batch, str | None]:
    """Tokens and attention mask of an item, and the column where the tokens were."""
    if isinstance(item, Batch | Row):
        return Batch(*item), None
    column, tokens, mask = None, item, None
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        tokens, mask = item[0], item[1] if len(item) > 1 else None
    elif isinstance(item, Mapping):
        column = next((c for c in TOKEN_COLUMNS if c in item), None)
        if column is None:
            raise DataError(f"A batch needs 'tokens' or 'input_ids'; given {sorted(map(str, item))}.")
        tokens, mask = item[column], item.get("attention_mask")
    tokens = as_tensor(tokens, "A batch" if column is None else repr(column))
    if mask is not None:
        mask = as_tensor(mask, "'attention_mask'")
        if mask.shape != tokens.shape[: min(2, max(1, tokens.ndim))]:
            raise DataError(
                f"The attention mask is {list(mask.shape)}, and the rows beside it, {column or 'tokens'!r}, "
                f"{list(tokens.shape)}."
            )
    return Batch(tokens, mask), column


def stack_rows(rows: Iterable[Row]) -> Batch:
    """One batch from rows; rows of unequal length are padded on the right, and the padding does not count."""
    rows = list(rows)
    masks = [torch.ones(len(t), dtype=torch.long) if mask is None else mask for t, mask in rows]
    padded, mask = (pad_sequence(part, batch_first=True) for part in ([row.tokens for row in rows], masks))
    return Batch(padded, None if bool(mask.all()) else mask)


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch from several, all padded on the right to the longest."""
    return stack_rows(
        Row(row, None if batch.attention_mask is None else batch.attention_mask[i])
        for batch in batches
        for i, row in enumerate(batch.tokens)
    )


def as_tensor(values: Any, what: str) -> Tensor:
    """Numbers of any form as a tensor; integers that no embedding takes become 64-bit ones; DataError where they are no
    numbers, or their rows differ in length."""
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


def bytes_of(tensor: Tensor) -> bytes:
    """What a tensor holds, for digests."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest_of_rows(rows: Any, most: int = 256, every: bool = False) -> str:
    """A hash of evenly spaced rows, and of the shape: cheap, also for rows that fill the memory; `every`: cheap to pick."""
    picked = sorted({round(i * (len(rows) - 1) / max(1, most - 1)) for i in range(most)})
    found = hashlib.sha256(f"{getattr(rows, 'dtype', None)} {list(getattr(rows, 'shape', ()))}".encode())
    for i in picked if every or isinstance(rows, Tensor) else picked[:1] + picked[-1:]:
        row = rows[i]
        found.update(bytes_of(row) if isinstance(row, Tensor) else repr(row).encode())
    return found.hexdigest()[:16]
