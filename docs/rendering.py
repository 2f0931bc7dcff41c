"""What every section of the results page is written with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Sequence[object]


def table(columns: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def origin(record: Mapping[str, Any]) -> str:
    """Command, date and versions of a run."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"```\n{record['command']}\n```\n\n{record['date']}; {versions}."
