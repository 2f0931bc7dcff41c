"""The table that `tl-paramdecomp reproduce` prints."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def result_table(record: dict[str, Any]) -> Table:
    """One row per figure, one column per seed, and one of what is published."""
    table = Table(title=f"{record['name']}: {record['settings']['steps']} steps", title_justify="left")
    for column in ("figure", *(f"seed {result['seed']}" for result in record["seeds"]), "published"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    sides = [*(_rows(result) for result in record["seeds"]), _rows(record["expected"])]
    for row in sides[0]:
        table.add_row(row, *(_shown(side.get(row)) for side in sides))
    return table


def _rows(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures by name, those of sites and other parts one by one."""
    rows: dict[str, Any] = {}
    for key, value in result.items():
        name = f"{prefix}{key if prefix else key.replace('_', ' ')}"
        if isinstance(value, Mapping) and not key.endswith(("by_site", "feature_scores")):
            rows |= _rows(value, f"{name}: ")
        elif isinstance(value, int | float) and key not in ("seed", "target_seed"):
            rows[name] = value
    return rows


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
