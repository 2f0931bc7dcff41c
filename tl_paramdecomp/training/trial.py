"""The first steps of a run, taken to see what it needs: its start on torch's meta device, and real steps with few rows."""

import contextlib
import math
import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.base import Captured
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.sources import BatchSource, MadeSource
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.parallel import ALONE
from tl_paramdecomp.sites import Fingerprint, WeightSite
from tl_paramdecomp.training.config import RunConfig
from tl_paramdecomp.training.loop import Run

META = torch.device("meta")
TURNS = 3
"""Turns of a phase of the start, such as a warm-up, that a trial takes; the rest take as long each."""
FEW = (2, 3)
"""Rows of a trial's steps, times the smallest number that the method takes; a single row is a special case to operations."""
TIMED = 2
"""Steps that are timed, after one that is not."""
AFFORDABLE = 10.0
"""Seconds that a step with more rows may take, where time is to be measured better."""


# --- without memory ---------------------------------------------------------------------------------------------------
def outline(adapter: ModelAdapter, sites: Mapping[str, WeightSite], method: Method[Any]) -> Any:
    """What the method starts from, with every tensor on torch's meta device; None where the start depends on numbers."""
    if any(f.name == "warm_up_steps" for f in fields(method)):  # type: ignore[arg-type]
        method = replace(method, warm_up_steps=0)  # type: ignore[type-var]
    if getattr(method, "gains", False):
        _ = adapter.norms  # tried out, and remembered, with numbers
    shadow: Any = object.__new__(type("Outline", (_Outline, type(adapter)), {}))
    shadow.__dict__ |= vars(adapter) | {"real": adapter}
    nothing = Batch(torch.empty(1, 1, dtype=torch.int64, device=META), None)
    try:
        with META, _Undrawn():
            return method.initialise(shadow, sites, torch.Generator(), lambda _, n: range(min(n, 1)), lambda _: nothing)
    except (RuntimeError, NotImplementedError):
        return None


class _Outline:
    """What an adapter gives, without its numbers."""

    real: ModelAdapter

    @property
    def device(self) -> torch.device:
        return META

    def weight(self, name: str) -> Tensor:
        return torch.empty_like(self.real.weight(name), device=META)

    def fingerprint(self, name: str, fresh: bool = False) -> Fingerprint:
        return Fingerprint((0, 0), "float32", 0.0, 0.0, (), (0.0, 0.0))

    def capture(self, tokens: Tensor, names: list[str], *rest: Any, **changes: Any) -> Captured:
        indices, inputs = torch.empty(1, 1, dtype=torch.int64, device=META), {}
        for site in map(self.real.site, names):
            inputs[site.name] = indices if site.kind == "embedding" else torch.empty(1, 1, site.d_in, device=META)
        return Captured(torch.empty(1, 1, 1, device=META), inputs)


