"""What measurements leave behind: plain values and arrays that are kept in files and read as tables."""

import dataclasses
import io
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor

from tl_paramdecomp.analysis import record_files
from tl_paramdecomp.components.disk import in_short, writing
from tl_paramdecomp.errors import DecompositionFileError, MissingExtraError
from tl_paramdecomp.settings import as_declared, from_plain

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table
else:
    DataFrame = Table = Any

Row = dict[str, Any]
Kept = TypeVar("Kept", bound="Record")
WITH_WITHOUT = "with - without"
"""In headings, which way every effect is counted: a number with a component minus the number without it."""


class Record:
    """Base of frozen dataclasses whose fields JSON can hold, or tensors."""

    what: ClassVar[str]
    """Its name in files and messages."""
    arrays: ClassVar[tuple[str, ...]] = ()
    """Fields that hold arrays by name, which are kept as tensors; an array is a tensor, or nested lists of floats."""
    absent: ClassVar[Mapping[str, str]] = {}
    """What it means where a file lacks a field, in words."""
    width: ClassVar[int] = 110
    """Columns that its tables are printed in."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Tables for a terminal, by rich."""

    def footnotes(self) -> list[str]:
        """Lines below the tables."""
        return []

    def check(self) -> None:
        """See that its fields fit each other, where a type does not say so.

        Raises:
            ValueError: They do not.
        """

    def save(self, path: str | Path) -> Path:
        """Write it as JSON with a checksum; arrays as safetensors in a file of the same name beside it. What was there before
        stays until all is written.

        Raises:
            DecompositionFileError: It cannot be written there; a file that is not this record's is where its arrays belong; or
                a field holds what could not be read again.
            DiskSpaceError: There is no room.
        """
        path = Path(path)
        with writing(f"Could not save the {self.what} as {path}"):
            kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
            tensors = {f"{name}:{key}": _as_tensor(a) for name in self.arrays for key, a in kept[name].items()}
            kept |= {name: list(kept[name]) for name in self.arrays}
            record_files.save(path, self.what, kept, tensors if self.arrays else None, self._check_as_read)
        return path

    @classmethod
    def _check_as_read(cls, values: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> None:
        """See before it is written that it can be read again."""
        try:
            cls._made(values, tensors)
        except Exception as error:
            raise ValueError(f"it could not be read again ({in_short(error)})") from error

    @classmethod
    def _made(cls: type[Kept], values: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> Kept:
        missing = {f.name for f in dataclasses.fields(cls)} - values.keys()  # type: ignore[arg-type]
        if missing:  # also of those that have a default
            said = [cls.absent[name] for name in cls.absent if name in missing]
            raise ValueError("; ".join(said) or f"it has no {', '.join(sorted(missing))}")
        if tensors is not None:
            left = dict(tensors)
            for name in cls.arrays:
                values[name] = {key: left.pop(f"{name}:{key}") for key in as_declared(values[name], list[str])}
            if left:
                raise ValueError(f"there are arrays of nothing: {', '.join(left)}")
        made = cls.from_json(values)
        made.check()
        return made

    @classmethod
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Read what `save` wrote, or what version 0.1.0 did, whose files have no checksum.

        Raises:
            DecompositionFileError: A file is missing, damaged, too large, or something else.
        """
        path = Path(path)
        values, tensors = record_files.load(path, cls.what, bool(cls.arrays))
        try:
            return cls._made(values, tensors)
        except Exception as error:  # a damaged file may go wrong anywhere
            raise DecompositionFileError(
                f"{path} holds no {cls.what} ({in_short(error)}); write one with save()."
            ) from error

    @classmethod
    def from_json(cls: type[Kept], kept: dict[str, Any]) -> Kept:
        """One from its fields as JSON has them, arrays as tensors by key.

        Raises:
            TypeError: They are not of the types that it declares.
        """
        return from_plain(cls, kept)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=self.width)
        for table in self.tables():
            console.print(table)
        for line in self.footnotes():
            console.print(line, highlight=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def old_frame(self: Any) -> DataFrame:
    """The same as `to_frame`, by its old name, which the next release takes away."""
    warnings.warn("frame() is called to_frame(); the old name goes next.", DeprecationWarning, stacklevel=2)
    return self.to_frame()


def _as_tensor(array: Any) -> Tensor:
    """With memory of its own, as safetensors wants it."""
    made = array.detach() if isinstance(array, Tensor) else torch.tensor(array, dtype=torch.float64)
    return made.cpu().clone(memory_format=torch.contiguous_format)


def plain_table(title: str, first: str, *columns: str, rows: Iterable[Sequence[str]] = ()) -> Table:
    """A table whose first column holds words and whose others hold figures."""
    from rich import table, text

    made = table.Table(title=title, title_justify="left")
    made.add_column(first, overflow="fold")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*map(text.Text, row))  # tokens are not markup
    return made


def frame_of(rows: Any, columns: Sequence[str] | None = None) -> DataFrame:
    """Rows as a pandas frame.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("to_frame() needs pandas: pip install pandas.") from error
    return pandas.DataFrame(rows, columns=columns)  # type: ignore[arg-type]


def shown(value: float | int | None, places: int = 4) -> str:
    """A figure for a table; nothing where there is none."""
    return "" if value is None else f"{value:.{places}f}"


def form(name: str, all_needed: bool = True, /, **keys: Any) -> Any:
    """The form of a row: values of these types under these keys, perhaps among others."""
    return TypedDict(name, keys, total=all_needed)  # type: ignore[misc]
