"""Tables and arrays of other libraries in memory, read as rows.

Their libraries are known by the types that are there already, and never imported here for their own sake.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_paramdecomp.data.batch import TOKEN_COLUMNS, Batch, as_tensor
from tl_paramdecomp.errors import DataError
from tl_paramdecomp.sites import check_mask_values


class Table(Sequence[Any]):
    """Records with columns, in memory; to be read as a `datasets` Dataset is."""

    def __init__(self, kind: str, columns: Mapping[Any, Any]) -> None:
        """Columns by name, each an array of any library or a list, of one length; `kind` says in messages what it was."""
        self.kind = kind
        self._columns = {str(name): _values(column) for name, column in columns.items()}
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"The {kind} has columns of unequal length: {lengths}.")
        self._rows, self.column_names = next(iter(lengths.values()), 0), list(lengths)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._rows:
            raise IndexError(i)
        return {name: self._cell(name, i) for name in self._columns}

    def whole(self, column: str) -> Batch | None:
        """All rows of a column of tokens, with their attention mask; None where they differ in length; DataError where one
        holds no numbers, or a mask of another length."""
        rows = self._arrays(column)
        masks = self._arrays("attention_mask") if "attention_mask" in self._columns else None
        for i, (row, mask) in enumerate(zip(rows, masks or (), strict=False)):
            if row.shape != mask.shape:
                raise DataError(f"Row {i} of the {self.kind} has {len(row)} tokens, and a mask of {mask.size}.")
        if len({len(row) for row in rows}) != 1:
            return None
        tokens = torch.from_numpy(np.stack(rows))
        if masks is None:
            return Batch(tokens, None)
        mask = torch.from_numpy(np.stack(masks)).long()
        check_mask_values(mask)
        return Batch(tokens, None if bool(mask.all()) else mask)

    def _cell(self, name: str, i: int) -> Any:
        cell = self._columns[name][i]
        cell = cell.tolist() if isinstance(cell, np.ndarray | np.generic) else cell
        return None if _missing(cell) else cell

    def _arrays(self, name: str) -> list[np.ndarray]:
        found = []
        for i, cell in enumerate(self._columns[name]):
            try:
                row = np.asarray(cell)
            except (TypeError, ValueError):
                row = np.asarray(None)
            if row.ndim != 1 or row.dtype.kind not in "iufb":
                told = f"text ({cell[:40]!r})" if isinstance(cell, str) else f"{type(cell).__name__} ({str(cell)[:40]})"
                told = "nothing" if _missing(cell) else told
                raise DataError(
                    f"Column {name!r} of the {self.kind} has in row {i} {told}; expected a list of token ids."
                )
            found.append(row.astype(np.int64) if row.dtype.kind in "iu" else row)
        return found


def as_known(data: Any) -> Any:
    """Tables and arrays of other libraries as a `Table` or a tensor; everything else as it is; DataError where an array holds
    neither numbers, nor lists of them, nor texts."""
    kind, pandas, arrow = type(data).__name__, sys.modules.get("pandas"), sys.modules.get("pyarrow")
    if isinstance(data, Tensor):
        return as_tensor(data, "The tensor")
    if isinstance(data, np.ndarray):
        return _one_column(data, kind) if data.dtype.kind in "OUT" and data.ndim == 1 else _numbers(data)
    if isinstance(data, Mapping):
        return _dict(data, kind)
    if pandas is not None and isinstance(data, pandas.DataFrame):
        if not data.columns.is_unique:
            raise DataError(f"The DataFrame has several columns of one name: {list(map(str, data.columns))}.")
        return Table(kind, {name: data[name] for name in data.columns})
    if pandas is not None and isinstance(data, pandas.Series | pandas.Index):
        return _one_column(data, kind)
    if arrow is not None and isinstance(data, arrow.Table | arrow.RecordBatch):
        return Table(kind, dict(zip(data.column_names, data.columns, strict=True)))
    if arrow is not None and isinstance(data, arrow.Array | arrow.ChunkedArray):
        return _one_column(data, kind)
    if hasattr(data, "__arrow_c_stream__") and not hasattr(data, "column_names"):  # polars, duckdb and others
        import pyarrow

        try:
            table = pyarrow.table(data)
        except (TypeError, ValueError):  # a column is no table
            return _one_column(pyarrow.chunked_array(data), kind)
        return Table(kind, dict(zip(table.column_names, table.columns, strict=True)))
    return data


def _dict(data: Mapping[str, Any], kind: str) -> Any:
    """A dict of columns as a table, where it is no batch of equally long rows already."""
    column = next((c for c in TOKEN_COLUMNS if c in data), None)
    if column is None:
        lists = [isinstance(v, Sequence | np.ndarray) and not isinstance(v, str | bytes) for v in data.values()]
        return Table(kind, data) if lists and all(lists) else data
    if isinstance(data[column], Tensor):
        return data
    try:
        torch.as_tensor(data[column])
    except (TypeError, ValueError, RuntimeError):
        return Table(kind, {name: v for name, v in data.items() if name in (column, "attention_mask")})
    return data


def _one_column(values: Any, kind: str) -> Table:
    """A column by itself, known by what it holds first."""
    first = next((cell for cell in _values(values) if not _missing(cell)), None)
    return Table(kind, {"text" if isinstance(first, str) else TOKEN_COLUMNS[0]: values})


def _missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ == "NAType" or (isinstance(cell, float) and cell != cell)


def _numbers(data: Any) -> Tensor:
    if isinstance(data, np.ma.MaskedArray):
        raise DataError(
            "A masked array's mask would be lost; give {'tokens': data.filled(0), 'attention_mask': (~data.mask).astype(int)}."
        )
    if data.dtype.kind not in "iufb":
        raise DataError(f"An array of token rows holds integers [rows, pos]; given {data.dtype} {list(data.shape)}.")
    return torch.from_numpy(np.ascontiguousarray(data.astype(np.int64) if data.dtype.kind in "iu" else data))


def _values(column: Any) -> Any:
    """A column as an array or list whose cells are Python's or numpy's own."""
    if isinstance(column, Tensor):
        return column.detach().cpu().numpy()
    if type(column).__module__.startswith("pyarrow"):
        return column.to_numpy(zero_copy_only=False)
    return column.to_numpy() if hasattr(column, "to_numpy") else column
