"""Tables of the causal commands: scores before and after, effects by position, edges, a circuit's components."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tl_paramdecomp.analysis.effects.attributions import Attribution
from tl_paramdecomp.analysis.effects.edges import Graph
from tl_paramdecomp.analysis.records import WITH_WITHOUT, plain_table

SHARES = ("answer probability", "accuracy: answer likeliest", "accuracy: answer above wrong", "probability difference")
"""Scores that are shares of 1."""


def print_shown(console: Console, shown: Sequence[Table | str]) -> None:
    """Tables and lines, whose brackets are no markup; a title may be wider than its table."""
    for place, part in enumerate(shown):
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False)
            continue
        if part.title is not None:
            console.print(("\n" if place else "") + str(part.title), style="bold", highlight=False, markup=False)
            part.title = None
        console.print(part)


def next_token_columns(columns: Mapping[str, Sequence[tuple[str, float]]]) -> Table:
    """Next tokens side by side, one column for each way of running the model."""
    table = Table()
    for name in columns:
        table.add_column(name)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(f"{p:6.1%} {escape(token.strip() or repr(token))}" for token, p in row))
    return table


def score_table(title: str, before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Means of scores, one column for each way of running the model."""
    table = plain_table(title, "mean over prompts", "model", "patched")
    for name, value in after.items():
        table.add_row(name, _score(name, before.get(name)), _score(name, value))
    return table


def effect_rows(found: Attribution, top: int, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The strongest effects with the tokens at their positions."""
    return [
        {
            "site": e.site, "component": e.component, "position": e.position,
            "token": None if e.position is None else texts[e.position], "effect": e.value,
        }
        for e in found.top(top, delta=True)
    ]  # fmt: skip


def effect_table(found: Attribution, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Effects, strongest first."""
    columns = ("site", "component", "position", "token", f"effect\n{WITH_WITHOUT}")
    table = Table(title=f"Strongest effects on the {found.metric}, by {found.method}", title_justify="left")
    for name in columns if found.by_position else (c for c in columns if c not in ("position", "token")):
        table.add_column(name, justify="left" if name in ("site", "token") else "right", overflow="fold")
    for row in rows:
        component = "delta" if row["component"] is None else str(row["component"])
        where = (str(row["position"]), escape(row["token"])) if found.by_position else ()
        table.add_row(row["site"], component, *where, f"{row['effect']:+.4g}")
    return table


def edge_table(graph: Graph, top: int, texts: Sequence[str]) -> Table:
    """Edges of a graph of components, strongest first, with the tokens at their ends."""
    kind = "mean absolute edges over prompts" if graph.kind == "dataset" else "strongest edges"
    table = Table(title=f"Direct effects between components: {kind}", title_justify="left")
    for name in ("from", "to", f"edge\n{WITH_WITHOUT}"):
        table.add_column(name, justify="left" if name in ("from", "to") else "right", overflow="fold")
    for edge in graph.strongest(top):
        ends = (_node(graph, edge[end], texts) for end in ("source", "target"))
        table.add_row(*ends, f"{edge['value']:+.4g}")
    return table


def members_table(components: Mapping[str, Sequence[int]], of: Mapping[str, int]) -> Table:
    """A circuit's components by site, runs of neighbours as a range."""
    table = Table(title="Components of the circuit", title_justify="left")
    for name in ("site", "inside", "of", "components"):
        table.add_column(name, justify="right" if name in ("inside", "of") else "left", overflow="fold")
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


def _node(graph: Graph, node: int | str, texts: Sequence[str]) -> str:
    position = None if isinstance(node, str) else graph.nodes[node]["position"]
    return escape(graph.label(node) + ("" if position is None else f" {texts[position]}"))


def _score(name: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1%}" if name in SHARES else f"{value:.4f}"
