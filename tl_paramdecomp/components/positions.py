"""Positions in a token row, in every form users write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_paramdecomp.errors import PositionIndexError, ShapeError
from tl_paramdecomp.sites import Span

PositionsLike: TypeAlias = int | Sequence[int] | slice | Tensor | None


@dataclass(frozen=True, eq=False)
class Positions:
    """Columns of a row: indices, a slice, or a boolean mask."""

    indices: tuple[int, ...] | None = None
    slice_: slice | None = None
    mask: Bool[Tensor, "*batch pos"] | None = None

    def columns(self, rows: Sequence[int], span: Span, name: str) -> Bool[Tensor, "*batch pos"]:
        """Which of a forward pass's columns are meant: [pos] or [batch, pos].

        Args:
            rows: [batch, pos] of the pass.
            span: Where its columns stand in the rows.
            name: Site, for messages.

        Raises:
            PositionIndexError: The row has no such position.
            ShapeError: There is no position axis, or a boolean mask has another length than the prompt.
        """
        if len(rows) < 2:
            raise ShapeError(f"{name} has no position axis here (its output is [{rows[0] if rows else ''}, d_out]); leave positions out.")
        length = rows[-1]
        prompt = span.prompt if span.prompt is not None else span.start + length
        here = torch.arange(span.start, span.start + length)
        if self.mask is not None:
            return self._masked(self.mask, here, prompt, rows, name)
        if self.slice_ is not None:
            return self._sliced(self.slice_, here, prompt, span, name)
        assert self.indices is not None
        end = max(prompt, span.start + length)
        for p in self.indices:
            if p < -prompt or (p >= end and not span.generating):
                raise PositionIndexError(
                    f"Position {p} for {name} does not exist: the row has positions 0 to {end - 1} "
                    f"(or -{prompt} to -1, counted from the end of the prompt)."
                )
        absolute = torch.tensor([p if p >= 0 else p + prompt for p in self.indices], dtype=torch.long)
        return torch.isin(here, absolute)

    @staticmethod
    def _masked(mask: Tensor, here: Tensor, prompt: int, rows: Sequence[int], name: str) -> Tensor:
        if mask.shape[-1] != prompt or (mask.ndim == 2 and mask.shape[0] not in (1, rows[0])):
            raise ShapeError(
                f"A boolean mask of positions for {name} needs shape [{prompt}] or [{rows[0]}, {prompt}] (the prompt's); "
                f"given {list(mask.shape)}."
            )
        inside = here < prompt  # decoded tokens are beyond the mask
        picked = mask.cpu()[..., here.clamp(max=prompt - 1)]
        return picked & inside

    @staticmethod
    def _sliced(wanted: slice, here: Tensor, prompt: int, span: Span, name: str) -> Tensor:
        step = 1 if wanted.step is None else wanted.step
        start = 0 if wanted.start is None else wanted.start
        relative = start < 0 or (wanted.stop is not None and wanted.stop < 0)
        open_end = prompt if relative else int(here[-1]) + 1
        stop = open_end if wanted.stop is None else wanted.stop
        start, stop = (max(p + prompt, 0) if p < 0 else p for p in (start, stop))
        if step < 1 or (start >= stop and wanted.stop is not None) or (start >= prompt and not span.generating and span.start == 0):
            raise PositionIndexError(
                f"positions={wanted} for {name} selects nothing of a prompt of {prompt} positions (steps must be positive)."
            )
        return (here >= start) & (here < stop) & ((here - start) % step == 0)


def parse_positions(positions: PositionsLike) -> Positions | None:
    """Positions as given by a user; None stands for everywhere.

    Raises:
        PositionIndexError: They are of no known form.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        return Positions(slice_=positions)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.ndim not in (1, 2):
            raise PositionIndexError(f"A boolean mask of positions is [pos] or [batch, pos]; given {list(positions.shape)}.")
        return Positions(mask=positions.clone())
    given = positions.tolist() if isinstance(positions, Tensor) or hasattr(positions, "tolist") else positions
    given = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    if isinstance(given, list | tuple) and given and all(isinstance(p, bool) for p in given):
        return Positions(mask=torch.tensor(given))
    if not isinstance(given, list | tuple | range | set) or not all(isinstance(p, int) and not isinstance(p, bool) for p in given):
        raise PositionIndexError(
            f"positions must be an int, a list of ints, a slice, a boolean mask or None; given {positions!r}."
        )
    if not len(given):
        raise PositionIndexError("An empty list of positions changes nothing; leave the edit out, or pass None for everywhere.")
    return Positions(indices=tuple(int(p) for p in given))
