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
            PositionIndexError: The row has no such position, or nothing tells where its prompt ends.
            ShapeError: There is no position axis, or a boolean mask has another length than the prompt.
        """
        if len(rows) < 2:
            raise ShapeError(
                f"{name} has no position axis here (its output is {[*rows, 'd_out']}); leave positions out."
            )
        if self.from_end and not span.prompt_known:
            raise unknown_end(name)
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
        absolute = torch.tensor([min(p if p >= 0 else p + prompt, end) for p in self.indices], dtype=torch.long)
        return torch.isin(here, absolute)

    @property
    def from_end(self) -> bool:
        """Whether it takes the end of the prompt to tell which columns are meant."""
        if self.slice_ is not None:
            return any(part is not None and part < 0 for part in (self.slice_.start, self.slice_.stop))
        return self.mask is not None or any(p < 0 for p in self.indices or ())

    @staticmethod
    def _masked(mask: Tensor, here: Tensor, prompt: int, rows: Sequence[int], name: str) -> Tensor:
        fits = mask.ndim == 1 or 1 in (mask.shape[0], rows[0]) or mask.shape[0] == rows[0]
        if mask.shape[-1] != prompt or not fits:
            raise ShapeError(
                f"A boolean mask of positions for {name} needs shape [{prompt}] or [{rows[0]}, {prompt}], like the "
                f"prompt; given {list(mask.shape)}."
            )
        inside = here < prompt  # decoded tokens are beyond the mask
        picked = mask.cpu()[..., here.clamp(max=prompt - 1)]
        return spread_over_rows(picked & inside, mask.ndim - 1, rows)

    @staticmethod
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


def spread_over_rows(tensor: Tensor, axis: int, rows: Sequence[int]) -> Tensor:
    """A tensor [batch, pos, ...], whose position axis is `axis`, such that it broadcasts to rows [batch, ..., pos] that have
    axes between these; one without a batch axis does so as it is."""
    if axis != 1 or len(rows) <= 2:
        return tensor
    return tensor.reshape(tensor.shape[0], *(1,) * (len(rows) - 2), *tensor.shape[1:])


def parse_positions(positions: Any) -> Positions | None:
    """Positions as given by a user; None stands for everywhere.

    Raises:
        PositionIndexError: They are of no known form.
    """
    if positions is None:
        return None
    if isinstance(positions, slice):
        plain = plain_slice(positions)
        if plain is None:
            raise _no_positions(positions)
        return Positions(slice_=plain)
    if str(getattr(positions, "dtype", "")) in ("bool", "torch.bool"):
        mask = torch.as_tensor(positions).clone()
        if mask.ndim not in (1, 2):
            raise PositionIndexError(f"A boolean mask of positions is [pos] or [batch, pos]; given {list(mask.shape)}.")
        return Positions(mask=mask)
    given = plain_indices(positions)
    if given is None:
        raise _no_positions(positions)
    if not given:
        raise PositionIndexError("An empty list of positions changes nothing; leave the edit out, or pass None.")
    return Positions(mask=torch.tensor(given)) if isinstance(given[0], bool) else Positions(indices=tuple(given))


def unknown_end(name: str) -> PositionIndexError:
    """The error for positions that count from the end of a prompt which the host reads in a way that does not tell it."""
    return PositionIndexError(
        f"Where the prompt ends is not known in this pass, so that what is masked or patched at {name} cannot be placed: "
        "negative positions, boolean masks and values with a position axis need it. Call generate with token ids alone, read "
        "the prompt in one pass, or name absolute positions."
    )


def _no_positions(given: Any) -> PositionIndexError:
    return PositionIndexError(
        "positions must be an int, a list of ints, a slice, a boolean mask [pos] or [batch, pos], or None; "
        f"given {given!r}."
    )
