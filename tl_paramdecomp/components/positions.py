"""Positions in a token row, in every form users write them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_paramdecomp.components.indices import plain_indices, plain_slice
from tl_paramdecomp.errors import PositionIndexError, ShapeError
from tl_paramdecomp.sites import Span

PositionsLike: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | slice | None
"""A column, several (list, tensor, array), a slice, a boolean mask [pos] or [batch, pos], or None for everywhere."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Columns of a row: indices, a slice, or a boolean mask [pos] or [batch, pos]."""

    given: tuple[int, ...] | slice | Tensor

    def columns(self, rows: Sequence[int], span: Span, name: str) -> Bool[Tensor, "*batch pos"]:
        """Which of a forward pass's columns are meant, [pos] or [batch, pos], of rows [batch, pos] at a site of this name.

        PositionIndexError where the row has no such position or nothing tells where its prompt ends, ShapeError where there
        is no position axis or a boolean mask has another length than the prompt.
        """
        if len(rows) < 2:
            raise ShapeError(
                f"{name} has no position axis here (its output is {[*rows, 'd_out']}); leave positions out."
            )
        if self._from_end and not span.prompt_known:
            raise unknown_end(name)
        here = torch.arange(span.start, span.start + rows[-1])
        prompt = span.prompt if span.prompt is not None else span.start + rows[-1]
        if isinstance(self.given, slice):
            return _sliced(self.given, here, prompt, span, name)
        if isinstance(self.given, Tensor):
            return _masked(self.given, here, prompt, rows, name)
        end = max(prompt, span.start + rows[-1])
        for p in self.given:
            if p < -prompt or (p >= end and not span.generating):
                raise PositionIndexError(
                    f"Position {p} for {name} does not exist: the row has positions 0 to {end - 1} "
                    f"(or -{prompt} to -1, counted from the end of the prompt)."
                )
        absolute = torch.tensor([min(p if p >= 0 else p + prompt, end) for p in self.given], dtype=torch.long)
        return torch.isin(here, absolute)

    @property
    def _from_end(self) -> bool:
        """Whether it takes the end of the prompt to tell which columns are meant."""
        if isinstance(self.given, Tensor):
            return True
        named = (self.given.start, self.given.stop) if isinstance(self.given, slice) else self.given
        return any(p is not None and p < 0 for p in named)


def _masked(mask: Tensor, here: Tensor, prompt: int, rows: Sequence[int], name: str) -> Tensor:
    fits = mask.ndim == 1 or 1 in (mask.shape[0], rows[0]) or mask.shape[0] == rows[0]
    if mask.shape[-1] != prompt or not fits:
        raise ShapeError(
            f"A boolean mask of positions for {name} needs shape [{prompt}] or [{rows[0]}, {prompt}], like the "
            f"prompt; given {list(mask.shape)}."
        )
    picked = mask.cpu()[..., here.clamp(max=prompt - 1)]
    return _spread_over_rows(picked & (here < prompt), mask.ndim - 1, rows)  # decoded tokens are beyond the mask


def _sliced(wanted: slice, here: Tensor, prompt: int, span: Span, name: str) -> Tensor:
    step = 1 if wanted.step is None else wanted.step
    start = 0 if wanted.start is None else wanted.start
    relative = start < 0 or (wanted.stop is not None and wanted.stop < 0)
    open_end = prompt if relative else int(here[-1]) + 1
    stop = open_end if wanted.stop is None else wanted.stop
    start, stop = (max(p + prompt, 0) if p < 0 else p for p in (start, stop))
    empty = start >= stop and wanted.stop is not None
    beyond = start >= prompt and span.start == 0 and not span.generating
    if step < 1 or empty or beyond:
        raise PositionIndexError(
            f"positions={wanted} for {name} selects nothing of a row with positions 0 to {prompt - 1} (a step must "
            "be positive)."
        )
    start, stop, step = (min(part, int(here[-1]) + 1) for part in (start, stop, step))  # what a tensor can hold
    return (here >= start) & (here < stop) & ((here - start) % step == 0)


