"""What each component by itself does for a metric: the sweep behind activation patching, component by component.

Noising runs the clean prompts and puts other values in; denoising runs the corrupt prompts and puts the clean activations in
(Heimersheim and Nanda 2024, arXiv 2404.15255). Effects are measured, not estimated from gradients.

An effect is the metric with the component minus the metric without it, as in `attribute`; positive ones speak for it:

    noising      m(clean run) - m(clean run with the value put in); of `zero`, an ablation
    denoising    m(corrupt run with the clean activation put in) - m(corrupt run)

`With` is the component's own clean activation in both, `without` whatever stands in its place (0, a mean, another prompt's
activation, a number), so that the sign means the same for every value and direction. A denoising effect is what patching
restores, a noising effect what patching breaks; both are in units of the metric, not shares of the clean run's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_answers
from tl_paramdecomp.analysis.effects.sweep_runs import Inputs, Runner, SitePatches, Unpatched, run_group, start_of
from tl_paramdecomp.analysis.records import WITH_WITHOUT, Record, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.plain import from_plain
from tl_paramdecomp.components.positions import Positions, PositionsLike, parse_positions
from tl_paramdecomp.errors import DataError, HeadIndexError, NoMatchingSiteError, SettingError, ShapeError
from tl_paramdecomp.patching.act_edits import derangement
from tl_paramdecomp.patching.claims import Claim, claimed
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SitePattern, Span, check_rows, select_sites

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

Direction = Literal["noising", "denoising"]
Sign = Literal["with minus without"]
SweepValue: TypeAlias = Literal["zero", "mean", "resample", "corrupt"] | float | int


GRANULARITIES = [[*some, "component"] for n in range(3) for some in combinations(("position", "head"), n)]
"""Axes that effects may have."""


class SweepEffect(NamedTuple):
    """One component and what it does for the metric."""

    site: str
    component: int
    effect: float
    """Metric with the component minus metric without it, mean over prompts."""
    position: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Sweep(Record):
    """Effects of every component by itself: the metric with it minus the metric without it. Positive values speak for it."""

    what: ClassVar[str] = "sweep"
    arrays: ClassVar[tuple[str, ...]] = ("effects",)
    absent: ClassVar[Mapping[str, str]] = {
        "sign": "it does not say which way its effects are counted, and in sweeps of before, noising effects have the other "
        "sign; sweep again"
    }

    sign: Sign
    """Which way effects are counted; files from before there was this field have ablations the other way, and do not load."""
    direction: str
    """`noising` (clean prompts are run) or `denoising` (corrupt ones)."""
    value: str
    """What was put in: zero, mean, resample, corrupt, clean, or a number."""
    metric: str
    granularity: list[str]
    """Axes of each site's effects: `position` and `head`, where they are apart, then `component`."""
    positions: str
    """Where patches were: everywhere, each, or some."""
    prompts: int
    clean: float
    """Metric of the clean run, mean over prompts."""
    corrupt: float | None
    """Metric of the corrupt run, where there are corrupt prompts."""
    effects: dict[str, list[Any]]
    """By site, nested lists along `granularity`: metric with the component minus metric without it, mean over prompts."""

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Sweep":
        """With its effects as nested lists."""
        effects = {site: a.tolist() if isinstance(a, Tensor) else a for site, a in kept["effects"].items()}
        return from_plain(cls, kept | {"effects": effects})

    def check(self) -> None:
        """As many axes as there are words for them."""
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"{self.granularity} are no axes of effects")
        for site in self.effects:
            shape = self.effect(site).shape
            if len(shape) != len(self.granularity) or 0 in shape:
                raise ValueError(f"effects of {site} are {list(shape)}, along {', '.join(self.granularity)}")

    def effect(self, site: str) -> Float[Tensor, "*axes C"]:
        """Effects of one site.

        Raises:
            NoMatchingSiteError: It was not swept.
        """
        if site not in self.effects:
            raise NoMatchingSiteError(f"{site!r} was not swept; {', '.join(self.effects)} were.")
        return torch.tensor(self.effects[site], dtype=torch.float64)

    def rows(self) -> Iterator[SweepEffect]:
        """Every patch, site by site."""
        for site in self.effects:
            values = self.effect(site)
            for place, effect in zip(product(*map(range, values.shape)), values.flatten().tolist()):
                at = dict(zip(self.granularity, place))
                yield SweepEffect(site, at["component"], effect, at.get("position"), at.get("head"))

    def top(self, n: int = 10) -> list[SweepEffect]:
        """The n of largest absolute effect, largest first."""
        return sorted(self.rows(), key=lambda row: -abs(row.effect))[:n]

    def to_frame(self) -> "pandas.DataFrame":
        """Every patch as a row of a pandas frame."""
        import pandas

        columns = ["site", *self.granularity, "effect"]
        return pandas.DataFrame([{c: getattr(row, c) for c in columns} for row in self.rows()], columns=columns)

    def tables(self, top: int = 10) -> "list[Table]":
        """The strongest effects, and each site's sums, for a terminal."""
        table = plain_table(
            f"Largest effects on {self.metric} ({self.direction}, value {self.value})",
            "site",
            *self.granularity,
            f"effect\n{WITH_WITHOUT}",
        )
        for row in self.top(top):
            table.add_row(row.site, *(str(getattr(row, axis)) for axis in self.granularity), f"{row.effect:+.4f}")
        sites = plain_table("By site", "site", "patches", "sum", "largest", "smallest")
        for site in self.effects:
            values = self.effect(site)
            figures = (values.sum(), values.max(), values.min())
            sites.add_row(site, str(values.numel()), *(f"{float(figure):+.4f}" for figure in figures))
        return [table, sites]

    def footnotes(self) -> list[str]:
        """The unpatched runs."""
        runs = f"clean {self.clean:.4f}" + ("" if self.corrupt is None else f", corrupt {self.corrupt:.4f}")
        return [
            f"{self.metric} of the unpatched runs over {self.prompts} prompts: {runs}. Positions: {self.positions}."
        ]


