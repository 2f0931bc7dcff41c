"""What each component by itself does for a metric: the sweep behind activation patching, component by component.

Noising runs the clean prompts and puts other values in; denoising runs the corrupt prompts and puts the clean activations in
(Heimersheim and Nanda 2024, arXiv 2404.15255). Effects are measured, not estimated from gradients.

An effect is the metric with the component minus the metric without it, as in `attribute`. `With` is the component's own clean
activation in both directions, `without` whatever stands in its place (0, a mean, another prompt's activation, a number): a
denoising effect is what patching restores, a noising effect what patching breaks, both in units of the metric.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.analysis.effects.single_runs import Runs, SitePatches
from tl_paramdecomp.analysis.effects.site_writes import Prompts, chosen_sites, prompts_of
from tl_paramdecomp.analysis.records import WITH_WITHOUT, DataFrame, Record, Table, frame_of, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.positions import Positions, PositionsLike, parse_positions
from tl_paramdecomp.errors import DataError, HeadIndexError, NoMatchingSiteError, SettingError, ShapeError
from tl_paramdecomp.patching.act_patches import derangement
from tl_paramdecomp.patching.target import Claim, checked_adapter, claimed
from tl_paramdecomp.settings import Count, Seed, fit, from_plain
from tl_paramdecomp.sites import SitePattern, Span

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
class Sweep(Record, what="sweep", arrays=("effects",)):
    """Effects of every component by itself: the metric with it minus the metric without it. Positive values speak for it."""

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
    """Its name."""
    granularity: list[str]
    """Axes of each site's effects: `position` and `head`, where they are apart, then `component`."""
    positions: str
    """Where patches were: everywhere, each, or some."""
    prompts: int
    """How many."""
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

    def to_frame(self) -> DataFrame:
        """Every patch as a row of a pandas frame."""
        columns = ["site", *self.granularity, "effect"]
        return frame_of([[getattr(row, c) for c in columns] for row in self.rows()], columns)

    def tables(self, top: int = 10) -> list[Table]:
        title = f"Largest effects on {self.metric} ({self.direction}, value {self.value})"
        axes = self.granularity
        rows = [[r.site, *(str(getattr(r, axis)) for axis in axes), f"{r.effect:+.4f}"] for r in self.top(top)]
        sites = plain_table("By site", "site", "patches", "sum", "largest", "smallest")
        for site in self.effects:
            values = self.effect(site)
            figures = (values.sum(), values.max(), values.min())
            sites.add_row(site, str(values.numel()), *(f"{float(figure):+.4f}" for figure in figures))
        return [plain_table(title, "site", *axes, f"effect\n{WITH_WITHOUT}", rows=rows), sites]

    def footnotes(self) -> list[str]:
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

    Raises:
        SettingError: A value, direction or number of rows that makes no sense.
        DataError: No corrupt prompts where they are needed, or one prompt to resample from.
        HeadIndexError: `by_head` with a site that has no heads.
        ShapeError, DtypeError: Prompts that are no token rows or are not aligned, means or a metric of another shape.
        NoMatchingSiteError, PositionIndexError: No such site or position.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched_acts`.
    """
    if hasattr(prompts, "clean") and (corrupt is not None or attention_mask is not None):
        raise SettingError("A task has its own corrupt prompts and attention mask; leave corrupt= and mask out.")
    runs = prompts_of(model, prompts, metric, corrupt, attention_mask, numbers=True)
    put, seed = _checked_value(value, direction, runs, rows_at_once), fit(seed, Seed, "seed")
    adapter = checked_adapter(model, decomposition, runs.clean, runs.attention_mask)
    chosen = _chosen_sites(decomposition, sites, by_head)
    denoising = direction == "denoising"
    base, source = (runs.corrupt, runs.clean) if denoising else (runs.clean, runs.corrupt)
    assert base is not None
    each = isinstance(positions, str) and positions == "each"
    if each and base.is_floating_point():
        raise ShapeError(f"These inputs {list(base.shape)} have no position axis; leave positions out.")
    where = None if each else parse_positions(positions)
    given: dict[str, Tensor] = {}
    if put == "mean" and means is not None:
        given = {name: _given_mean(decomposition[name], means, base.shape[1], by_head) for name in chosen}
    claims = {name: Claim(decomposition[name], additive=True) for name in chosen}
    with torch.no_grad(), claimed(adapter.core, claims):
        told = (runs.attention_mask, rows_at_once, runs.score, None if runs.task is None else runs.task.last)
        run, reads = Runs(adapter, base, *told), put in ("corrupt", "clean")
        others = None if source is None else Runs(adapter, source, *told, resumes=reads)
        ends = [before := run.plain(), None if others is None else others.plain()]
        found, columns = {}, range(base.shape[1]) if each else None
        with tqdm(desc="sweep", disable=not progress, unit="patch") as bar:
            for block, names in run.by_block(chosen).items():
                x = run.inputs(names, block)
                other = others.inputs(names, block) if others and reads else {}
                patches = {}
                for name in names:
                    own = (decomposition[name], put, x[name], other.get(name), given.get(name))
                    change = _change(*own, runs.attention_mask, where, by_head, seed)
                    patches[name] = SitePatches(decomposition[name], change, columns, by_head)
                    found[name] = torch.zeros(patches[name].shape, dtype=torch.float64)
                bar.total = (bar.total or 0) + sum(map(len, patches.values()))
                for name, some, scores in run.patched(patches, block):
                    found[name].view(-1)[some] = (scores - before).mean(1).cpu()
                    bar.update(len(some))
    metrics = [None if scores is None else float(scores.mean()) for scores in (reversed(ends) if denoising else ends)]
    assert metrics[0] is not None
    axes = [*(["position"] if each else []), *(["head"] if by_head else []), "component"]
    return Sweep(
        "with minus without", direction, put if isinstance(put, str) else f"{put:g}", runs.metric, axes,
        "each" if each else "everywhere" if where is None else repr(positions), len(base), metrics[0], metrics[1],
        {name: (found[name] if denoising else 0.0 - found[name]).tolist() for name in chosen},
    )  # fmt: skip


# --- what is put in --------------------------------------------------------------------------------------------------
def _change(
    components: Components, put: str | float, x: Tensor, other: Tensor | None, mean: Tensor | None,
    attention_mask: Tensor | None, positions: Positions | None, by_head: bool, seed: int,
) -> Float[Tensor, "n ..."]:  # fmt: skip
    """a' - h of one site, from what it reads in the run that is patched and in the run that values come from."""
    site = components.site
    parts = by_head and site.head_side == "in"
    read = components.head_acts if parts else components.acts
    h = read(x).detach()
    rows = h.shape[: -2 if parts else -1]
    if mean is not None:
        new = mean.to(h)
    elif other is not None:
        new = read(other).detach()
    elif put == "resample":
        new = h[derangement(len(h), seed).to(h.device)]
    elif put == "mean":
        weight = h.new_ones(rows) if attention_mask is None else attention_mask.to(h)
        weight = weight.view(*rows, *(1,) * (h.ndim - len(rows)))
        new = (h * weight).sum(tuple(range(len(rows)))) / weight.sum()
    else:
        new = torch.full_like(h, 0.0 if put == "zero" else float(put))
    if positions is None:
        return new - h
    columns = positions.columns(rows, Span(0, rows[-1]), site.name).to(h)
    return (new - h) * columns.view(*columns.shape, *(1,) * (h.ndim - len(rows)))


def _given_mean(components: Components, means: Mapping[str, Tensor], length: int, by_head: bool) -> Tensor:
    name, C = components.site.name, components.n_components
    if by_head and components.site.head_side == "in":
        raise SettingError(f"Means of whole activations say nothing of the parts that heads of {name} read.")
    if name not in means:
        raise NoMatchingSiteError(f"There is no mean of {name} among those of {', '.join(means)}.")
    if means[name].shape not in ((C,), (length, C)):
        raise ShapeError(f"Means of {name} are [C={C}] or [pos={length}, C={C}]; given {list(means[name].shape)}.")
    return means[name]


# --- checks ----------------------------------------------------------------------------------------------------------
def _checked_value(value: SweepValue | None, direction: str, runs: Prompts, rows_at_once: int) -> str | float:
    """What is put in, by name or as a number."""
    fit(direction, Direction, "direction")
    fit(rows_at_once, Count, "rows_at_once")
    if not len(runs.clean):
        raise DataError("A sweep needs at least one prompt.")
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
    names = list(chosen_sites(decomposition, pattern))
    if not by_head:
        return names
    whole = [name for name in names if decomposition.sites[name].n_heads is None]
    if (whole and pattern is not None) or len(whole) == len(names):
        raise HeadIndexError(
            f"{whole[0]} does not divide into heads; leave by_head out, or sweep W_Q, W_K, W_V and W_O."
        )
    return [name for name in names if name not in whole]
