"""The first steps of a run, taken to see what it needs: its start on torch's meta device, and real steps with few rows."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.base import Captured
from tl_paramdecomp.methods.base import Batch, Method, TrainingStep
from tl_paramdecomp.methods.draws import RandomNumbers
from tl_paramdecomp.sites import Fingerprint, WeightSite
from tl_paramdecomp.training.data import BatchSource
from tl_paramdecomp.training.guards import FiniteGuard, OnNonfinite
from tl_paramdecomp.training.memory import Peak, Trace, Traced, available, continued, give_back, held
from tl_paramdecomp.training.state import TrainingState, figures_of, optimise, start_state

META = torch.device("meta")
TURNS = 3
"""Turns of a phase of the start, such as a warm-up, that a trial takes; the rest take as long each."""
FEW = (2, 3)
"""Rows of a trial's steps, times the smallest number that the method takes; a single row is a special case to operations."""
MAPPED = 32 * 2**20
"""Bytes from which glibc always takes memory of its own for a tensor, and gives it back; smaller ones come from its heap,
where gaps are left that nothing fits into."""
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
        sites = {name: self.real.site(name) for name in names}
        indices = torch.empty(1, 1, dtype=torch.int64, device=META)
        inputs = {
            name: indices if s.kind == "embedding" else torch.empty(1, 1, s.d_in, device=META)
            for name, s in sites.items()
        }
        return Captured(torch.empty(1, 1, 1, device=META), inputs)