def sweep(
    model: Any,
    decomposition: Decomposition,
    prompts: Any,
    metric: Callable[..., Tensor],
    *,
    corrupt: Int[Tensor, "n pos"] | None = None,
    attention_mask: Int[Tensor, "n pos"] | None = None,
    sites: SitePattern | None = None,
    value: SweepValue | None = None,
    direction: Direction = "noising",
    positions: PositionsLike | Literal["each"] = None,
    by_head: bool = False,
    means: Mapping[str, Float[Tensor, "..."]] | None = None,
    rows_at_once: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """The effect of every component by itself, many of them as rows of one batch: metric with it minus metric without it.

    Noising takes the metric of the clean run minus that of the clean run with the value put in, denoising that of the corrupt
    run with the clean activation put in minus that of the corrupt run. With `value="zero"` it is the exact ablation, and what
    `attribute(..., method="ablation", by_position=False)` gives.

    What each prompt reads at every site, and what every block returns for it, is held in memory meanwhile.

    Args:
        model: The target, on any host. Patches of other sites that are open hold, in full passes.
        decomposition: Made from its weights.
        prompts: A task (clean and corrupt prompts, answers), or token rows [n, pos].
        metric: With a task, from logits at the answers [n, vocab] and the task to [n]; with token rows, from logits
            [n, pos, vocab] to [n]. It is called for each patch with all prompts.
        corrupt: With token rows, prompts to take values from, aligned token by token.
        attention_mask: With token rows: 1 where a position counts.
        sites: Only these; None: all of the decomposition (with `by_head`: all that have heads).
        value: Put in when noising (None: zero): `zero`; `mean`, over the positions that count of the prompts that are run,
            or `means`; `resample`, another prompt's at the same position; `corrupt`, the aligned corrupt prompt's; a
            number. Denoising puts the clean activations in.
        direction: `noising` or `denoising`.
        positions: Where each patch holds: as in `ActPatches.set`, or `each`: a patch for every position by itself.
        by_head: A patch for every head by itself: what it writes (W_Q, W_K, W_V), or reads (W_O).
        means: For `mean`: of `activation_means`.
        rows_at_once: Rows in one forward pass.
        seed: Of `resample`.
        progress: Show a progress bar.

    Raises:
        SettingError: A value, direction or number of rows that makes no sense.
        DataError: No corrupt prompts where they are needed, or one prompt to resample from.
        HeadIndexError: `by_head` with a site that has no heads.
        ShapeError, DtypeError: Prompts that are no token rows or are not aligned, means or a metric of another shape.
        NoMatchingSiteError, PositionIndexError: No such site or position.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched_acts`.
    """
    runs = _Runs.of(prompts, metric, corrupt, attention_mask)
    put = _checked_value(value, direction, runs, rows_at_once)
    adapter = checked_adapter(model, decomposition)
    need_answers(adapter, prompts, metric)
    chosen = _chosen_sites(decomposition, sites, by_head)
    denoising = direction == "denoising"
    base, source = (runs.corrupt, runs.clean) if denoising else (runs.clean, runs.corrupt)
    assert base is not None
    each = positions == "each" if isinstance(positions, str) else False
    if each and base.is_floating_point():
        raise ShapeError(f"These inputs {list(base.shape)} have no position axis; leave positions out.")
    where = None if each else parse_positions(positions)
    values = _Values(put, base, runs.attention_mask, where, by_head, means, seed)
    made = {
        name: SitePatches(decomposition[name], by_head, base.shape[1] if each else None, values.of(decomposition[name]))
        for name in chosen
    }
    claims = {name: Claim(decomposition[name], additive=True) for name in chosen}
    with torch.no_grad(), claimed(adapter.core, claims):
        unpatched = {"clean": _metric_of(adapter, runs, runs.clean, rows_at_once)}
        if runs.corrupt is not None:
            unpatched["corrupt"] = _metric_of(adapter, runs, runs.corrupt, rows_at_once)
        changes = _changes(adapter, runs, base, source if values.takes_other else None, made, rows_at_once, progress)
    return Sweep(
        sign="with minus without",
        direction=direction,
        value=put if isinstance(put, str) else f"{put:g}",
        metric=runs.metric_name,
        granularity=[*(["position"] if each else []), *(["head"] if by_head else []), "component"],
        positions="each" if each else "everywhere" if where is None else repr(positions),
        prompts=len(base),
        clean=unpatched["clean"],
        corrupt=unpatched.get("corrupt"),
        effects={name: (changes[name] if denoising else 0.0 - changes[name]).tolist() for name in chosen},
    )


# --- what is run -----------------------------------------------------------------------------------------------------
class _Runs(NamedTuple):
    """Prompts and how their logits are scored."""

    clean: Tensor
    corrupt: Tensor | None
    attention_mask: Tensor | None
    last: Tensor | None
    score: Callable[[Tensor], Tensor]
    metric_name: str

    @classmethod
    def of(cls, prompts: Any, metric: Callable[..., Tensor], corrupt: Tensor | None, mask: Tensor | None) -> "_Runs":
        name = getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)
        if hasattr(prompts, "clean"):
            if corrupt is not None or mask is not None:
                raise SettingError(
                    "A task has its own corrupt prompts and attention mask; leave corrupt= and mask out."
                )
            made = cls(
                *(prompts.clean, prompts.corrupt, prompts.attention_mask, prompts.last),
                lambda logits: metric(logits, prompts),
                str(name),
            )
        else:
            made = cls(prompts, corrupt, mask, None, metric, str(name))
        check_rows(made.clean, made.attention_mask)
        if not len(made.clean):
            raise DataError("A sweep needs at least one prompt.")
        if made.corrupt is not None:
            check_rows(made.corrupt, made.attention_mask)
            if made.corrupt.shape != made.clean.shape:
                raise ShapeError(
                    f"Corrupt prompts are aligned with the clean ones, token by token; the clean ones are "
                    f"{list(made.clean.shape)}, the corrupt ones {list(made.corrupt.shape)}."
                )
        return made

    def scored(self, logits: Tensor) -> Float[Tensor, " n"]:
        """The metric of all prompts.

        Raises:
            ShapeError: It does not give one number for each prompt.
        """
        found = self.score(logits)
        if found.shape != (len(self.clean),):
            raise ShapeError(
                f"The metric {self.metric_name} must give one number for each of {len(self.clean)} prompts; it gave "
                f"{list(found.shape)}."
            )
        return found


