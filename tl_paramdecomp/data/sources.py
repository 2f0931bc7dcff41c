"""Token batches from whatever users have: a tensor, batches, a `datasets` dataset, a text column.

Batches are a function of the seed and the step, so that a run resumed at a step sees what it would have seen. Every process
of a run sees the same batches and takes its own rows of them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters.limits import UNLIMITED, Limits
from tl_paramdecomp.data.batch import TOKEN_COLUMNS, Batch, as_tensor
from tl_paramdecomp.data.cursors import Items, items_of
from tl_paramdecomp.data.tables import Table, as_known
from tl_paramdecomp.data.text import TEXT_COLUMNS, TextRows
from tl_paramdecomp.data.vocabulary import RowRules, limits_of, refuse_other_tokenizer
from tl_paramdecomp.errors import DataError

__all__ = [
    "Batch", "BatchMaker", "BatchSource", "MadeSource", "RowSource", "StreamSource", "TextRows", "as_batch", "batch_source",
    "rows_of_rank", "stack_rows",
]  # fmt: skip


class BatchSource(ABC):
    """Where batches come from."""

    limits: Limits = UNLIMITED
    """Of who reads the rows; what does not keep to them is refused."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step, of all processes together; steps are asked for in order."""

    @property
    def info(self) -> dict[str, Any]:
        """What tells this data from other data, as values that JSON can hold; the same in every process."""
        return {"form": type(self).__name__}

    def check(self) -> None:  # noqa: B027
        """See that there is a first batch and that the model can read it, and stand as before.

        Raises:
            DataError: There is none, or it cannot.
        """

    def state(self) -> dict[str, Any]:
        """Where the source stands after the last batch, as values that JSON can hold."""
        return {"data": self.info}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where another source of the same data stood, so that the next batch is bit for bit what it would have given.

        Raises:
            DataError: It was of other data.
        """
        self._refuse_other(state)

    def _refuse_other(self, state: Mapping[str, Any]) -> None:
        known, own = state.get("data", self.info), self.info
        differing = [key for key in {**known, **own} if known.get(key) != own.get(key)]
        if differing:
            told = "; ".join(
                f"{key:.40} was {known.get(key)!r:.80} and is {own.get(key)!r:.80}" for key in differing[:5]
            )
            raise DataError(f"The run was begun with other data ({told}); give the same, or begin a new run.")


class BatchMaker(ABC):
    """Data that makes its own sources, as `token_batches` gives it."""

    @abstractmethod
    def source(
        self, batch_size: int | None = None, seed: int = 0, model: Any = None, tokenizer: Any = None, together: int = 1
    ) -> BatchSource:
        """A new source that stands at the beginning.

        Args:
            batch_size: Rows of a batch; None: as the data was made.
            seed: Order of the rows, where the data was made without one.
            model: Who reads the rows, on any host, or its adapter.
            tokenizer: The model's, where neither it nor the data has one.
            together: Neighbouring rows that stay neighbours in a shuffle.
        """


class RowSource(BatchSource):
    """Random access to rows: each pass is a new permutation, drawn from the seed, of groups of `together` neighbours."""

    def __init__(
        self, rows: Any, batch_size: int, seed: int, attention_mask: Tensor | None = None, together: int = 1,
        shuffled: bool = True, limits: Limits = UNLIMITED, info: Mapping[str, Any] | None = None, first: int = 0,
    ) -> None:  # fmt: skip
        if len(rows) == 0:
            raise DataError("The data has no rows.")
        if len(rows) % together or batch_size % together:
            raise DataError(
                f"Rows belong together by {together}; given {len(rows)} rows and a batch size of {batch_size}, which must both "
                "be multiples of that."
            )
        self.together, self.shuffled, self.limits, self.first = together, shuffled, limits, first
        self.rows, self.batch_size, self.seed, self.attention_mask = rows, batch_size, seed, attention_mask
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._info = None if info is None else dict(info)

    def batch(self, step: int) -> Batch:
        return self._picked(range(step * self.batch_size, (step + 1) * self.batch_size))

    def one_pass(self) -> Iterator[Batch]:
        """Batches of every row once; the last may be smaller."""
        for begin in range(0, len(self.rows), self.batch_size):
            yield self._picked(range(begin, min(begin + self.batch_size, len(self.rows))))

    def _picked(self, places: Iterable[int]) -> Batch:
        picked = [self._row(place) for place in places]
        if isinstance(self.rows, Tensor):
            index = torch.tensor(picked)
            return Batch(self.rows[index], None if self.attention_mask is None else self.attention_mask[index])
        rows = [self.rows[i] for i in picked]
        self._refuse(picked, rows)
        return stack_rows(rows)

    def _refuse(self, numbers: Iterable[int], rows: Sequence[Any]) -> None:
        """See that the model can read rows that are no tensor, each known by its number in the data."""
        for number, row in zip(numbers, rows, strict=True):
            one = stack_rows([row])
            self.limits.refuse(one.tokens, "The data", one.attention_mask, self.first + number)

    @property
    def info(self) -> dict[str, Any]:
        if self._info is None:
            self._info = {
                "form": "rows", "rows": len(self.rows), "digest": digest_of_rows(self.rows), "batch_size": self.batch_size,
                "seed": self.seed, "shuffled": self.shuffled, "together": self.together,
            }  # fmt: skip
        return self._info

    def check(self) -> None:
        if isinstance(self.rows, Tensor):
            self.limits.refuse(self.rows, "The tensor of token rows", self.attention_mask)
            return
        if isinstance(getattr(self.rows, "items", self.rows), Table):  # in memory: all of it is looked at
            self._refuse(range(len(self.rows)), [self.rows[i] for i in range(len(self.rows))])
        self.batch(0)

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.rows))
        if not self.shuffled:
            return offset
        if self._epoch[0] != epoch:
            number = self.seed * 1_000_003 + epoch  # of a clock's nanoseconds, more than torch takes
            generator = torch.Generator().manual_seed(number if abs(number) < 1 << 63 else number % (1 << 63))
            groups = torch.randperm(len(self.rows) // self.together, generator=generator) * self.together
            self._epoch = (epoch, (groups[:, None] + torch.arange(self.together)).flatten().tolist())
        return self._epoch[1][offset]


class MadeSource(BatchSource):
    """Batches made by a function of the step's number, which is asked for each step once."""

    def __init__(self, make: Callable[[int], Any], limits: Limits = UNLIMITED) -> None:
        self.make, self.limits = make, limits

    def batch(self, step: int) -> Batch:
        batch = as_batch(self.make(step))
        self.limits.refuse(batch.tokens, f"The batch made for step {step}", batch.attention_mask)
        return batch

    @property
    def info(self) -> dict[str, Any]:
        return {"form": "function of the step"}


