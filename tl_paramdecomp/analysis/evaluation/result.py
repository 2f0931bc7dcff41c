"""What an evaluation found: as a table to read, a pandas frame, and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tl_paramdecomp.analysis.records import DataFrame, Record, Row, Table, form, frame_of, old_frame, plain_table, shown

PARTIAL, NOT_REACHED = " (partial: time ran out)", "not reached"


AT, CLIMB = {"site": str, "masks": str, "delta": str}, {"steps": int, "restarts": int, "start": float}
# outputs that are no logits have no cross-entropy, and are compared by their mean square
Ends, NoEnds = form("Ends", model=float, zero=float), form("NoEnds")
MaskRow = form(
    "MaskRow", **AT, kl=float, kl_sd=float | None, ce_difference=float, ce_recovered=float | None, top1=float
)
SquareRow = form("SquareRow", **AT, mse=float, mse_sd=float | None)
AdversaryRow = form("AdversaryRow", **CLIMB, kl=float, kl_worst=float, kl_all=list[float])
SquareAdversaryRow = form("SquareAdversaryRow", **CLIMB, mse=float, mse_worst=float, mse_all=list[float])
SiteRow = form(
    "SiteRow", site=str, components=int, rank=int, relative_error=float, l0=float, l0_above_0=float, active_parameters=float,
    alive=int, active_anywhere=int, densities=list[int],
)  # fmt: skip
FIGURES = ("auroc", "spearman", "important", "unimportant")
SpecificityRow = form("SpecificityRow", **dict.fromkeys(FIGURES, float | None), pairs=int)
ControlRow = form("ControlRow", False, l0=float, rounded=float, adversarial=float)


@dataclass(frozen=True)
class Evaluation(Record, what="evaluation"):
    """Figures of one decomposition on held-out rows; KL in nats per token, summed over the vocabulary.

    Where the model gives no logits, figures are the mean square of outputs under `mse` instead of `kl`.
    """

    protocol: Row
    """Everything that was set."""
    rows: int
    """Held-out ones."""
    positions: int
    """Scored ones."""
    ce: Annotated[dict[str, float], Ends | NoEnds]
    """Cross-entropy of the model itself, and with all components and the delta component removed."""
    masks: Annotated[list[Row], list[MaskRow] | list[SquareRow]]
    """One for each kind of mask, delta component and scope: KL, its standard deviation over draws, CE difference (masked minus
    model), the share of CE that is recovered between the zero mask (0) and the model (1), and how often the likeliest token is
    the model's."""
    adversary: Annotated[list[Row], list[AdversaryRow] | list[SquareAdversaryRow]]
    """By steps: median and largest KL over restarts, and where they began."""
    sites: Annotated[list[Row], list[SiteRow]]
    """By matrix: relative weight error, L0 above 0.1 and above 0, active parameters, alive components, how often they are
    active."""
    specificity: Annotated[dict[str, Row], dict[str, SpecificityRow]]
    """Importance against the measured effect of ablating, and the same of importances dealt out anew."""
    controls: Annotated[dict[str, Row], dict[str, ControlRow]]
    """Headline of other decompositions of the model."""
    run: Row
    """Where the decomposition came from."""
    seconds: float
    """That it took."""
    left_out: list[str]
    """Parts that the time budget left no room for."""

    def check(self) -> None:
        lacking = [row for row in (*self.masks, *self.adversary) if self.measure not in row]
        if lacking or (self.measure == "kl") != ({"model", "zero"} <= self.ce.keys()):
            raise ValueError(f"its figures are not those of {self.measure!r}")

    @property
    def measure(self) -> str:
        """`kl` or `mse`: what outputs were compared by, and the key of its figures."""
        return self.protocol.get("measure", "kl")

    def distance(self, masks: str, delta: str = "absent", site: str = "all") -> float:
        """KL, or mean square, under one kind of mask.

        Raises:
            KeyError: It was not measured.
        """
        return self.mask_row(masks, delta, site)[self.measure]

    def mask_row(self, masks: str, delta: str = "absent", site: str = "all") -> Row:
        """The row of one kind of mask.

        Raises:
            KeyError: It was not measured.
        """
        for row in self.masks:
            if (row["masks"], row["delta"], row["site"]) == (masks, delta, site):
                return row
        raise KeyError(f"{masks}, delta {delta}, {site}")

    @property
    def headline(self) -> dict[str, float]:
        """L0 with the KL under rounded (0.1) and adversarial masks (20 steps, or the most there are): those of them that were
        reached, where time ran out (`left_out`)."""
        found: dict[str, float] = {"l0": sum(row["l0"] for row in self.sites)} if self.sites else {}
        rounded = [r for r in self.masks if (r["masks"], r["delta"], r["site"]) == ("rounded 0.1", "absent", "all")]
        found |= {"rounded": rounded[0][self.measure]} if rounded else {}
        climbs = self._headline_climbs()
        return found | ({"adversarial": climbs[self.measure]} if climbs else {})

    def _headline_climbs(self) -> Row | None:
        """The adversary that the headline is of."""
        by_steps = {row["steps"]: row for row in self.adversary}
        return by_steps[headline_steps(tuple(by_steps))] if by_steps else None

    def to_frame(self) -> DataFrame:
        """Kinds of masks as a pandas frame."""
        return frame_of(self.masks)

    frame = old_frame

    def sites_frame(self) -> DataFrame:
        """Matrices as a pandas frame."""
        return frame_of(self.sites, list(self.sites[0]) if self.sites else ["site"]).set_index("site")

    def tables(self) -> list[Table]:
        found = [_headline(self), _masks(self), _adversary(self), _specificity(self), _sites(self)]
        return [table for table in found if table.row_count]

    def footnotes(self) -> list[str]:
        return [f"Left out for want of time: {'; '.join(self.left_out)}."] if self.left_out else []


