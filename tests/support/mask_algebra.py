"""Sequences of operations on masks, and what they mean: dense float64 arrays that one plain loop for each operation changes.

Nothing here uses the library's own way of reading components, positions or spans.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import tl_paramdecomp as tlpd
from tl_paramdecomp.sites import Span, WeightSite

NUMBERS = [0.0, 1.0, 0.5, -1.0, 2.0, 0.1, 1 / 3, -2.7, 7.0]
"""Factors and masks, inside of [0, 1] and outside, of short binary fractions and of endless ones."""


# --- rows, and how a model computes them ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Token rows: a prompt, and what is decoded after it."""

    batch: int
    prompt: int
    decoded: int = 0
    cuts: tuple[int, ...] = ()
    """Columns of the prompt at which a new pass begins."""

    @property
    def length(self) -> int:
        return self.prompt + self.decoded

    def spans(self) -> Iterator[tuple[Span, int]]:
        """One pass after another through the cache, with how many columns each computes."""
        borders = [0, *self.cuts, *range(self.prompt, self.length + 1)]
        for start, end in itertools.pairwise(borders):
            yield Span(start, self.prompt, generating=True), end - start


@st.composite
def rows(
    draw: st.DrawFn, decoding: bool = True, prompts: st.SearchStrategy[int] | None = None, batches: int = 3
) -> Rows:
    prompt = draw(st.integers(1, 5) if prompts is None else prompts)
    cuts = draw(st.sets(st.integers(1, prompt - 1))) if prompt > 1 else set()
    return Rows(draw(st.integers(1, batches)), prompt, draw(st.integers(0, 3)) if decoding else 0, tuple(sorted(cuts)))


# --- components and positions: as users write them, and as plain Python -----------------------------------------------
@dataclass(frozen=True, eq=False)
class Written:
    """Indices as a user hands them over, and the same as an int, a list, a slice, or (nested) lists of booleans."""

    given: Any
    plain: Any

    def __repr__(self) -> str:
        return repr(self.given)

    def spoil(self) -> None:
        """Change what was given in place, where that can be."""
        for part in (self.given.start, self.given.stop) if isinstance(self.given, slice) else (self.given,):
            if isinstance(part, list):
                part.clear()
            elif isinstance(part, torch.Tensor):
                part.zero_()
            elif isinstance(part, np.ndarray):
                part[...] = 0


def _whole(number: int | None) -> st.SearchStrategy[Any]:
    """One whole number in one of its forms."""
    return st.sampled_from(
        [number] if number is None or number > 99 else [number, np.int64(number), torch.tensor(number)]
    )


@st.composite
def _written(draw: st.DrawFn, plain: Any) -> Written:
    if isinstance(plain, slice):
        return Written(slice(*(draw(_whole(part)) for part in (plain.start, plain.stop, plain.step))), plain)
    if not isinstance(plain, list):
        return Written(draw(_whole(plain)), plain)
    nested = bool(plain) and isinstance(plain[0], list)
    numbers = bool(plain) and not nested and not isinstance(plain[0], bool)
    forms: list[Callable[[Any], Any]] = [torch.tensor, np.array] if nested else [list, tuple, torch.tensor, np.array]
    forms += (
        [set, lambda some: dict.fromkeys(some).keys(), lambda some: [np.int32(one) for one in some]] if numbers else []
    )
    return Written(draw(st.sampled_from(forms if plain else [list, tuple]))(plain), plain)


@functools.cache
def slices(low: int, high: int, steps: tuple[int, ...]) -> st.SearchStrategy[slice]:
    end = st.none() | st.integers(low, high)
    return st.builds(slice, end, end, st.none() | st.sampled_from(steps))


@functools.cache
def components(n: int) -> st.SearchStrategy[Written]:
    """Components in every form; slices begin and end among them or after them."""
    index = st.integers(-n, n - 1)
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    some = slices(-n, n - 1, (1, 2, 3, -1, -2))
    return st.one_of(index, st.lists(index, max_size=n + 1), flags, some).flatmap(_written)


def chosen(plain: Any, n: int) -> set[int]:
    """The components meant."""
    if isinstance(plain, int):
        return {plain if plain >= 0 else n + plain}
    if isinstance(plain, list):
        return {c if one is True else one % n for c, one in enumerate(plain) if one is not False}
    step = plain.step or 1
    start, stop = ((end + n if end is not None and end < 0 else end) for end in (plain.start, plain.stop))
    at = (0 if step > 0 else n - 1) if start is None else start
    stop = (n if step > 0 else -1) if stop is None else stop
    found = set()
    while 0 <= at < n and (at < stop if step > 0 else at > stop):
        found.add(at)
        at += step
    return found