def _runner(adapter: ModelAdapter, runs: _Runs, tokens: Tensor, rows: int, resumes: bool) -> Runner:
    prompts = Unpatched(adapter, tokens, runs.attention_mask, rows, resumes)
    return Runner(adapter, prompts, runs.last, runs.scored)


def _metric_of(adapter: ModelAdapter, runs: _Runs, tokens: Tensor, rows: int) -> float:
    return float(_runner(adapter, runs, tokens, rows, False).scores([], 0).mean())


def _changes(
    adapter: ModelAdapter,
    runs: _Runs,
    base: Tensor,
    source: Tensor | None,
    made: Mapping[str, SitePatches],
    rows_at_once: int,
    progress: bool,
) -> dict[str, Float[Tensor, "*axes C"]]:
    """Metric with each patch minus metric of the run that is patched; with patches open elsewhere passes begin at the first
    block."""
    resumes = bool(adapter.blocks) and not adapter.interceptions
    runner = _runner(adapter, runs, base, rows_at_once, resumes)
    others = None if source is None else Unpatched(adapter, source, runs.attention_mask, rows_at_once, resumes)
    before = runner.scores([], 0)
    groups: dict[int, list[str]] = {}
    for name in made:
        groups.setdefault(start_of(adapter, name) if resumes else 0, []).append(name)
    found = {name: torch.zeros(len(patches), dtype=torch.float64) for name, patches in made.items()}
    at_once = max(1, rows_at_once // len(base))
    with tqdm(total=sum(map(len, made.values())), desc="sweep", disable=not progress, unit="patch") as bar:
        for block, names in sorted(groups.items()):
            x = runner.prompts.inputs(names, block)
            other = {} if others is None else others.inputs(names, block)
            changes = {name: made[name].change(Inputs(x[name], other.get(name))) for name in names}
            for scores in run_group(runner, {name: made[name] for name in names}, changes, block, at_once):
                for name, (first, part) in scores.items():
                    found[name][first : first + len(part)] = (part - before).mean(1).cpu()
                    bar.update(len(part))
    return {name: changes.view(made[name].shape) for name, changes in found.items()}


# --- what is put in --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Values:
    """Makes, for each site, the difference that patching its components makes to their activations."""

    put: str | float
    tokens: Tensor
    attention_mask: Tensor | None
    positions: Positions | None
    by_head: bool
    means: Mapping[str, Tensor] | None
    seed: int

    @property
    def takes_other(self) -> bool:
        """Whether values come from another run."""
        return self.put in ("corrupt", "clean")

    def of(self, components: Components) -> Callable[[Inputs], Tensor]:
        """For one site, from its inputs to a' - h."""
        site = components.site
        parts = self.by_head and site.head_side == "in"
        read = components.head_acts if parts else components.acts
        given = None if self.means is None or self.put != "mean" else self._given_mean(components, parts)

        def change(inputs: Inputs) -> Tensor:
            h = read(inputs.x).detach()
            rows = h.shape[: -2 if parts else -1]
            other = None if inputs.other is None else read(inputs.other).detach()
            new = self._new(h, rows, other) if given is None else given.to(h)
            difference = new - h
            if self.positions is None:
                return difference
            columns = self.positions.columns(rows, Span(0, rows[-1]), site.name).to(h)
            return difference * columns.view(*columns.shape, *(1,) * (h.ndim - len(rows)))

        return change

    def _new(self, h: Tensor, rows: Sequence[int], other: Tensor | None) -> Tensor:
        if other is not None:
            return other
        if self.put == "resample":
            return h[derangement(len(h), self.seed).to(h.device)]
        if self.put == "mean":
            weight = h.new_ones(rows) if self.attention_mask is None else self.attention_mask.to(h)
            weight = weight.view(*rows, *(1,) * (h.ndim - len(rows)))
            return (h * weight).sum(tuple(range(len(rows)))) / weight.sum()
        return torch.full_like(h, 0.0 if self.put == "zero" else float(self.put))

    def _given_mean(self, components: Components, parts: bool) -> Tensor:
        assert self.means is not None
        name, C = components.site.name, components.n_components
        if parts:
            raise SettingError(f"Means of whole activations say nothing of the parts that heads of {name} read.")
        if name not in self.means:
            raise NoMatchingSiteError(f"There is no mean of {name} among those of {', '.join(self.means)}.")
        mean = self.means[name]
        if mean.shape not in ((C,), (self.tokens.shape[1], C)):
            raise ShapeError(
                f"Means of {name} are [C={C}] or [pos={self.tokens.shape[1]}, C={C}]; given {list(mean.shape)}."
            )
        return mean


# --- checks ----------------------------------------------------------------------------------------------------------
def _checked_value(value: SweepValue | None, direction: str, runs: _Runs, rows_at_once: int) -> str | float:
    """What is put in, by name or as a number."""
    if direction not in ("noising", "denoising"):
        raise SettingError(f"A direction is 'noising' or 'denoising'; given {direction!r}.")
    if rows_at_once < 1:
        raise SettingError(f"rows_at_once is at least 1; given {rows_at_once}.")
    put = ("corrupt" if direction == "denoising" else "zero") if value is None else value
    if isinstance(put, str) and put not in ("zero", "mean", "resample", "corrupt"):
        raise SettingError(f"A value is 'zero', 'mean', 'resample', 'corrupt' or a number; given {put!r}.")
    if direction == "denoising" and put != "corrupt":
        raise SettingError(f"Denoising puts the clean activations into the corrupt run; leave value={put!r} out.")
    if put == "corrupt" and runs.corrupt is None:
        raise DataError("There are no corrupt prompts: give corrupt=, or a task that has some.")
    if put == "resample" and len(runs.clean) < 2:
        raise DataError("Resampling takes another prompt's activations, and there is one prompt. Give several.")
    return "clean" if direction == "denoising" else put


def _chosen_sites(decomposition: Decomposition, pattern: SitePattern | None, by_head: bool) -> Sequence[str]:
    names = list(decomposition if pattern is None else select_sites(decomposition.sites, pattern))
    if not by_head:
        return names
    whole = [name for name in names if decomposition.sites[name].n_heads is None]
    if (whole and pattern is not None) or len(whole) == len(names):
        raise HeadIndexError(
            f"{whole[0]} does not divide into heads; leave by_head out, or sweep W_Q, W_K, W_V and W_O."
        )
    return [name for name in names if name not in whole]