def headline_steps(ladder: Sequence[int]) -> int:
    """Steps of the adversary in a headline: 20, or the most there are."""
    return 20 if 20 in ladder else max(ladder)


def distance_name(measure: str) -> str:
    """In the heads of tables."""
    return "KL" if measure == "kl" else "mean square"


def _headline(found: Evaluation) -> Table:
    what = distance_name(found.measure)
    title = f"Headline{PARTIAL if found.left_out else ''}: {found.positions} tokens of {found.rows} held-out rows"
    table = plain_table(title, "decomposition", "L0", f"rounded {what}", f"adversarial {what}")
    climbs, restarts = found._headline_climbs(), found.protocol.get("restarts", 1)
    wanted = ["l0", "rounded", *(["adversarial"] if found.protocol.get("ladder") else [])] if found.left_out else []
    for name, values in {"this one": found.headline, **found.controls}.items():
        cells = {key: shown(values.get(key), 1 if key == "l0" else 4) for key in ("l0", "rounded", "adversarial")}
        if name == "this one" and climbs and climbs["restarts"] < restarts:
            cells["adversarial"] += f" ({climbs['restarts']} of {restarts} restarts)"
        table.add_row(name, *(cell or (NOT_REACHED if key in wanted else "") for key, cell in cells.items()))
    permuted = [row[found.measure] for row in found.masks if row["masks"].startswith("permuted")]
    if permuted:
        table.add_row("the same, importances dealt anew", shown(found.headline.get("l0"), 1), shown(permuted[0]), "")
    return table


def _masks(found: Evaluation) -> Table:
    key, title, columns = found.measure, "Masks", ("masks", "delta", distance_name(found.measure), "± draws")
    if found.ce:
        title += f" (cross-entropy: model {found.ce['model']:.3f}, all removed {found.ce['zero']:.3f})"
        columns = (*columns, "CE difference", "CE recovered", "same top token")
    table = plain_table(title, *columns)
    for row in (r for r in found.masks if r["site"] == "all"):
        figures = [shown(row[key]), shown(row[f"{key}_sd"])]
        if found.ce:
            share = "" if row["ce_recovered"] is None else f"{row['ce_recovered']:.1%}"
            figures += [f"{row['ce_difference']:+.4f}", share, f"{row['top1']:.1%}"]
        table.add_row(row["masks"], row["delta"], *figures)
    return table


def _adversary(found: Evaluation) -> Table:
    restarts = max((row["restarts"] for row in found.adversary), default=0)
    what, key = distance_name(found.measure), found.measure
    return plain_table(
        f"Adversary: one for all rows, {restarts} restarts",
        *("steps", f"{what}, median", f"{what}, worst", "random start"),
        rows=[[str(r["steps"]), *(shown(r[name]) for name in (key, f"{key}_worst", "start"))] for r in found.adversary],
    )


def _specificity(found: Evaluation) -> Table:
    what = distance_name(found.measure)
    columns = ("AUROC", "Spearman", f"{what} where g > 0.5", f"{what} where g < 0.01")
    table = plain_table("Does importance predict what ablating one component does?", "importances", *columns)
    for what, row in found.specificity.items():
        figures = (shown(row[key], places) for key, places in zip(FIGURES, (3, 3, 4, 4)))
        table.add_row("as they are" if what == "importance" else "dealt anew", *figures)
    return table


def _sites(found: Evaluation) -> Table:
    columns = ("rel. error", "L0", "rank", "active params", "alive", "of")
    table = plain_table("Matrices", "site", *columns, f"rounded {distance_name(found.measure)}, alone")
    alone = {row["site"]: row[found.measure] for row in found.masks if row["masks"] == "rounded 0.1"}

    def add(name: str, error: str, row: Row, last: str) -> None:
        sizes = (str(row["rank"]), f"{row['active_parameters']:.0f}", str(row["alive"]), str(row["components"]))
        table.add_row(name, error, f"{row['l0']:.1f}", *sizes, last)

    for row in found.sites:
        add(row["site"], f"{row['relative_error']:.1e}", row, shown(alone.get(row["site"])))
    if found.sites:
        sums = ("l0", "rank", "active_parameters", "alive", "components")
        table.add_section()
        add("all", "", {key: sum(row[key] for row in found.sites) for key in sums}, "")
    return table