def at_columns(
    given: Tensor, axis: int, rows: Sequence[int], span: Span, name: str, what: str
) -> tuple[Tensor, Bool[Tensor, " pos"] | None]:
    """Values given for the prompt at the columns of one pass, and which of these they are for (None: all).

    They are [pos, ...] or [batch, pos, ...], with the position axis `axis`; where that is negative there is none, and they are
    for all columns. `rows` is the shape of the site's output without its last axis. ShapeError where they do not broadcast to
    the rows or are of another number of positions than the prompt, PositionIndexError where nothing tells where that ends.
    """
    shape = f"The shape of the {what} {name} is {list(given.shape)}"
    if axis >= len(rows) or (axis == 1 and 1 not in (given.shape[0], rows[0]) and given.shape[0] != rows[0]):
        raise ShapeError(
            f"{shape}, but the site's output has rows {list(rows)}; give one row, or one for each (generation with beams or "
            "several return sequences multiplies the batch)."
        )
    if axis < 0 or given.shape[axis] == 1:
        return _spread_over_rows(given, axis, rows), None
    if not span.prompt_known:
        raise unknown_end(name)
    covered, start, end = given.shape[axis], span.start, span.start + rows[-1]
    prompt = end if span.prompt is None else span.prompt
    if covered != prompt and (start or covered != end):
        raise ShapeError(
            f"{shape}: {'they cover' if 'values' in what else 'it covers'} {covered} positions, but the prompt has "
            f"{prompt}. Give one value, or one for each position of the prompt; activations of another prompt must be of "
            "one with as many tokens, aligned with this one."
        )
    inside = given.narrow(axis, min(start, covered), max(0, min(end, covered) - start))
    beyond = rows[-1] - inside.shape[axis]
    if beyond:
        ones = inside.new_ones(*inside.shape[:axis], beyond, *inside.shape[axis + 1 :])
        inside = torch.cat([inside, ones], axis)
    there = torch.arange(start, end, device=given.device) < prompt if end > prompt else None
    return _spread_over_rows(inside, axis, rows), there


def _spread_over_rows(tensor: Tensor, axis: int, rows: Sequence[int]) -> Tensor:
    """A tensor [batch, pos, ...] such that it broadcasts to rows that have axes between these two, as convolutions do."""
    if axis != 1 or len(rows) <= 2:
        return tensor
    return tensor.reshape(tensor.shape[0], *(1,) * (len(rows) - 2), *tensor.shape[1:])


def parse_positions(positions: Any) -> Positions | None:
    """Positions as given by a user; None stands for everywhere. PositionIndexError where they are of no known form."""
    if positions is None:
        return None
    if isinstance(positions, slice) and (plain := plain_slice(positions)) is not None:
        return Positions(plain)
    if str(getattr(positions, "dtype", "")) in ("bool", "torch.bool"):
        mask = torch.as_tensor(positions).clone()
        if mask.ndim not in (1, 2):
            raise PositionIndexError(f"A boolean mask of positions is [pos] or [batch, pos]; given {list(mask.shape)}.")
        return Positions(mask)
    given = None if isinstance(positions, slice) else plain_indices(positions)
    if given is None:
        raise PositionIndexError(
            "positions must be an int, a list of ints, a slice, a boolean mask [pos] or [batch, pos], or None; "
            f"given {positions!r}."
        )
    if not given:
        raise PositionIndexError("An empty list of positions changes nothing; leave the edit out, or pass None.")
    return Positions(torch.tensor(given) if isinstance(given[0], bool) else tuple(given))


def unknown_end(name: str) -> PositionIndexError:
    """The error for positions that count from the end of a prompt which the host reads in a way that does not tell it."""
    return PositionIndexError(
        f"Where the prompt ends is not known in this pass, so that what is masked or patched at {name} cannot be placed: "
        "negative positions, boolean masks and values with a position axis need it. Call generate with token ids alone, read "
        "the prompt in one pass, or name absolute positions."
    )
