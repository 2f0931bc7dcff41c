"""How much each component at each position does for a metric: by gradients, along a path of inputs, or by ablating it.

Every value is the metric with the component's write as it is minus the metric with it removed or replaced, as in `sweep`;
positive values speak for the component. With h = x V the activations, g = dL/dy the derivative of the metric by what the
site writes:

    gradient        (h_c - h'_c) (U_c . g), of first order
    integrated      (h_c - h'_c) (U_c . mean of g along a path from the corrupt to the clean run)
    ablation        exact: one run for each component

h' is 0, or the activation on a corrupt prompt aligned with the clean one. For gradients that is attribution patching (Syed,
Rager, Conmy 2023, arXiv 2310.10348), for paths EAP-IG (Hanna, Pezzelle, Belinkov 2024, arXiv 2403.17806), with parameter
components in the place of activations. The delta component, and with gradients biases and embeddings, are attributed too.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.attention import attention_softmaxes
from tl_paramdecomp.adapters.norm_scales import opened_norms
from tl_paramdecomp.analysis.effects.single_runs import Runs, SitePatches
from tl_paramdecomp.analysis.effects.site_writes import (
    EMBEDDINGS,
    Prompts,
    Role,
    SiteWrites,
    along_writes,
    chosen_columns,
    chosen_sites,
    dotted,
    prompts_of,
)
from tl_paramdecomp.analysis.records import WITH_WITHOUT, DataFrame, Record, Table, frame_of, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.positions import PositionsLike
from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.settings import Count, fit, from_plain
from tl_paramdecomp.sites import SitePattern

Method = Literal["gradient", "integrated", "ablation"]
Path = Literal["embeddings", "writes"]
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
class Attribution(Record, what="attribution", arrays=("values", "delta", "bias", "embeddings")):
    """Effects on a metric. Positive values speak for a component: the metric is higher with it than without."""

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
            row: Of one row; None: of the mean over all rows.

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


# --- attributing --------------------------------------------------------------------------------------------------------
def attribute(
    model: Any,
    decomposition: Decomposition,
    tokens: Any,
    metric: Any,
    *,
    method: Method = "gradient",
    corrupt: Int[Tensor, "batch pos"] | None = None,
    direction: Literal["noising", "denoising"] = "noising",
    steps: int = 8,
    path: Path = "embeddings",
    sites: SitePattern | None = None,
    positions: PositionsLike = None,
    by_position: bool = True,
    frozen_norms: bool = False,
    frozen_patterns: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    rows_at_once: int = 64,
    progress: bool = True,
) -> Attribution:
    """Effect of every component at every position on a metric, of the model as it stands: metric with it minus metric without.

    Args:
        tokens: Token rows [batch, pos]; or a task, which brings its corrupt prompts and attention mask.
        metric: From logits [batch, pos, vocab] to one number per row; with a task, from its answer logits [batch, vocab] and
            the task. Row i may depend on row i alone.
        method: `gradient` takes one forward and one backward pass for everything (and one forward pass for corrupt rows),
            `integrated` as many again as `steps`, `ablation` one row for each component and position.
        corrupt: Rows aligned with `tokens`; activations are compared with theirs. None: with zero.
        direction: With corrupt rows, the run in which the effect is taken. `noising`: the clean run, where a component is
            given its corrupt activation. `denoising`: the corrupt run, where it is given its clean one. `integrated`
            averages over all runs between the two.
        steps: Nodes of the Gauss-Legendre rule along the path, which is exact where the gradient is a polynomial in the step
            of degree up to 2 steps - 1.
        path: `embeddings` interpolates what the embedding writes, and everything after it follows. `writes` sets what all
            sites write, and the embeddings, to points between the corrupt and the clean run at once, so that each is
            credited with its direct effect alone and all attributions (components, delta components, embeddings) sum to
            the difference of the metric as the rule becomes exact.
        sites: Globs or a predicate over the decomposition's sites; None for all.
        positions: Columns to attribute; None for all.
        by_position: False sums over these positions (`ablation` ablates a component at all of them at once).
        frozen_norms: Take gradients with the denominators of LayerNorm and RMSNorm held; not for `ablation`.
        frozen_patterns: Take gradients with attention patterns held; not for `ablation`.
        attention_mask: 1 where a position counts; attributions at the others are 0.

    Raises:
        SettingError: No such method, direction or path; `integrated` without corrupt rows, `denoising` without them; steps
            below 1; a metric without a gradient where one is needed, or not finite; something frozen for `ablation`.
        UnsupportedModelError: No embedding for a path to start from, or a normalisation that cannot be held.
        NoMatchingSiteError: `sites` selects none.
        ShapeError, DtypeError, PositionIndexError: Rows, mask, positions or the metric's values do not fit.
        TargetMismatchError, DeviceError: As `patched`.
    """
    prompts = prompts_of(model, tokens, metric, corrupt, attention_mask)
    for value, kind, place in (
        (method, Method, "method"), (direction, Literal["noising", "denoising"], "direction"), (path, Path, "path"),
        (steps, Count, "steps"), (rows_at_once, Count, "rows_at_once"),
    ):  # fmt: skip
        fit(value, kind, place)
    if prompts.corrupt is None and (method == "integrated" or direction == "denoising"):
        raise SettingError(
            "Integrated gradients run from a corrupt prompt to the clean one, and denoising restores clean activations in the "
            "run over a corrupt prompt; give corrupt=."
        )
    if method == "ablation" and (frozen_norms or frozen_patterns):
        raise SettingError("Ablations run the model as it is; frozen_norms and frozen_patterns are for gradients.")
    adapter = checked_adapter(model, decomposition, prompts.clean, prompts.attention_mask)
    own = chosen_sites(decomposition, sites)
    tables = [n for n in EMBEDDINGS if method != "ablation" and n in adapter.wirings and n not in own]
    columns = chosen_columns(positions, prompts.clean, "attribution")
    if prompts.corrupt is None:
        towards: Direction = "removal"
    else:
        towards = "corrupt to clean" if method == "integrated" else direction
    run = _Run(adapter, own, tables, prompts, towards, columns, by_position, frozen_norms, frozen_patterns)
    return run.attributed(method, steps, path, rows_at_once, progress)


class _Pass(NamedTuple):
    """One pass over rows."""

    writes: SiteWrites
    metric: Float[Tensor, " batch"]
    gradients: dict[str, Tensor]
    """Of the metric by each write; empty where they are only read."""


@dataclass(eq=False)
class _Run:
    """One call of `attribute`."""

    adapter: ModelAdapter
    sites: dict[str, Components]
    embeddings: list[str]
    """Tables that are attributed as a whole."""
    prompts: Prompts
    direction: Direction
    columns: list[int]
    by_position: bool
    frozen_norms: bool
    frozen_patterns: bool

    def passed(self, rows: Tensor, role: Role, given: Mapping[str, Tensor] | None = None) -> _Pass:
        """Every site in its role over rows; what some write may be given."""
        given, writes, root, opened = given or {}, SiteWrites(len(rows)), self.adapter.root, role != "read"
        fns = writes.fns([name for name in (*self.sites, *self.embeddings) if name not in given], role)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(opened))
            if opened and self.frozen_norms:
                stack.enter_context(opened_norms(root, hold=True))
            if opened and self.frozen_patterns:
                stack.enter_context(attention_softmaxes(root, hold=True))
            stack.enter_context(self.adapter.intercept(fns | writes.fns(given, "pinned", given)))
            found = self.prompts.measure(self.adapter.forward(rows, self.prompts.attention_mask))
        writes.check_positions()
        if not opened:
            return _Pass(writes, found, {})
        if not found.requires_grad:
            raise SettingError(
                f"The metric {self.prompts.metric} has no gradient (a rank or a comparison has none); use method='ablation'."
            )
        return _Pass(writes, found.detach(), writes.gradients(found.sum()))

    def attributed(self, method: Method, steps: int, path: Path, rows_at_once: int, progress: bool) -> Attribution:
        """All of it, by any method."""
        prompts, denoising, role = (
            self.prompts,
            self.direction == "denoising",
            "open" if method == "gradient" else "read",
        )
        corrupt = None if prompts.corrupt is None else self.passed(prompts.corrupt, role if denoising else "read")
        clean = self.passed(prompts.clean, "read" if denoising else role)
        of_clean = clean.metric.double().tolist()
        if not all(map(math.isfinite, of_clean)):
            raise SettingError(f"The metric {prompts.metric} is not finite on these rows: {of_clean[:4]}.")
        if method == "ablation":
            parts = self.by_ablation(clean, corrupt, rows_at_once, progress)
        elif method == "integrated" and corrupt is not None:
            parts = self.along(clean, corrupt, self.path_gradients(clean, corrupt, steps, path))
        else:
            parts = self.along(clean, corrupt, (corrupt if denoising and corrupt is not None else clean).gradients)
        on_path = method == "integrated"
        return Attribution(
            method=method, metric=prompts.metric, direction=self.direction, positions=list(self.columns),
            by_position=self.by_position, clean=of_clean, corrupt=None if corrupt is None else corrupt.metric.double().tolist(),
            steps=steps if on_path else None, path=path if on_path else None, frozen_norms=self.frozen_norms,
            frozen_patterns=self.frozen_patterns, **parts,
        )  # fmt: skip

    def path_gradients(self, clean: _Pass, corrupt: _Pass, steps: int, path: Path) -> dict[str, Tensor]:
        """Gradients averaged between the corrupt and the clean run."""
        if "embed.W_E" not in self.adapter.wirings:
            raise UnsupportedModelError(
                f"{type(self.adapter.model).__name__} has no site embed.W_E from which a path could start; "
                "use method='gradient'."
            )
        pinned = ["embed.W_E"] if path == "embeddings" else list(clean.writes.y)
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        mean: dict[str, Tensor] = {}
        for alpha, weight in zip((nodes + 1.0) / 2.0, weights / 2.0, strict=True):
            given = {name: torch.lerp(corrupt.writes.y[name], clean.writes.y[name], float(alpha)) for name in pinned}
            for name, gradient in self.passed(self.prompts.clean, "open", given).gradients.items():
                mean[name] = mean[name].add_(gradient, alpha=weight) if name in mean else gradient * weight
        return mean

    def by_ablation(self, clean: _Pass, corrupt: _Pass | None, rows_at_once: int, progress: bool) -> dict[str, Any]:
        """Every component at every position on its own."""
        prompts, base, reference, rows, sign = self.prompts, clean, corrupt, self.prompts.clean, 1.0
        if self.direction == "denoising" and corrupt is not None and prompts.corrupt is not None:
            base, reference, rows, sign = corrupt, clean, prompts.corrupt, -1.0
        patches = {name: self._patches(name, base, reference) for name in self.sites}
        wanted = {name: own.changing() for name, own in patches.items()}
        found = {name: own.change.new_zeros((*own.shape, len(rows))) for name, own in patches.items()}
        with torch.no_grad(), tqdm(desc="ablations", disable=not progress, leave=False) as bar:
            bar.total = sum(map(len, wanted.values()))
            run = Runs(self.adapter, rows, prompts.attention_mask, rows_at_once, prompts.measure)
            for block, names in run.by_block(patches).items():
                for name, some, scores in run.patched({name: patches[name] for name in names}, block, wanted):
                    effects = sign * (base.metric - scores)
                    found[name].view(-1, len(rows))[some] = effects.to(found[name])
                    bar.update(len(some))
        values, delta = {}, {}
        for name, effects in found.items():
            effects = effects.movedim(-1, 0) if self.by_position else effects.movedim(-1, 0).unsqueeze(1)
            if self.by_position and prompts.real is not None:  # rounding, at most: nothing is changed at padding
                effects = effects * prompts.real[:, self.columns].unsqueeze(-1)
            values[name], delta[name] = effects[..., :-1], effects[..., -1]
        return {"values": values, "delta": delta, "bias": {}, "embeddings": {}}

    def _patches(self, name: str, base: _Pass, reference: _Pass | None) -> SitePatches:
        """What takes the place of the activations of one site, at the columns that are asked for and are no padding."""
        components = self.sites[name]
        change, rest = _change(name, components, base, reference)
        wanted = torch.zeros(change.shape[:2], dtype=change.dtype, device=change.device)
        wanted[:, self.columns] = -1.0
        if self.prompts.real is not None:
            wanted *= self.prompts.real
        change, rest = change * wanted.unsqueeze(-1), rest * wanted.unsqueeze(-1).to(rest.dtype)
        return SitePatches(components, change, self.columns if self.by_position else None, rest=rest)

    def along(self, clean: _Pass, corrupt: _Pass | None, gradients: Mapping[str, Tensor]) -> dict[str, Any]:
        """Changes of what everything writes, along gradients."""
        values, delta, bias, embeddings = {}, {}, {}, {}
        for name, components in self.sites.items():
            gradient = gradients[name]
            h, rest = _change(name, components, clean, corrupt)
            values[name] = self._placed(along_writes(components, h, gradient))
            delta[name] = self._placed(dotted(rest, gradient))
            own = clean.writes.bias[name]
            if own is not None and corrupt is None:
                bias[name] = self._placed(dotted(own, gradient))
        for name in self.embeddings:
            write = clean.writes.y[name] if corrupt is None else clean.writes.y[name] - corrupt.writes.y[name]
            embeddings[name] = self._placed(dotted(write, gradients[name]))
        return {"values": values, "delta": delta, "bias": bias, "embeddings": embeddings}

    def _placed(self, found: Float[Tensor, "batch pos *C"]) -> Float[Tensor, "batch columns *C"]:
        """Values at the columns that are asked for, 0 at padding; one column where positions are summed."""
        real = self.prompts.real
        if real is not None:
            found = found * real.to(found.dtype).view(*real.shape, *(1,) * (found.ndim - 2))
        found = found[:, self.columns]
        return found if self.by_position else found.sum(1, keepdim=True)


def _change(name: str, components: Components, one: _Pass, other: _Pass | None) -> tuple[Tensor, Tensor]:
    """Activations, and what the delta component writes, in one pass minus another, or minus none."""
    h, rest = one.writes.acts(name, components), one.writes.delta_write(name, components)
    if other is None:
        return h, rest
    return h - other.writes.acts(name, components), rest - other.writes.delta_write(name, components)
