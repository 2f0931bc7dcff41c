"""What a run will need before it is begun: components, memory, time and disk.

1. The method's start is made on torch's meta device, where tensors have shapes and no memory: that gives the counts, and what
   is held throughout. Where not even that fits there is no trial.
2. Otherwise the run is really begun (`trial`): its start, then a few steps with two and three rows (times the smallest number
   that the method takes), optimiser and all.
3. Memory and time are continued to the batch's rows. What is live after each operation of a step is affine in the rows, so that
   the peak is found even where it is another operation's with more rows (`trial.LiveBytes`); what the process holds beside
   tensors is what it held in the trial.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.records import Record, Row, form, plain_table
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.patching.target import frozen
from tl_paramdecomp.sites import SitePattern
from tl_paramdecomp.training.config import OnNonfinite, RunConfig
from tl_paramdecomp.training.trial import Trial, available, held, outline, peak_resident, size_of

if TYPE_CHECKING:
    from rich.table import Table

HELD = {
    "process": "process: libraries, rows, and what is loaded",
    "model": "target model",
    "components": "components",
    "importance": "importance function",
    "gradients": "gradients",
    "optimiser": "Adam's two averages",
    "copy": "copy to take a step back to",
}
"""What is held throughout, in words."""
MOMENTS = ("step", "row", "start", "peak", "available")
RunRow = form("RunRow", method=str, importance=str | None, steps=int, rows=int, shape=list[int], device=str)
SiteRow = form("SiteRow", site=str, d_in=int | None, d_out=int | None, components=int, parameters=int)
CountRow = form("CountRow", components=int, parameters=int, importance=int, trained=int, optimiser=int)
MemoryRow = form("MemoryRow", in_use=int, **dict.fromkeys(HELD, int), **dict.fromkeys(MOMENTS, int | None))
SecondsRow = form("SecondsRow", start=float | None, step=float | None, run=float | None)
DiskRow = form("DiskRow", checkpoint=int, kept=int, result=int, total=int)


@dataclass(frozen=True)
class Estimate(Record, what="estimate"):
    """What a run needs, in bytes and seconds."""

    run: Annotated[Row, RunRow]
    """Method, importance function, steps, rows and their shape, device."""
    sites: Annotated[list[Row], list[SiteRow]]
    """By site: d_in, d_out, components, parameters."""
    counts: Annotated[Row, CountRow]
    """Components; parameters of components, of the importance function, of all that is trained; numbers the optimiser keeps."""
    memory: Annotated[Row, MemoryRow]
    """What is held throughout, by what it is for; what a `step` adds to it; the `peak`, in the start or in a step; what is
    `available` besides what is in use now. On a CPU it is the resident memory of the process."""
    seconds: Annotated[Row, SecondsRow]
    """Of the `start`, a `step`, and the `run` without checkpoints and evaluations; None without a trial."""
    disk: Annotated[Row, DiskRow]
    """Of a `checkpoint` and of the `result`; how many checkpoints are `kept`, and the `total`."""
    refused: str | None = None
    """Why no trial was made."""

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into memory; None where that is not known."""
        peak, left = self.memory["peak"], self.memory["available"]
        if self.refused is not None:
            return False
        return None if peak is None or left is None else peak <= left + self.memory["in_use"]

    def tables(self) -> "list[Table]":
        """Sites, memory, and what else it takes."""
        return [_sites(self), _memory(self), _costs(self)]

    def footnotes(self) -> list[str]:
        """Why there was no trial, or that the run does not fit."""
        if self.refused is not None:
            return [self.refused]
        if self.fits is False:
            room = self.memory["available"] + self.memory["in_use"]
            return [f"This does not fit: {in_bytes(self.memory['peak'])} are needed, and there are {in_bytes(room)}."]
        return []