class StreamSource(BatchSource):
    """Batches in the order an iterable gives them; begun again at its end where it can be."""

    def __init__(self, batches: Iterable[Any], batch_size: int, limits: Limits = UNLIMITED) -> None:
        self.items: Items = items_of(batches)
        self.batches, self.batch_size, self.limits = batches, batch_size, limits
        self._cursor = self.items.open()
        self._pass = 0
        self._next_step = 0
        self._first: tuple[Batch, dict[str, Any]] | None = None

    def batch(self, step: int) -> Batch:
        while self._next_step < step:  # where no state was restored, what was used is read again
            self._read()
        return self._read()

    @property
    def info(self) -> dict[str, Any]:
        return {"form": "stream", "batch_size": self.batch_size, "items": self.items.describe()}

    def check(self) -> None:
        if self._next_step == 0 and self._first is None:
            before = self.state()
            self._first = (self._read(), before)
            self._next_step = 0
            if isinstance(self.batches, list | tuple):  # in memory: all of it is looked at
                for i, item in enumerate(self.batches):
                    batch = stack_rows([item]) if _is_row(item) else as_batch(item)
                    self.limits.refuse(
                        batch.tokens, f"Item {i} of the {type(self.batches).__name__}", batch.attention_mask
                    )

    def state(self) -> dict[str, Any]:
        if self._first is not None:
            return self._first[1]
        return {"data": self.info, "step": self._next_step, "pass": self._pass, "place": self._cursor.place()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._refuse_other(state)
        if "place" not in state:
            return
        if self._first is not None and all(state[key] == self._first[1][key] for key in ("pass", "place")):
            return  # the batch that was looked at is the next one
        while self._pass < state["pass"] and self.items.replayed:
            for _ in self._cursor:
                pass
            self._pass, self._cursor = self._pass + 1, self.items.open()
        if self._pass != state["pass"]:
            self._pass, self._cursor = state["pass"], self.items.open()
        self._cursor.go_to(state["place"])
        self._next_step, self._first = state["step"], None

    def _read(self) -> Batch:
        self._next_step += 1
        if self._first is not None:
            batch, self._first = self._first[0], None
            return batch
        rows = [self._item()]
        if _is_row(rows[0]):
            rows += [self._item() for _ in range(self.batch_size - 1)]
            batch = stack_rows(rows)
        else:
            batch = as_batch(rows[0])
        self.limits.refuse(batch.tokens, f"The batch of step {self._next_step - 1}", batch.attention_mask)
        return batch

    def _item(self) -> Any:
        try:
            return next(self._cursor)
        except StopIteration:
            self._pass, self._cursor = self._pass + 1, self.items.open()
        try:
            return next(self._cursor)
        except StopIteration:
            raise DataError(
                "The data ran out before the steps did, and it cannot be read again: it is a one-time iterator. Give a list, "
                "a tensor, a dataset, or an object whose __iter__ begins anew."
            ) from None


def batch_source(
    data: Any,
    batch_size: int,
    seed: int,
    tokenizer: Any = None,
    length: int | None = None,
    together: int = 1,
    model: Any = None,
) -> BatchSource:
    """Batches from data in any of the forms users have.

    Args:
        data: What `token_batches` gives; a tensor or array [rows, pos]; an iterable of batches ([batch, pos] tensors, or dicts
            with `tokens` or `input_ids` and perhaps `attention_mask`, such as a `BatchEncoding`) or of rows; such a dict; a
            function from the step's number to such a batch; a `datasets` Dataset or IterableDataset, a DataFrame, Series or
            Arrow table (`tables`) with such a column, or with a text column and a tokenizer; a list of texts and a tokenizer.
        batch_size: Rows per batch, where the data comes as rows.
        seed: Order of the rows.
        tokenizer: For text.
        length: Row length for text; None: the tokenizer's own limit, at most 1024.
        together: Neighbouring rows that stay neighbours in a shuffle.
        model: Who reads the rows, on any host, or its adapter: what it cannot read is refused. None: nobody is asked.

    Raises:
        DataError: The data is empty or of no such form.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; given {batch_size}.")
    if isinstance(data, BatchSource):
        return data
    if isinstance(data, BatchMaker):
        return data.source(batch_size, seed, model, tokenizer, together)
    limits, data = limits_of(model), as_known(data)
    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise DataError(f"A tensor of token rows is [rows, pos]; given {list(data.shape)}.")
        return RowSource(data, batch_size, seed, together=together, limits=limits)
    if isinstance(data, Mapping):
        batch = as_batch(data)
        return RowSource(batch.tokens, batch_size, seed, batch.attention_mask, together, limits=limits)
    if callable(data) and not isinstance(data, Iterable):
        return MadeSource(data, limits)
    if getattr(data, "column_names", None) is not None:
        column = _column_of(data)
        if column not in TOKEN_COLUMNS:
            return StreamSource(_text_rows(data, tokenizer, length, limits, column), batch_size, limits)
        if isinstance(data, Table) and (whole := data.whole(column)) is not None:
            return RowSource(whole.tokens, batch_size, seed, whole.attention_mask, together, limits=limits)
        if hasattr(data, "__len__"):
            return RowSource(data, batch_size, seed, together=together, limits=limits)
        return StreamSource(data, batch_size, limits)
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise DataError(
            f"Data must be a tensor of token rows, batches, a table, or a dataset; given {type(data).__name__}. Files and "
            "datasets on the hub are opened with token_batches(name, model)."
        )
    if _is_pair_with_mask(data):
        raise DataError(
            "A pair of rows and their attention mask would be read as two batches; give {'tokens': rows, 'attention_mask': "
            "mask}, or a list with the pair in it."
        )
    if not isinstance(data, Iterator):  # a stream need not know its columns before it is read
        first = next(iter(data), None)
        if isinstance(first, str) or (
            isinstance(first, Mapping) and "text" in first and not set(TOKEN_COLUMNS) & set(first)
        ):
            return StreamSource(_text_rows(data, tokenizer, length, limits), batch_size, limits)
    return StreamSource(data, batch_size, limits)


def _is_pair_with_mask(data: Any) -> bool:
    """Whether data is (rows, mask) and no batches: of one shape, the second of nothing but 0 and 1."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, Tensor) for one in data)):
        return False
    rows, mask = data
    return (
        rows.ndim == 2
        and rows.shape == mask.shape
        and mask.layout == torch.strided
        and not mask.is_meta
        and (mask.dtype == torch.bool or (not mask.is_floating_point() and bool(((mask == 0) | (mask == 1)).all())))
    )


def _column_of(data: Any) -> str:
    """The column of a table or dataset that is read."""
    found = next((c for c in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if c in data.column_names), None)
    if found is None:
        what = data.kind if isinstance(data, Table) else "dataset"
        raise DataError(
            f"The {what} has columns {list(data.column_names)}; one must be 'tokens', 'input_ids' or 'text'. Name another with "
            "token_batches(data, model, column=...); rows of numbers whose columns have no names are an array [rows, pos]."
        )
    return found


def _text_rows(texts: Any, tokenizer: Any, length: int | None, limits: Limits, column: str = "text") -> TextRows:
    rows = TextRows(texts, tokenizer, length, column, limits.context)
    refuse_other_tokenizer(RowRules(tokenizer, eos=tokenizer.eos_token_id, n_vocab=limits.vocabulary))
    return rows


def rows_of_rank(batch: Batch, rank: int, world: int) -> Batch:
    """The rows of one process, of a batch that is the same in all.

    Args:
        batch: Of all processes together.
        rank: This process's number, from 0 on.
        world: How many there are.

    Raises:
        DataError: The rows cannot be divided so, or there is no such process.
    """
    rows = len(batch.tokens)
    if not 0 <= rank < world:
        raise DataError(f"Processes are numbered 0 to {world - 1}; given {rank}.")
    if rows % world:
        raise DataError(
            f"A batch of {rows} rows cannot be divided evenly among {world} processes; choose a multiple of {world}."
        )
    own = slice(rank * (rows // world), (rank + 1) * (rows // world))
    return Batch(batch.tokens[own], None if batch.attention_mask is None else batch.attention_mask[own])


def as_batch(item: Any) -> Batch:
    """A batch from a tensor or a dict."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        return Batch.of(item)
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        return Batch.of({"tokens": item[0], "attention_mask": item[1] if len(item) > 1 else None})
    tokens = as_tensor(item, "A batch")
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
        tokens.append(as_tensor(fields[column], "A row"))
        mask = fields.get("attention_mask")
        masks.append(torch.ones(len(tokens[-1]), dtype=torch.long) if mask is None else as_tensor(mask, "A mask"))
        if masks[-1].shape != tokens[-1].shape[:1]:
            raise DataError(f"A row {list(tokens[-1].shape)} has an attention mask {list(masks[-1].shape)} beside it.")
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return Batch(padded, None if bool(mask.all()) else mask)


def _is_row(item: Any) -> bool:
    if isinstance(item, Mapping):
        column = next((c for c in TOKEN_COLUMNS if c in item), None)
        item = item[column] if column is not None else item
    if isinstance(item, Batch) or (isinstance(item, list | tuple) and item and isinstance(item[0], Tensor)):
        return False
    return not isinstance(item, Mapping) and as_tensor(item, "The data").ndim == 1


def digest_of_rows(rows: Any, most: int = 256) -> str:
    """A hash of evenly spaced rows, and of the shape: cheap, also for rows that fill the memory."""
    picked = sorted({round(i * (len(rows) - 1) / max(1, most - 1)) for i in range(most)})
    found = hashlib.sha256(f"{getattr(rows, 'dtype', None)} {list(getattr(rows, 'shape', ()))}".encode())
    for i in picked if isinstance(rows, Tensor | Table) else picked[:1] + picked[-1:]:
        row = rows[i]
        row = (
            row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if isinstance(row, Tensor)
            else row
        )
        found.update(row if isinstance(row, bytes) else repr(row).encode())
    return found.hexdigest()[:16]
