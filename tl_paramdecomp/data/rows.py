"""Rows of anything that users have: the one place where data of any form becomes batches."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.data.batch import TOKEN_COLUMNS, Batch, joined
from tl_paramdecomp.data.documents import TEXT_COLUMNS, TextRows
from tl_paramdecomp.data.sources import BatchSource, MadeSource, RowSource, StreamSource
from tl_paramdecomp.data.streams import items_of
from tl_paramdecomp.data.tables import Table, as_known
from tl_paramdecomp.data.token_batches import TokenBatches
from tl_paramdecomp.data.tokenizer import limits_of, row_tokenizer
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.sites import check_rows


def batch_source(
    data: Any,
    batch_size: int,
    seed: int = 0,
    tokenizer: Any = None,
    length: int | None = None,
    together: int = 1,
    model: Any = None,
    decomposition: Any = None,
    shuffled: bool = True,
) -> BatchSource:
    """Batches from data in any of the forms users have.

    Args:
        data: What `token_batches` gives; a tensor or array [rows, pos]; an iterable of batches ([batch, pos] tensors, pairs of
            those and their attention mask, or dicts with `tokens` or `input_ids` and perhaps `attention_mask`, such as a
            `BatchEncoding`) or of rows; such a dict; a function from the step's number to such a batch; a `datasets` Dataset
            or IterableDataset, a DataFrame, Series or Arrow table (`tables`) with such a column, or with a column of text; a
            list of texts.
        batch_size: Rows per batch, where the data comes as rows.
        seed: Order of the rows.
        tokenizer: For text; None: the model's.
        length: Of rows of text; None: as much as model and tokenizer take, at most 1024.
        together: Neighbouring rows that stay neighbours in a shuffle.
        model: Who reads the rows, on any host, or its adapter: what it cannot read is refused. None: nobody is asked.
        decomposition: Says how rows of text begin.
        shuffled: False: rows in the order of the data.

    Raises:
        DataError: The data is empty or of no such form.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; given {batch_size}.")
    if isinstance(data, BatchSource):
        return data
    if isinstance(data, TokenBatches):
        return data.source(batch_size, seed, model, tokenizer, together, decomposition, shuffled)
    limits, data = limits_of(model), as_known(data)

    def numbered(rows: Any, attention_mask: Tensor | None = None) -> RowSource:
        return RowSource(rows, batch_size, seed, attention_mask, together, shuffled, limits)

    def streamed(rows: Any) -> StreamSource:
        writer = rows.encode.rules if isinstance(rows, TextRows) else None
        return StreamSource(items_of(rows), batch_size, limits=limits, writer=writer)

    def text_rows(texts: Any, column: str = "text") -> TextRows:
        return TextRows(texts, row_tokenizer(model, tokenizer, decomposition=decomposition), length, column)

    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise DataError(f"A tensor of token rows is [rows, pos]; given {list(data.shape)}.")
        return numbered(data)
    if isinstance(data, Mapping | Batch):
        return numbered(*Batch.of(data))
    if callable(data) and not isinstance(data, Iterable):
        return MadeSource(data, limits)
    if getattr(data, "column_names", None) is not None:
        column = _column_of(data)
        if column not in TOKEN_COLUMNS:
            return streamed(text_rows(data, column))
        if isinstance(data, Table) and (whole := data.whole(column)) is not None:
            return numbered(*whole)
        return numbered(data) if hasattr(data, "__len__") else streamed(data)
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
        is_record = isinstance(first, Mapping) and "text" in first and not set(TOKEN_COLUMNS) & set(first)
        if isinstance(first, str) or is_record:
            return streamed(text_rows(data))
    return streamed(data)


def batches_of(
    data: Any, size: int, attention_mask: Any = None, *, model: Any = None, decomposition: Any = None
) -> Iterator[Batch]:
    """Rows in any of the forms of `batch_source`, read once and in their order, `size` at a time where they are no batches; an
    attention mask belongs to one tensor of rows, else SettingError; other errors as of `batch_source`."""
    if size < 1:
        raise SettingError(f"rows_at_once is at least 1; given {size}.")
    if isinstance(data, Mapping):
        if attention_mask is not None and data.get("attention_mask") is not None:
            raise SettingError("There are two attention masks, one in the data and one beside it; give one.")
        data = data if attention_mask is None else {**data, "attention_mask": attention_mask}
    elif isinstance(data := data if attention_mask is None else as_known(data), Tensor):  # those who ask may refuse it
        check_rows(data, attention_mask)
        masks = [None] * len(data) if attention_mask is None else attention_mask.split(size)
        yield from map(Batch, data.split(size) if len(data) else (), masks)
        return
    elif attention_mask is not None:
        raise SettingError("An attention mask belongs to one tensor of rows; give batches as pairs (tokens, mask).")
    yield from batch_source(data, size, model=model, decomposition=decomposition, shuffled=False).one_pass()


def rows_to_measure(
    data: Any, attention_mask: Any = None, rows: int = 64, *, model: Any = None, decomposition: Any = None
) -> Batch:
    """All rows of one tensor or dict, or the first `rows` of data of other forms, padded to the longest; errors as of
    `batches_of`."""
    if rows < 1:
        raise SettingError(f"rows must be at least 1; given {rows}.")
    if isinstance(data, Tensor):
        return Batch(data, attention_mask)
    if isinstance(data, Mapping) and set(TOKEN_COLUMNS) & set(data) and attention_mask is None:
        data = as_known(data)
        if not isinstance(data, Table):
            return Batch.of(data)
    taken: list[Batch] = []
    for batch in batches_of(data, rows, attention_mask, model=model, decomposition=decomposition):
        taken.append(batch)
        if sum(len(one.tokens) for one in taken) >= rows:
            break
    if not taken:
        raise DataError("There are no rows to measure on: the data gives no batch.")
    return joined(taken).rows(slice(rows)) if len(taken) > 1 else taken[0].rows(slice(rows))


def _is_pair_with_mask(data: Any) -> bool:
    """Whether data is (rows, mask) and no batches: of one shape, the second of nothing but 0 and 1."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, Tensor) for one in data)):
        return False
    rows, mask = data
    if rows.ndim != 2 or rows.shape != mask.shape or mask.layout != torch.strided or mask.is_meta:
        return False
    return mask.dtype == torch.bool or (not mask.is_floating_point() and bool(((mask == 0) | (mask == 1)).all()))


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