@functools.cache
def positions(row: Rows) -> st.SearchStrategy[Written]:
    """Positions in every form that such rows have, everywhere among them; while decoding also ones not reached yet."""
    top = row.length + 1 if row.decoded else row.length - 1
    index = st.integers(-row.prompt, top)
    flags = st.lists(st.booleans(), min_size=row.prompt, max_size=row.prompt)
    by_row = st.lists(flags, min_size=row.batch, max_size=row.batch) | st.lists(flags, min_size=1, max_size=1)
    some = slices(-row.prompt - 2, top, (1, 2, 3, 10**30)).filter(lambda one: selects(one, row.prompt))
    plain = st.one_of(index, st.lists(index, min_size=1, max_size=4), flags, by_row, some)
    return st.just(Written(None, None)) | plain.flatmap(_written)


def ends(plain: slice, prompt: int) -> tuple[int, int | None]:
    """First column of a slice and the one after its last (None: it grows with the row). Whatever is negative counts from the
    end of the prompt, and a slice without an end that begins so ends with the prompt."""
    start = 0 if plain.start is None else plain.start
    if plain.stop is None:
        stop = prompt if start < 0 else None
    else:
        stop = plain.stop if plain.stop >= 0 else max(prompt + plain.stop, 0)
    return (start if start >= 0 else max(prompt + start, 0)), stop


def selects(plain: slice, prompt: int) -> bool:
    """Whether a slice of positions names any column at all."""
    start, stop = ends(plain, prompt)
    return plain.stop is None or stop is None or start < stop


def named(plain: Any, b: int, t: int, prompt: int) -> bool:
    """Whether column t of row b is meant. Negatives count from the end of the prompt, booleans are about the prompt alone."""
    if plain is None:
        return True
    if isinstance(plain, int):
        return t == plain if plain >= 0 else t < prompt and t == prompt + plain
    if isinstance(plain, slice):
        at, stop = ends(plain, prompt)
        while at < t:
            at += plain.step or 1
        return at == t and (stop is None or t < stop)
    if isinstance(plain[0], list):
        plain = plain[b if len(plain) > 1 else 0]
    if isinstance(plain[0], bool):
        return t < prompt and plain[t]
    return any(named(one, b, t, prompt) for one in plain)


# --- operations -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a method of `Masks`."""

    method: str
    components: Written | None = None
    number: float = 0.0
    """The factor of `scale`, the delta mask of `keep_only`."""
    positions: Written = Written(None, None)
    head: int | None = None
    m: Any = None
    delta: Any = None

    def __repr__(self) -> str:
        if self.method == "with_values":
            return f"with_values({self.m!r}, {self.delta!r})"
        return f"{self.method}({self.components}, {self.number}, positions={self.positions}, head={self.head})"

    def of(self, masks: tlpd.Masks, site: str) -> tlpd.Masks:
        """Masks after the call."""
        if self.method == "with_values":
            return masks.with_values(site, self.m, delta=self.delta)
        assert self.components is not None
        some, where = self.components.given, self.positions.given
        if self.method == "keep_only":
            return masks.keep_only(site, some, delta=self.number, positions=where)
        if self.method == "scale":
            return masks.scale(site, some, self.number, positions=where, head=self.head)
        return masks.ablate(site, some, positions=where, head=self.head)

    def spoil(self) -> None:
        """Change the caller's lists, arrays and tensors in place."""
        for written in (self.components, self.positions):
            if written is not None:
                written.spoil()
        for values in (self.m, self.delta):
            if isinstance(values, torch.Tensor):
                values.zero_()