def estimate_run(
    model: Any,
    sites: SitePattern,
    method: Method[Any],
    data: Any = None,
    steps: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    *,
    background: Any = None,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    keep_best: bool = False,
    on_nonfinite: OnNonfinite = "stop",
    accumulate: int = 1,
    trial: bool = True,
) -> Estimate:
    """What `decompose` with the same arguments will need. It writes no file, and leaves the model as it was.

    A trial takes as long as the start of the run and about ten steps of few rows. Some of what it frees stays with the
    process; `tl-paramdecomp decompose ... --dry-run` has one of its own.

    Args:
        model, sites, method, data, steps, batch_size, seed, background, checkpoint_every, keep_checkpoints, on_nonfinite,
            accumulate: As for `decompose`; the first batch of the data is read.
        keep_best: Whether the best checkpoint is kept as well.
        trial: Begin the run to measure; False: count only.

    Raises:
        NoMatchingSiteError, UnsupportedModelError, DataError, SettingError: As `decompose`.
    """
    config = RunConfig(
        steps, batch_size, seed, checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints,
        on_nonfinite=on_nonfinite, accumulate=accumulate,
    )  # fmt: skip
    adapter = adapt(model)
    chosen = adapter.select(sites)
    source, other = (
        None if rows is None else batch_source(rows, batch_size, seed + i, together=method.rows_together, model=adapter)
        for i, rows in enumerate((data, background))
    )
    steps = config.steps_of(method, data)
    if steps:
        method.check(adapter)
    for used in (source, other):
        if used is not None:
            used.check()
    in_use, cuda = held(adapter.device), adapter.device.type == "cuda"
    size = size_of([*adapter.root.parameters(), *adapter.root.buffers()])
    now = _Now(in_use, in_use if cuda else peak_resident(), size, available(adapter.device))
    devices = [adapter.device] if cuda else []
    with frozen(adapter), torch.random.fork_rng(devices):
        made = outline(adapter, chosen, method)
        refused = None if made is None else _too_large(_kept(made, method, steps, on_nonfinite), now.available)
        taken = Trial(adapter, chosen, method, source, other, config, steps)
        if trial and refused is None:
            made = taken.run().made
    if made is None:
        raise SettingError(
            f"What {type(method).__name__} starts from here depends on the weights; leave trial=True to count it."
        )
    kept, function = _kept(made, method, steps, on_nonfinite), getattr(made, "importance", None)
    parameters, importance, trained = _sums(made, method, steps, Tensor.numel)
    result = kept["components"] + kept["importance"]
    checkpoint = result + kept["optimiser"] + taken.remembered(taken.rows)
    step = None if taken.few is None else taken.step_seconds(taken.rows)
    stay = min(keep_checkpoints + keep_best, -(-steps // checkpoint_every))
    return Estimate(
        run={
            "method": type(method).__name__, "importance": None if function is None else function.config.kind,
            "steps": steps, "rows": taken.rows or batch_size, "shape": list(taken.shape), "device": str(adapter.device),
        },
        sites=_rows_of_sites(made),
        counts={
            "components": sum(made.n_components.values()) if hasattr(made, "n_components") else made.n_subnetworks,
            "parameters": parameters, "importance": importance, "trained": trained, "optimiser": 2 * trained,
        },
        memory=_memory_of(kept, now, taken),
        seconds=dict.fromkeys(("start", "step", "run")) if taken.made is None else {
            "start": taken.start_seconds, "step": step, "run": taken.start_seconds + steps * (step or 0.0),
        },
        disk={"checkpoint": checkpoint, "kept": stay, "result": result, "total": stay * checkpoint + result},
        refused=refused,
    )  # fmt: skip


class _Now(NamedTuple):
    """What is held before a trial, in bytes."""

    in_use: int
    peak: int
    model: int
    available: int | None


def _sums(made: Any, method: Method[Any], steps: int, of: Callable[[Tensor], int]) -> tuple[int, int, int]:
    """Numbers or bytes of components, of the importance function, and of all that is trained; also on the meta device, where
    storages cannot be told apart."""
    network, groups = getattr(made, "importance", None), method.parameter_groups(made) if steps else []
    every, importance, trained = (
        sum(map(of, {id(p): p for p in some}.values()))
        for some in (
            made.parameters(), () if network is None else network.parameters(), (p for g in groups for p in g.parameters),
        )
    )  # fmt: skip
    return every - importance, importance, trained


def _kept(made: Any, method: Method[Any], steps: int, on_nonfinite: OnNonfinite) -> Row:
    """Bytes held throughout, besides the process and the model."""
    components, importance, trained = _sums(made, method, steps, lambda t: t.numel() * t.element_size())
    copy = components + importance + 2 * trained if on_nonfinite == "skip" and steps else 0
    return {
        "components": components, "importance": importance, "gradients": trained, "optimiser": 2 * trained, "copy": copy,
    }  # fmt: skip


def _too_large(kept: Row, left: int | None) -> str | None:
    needed = sum(kept.values())
    if left is None or needed <= left:
        return None
    return (
        f"No trial: {in_bytes(needed)} are held throughout, and {in_bytes(left)} are free. Take fewer sites or components, or "
        "a machine with more memory."
    )


def _rows_of_sites(made: Any) -> list[Row]:
    """Sites, and norms where they take part."""
    rows, dictionaries = [], [made] if hasattr(made, "n_components") else [made.decoder, made.encoder]
    for name, part in dictionaries[0].items():
        site = part.site
        rows.append({
            "site": name,
            "d_in": getattr(site, "d_in", None),
            "d_out": getattr(site, "d_out", getattr(site, "width", None)),
            "components": made.n_components[name] if hasattr(made, "n_components") else made.n_subnetworks,
            "parameters": sum(p.numel() for parts in dictionaries for p in parts[name].parameters()),
        })  # fmt: skip
    return rows


def _memory_of(kept: Row, now: _Now, taken: Trial) -> Row:
    fixed = {"process": max(0, now.in_use - now.model), "model": now.model, **kept}
    found: Row = {**fixed, **dict.fromkeys(MOMENTS), "in_use": now.in_use, "available": now.available}
    if taken.made is None:
        return found
    found["start"] = found["peak"] = max(now.peak, taken.start_peak)
    if taken.few is not None:
        step = taken.step_peak(taken.rows)
        found |= {"step": max(0, step - sum(fixed.values())), "peak": max(found["start"], step)}
        found["row"] = None if taken.rows < 2 else step - taken.step_peak(taken.rows - 1)
    return found


# --- tables -----------------------------------------------------------------------------------------------------------
def _sites(found: Estimate) -> "Table":
    run, counts = found.run, found.counts
    table = plain_table(f"Sites of {run['method']}", "site", "d_in", "d_out", "components", "parameters")
    for row in found.sites:
        table.add_row(row["site"], *(_number(row[key]) for key in ("d_in", "d_out", "components", "parameters")))
    table.add_section()
    table.add_row("all", "", "", _number(counts["components"]), _number(counts["parameters"]))
    words = {"trained": "trained", "optimiser": "numbers the optimiser keeps"}
    if run["importance"] is not None:
        words = {"importance": f"importance function ({run['importance']})", **words}
    for key, text in words.items():
        table.add_row(text, "", "", "", _number(counts[key]))
    return table


def _memory(found: Estimate) -> "Table":
    memory, run = found.memory, found.run
    kind = "resident memory" if run["device"] == "cpu" else f"allocated on {run['device']}"
    table = plain_table(f"Memory ({kind})", "what", "bytes")
    for key, text in HELD.items():
        if memory[key] or key != "copy":
            table.add_row(text, in_bytes(memory[key]))
    table.add_section()
    table.add_row("held throughout", in_bytes(sum(memory[key] for key in HELD)))
    if memory["step"] is not None:
        rows = " x ".join(str(n) for n in [run["rows"], *run["shape"]])
        table.add_row(f"added by a step of {rows}", in_bytes(memory["step"]))
        table.add_row("of that, by its last row", in_bytes(memory["row"] or 0), style="dim")
    if memory["peak"] is not None:
        table.add_section()
        table.add_row("peak at the start", in_bytes(memory["start"]))
        table.add_row("peak of the run", in_bytes(memory["peak"]), style="bold")
    if memory["available"] is not None:
        table.add_row("there is", in_bytes(memory["available"] + memory["in_use"]))
    return table


def _costs(found: Estimate) -> "Table":
    seconds, disk, run = found.seconds, found.disk, found.run
    table = plain_table("Time and disk", "what", "")
    if seconds["run"] is not None:
        table.add_row("start", in_seconds(seconds["start"]))
        if seconds["step"] is not None:
            table.add_row("a step", in_seconds(seconds["step"]))
        table.add_row(
            f"{run['steps']:,} steps, without checkpoints and evaluations", in_seconds(seconds["run"]), style="bold"
        )
        table.add_section()
    table.add_row("a checkpoint", in_bytes(disk["checkpoint"]))
    table.add_row("the result", in_bytes(disk["result"]))
    table.add_row(f"in all, with {disk['kept']} checkpoints kept", in_bytes(disk["total"]), style="bold")
    return table


def in_bytes(n: float | int) -> str:
    """A number of bytes to read, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}" if unit == "GB" else f"{n / size:,.0f} {unit}"
    return f"{n:.0f} B"


def in_seconds(s: float | int) -> str:
    """A time to read."""
    if s < 60:
        return f"{s:.2g} s" if s < 10 else f"{s:.0f} s"
    minutes, seconds = divmod(round(s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _number(n: int | None) -> str:
    return "" if n is None else f"{n:,}"
