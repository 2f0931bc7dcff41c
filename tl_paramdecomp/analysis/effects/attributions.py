"""What attribution leaves behind: an effect of every component at every position, as tensors, tables and files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.analysis.records import WITH_WITHOUT, DataFrame, Record, Table, frame_of, plain_table
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.settings import from_plain

Direction = Literal["removal", "noising", "denoising", "corrupt to clean"]

IN_WORDS: dict[Direction, str] = {
    "removal": "metric minus metric with the component removed",
    "noising": "metric minus metric with the component's corrupt activation, in the clean run",
    "denoising": "metric with the component's clean activation minus metric, in the corrupt run",
    "corrupt to clean": "share of the metric's difference along a path from the corrupt to the clean run",
}
SHOWN = 15
"""Components in a printed table."""


class Effect(NamedTuple):
    """One component at one position and what it does for the metric."""

    site: str
    component: int | None
    """None for the delta component."""
    position: int | None
    """Column of the rows; None where positions are summed."""
    value: float
    """Metric with the component minus metric without it, as `Attribution.direction` says."""


@dataclass(frozen=True, eq=False)
class Attribution(Record):
    """Effects on a metric. Positive values speak for a component: the metric is higher with it than without."""

    what: ClassVar[str] = "attribution"
    arrays: ClassVar[tuple[str, ...]] = ("values", "delta", "bias", "embeddings")

    method: str
    """`gradient`, `integrated` or `ablation`."""
    metric: str
    """Its name."""
    direction: Direction
    """What is compared with what."""
    positions: list[int]
    """Columns of the rows that are attributed."""
    by_position: bool
    """False: the second axis of all values is one entry, for these positions together."""
    clean: list[float]
    """The metric on each clean row."""
    corrupt: list[float] | None
    """The metric on each corrupt row; None where components are removed."""
    steps: int | None
    """Nodes of the Gauss-Legendre rule of `integrated`."""
    path: str | None
    """What `integrated` moves along; None for the others."""
    frozen_norms: bool
    """Whether denominators of norms were held."""
    frozen_patterns: bool
    """Whether attention patterns were held."""
    values: dict[str, Float[Tensor, "batch columns _C"]]
    """By site, the effect of each component at each of the positions."""
    delta: dict[str, Float[Tensor, "batch columns"]]
    """By site, the effect of the delta component W - V U."""
    bias: dict[str, Float[Tensor, "batch columns"]]
    """By site, of its bias; empty where biases do not change or single ablations were run."""
    embeddings: dict[str, Float[Tensor, "batch columns"]]
    """Of embedding tables that are not among the sites, each as a whole; empty for single ablations."""

    @property
    def granularity(self) -> str:
        """What one value is of."""
        return (
            "component and position" if self.by_position else f"component at {len(self.positions)} positions together"
        )

    # --- reading ----------------------------------------------------------------------------------------------------
    def top(self, n: int = 10, row: int | None = None, delta: bool = False) -> list[Effect]:
        """The n effects of largest absolute value, largest first.

        Args:
            n: How many at most.
            row: Of one row; None: of the mean over all rows.
            delta: Delta components as well.

        Raises:
            SettingError: There is no such row.
        """
        found: list[Effect] = []
        for site in self.values:
            table = self._row(self.values[site], row)
            best = table.abs().flatten().topk(min(n, table.numel())).indices.tolist()
            for place in best:
                p, c = divmod(place, table.shape[-1])
                found.append(Effect(site, c, self._position(p), float(table[p, c])))
            if delta:
                rest = self._row(self.delta[site], row).tolist()
                found += [Effect(site, None, self._position(p), value) for p, value in enumerate(rest)]
        return sorted(found, key=lambda effect: -abs(effect.value))[:n]

    def by_component(self) -> dict[str, Float[Tensor, "batch _C"]]:
        """Sums over the positions, by site."""
        return {site: values.sum(1) for site, values in self.values.items()}

    def total(self) -> Float[Tensor, " batch"]:
        """Sum of everything that is attributed, by row."""
        parts = [values.sum((1, 2)) for values in self.values.values()]
        parts += [v.sum(1) for part in (self.delta, self.bias, self.embeddings) for v in part.values()]
        return torch.stack([part.double() for part in parts]).sum(0)

    def to_frame(self) -> DataFrame:
        """One line for each row, site, component (missing for the delta component) and position (missing for all)."""
        lines = []
        for site in self.values:
            table = torch.cat([self.values[site], self.delta[site].unsqueeze(-1)], -1)
            C = table.shape[-1] - 1
            for row, columns in enumerate(table.tolist()):
                for p, effects in enumerate(columns):
                    where = self._position(p)
                    lines += [(row, site, c if c < C else None, where, value) for c, value in enumerate(effects)]
        frame = frame_of(lines, ["row", "site", "component", "position", "value"])
        return frame.astype({"component": "Int64", "position": "Int64"})

    def _row(self, values: Tensor, row: int | None) -> Tensor:
        if row is None:
            return values.mean(0)
        if not -len(values) <= row < len(values):
            raise SettingError(f"There are rows 0 to {len(values) - 1}; given {row}.")
        return values[row]

    def _position(self, place: int) -> int | None:
        return self.positions[place] if self.by_position else None

    # --- words and files --------------------------------------------------------------------------------------------
    def check(self) -> None:
        rows, places = len(self.clean), len(self.positions) if self.by_position else 1
        if not rows or not self.positions or (self.corrupt is not None and len(self.corrupt) != rows):
            raise ValueError(f"{rows} rows, {len(self.positions)} positions")
        if self.delta.keys() != self.values.keys():
            raise ValueError("delta components and components are of other sites")
        for name in self.arrays:
            for site, array in getattr(self, name).items():
                if tuple(array.shape[:2]) != (rows, places):
                    raise ValueError(f"{name} of {site} are {list(array.shape)}, with {rows} rows and {places} places")

    def tables(self, top: int = SHOWN, texts: Sequence[str] = ()) -> list[Table]:
        """The `top` strongest effects, with the texts of their positions where they are given, and sums."""
        rows = []
        for e in self.top(top, delta=True):
            component = "delta" if e.component is None else str(e.component)
            where = ["all" if e.position is None else str(e.position)]
            where += ["" if e.position is None else texts[e.position]] if texts else []
            rows.append((e.site, component, *where, f"{e.value:+.4g}"))
        title, columns = f"Attribution by {self.method} to {self.metric}", ["component", "position"]
        columns += [*(["token"] if texts else []), f"effect\n{WITH_WITHOUT}"]
        table = plain_table(title, "site", *columns, rows=rows)
        sums = plain_table(
            "Sums over components and positions, mean over rows", "site", "components", "delta", "largest"
        )
        for site, values in self.values.items():
            mean, rest = values.mean(0), self.delta[site].mean(0)
            sums.add_row(site, f"{mean.sum():+.4g}", f"{rest.sum():+.4g}", f"{mean.abs().max():.4g}")
        return [table, sums]

    def footnotes(self) -> list[str]:
        rows = f"{len(self.clean)} row{'' if len(self.clean) == 1 else 's'}"
        clean = f"clean {sum(self.clean) / len(self.clean):.4g}"
        lines = [f"{IN_WORDS[self.direction]}; one value per {self.granularity}; {rows}, {clean}"]
        if self.corrupt is not None:
            lines[0] += f", corrupt {sum(self.corrupt) / len(self.corrupt):.4g}"
        if self.steps is not None:
            lines.append(f"Gauss-Legendre rule of {self.steps} nodes along a path of {self.path}.")
        return lines + ([f"Held in gradients: {', '.join(held(self))}."] if held(self) else [])

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Attribution":
        """With tensors of what version 0.1.0 kept as lists.

        Raises:
            TypeError, ValueError: The fields are not what they should be.
        """
        arrays = {name: {site: _as_tensor(array) for site, array in kept[name].items()} for name in cls.arrays}
        return from_plain(cls, kept | arrays)


def _as_tensor(kept: Any) -> Tensor:
    return kept if isinstance(kept, Tensor) else torch.tensor(kept["values"], dtype=getattr(torch, str(kept["dtype"])))


def held(found: Any) -> list[str]:
    """What was frozen while gradients were taken, in words."""
    words = {"norm denominators": found.frozen_norms, "patterns": found.frozen_patterns}
    return [word for word, on in words.items() if on]