DTYPES = [torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
SINGLE = [*NUMBERS, 0, 1, 3, True, np.float32(0.1), np.int64(2)]


def _values(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Any:
    """A number, or a tensor of one of some shapes and of any dtype."""
    shape = draw(st.sampled_from([None, *shapes]))
    if shape is None:
        return draw(st.sampled_from(SINGLE))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(np.array(rng.choice(NUMBERS, shape))).to(draw(st.sampled_from(DTYPES)))


@st.composite
def operations(
    draw: st.DrawFn, n: int, row: Rows, heads: int | None = None, everywhere: bool = False, values: bool = True
) -> Operation:
    """Any operation on a site of n components; `with_values` in every shape that broadcasts to the rows."""
    method = draw(st.sampled_from(["ablate", "scale", "keep_only", "with_values"][: None if values else 3]))
    if method == "with_values":
        b, p = row.batch, row.prompt
        full = [(n,), (1, n), (p, n), (p, 1), (1, p, n), (b, p, n), (b, 1, n), (1, 1, n), (b, p, 1), (b, 1, 1)]
        m = _values(draw, [(), (1,), *full])
        return Operation(method, m=m, delta=_values(draw, [(), (1,), (p,), (1, p), (b, p), (b, 1), (1, 1)]))
    head = draw(st.none() | st.integers(0, heads - 1)) if heads and method != "keep_only" else None
    number = 0.0 if method == "ablate" else draw(st.sampled_from(NUMBERS))
    where = Written(None, None) if everywhere else draw(positions(row))
    return Operation(method, draw(components(n)), number, where, head)


@st.composite
def sequences(
    draw: st.DrawFn, sites: Iterable[WeightSite], n_components: Mapping[str, int], row: Rows, most: int = 6
) -> list[tuple[str, Operation]]:
    """Several operations on several sites, each site by its name or an alias."""
    chosen_sites = draw(st.lists(st.sampled_from(list(sites)), max_size=most))
    return [
        (
            draw(st.sampled_from([site.name, *site.aliases])),
            draw(operations(n_components[site.name], row, site.n_heads)),
        )
        for site in chosen_sites
    ]


# --- what they mean ---------------------------------------------------------------------------------------------------
class Textbook:
    """Masks of one site over whole rows: m [batch, pos, head, C] and d [batch, pos]."""

    def __init__(self, row: Rows, n: int, heads: int | None = None) -> None:
        self.row, self.n = row, n
        self.m = np.ones((row.batch, row.length, heads or 1, n))
        self.d = np.ones((row.batch, row.length))

    def __call__(self, operation: Operation) -> "Textbook":
        after = Textbook(self.row, self.n, self.m.shape[2])
        after.m, after.d = self.m.copy(), self.d.copy()
        some = None if operation.components is None else chosen(operation.components.plain, self.n)
        for b, t in np.ndindex(self.d.shape):
            if some is None:
                after._given(operation, b, t)
            elif named(operation.positions.plain, b, t, self.row.prompt):
                after._edited(operation, some, b, t)
        return after

    def _edited(self, operation: Operation, some: set[int], b: int, t: int) -> None:
        if operation.method == "keep_only":
            self.d[b, t] = operation.number
            for c in set(range(self.n)) - some:
                self.m[b, t, :, c] *= 0.0
            return
        for h in range(self.m.shape[2]):
            for c in some if operation.head in (None, h) else ():
                self.m[b, t, h, c] *= operation.number

    def _given(self, operation: Operation, b: int, t: int) -> None:
        m, d = (np.asarray(torch.as_tensor(v, dtype=torch.float64)) for v in (operation.m, operation.delta))
        by_position = (m.ndim > 1 and m.shape[-2] > 1) or (d.ndim > 0 and d.shape[-1] > 1)
        if by_position and t >= self.row.prompt:
            self.m[b, t], self.d[b, t] = 1.0, 1.0  # tokens decoded after what the masks cover are the model's own
            return
        for axis, at in ((m.ndim - 3, b), (m.ndim - 2, t)):
            if axis >= 0:
                m = m.take([at if m.shape[axis] > 1 else 0], axis)
        for axis, at in ((d.ndim - 2, b), (d.ndim - 1, t)):
            if axis >= 0:
                d = d.take([at if d.shape[axis] > 1 else 0], axis)
        self.m[b, t], self.d[b, t] = m.reshape(1, -1), d.item()

    def output(
        self, x: np.ndarray, W: np.ndarray, V: np.ndarray, U: np.ndarray, b: np.ndarray | None, side: str | None
    ) -> np.ndarray:
        """b + (m * h) U + d x (W - V U), column by column and head by head; x is [..., d_in], or indices of rows of W."""
        found = np.zeros((self.row.batch, self.row.length, W.shape[1]))
        heads = self.m.shape[2]
        reads, writes = (V.shape[0] // heads, U.shape[1]) if side == "in" else (V.shape[0], U.shape[1] // heads)
        for i, t in np.ndindex(self.d.shape):
            one = x[i if len(x) > 1 else 0, t]
            row = np.eye(W.shape[0])[one] if x.ndim == 2 else one
            for h in range(heads):
                read = slice(h * reads, (h + 1) * reads) if side == "in" else slice(None)
                write = slice(h * writes, (h + 1) * writes) if side == "out" else slice(None)
                found[i, t, write] += (self.m[i, t, h] * (row[read] @ V[read])) @ U[:, write]
            found[i, t] += self.d[i, t] * (row @ (W - V @ U)) + (0.0 if b is None else b)
        return found
