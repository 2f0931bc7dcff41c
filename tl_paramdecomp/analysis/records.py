"""What measurements leave behind: plain values and arrays that are kept in files and read as tables.

A file is one JSON object with `format`, `record` (what it is of), the record's fields, each on a line of its own, and last the
`checksum` of all bytes before it. Where there are arrays, `tensors` holds the sha256 and size of `NAME.safetensors` beside it;
the two files are written as `files.write_pair` writes a decomposition's. Version 0.1.0 wrote the fields alone: no `format`, no
checksum, arrays as lists; such files are read, not written.
"""

import dataclasses
import io
import json
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

import torch
from torch import Tensor

from tl_paramdecomp.components.disk import distinct, in_short, parse_json, read_text, replace_text, writing
from tl_paramdecomp.components.files import Described, Pair, check_seal, read_pair, sealed, write_pair
from tl_paramdecomp.errors import DecompositionFileError, MissingExtraError
from tl_paramdecomp.settings import as_declared, from_plain

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table
else:
    DataFrame = Table = Any

FORMAT = 2
LARGEST = 1 << 27
"""Bytes of JSON that are written or read at most: 128 MiB."""
HEADER = ("format", "record", "tensors", "checksum")
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

    def __init_subclass__(cls, **told: Any) -> None:
        """With these of the class: `class Sweep(Record, what="sweep", arrays=("effects",))`."""
        for name, value in told.items():
            setattr(cls, name, value)

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

            def text_with(digest: str | None = None, size: int | None = None) -> str:
                about = {} if digest is None else {"tensors": {"sha256": digest, "bytes": size}}
                text = _as_text(path, {"format": FORMAT, "record": self.what, **kept, **about})
                # {1: 0, "1": 0} gives JSON that would be refused
                again = json.loads(text, object_pairs_hook=distinct)
                try:  # before anything is put in place
                    self._made(again, tensors if self.arrays else None)
                except Exception as error:
                    raise ValueError(f"it could not be read again ({in_short(error)})") from error
                return text

            if self.arrays:
                pair = _pair(path)
                _refuse_other_arrays(pair)
                write_pair(pair, tensors, text_with)
            else:
                replace_text(path, text_with())
        return path

    @classmethod
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Read what `save` wrote, or what version 0.1.0 did, whose files have no checksum.

        Raises:
            DecompositionFileError: A file is missing, damaged, too large, or something else.
        """
        path, tensors = Path(path), None
        values = _read(path, cls.what)
        if cls.arrays and "format" in values:
            values, mapped = read_pair(_pair(path), lambda: _described(path, _read(path, cls.what)))
            # copies: what is read is the file itself as long as nobody writes to it
            tensors = {name: tensor.clone() for name, tensor in mapped.items()}
        try:
            return cls._made(values, tensors)
        except Exception as error:  # a damaged file may go wrong anywhere
            raise DecompositionFileError(
                f"{path} holds no {cls.what} ({in_short(error)}); write one with save()."
            ) from error

    @classmethod
    def _made(cls: type[Kept], values: dict[str, Any], tensors: Mapping[str, Tensor] | None) -> Kept:
        """From all that a file holds."""
        values = {key: value for key, value in values.items() if "format" not in values or key not in HEADER}
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
    """Rows as a pandas frame."""
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


# --- files ------------------------------------------------------------------------------------------------------------
def _read(path: Path, what: str) -> dict[str, Any]:
    """Fields and header, the checksum compared."""
    text = read_text(path, LARGEST)
    values = parse_json(path, text, finite=False)
    if not isinstance(values, dict):
        raise DecompositionFileError(f"{path} holds no {what} but {values!r:.40}; write one with save().")
    if "format" not in values:
        return values
    if type(values["format"]) is not int or values["format"] != FORMAT:
        raise DecompositionFileError(
            f"{path} is of format {values['format']!r:.40}; this version reads records of format {FORMAT} and those of 0.1.0. "
            "Install the version that wrote it."
        )
    check_seal(path, text)
    if values.get("record") != what:
        raise DecompositionFileError(
            f"{path} holds no {what} but a record of {values.get('record')!r:.40}; open it with the class that wrote it."
        )
    return values


def _described(path: Path, values: dict[str, Any]) -> Described:
    described = values.get("tensors")
    if not isinstance(described, dict) or type(described.get("bytes")) is not int:
        raise DecompositionFileError(f"{path} does not say what arrays it has; it is damaged.")
    return Described(values, described.get("sha256"), described["bytes"])


def _pair(path: Path) -> Pair:
    return Pair(path, path.with_name(f"{path.name.removesuffix('.json')}.safetensors"))


def _refuse_other_arrays(pair: Pair) -> None:
    """The user named one file; the other must not be somebody's."""
    if not os.path.lexists(pair.tensors):
        return
    try:
        text = read_text(pair.json, LARGEST, follow=False)
        found = parse_json(pair.json, text, finite=False)
        check_seal(pair.json, text)
        is_ours = isinstance(found.get("tensors"), dict)
    except (DecompositionFileError, AttributeError):
        is_ours = False
    if not is_ours:
        raise DecompositionFileError(
            f"{pair.tensors} is where the arrays belong, and {pair.json.name} does not say that they are its own; choose "
            "another name, or move that file away."
        )


def _as_text(path: Path, values: Mapping[str, Any]) -> str:
    """An object with a line for each field, and its checksum."""
    lines = [f" {json.dumps(key)}: {json.dumps(value, default=_plain)}" for key, value in values.items()]
    text = sealed("{\n" + ",\n".join(lines))
    if len(text) > LARGEST:
        raise ValueError(
            f"{path.name} would have {len(text)} bytes, and no more than {LARGEST} are read again; keep less"
        )
    return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{value!r:.80} is nothing that JSON has")


def _as_tensor(array: Any) -> Tensor:
    """With memory of its own, as safetensors wants it."""
    made = array.detach() if isinstance(array, Tensor) else torch.tensor(array, dtype=torch.float64)
    return made.cpu().clone(memory_format=torch.contiguous_format)