class _Undrawn(TorchFunctionMode):
    """Nothing is drawn from a generator: the meta device has none."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "generator"})


# --- with memory ------------------------------------------------------------------------------------------------------
class Steps(NamedTuple):
    """What steps with so many rows took."""

    rows: int
    trace: Trace
    """The tensors of a step."""
    peak: int
    """The most that the device held in a step."""
    remembered: list[int]
    """Bytes of each tensor that the method keeps between steps."""
    seconds: float


@dataclass
class Trial:
    """The beginning of a run."""

    adapter: ModelAdapter
    sites: Mapping[str, WeightSite]
    method: Method[Any]
    source: BatchSource | None
    background: BatchSource | None
    steps: int
    """Of the whole run; 0: its start is all there is."""
    seed: int
    accumulate: int = 1
    """Micro-batches of a step."""
    on_nonfinite: OnNonfinite = "stop"
    base: int = 0
    """Bytes in use beside what the method makes, once all that a step loads is there."""
    lasting: tuple[int, ...] = ()
    """Bytes of each tensor that is there between steps: parameters and what the optimiser keeps of them."""
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
        device, phases = self.adapter.device, _Phases()
        peak, begun = Peak(device), time.perf_counter()
        first = None if self.source is None else self.source.batch(0)
        batches = None if self.source is None or first is None else _kept(self.source, first)
        generator = torch.Generator().manual_seed(self.seed)
        self.made = self.method.initialise(self.adapter, self.sites, generator, phases, batches)
        self.made.requires_grad_(False)
        self.start_seconds, self.start_peak = time.perf_counter() - begun + phases.left, peak.bytes()
        if first is None or not self.steps:
            return self
        self._batches = first, None if self.background is None else self.background.batch(0)
        self.rows, self.shape = len(first.tokens), tuple(first.tokens.shape[1:])
        unit = unit_of(self.method) * self.accumulate
        rows = [n * unit for n in FEW] if self.rows > FEW[1] * unit else [self.rows]
        with torch.enable_grad():
            self.few = self._take(rows[0], device)
            give_back()
            self.base = held(device) - sum(p.nbytes for p in self.made.parameters())
            self.more = self._take(rows[-1], device)
            self.timed = self._timed_with_more(unit, device)
        return self

    def step_peak(self, rows: int) -> int:
        """The most that the device holds in a step of so many rows."""
        assert self.few is not None and self.more is not None
        few, more = self.few, self.more
        if few.rows == more.rows:
            return more.peak
        both = few.rows, more.rows
        if self.adapter.device.type == "cuda":
            return affine(few.peak, more.peak, both, rows)
        loss = _solved(lambda loss: self._held(more.trace, more.remembered, loss), float(more.peak - self.base))
        trace = continued(few.trace, more.trace, both, rows)
        return self.base + round(self._held(trace, self._remembered(rows), loss))

    def _held(self, trace: Trace, remembered: Sequence[int], loss: float) -> float:
        """Bytes of all tensors at their peak, where those on the heap take so many times their own."""

        def weigh(size: int) -> float:
            return float(size) if size >= MAPPED else loss * size

        return trace.peak(weigh) + sum(map(weigh, (*remembered, *self.lasting)))

    def step_seconds(self, rows: int) -> float:
        """Time of a step of so many rows."""
        assert self.few is not None and self.timed is not None
        few, more = self.few, self.timed
        if more.rows in (rows, few.rows):
            return more.seconds
        slope = max(0.0, more.seconds - few.seconds) / (more.rows - few.rows)
        return more.seconds + (rows - more.rows) * slope

    def remembered(self, rows: int) -> int:
        """Bytes of what the method keeps between steps of so many rows."""
        return 0 if self.few is None else sum(self._remembered(rows))

    def _remembered(self, rows: int) -> list[int]:
        assert self.few is not None and self.more is not None
        pairs = zip(self.few.remembered, self.more.remembered, strict=True)
        return [affine(a, b, (self.few.rows, self.more.rows), rows) for a, b in pairs]

    def _timed_with_more(self, unit: int, device: torch.device) -> Steps:
        """Steps of as many rows as time and memory allow, up to the whole batch."""
        assert self.more is not None
        more, left = self.more, available(device)
        rows = min(self.rows, int(more.rows * AFFORDABLE / max(more.seconds, 1e-9)))
        while rows > more.rows and left is not None and self.step_peak(rows) - more.peak > 0.8 * left:
            rows //= 2
        rows -= rows % unit
        return self._take(rows, device, traced=False) if rows > more.rows else more

    def _take(self, rows: int, device: torch.device, traced: bool = True) -> Steps:
        assert self.source is not None
        numbers = RandomNumbers(self.seed, device, 0, self.accumulate > 1, "per_rank")
        state = start_state(self.method, self.made, numbers, self.source, self.background, accumulate=self.accumulate)
        give_back()
        trace, peak, seconds = Trace([], []), Peak(device), []
        for number in range(1 + traced + TIMED):
            state.optimiser.zero_grad()
            if traced and number == 1 and device.type != "cuda":
                with Traced(device) as traced_step:
                    self._step(state, rows, number)
                trace = traced_step.trace
                continue
            peak, begun = (Peak(device), time.perf_counter()) if number < 1 + traced else (peak, time.perf_counter())
            self._step(state, rows, number)
            seconds.append(time.perf_counter() - begun)
        state.optimiser.zero_grad()
        kept = [t for values in state.optimiser.state.values() for t in values.values()]
        self.lasting = tuple(t.nbytes for t in (*self.made.parameters(), *kept))
        self.made.requires_grad_(False)
        return Steps(rows, trace, peak.bytes(), [t.nbytes for t in state.memory.values()], min(seconds[1:]))

    def _step(self, state: TrainingState, rows: int, number: int) -> None:
        """One step as the loop takes it."""
        batch, other = (None if b is None else b.rows(slice(0, rows)) for b in self._batches)
        assert batch is not None
        guard = FiniteGuard(self.on_nonfinite, max_skips=self.steps)
        guard.before_step(state)
        state.optimiser.zero_grad()
        now = TrainingStep(
            self.adapter, self.made, batch, state.numbers, number / max(1, self.steps - 1), state.memory, other,
            accumulate=self.accumulate, number=number,
        )  # fmt: skip
        report = self.method.gradients(now)
        norms = optimise(state.groups, state.optimiser, self.method.learning_rate_factor(number, self.steps))
        self.method.after_step(now)
        guard.after_step(report, norms, state, "")
        state.done = number + 1
        figures_of(report, norms, state)


def _kept(source: BatchSource, first: Batch) -> Callable[[int], Batch]:
    """Batches by number, of which the first was read."""
    return lambda i: first if i == 0 else source.batch(i)


class _Phases:
    """Takes the first turns of each phase of a start, and keeps what the others would take."""

    def __init__(self) -> None:
        self.left = 0.0

    def __call__(self, what: str, total: int) -> Iterator[int]:
        taken, begun = min(total, TURNS), time.perf_counter()
        yield from range(taken)
        self.left += (total - taken) * (time.perf_counter() - begun) / max(1, taken)


def _solved(function: Callable[[float], float], wanted: float | int) -> float:
    """Where in [1, 4] an increasing function comes to a value, or the nearer end."""
    low, high = 1.0, 4.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < wanted else (low, middle)
    return low


def affine(few: float | int, more: float | int, rows: tuple[int, int], wanted: int) -> int:
    """What a figure of two numbers of rows comes to for another."""
    if rows[0] == rows[1]:
        return round(more)
    return round(few + (wanted - rows[0]) / (rows[1] - rows[0]) * (more - few))


def unit_of(method: Method[Any]) -> int:
    """The smallest number of rows that a method takes."""
    owner: Any = getattr(method, "training", None) or method
    losses = (*getattr(owner, "losses", ()), *getattr(owner, "background_losses", ()))
    shared = [loss.repeats for loss in losses if getattr(loss, "scope", None) == "repeat_across_batch"]
    return math.lcm(method.rows_together, *shared)
