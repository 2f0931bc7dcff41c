"""What measurements leave behind: plain values that are kept as JSON and read as tables."""

import dataclasses
import io
import json
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tl_paramdecomp.components.files import parse_json, read_text, replace_text
from tl_paramdecomp.components.plain import from_plain, in_short
from tl_paramdecomp.errors import DecompositionFileError

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
Kept = TypeVar("Kept", bound="Record")
WITH_WITHOUT = "with - without"
"""In headings, which way every effect is counted: a number with a component minus the number without it."""


class Record:
    """Base of frozen dataclasses whose fields JSON can hold."""

    what: ClassVar[str]
    """Its name in messages."""
    width: ClassVar[int] = 110
    """Columns that its tables are printed in."""

    @abstractmethod
    def tables(self) -> "list[Table]":
        """Tables for a terminal, by rich."""

    def footnotes(self) -> list[str]:
        """Lines below the tables."""
        return []

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all.

        Raises:
            DecompositionFileError: It cannot be written there.
        """
        path = Path(path)
        replace_text(path, json.dumps(dataclasses.asdict(self), indent=1))  # type: ignore[call-overload]
        return path

    @classmethod
    def load(cls: type[Kept], path: str | Path) -> Kept:
        """Read what `save` wrote.

        Raises:
            DecompositionFileError: The file is missing, damaged or something else.
        """
        try:
            return cls.from_json(parse_json(Path(path), read_text(Path(path)), finite=False))
        except Exception as error:  # a damaged file may go wrong anywhere
            raise DecompositionFileError(
                f"{path} holds no {cls.what} ({in_short(error)}); write one with save()."
            ) from error

    @classmethod
    def from_json(cls: type[Kept], kept: dict[str, Any]) -> Kept:
        """One from its fields as JSON has them.

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


def plain_table(title: str, first: str, *columns: str) -> "Table":
    """An empty table whose first column holds words and whose others hold figures."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
