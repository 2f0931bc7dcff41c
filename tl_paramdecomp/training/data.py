"""Token batches from whatever users have: a tensor, batches, a `datasets` dataset, a text column.

Batches are a function of the seed and the step, so that a run resumed at a step sees what it would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.errors import DataError
from tl_paramdecomp.methods.base import Batch

TOKEN_COLUMNS = ("tokens", "input_ids")


class BatchSource(ABC):
    """Where batches come from."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step; steps are asked for in order."""

    def state(self) -> dict[str, Any]:
        """Where the source stands after the last batch, as JSON-able values; nothing where batches depend on the step alone."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Put a freshly made source where another stood, so that the next batch is what the other's would have been."""


class RowSource(BatchSource):
    """Random access to rows: each pass is a new permutation, drawn from the seed, of groups of `together` neighbours."""

    def __init__(
        self, rows: Any, batch_size: int, seed: int, attention_mask: Tensor | None = None, together: int = 1
    ) -> None:
        if len(rows) == 0:
            raise DataError("The data has no rows.")
        if len(rows) % together or batch_size % together:
            raise DataError(
                f"Rows belong together by {together}; given {len(rows)} rows and a batch size of {batch_size}, which must both "
                "be multiples of that."
            )
        self.together = together
        self.rows, self.batch_size, self.seed, self.attention_mask = rows, batch_size, seed, attention_mask
        self._epoch: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> Batch:
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        picked = [self._row(place) for place in places]
        if isinstance(self.rows, Tensor):
            index = torch.tensor(picked)
            return Batch(self.rows[index], None if self.attention_mask is None else self.attention_mask[index])
        return stack_rows([self.rows[i] for i in picked])

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.rows))
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            groups = torch.randperm(len(self.rows) // self.together, generator=generator) * self.together
            self._epoch = (epoch, (groups[:, None] + torch.arange(self.together)).flatten().tolist())
        return self._epoch[1][offset]


class MadeSource(BatchSource):
    """Batches made by a function of the step's number."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def batch(self, step: int) -> Batch:
        return as_batch(self.make(step))


class StreamSource(BatchSource):
    """Batches in the order an iterable gives them; begun again at its end where it can be."""

    def __init__(self, batches: Iterable[Any], batch_size: int) -> None:
        self.batches, self.batch_size = batches, batch_size
        self._iterator: Iterator[Any] = iter(batches)
        self._next_step = 0

    def batch(self, step: int) -> Batch:
        while self._next_step < step:  # a resumed run skips what was used
            self._read()
        return self._read()

    def _read(self) -> Batch:
        self._next_step += 1
        rows = [self._item()]
        if _is_row(rows[0]):
            rows += [self._item() for _ in range(self.batch_size - 1)]
            return stack_rows(rows)
        return as_batch(rows[0])

    def _item(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.batches)
        try:
            return next(self._iterator)
        except StopIteration:
            raise DataError(
                "The data ran out before the steps did, and it cannot be read again: it is a one-time iterator. Give a list, "
                "a tensor, a dataset, or an object whose __iter__ begins anew."
            ) from None


def batch_source(
    data: Any, batch_size: int, seed: int, tokenizer: Any = None, length: int | None = None, together: int = 1
) -> BatchSource:
    """Batches from data in any of the forms users have.

    Args:
        data: A tensor [rows, pos]; an iterable of batches ([batch, pos] tensors, or dicts with `tokens` or `input_ids` and
            perhaps `attention_mask`) or of rows; a function from the step's number to such a batch; a `datasets` Dataset
            or IterableDataset with such a column, or with a text column and a tokenizer.
        batch_size: Rows per batch, where the data comes as rows.
        seed: Order of the rows.
        tokenizer: For text.
        length: Row length for text; None: the tokenizer's own limit, at most 1024.
        together: Neighbouring rows that stay neighbours in a shuffle.

    Raises:
        DataError: The data is empty or of no such form.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; given {batch_size}.")
    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise DataError(f"A tensor of token rows is [rows, pos]; given {list(data.shape)}.")
        return RowSource(data, batch_size, seed, together=together)
    if isinstance(data, Mapping):
        batch = as_batch(data)
        return RowSource(batch.tokens, batch_size, seed, batch.attention_mask, together)
    if callable(data) and not isinstance(data, Iterable):
        return MadeSource(data)
    columns = getattr(data, "column_names", None)
    if columns is not None:
        column = next((c for c in (*TOKEN_COLUMNS, "text") if c in columns), None)
        if column is None:
            raise DataError(f"The dataset has columns {columns}; one must be 'tokens', 'input_ids' or 'text'.")
        if column == "text":
            return StreamSource(TextRows(data, tokenizer, length), batch_size)
        if hasattr(data, "__len__"):
            return RowSource(data, batch_size, seed, together=together)
        return StreamSource(data, batch_size)
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise DataError(f"Data must be a tensor of token rows, batches, or a dataset; given {type(data).__name__}.")
    if not isinstance(data, Iterator):  # a stream need not know its columns before it is read
        first = next(iter(data), None)
        if isinstance(first, str) or (
            isinstance(first, Mapping) and "text" in first and not set(TOKEN_COLUMNS) & set(first)
        ):
            return StreamSource(TextRows(data, tokenizer, length), batch_size)
    return StreamSource(data, batch_size)


class TextRows:
    """Texts joined by the end-of-text token and cut into rows, each beginning with the beginning-of-text token."""

    def __init__(self, texts: Iterable[Any], tokenizer: Any, length: int | None) -> None:
        if tokenizer is None:
            raise DataError(
                "Text needs a tokenizer: give a model that has one (model.tokenizer), or token rows instead of text."
            )
        self.texts, self.tokenizer = texts, tokenizer
        limit = getattr(tokenizer, "model_max_length", 1024)
        self.length = length if length is not None else int(min(limit, 1024))

    def __iter__(self) -> Iterator[Int[Tensor, " pos"]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [bos] if bos is not None else []
        kept: list[int] = []
        for item in self.texts:
            text = item["text"] if isinstance(item, Mapping) else item
            kept += self.tokenizer(text, add_special_tokens=False)["input_ids"] + ([eos] if eos is not None else [])
            body = self.length - len(start)
            while len(kept) >= body:
                yield torch.tensor(start + kept[:body])
                kept = kept[body:]


def as_batch(item: Any) -> Batch:
    """A batch from a tensor or a dict."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        column = next((c for c in TOKEN_COLUMNS if c in item), None)
        if column is None:
            raise DataError(f"A batch needs 'tokens' or 'input_ids'; given {sorted(item)}.")
        mask = item.get("attention_mask")
        return Batch(torch.as_tensor(item[column]), None if mask is None else torch.as_tensor(mask))
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        return Batch(item[0], item[1] if len(item) > 1 else None)
    tokens = torch.as_tensor(item)
    if tokens.ndim < 2:
        raise DataError(f"A batch of token rows is [batch, pos]; given {list(tokens.shape)}.")
    return Batch(tokens, None)


def stack_rows(rows: Sequence[Any]) -> Batch:
    """One batch from rows; rows of unequal length are padded on the right, and the padding does not count."""
    tokens, masks = [], []
    for row in rows:
        fields = row if isinstance(row, Mapping) else {"tokens": row}
        column = next((c for c in TOKEN_COLUMNS if c in fields), None)
        if column is None:
            raise DataError(f"A row needs 'tokens' or 'input_ids'; given {sorted(fields)}.")
        tokens.append(torch.as_tensor(fields[column]))
        masks.append(torch.as_tensor(fields.get("attention_mask", torch.ones(len(tokens[-1]), dtype=torch.long))))
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return Batch(padded, None if bool(mask.all()) else mask)


def _is_row(item: Any) -> bool:
    if isinstance(item, Mapping):
        column = next((c for c in TOKEN_COLUMNS if c in item), None)
        item = item[column] if column is not None else item
    if isinstance(item, Batch) or (isinstance(item, list | tuple) and item and isinstance(item[0], Tensor)):
        return False
    return not isinstance(item, Mapping) and torch.as_tensor(item).ndim == 1
