"""What a comparison of methods found: curves against sparsity, matched figures, areas, stability, splitting.

One number of one run says little: methods are compared where they are equally sparse. A method's curve is its KL against
log L0 (or log active parameters) for one seed, straight between its runs, and nowhere else: figures that a curve does not
reach are left empty. The area under a curve is given as mean height over the range that all curves share.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from tl_paramdecomp.analysis.evaluation.result import distance_name
from tl_paramdecomp.analysis.records import DataFrame, Record, Row, Table, form, frame_of, old_frame, plain_table, shown

Metric = Literal["rounded", "stochastic", "adversarial", "importance", "unmasked"]
Axis = Literal["l0", "active_parameters"]

HEADLINE: tuple[Metric, ...] = ("rounded", "stochastic", "adversarial")
AXES: dict[Axis, str] = {"l0": "L0", "active_parameters": "active parameters"}
SHARES = (1 / 4, 1 / 8, 1 / 16)
"""L0 at which methods are compared, as shares of the summed ranks of the matrices."""


Settled = form("Settled", seeds=list[int])
"""What of a protocol curves depend on."""
Point = form(
    "Point", method=str, sparsity=float, seed=int, l0=float, active_parameters=float, active=int, components=int,
    **dict.fromkeys((*get_args(Metric), "permuted"), float | None), zero=float,
)  # fmt: skip
StabilityRow = form("StabilityRow", method=str, sparsity=float, trained=dict[str, float], untrained=dict[str, float])
SplittingRow = form(
    "SplittingRow", method=str, capacity=float, components=int, active=int, split=float | None, l0=float, rounded=float | None
)  # fmt: skip


@dataclass(frozen=True)
class Comparison(Record, what="comparison", width=120):
    """Runs of several methods at several sparsities and seeds, all under one protocol; KL in nats per token."""

    protocol: Annotated[Row, Settled]
    """What was fixed before the first run: sites, budget, seeds, sparsities, data, adversary."""
    methods: dict[str, Row]
    """Settings by label."""
    ranks: int
    """Summed ranks of the matrices: the L0 of a dense basis."""
    parameters: int
    """Weights in the matrices."""
    points: Annotated[list[Row], list[Point]]
    """One for each run: method, sparsity, seed, L0, active parameters, KL by kind of mask, controls."""
    stability: Annotated[list[Row], list[StabilityRow]]
    """By method and sparsity: matched cosines between seeds, and between their untrained starts."""
    splitting: Annotated[list[Row], list[SplittingRow]]
    """By method and capacity: components, alive ones, share of the smallest's components that split."""
    versions: dict[str, str]
    """Of the libraries."""

    # --- curves -----------------------------------------------------------------------------------------------------
    def curve(self, method: str, seed: int, metric: Metric, axis: Axis = "l0") -> list[tuple[float, float]]:
        """One seed's (L0, KL), by rising L0; runs without any active component are not on it."""
        rows = [p for p in self.points if p["method"] == method and p["seed"] == seed]
        rows = [p for p in rows if p[axis] > 0 and p[metric] is not None]
        return sorted((float(p[axis]), float(p[metric])) for p in rows)

    def curves(self, metric: Metric, axis: Axis = "l0") -> dict[str, list[list[tuple[float, float]]]]:
        """Every method's curves, one for each seed."""
        return {
            method: [self.curve(method, seed, metric, axis) for seed in self.protocol["seeds"]]
            for method in self.methods
        }

    def at(self, share: float, metric: Metric, axis: Axis = "l0") -> dict[str, list[float]]:
        """KL of every method at one sparsity, for those seeds whose curve reaches it.

        Args:
            share: L0 as a share of the summed ranks, or active parameters as a share of all.
        """
        place = share * (self.ranks if axis == "l0" else self.parameters)
        found = {
            method: [height(curve, place) for curve in curves] for method, curves in self.curves(metric, axis).items()
        }
        return {method: [v for v in values if v is not None] for method, values in found.items()}

    def shared_range(self, axis: Axis = "l0") -> tuple[float, float] | None:
        """The stretch of the axis that every curve covers; None where there is none."""
        every = [curve for curves in self.curves("rounded", axis).values() for curve in curves]
        if not every or not all(every):
            return None
        low, high = max(c[0][0] for c in every), min(c[-1][0] for c in every)
        return (low, high) if low < high else None

    def areas(self, metric: Metric, axis: Axis = "l0") -> dict[str, list[float]]:
        """Mean KL over the shared range of log L0, by method and seed; empty where curves share none."""
        shared = self.shared_range(axis)
        if shared is None:
            return {}
        return {
            method: [area(curve, *shared) for curve in curves] for method, curves in self.curves(metric, axis).items()
        }

    # --- to look at, and to keep ------------------------------------------------------------------------------------
    @property
    def measure(self) -> str:
        """`kl` or `mse`: what outputs were compared by."""
        return self.points[0].get("measure", "kl") if self.points else "kl"

    def to_frame(self) -> DataFrame:
        """Runs as a pandas frame."""
        return frame_of(self.points)

    frame = old_frame

    @property
    def measured(self) -> tuple[Metric, ...]:
        """Of rounded, stochastic and adversarial KL those that the protocol asked for."""
        return tuple(m for m in HEADLINE if any(p[m] is not None for p in self.points))

    def tables(self) -> list[Table]:
        matched = [_matched(self, metric) for metric in self.measured]
        found = [*matched, _points(self), _stability(self), _splitting(self)]
        return [table for table in found if table.row_count]