class _Undrawn(TorchFunctionMode):
    """Nothing is drawn from a generator: the meta device has none."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "generator"})


# --- with memory ------------------------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """What steps with so many rows took."""

    rows: int
    live: Sequence[int]
    """Bytes of the tensors that a step had made, after each of its operations."""
    peak: int
    """The most that the device held in a step."""
    remembered: int
    """Bytes of what the method keeps between steps."""
    seconds: float


@dataclass
class Trial:
    """The beginning of a run."""

    adapter: ModelAdapter
    sites: Mapping[str, WeightSite]
    method: Method[Any]
    source: BatchSource | None
    background: BatchSource | None
    config: RunConfig
    steps: int
    """Of the whole run; 0: its start is all there is."""
    made: Any = None
    start_seconds: float = 0.0
    start_peak: int = 0
    few: Steps | None = None
    more: Steps | None = None
    timed: Steps | None = None
    rows: int = 0
    """Of the whole batch."""
    shape: tuple[int, ...] = ()
    """Of a row."""
    _batches: tuple[Batch, Batch | None] = field(default=(None, None), repr=False)  # type: ignore[assignment]

    def run(self) -> "Trial":
        """Take the start and the steps. The target must be frozen."""
        source, peak, begun, phases = self.source, Peak(self.adapter.device), time.perf_counter(), _Phases()
        first = None if source is None else source.batch(0)
        batches = None if source is None or first is None else lambda i: source.batch(i) if i else first
        generator = torch.Generator().manual_seed(self.config.seed)
        self.made = self.method.initialise(self.adapter, self.sites, generator, phases, batches)
        self.made.requires_grad_(False)
        self.start_seconds, self.start_peak = time.perf_counter() - begun + phases.left, peak.bytes()
        if first is None or not self.steps:
            return self
        self._batches = first, None if self.background is None else self.background.batch(0)
        self.rows, self.shape = len(first.tokens), tuple(first.tokens.shape[1:])
        unit = unit_of(self.method) * self.config.accumulate
        rows = [n * unit for n in FEW] if self.rows > FEW[1] * unit else [self.rows]
        with torch.enable_grad():
            self.few, self.more = (self._take(n) for n in (rows[0], rows[-1]))
            self.timed = self._timed_with_more(self.more, unit)
        return self

    def step_peak(self, rows: int) -> int:
        """The most that the device holds in a step of so many rows: what it held in the largest step that was taken, which
        counts what the allocator loses between tensors, and what the tensors of more rows add."""
        assert self.few is not None and self.more is not None
        few, more, largest = self.few, self.more, self.timed or self.more
        if few.rows == largest.rows:
            return largest.peak
        if self.adapter.device.type == "cuda":  # traces do not see what CUDA's backward passes make
            return continued([few.peak], [largest.peak], (few.rows, largest.rows), rows)
        live = {n: continued(few.live, more.live, (few.rows, more.rows), n) for n in (rows, largest.rows)}
        return largest.peak + live[rows] - live[largest.rows] + self.remembered(rows) - largest.remembered

    def step_seconds(self, rows: int) -> float:
        """Time of a step of so many rows."""
        assert self.few is not None and self.timed is not None
        few, more = self.few, self.timed
        slope = max(0.0, more.seconds - few.seconds) / max(1, more.rows - few.rows)
        return more.seconds + (rows - more.rows) * slope

    def remembered(self, rows: int) -> int:
        """Bytes of what the method keeps between steps of so many rows."""
        if self.few is None or self.more is None:
            return 0
        return continued([self.few.remembered], [self.more.remembered], (self.few.rows, self.more.rows), rows)

    def _timed_with_more(self, more: Steps, unit: int) -> Steps:
        """Steps of as many rows as time and memory allow, up to the whole batch."""
        left = available(self.adapter.device)
        rows = min(self.rows, int(more.rows * AFFORDABLE / max(more.seconds, 1e-9)))
        while rows > more.rows and left is not None and self.step_peak(rows) - more.peak > 0.8 * left:
            rows //= 2
        rows -= rows % unit
        return self._take(rows, traced=False) if rows > more.rows else more

    def _take(self, rows: int, traced: bool = True) -> Steps:
        """Steps as the loop takes them."""
        device = self.adapter.device
        few = [None if b is None else b.rows(slice(0, rows)) for b in self._batches]
        source, background = (None if b is None else MadeSource(lambda _, b=b: b) for b in few)
        assert source is not None
        config = replace(self.config, log_every=1, max_skips=self.steps)
        run = Run(self.adapter, self.method, {"method": {}}, config, self.steps, (), ALONE, None)
        run.prepare(self.made, source, background, None)
        live, peak, seconds = [0], Peak(device), []
        for number in range(1 + traced + TIMED):
            run.state.optimiser.zero_grad()
            if traced and number == 1 and device.type != "cuda":
                with LiveBytes(device) as counted:
                    run.step(0.0)
                live = counted.trace
                continue
            peak, begun = peak if number > traced else Peak(device), time.perf_counter()
            run.step(0.0)
            seconds.append(time.perf_counter() - begun)
        run.state.optimiser.zero_grad()
        self.made.requires_grad_(False)
        return Steps(rows, live, peak.bytes(), size_of(run.state.memory.values()), min(seconds[1:]))


class _Phases:
    """Takes the first turns of each phase of a start, and keeps what the others would take."""

    def __init__(self) -> None:
        self.left = 0.0

    def __call__(self, what: str, total: int) -> Iterator[int]:
        taken, begun = min(total, TURNS), time.perf_counter()
        yield from range(taken)
        self.left += (total - taken) * (time.perf_counter() - begun) / max(1, taken)


def unit_of(method: Method[Any]) -> int:
    """The smallest number of rows that a method takes."""
    owner: Any = getattr(method, "training", None) or method
    losses = (*getattr(owner, "losses", ()), *getattr(owner, "background_losses", ()))
    shared = [loss.repeats for loss in losses if getattr(loss, "scope", None) == "repeat_across_batch"]
    return math.lcm(method.rows_together, *shared)


STATUS, MEMINFO, CLEAR = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/clear_refs")


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of tensors that were made within it and are still there, after every operation.

    A training step does the same operations whatever its number of rows, and what is live after each of them is affine in
    that number: two traces say what any other step will hold (`continued`).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.trace = device, 0, [0]
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._note(storage)
        self.trace.append(self.live)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage)
        self._count(storage.nbytes())
        weakref.finalize(storage, self._count, -storage.nbytes())

    def _count(self, size: int) -> None:
        self.live += size


def continued(few: Sequence[int], more: Sequence[int], rows: tuple[int, int], wanted: int) -> int:
    """The most bytes that are live in a step of `wanted` rows, from the traces of steps of two other numbers of rows.

    Where the two steps did not do the same operations, their largest values are continued instead.
    """
    share = (wanted - rows[0]) / max(1, rows[1] - rows[0])
    if len(few) != len(more):
        few, more = [max(few)], [max(more)]
    return max(round(a + share * (b - a)) for a, b in zip(few, more, strict=True))


class Peak:
    """The most memory that a device has held since it was made: resident memory of this process for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR.exists():
            with contextlib.suppress(OSError):
                CLEAR.write_text("5", encoding="ascii")

    def bytes(self) -> int:
        """So many bytes; what was held before counts where the system keeps no peak that can be reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()


def held(device: torch.device) -> int:
    """Bytes in use now: allocated on a CUDA device, resident memory of this process for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _said(STATUS, "VmRSS") or peak_resident()


def peak_resident() -> int:
    """The most resident memory that this process has had, since `Peak` was last made where that can be told."""
    found = _said(STATUS, "VmHWM")
    if found is not None:
        return found
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left, folder = _said(MEMINFO, "MemAvailable"), Path("/sys/fs/cgroup")
    if left is None:
        with contextlib.suppress(ValueError, OSError, AttributeError):
            left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # what a container's limit leaves
        limited = int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
        return limited if left is None else min(left, limited)
    return left


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, those that share memory counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _said(path: Path, key: str) -> int | None:
    """Bytes that a file of the kernel's says under a key."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None
