"""Tables of what commands find out beyond records' own: next tokens, scores before and after, members, published figures."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tl_paramdecomp.analysis.next_tokens import NextTokens
from tl_paramdecomp.analysis.records import plain_table

if TYPE_CHECKING:
    from rich.table import Table

SHARES = ("answer probability", "accuracy: answer likeliest", "accuracy: answer above wrong", "probability difference")
"""Scores that are shares of 1."""


def next_token_table(columns: Mapping[str, NextTokens]) -> "Table":
    """Next tokens side by side, one column for each way of running the model."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(f"{p:6.1%} {escape(token.strip() or repr(token))}" for token, p in row))
    return table


def score_table(title: str, before: Mapping[str, float], after: Mapping[str, float]) -> "Table":
    """Means of scores, one column for each way of running the model."""
    table = plain_table(title, "mean over prompts", "model", "patched")
    for name in after:
        values = [side.get(name, math.nan) for side in (before, after)]
        table.add_row(name, *("" if math.isnan(v) else f"{v:.1%}" if name in SHARES else f"{v:.4f}" for v in values))
    return table


def members_table(components: Mapping[str, Sequence[int]], of: Mapping[str, int]) -> "Table":
    """A circuit's components by site, runs of neighbours as a range."""
    table = plain_table("Components of the circuit", "site", "inside", "of")
    table.add_column("components", overflow="fold")
    for site, chosen in components.items():
        if chosen:
            table.add_row(site, str(len(chosen)), str(of[site]), ranges(chosen))
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as text, neighbours drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def reproduced_table(record: Mapping[str, Any]) -> "Table":
    """What `reproduce` found: one row per figure, one column per seed, and one of what is published."""
    title = f"{record['name']}: {record['settings']['steps']} steps"
    table = plain_table(title, "figure", *(f"seed {result['seed']}" for result in record["seeds"]), "published")
    sides = [_figures(result) for result in (*record["seeds"], record["expected"])]
    for figure in sides[0]:
        values = [side.get(figure, "") for side in sides]
        table.add_row(figure, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return table


def _figures(result: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures by name, those of sites and other parts one by one."""
    rows: dict[str, Any] = {}
    for key, value in result.items():
        name = f"{prefix}{key if prefix else key.replace('_', ' ')}"
        if isinstance(value, Mapping) and not key.endswith(("by_site", "feature_scores")):
            rows |= _figures(value, f"{name}: ")
        elif isinstance(value, int | float) and key not in ("seed", "target_seed"):
            rows[name] = value
    return rows