def height(curve: Sequence[tuple[float, float]], place: float) -> float | None:
    """The curve's value at a place, straight between its points in the logarithm; None outside them."""
    for (x, y), (x2, y2) in itertools.pairwise(curve):
        if x <= place <= x2:
            share = 0.0 if x == x2 else (math.log(place) - math.log(x)) / (math.log(x2) - math.log(x))
            return y + share * (y2 - y)
    return curve[0][1] if curve and curve[0][0] == place else None


def area(curve: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Mean height of a curve over [low, high] of the logarithm; it must reach both ends."""
    ends = [(place, height(curve, place)) for place in (low, high)]
    assert ends[0][1] is not None and ends[1][1] is not None
    within = [ends[0], *((x, y) for x, y in curve if low < x < high), ends[1]]
    pairs: Any = itertools.pairwise(within)
    total = sum((math.log(x2) - math.log(x)) * (y + y2) / 2 for (x, y), (x2, y2) in pairs)
    return total / (math.log(high) - math.log(low))


# --- tables -----------------------------------------------------------------------------------------------------------
def spread(values: Sequence[float], places: int = 3) -> str:
    """Median, and the range where there are several."""
    if not values:
        return ""
    text = f"{statistics.median(values):.{places}f}"
    return f"{text} ({min(values):.{places}f}-{max(values):.{places}f})" if len(values) > 1 else text


def _matched(found: Comparison, metric: Metric) -> Table:
    shared = {name: found.shared_range(axis) for axis, name in AXES.items()}
    over = [f"mean, {name} {r[0]:,.0f}-{r[1]:,.0f}" for name, r in shared.items() if r is not None]
    columns = [f"L0 {share * found.ranks:.0f} (1/{round(1 / share)})" for share in SHARES]
    what = "KL" if found.measure == "kl" else "Mean square"
    title = f"{what}, {metric} masks, at equal L0 (dense: {found.ranks}): median over seeds, and range"
    table = plain_table(title, "method", *columns, *over)
    at = [found.at(share, metric) for share in SHARES]
    at += [found.areas(metric, axis) for axis, name in AXES.items() if shared[name] is not None]
    for method in found.methods:
        table.add_row(method, *(spread(values[method]) for values in at))
    return table


POINTS = {
    "l0": "L0", "active": "active", "rounded": "rounded", "stochastic": "stoch.", "adversarial": "PGD", "permuted": "perm.",
}  # fmt: skip


def _points(found: Comparison) -> Table:
    zero = found.points[0]["zero"] if found.points else math.nan
    what = "KL in nats per token" if found.measure == "kl" else "mean square of outputs"
    title = f"Runs: {what}; all components removed {zero:.3f}; perm.: rounded, importances dealt anew"
    table = plain_table(title, "method", "factor", "seed", *POINTS.values())
    last = None
    for row in found.points:
        new = row["method"] != last
        if new and last is not None:
            table.add_section()
        last = row["method"]
        figures = (shown(row[key], {"active": 0, "l0": 1}.get(key, 3)) for key in POINTS)
        table.add_row(last if new else "", f"{row['sparsity']:.3g}", str(row["seed"]), *figures)
    return table


def _stability(found: Comparison) -> Table:
    columns = ("method, sparsity", "V", "U", "rank one", "untrained: V", "U", "rank one")
    table = plain_table("Matched cosines between seeds, of active components", *columns)
    for row in found.stability:
        cosines = [row[side].get(of) for side in ("trained", "untrained") for of in ("read", "write", "rank_one")]
        table.add_row(f"{row['method']}, {row['sparsity']:g}", *(shown(cosine, 3) for cosine in cosines))
    return table


def _splitting(found: Comparison) -> Table:
    what = f"rounded {distance_name(found.measure)}"
    columns = ("components", "active", "split in the largest", "L0", what)
    table = plain_table("Splitting: more capacity should not mean more components", "method, capacity", *columns)
    for row in found.splitting:
        share = "" if row["split"] is None else f"{row['split']:.1%}"
        figures = (str(row["components"]), str(row["active"]), share, f"{row['l0']:.1f}", shown(row["rounded"], 3))
        table.add_row(f"{row['method']}, x {row['capacity']:g}", *figures)
    return table
