"""Rows of a stream in windows, each shuffled by itself, so that a place among them needs none of their contents.

1. Read the next `size` rows; their place in the data is that of the first.
2. Deal them out in an order drawn from the seed, the pass and the window's number.
3. A saved state is the window's place, how many rows of it are dealt out, and a digest of the rows, which says on the way back
   whether they are the same. Where they are not, as a `datasets` stream's own state does not always lead back exactly, the
   pass is read again from its beginning.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tl_paramdecomp.adapters.limits import UNLIMITED, Limits
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.cursors import Cursor, Items
from tl_paramdecomp.data.sources import BatchSource, stack_rows
from tl_paramdecomp.data.text import JoinedCursor
from tl_paramdecomp.errors import DataError

UNSHUFFLED = 64
"""Rows of a window where the order stays as it is."""


@dataclass
class _Window:
    """Rows that are dealt out together."""

    number: int
    """Windows of the pass before this one."""
    place: dict[str, Any]
    """Where its first row stands in the data."""
    rows: list[Any]
    order: list[int]
    dealt: int = 0

    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            tokens = row["tokens"] if isinstance(row, Mapping) else row
            found.update(f"{len(tokens)} ".encode() + tokens.numpy().tobytes())
        return found.hexdigest()[:16]


class WindowSource(BatchSource):
    """Batches of rows that come one after another, shuffled within windows; the data is read again at its end."""

    def __init__(
        self,
        rows: Items,
        batch_size: int,
        seed: int,
        shuffle: int,
        skip: int = 0,
        together: int = 1,
        info: Mapping[str, Any] | None = None,
        limits: Limits = UNLIMITED,
    ) -> None:
        """
        Args:
            rows: Token rows, or records with `tokens` and perhaps `attention_mask`.
            batch_size: Rows of a batch.
            seed: Order within windows.
            shuffle: Rows of a window; 0: they are dealt out as they come.
            skip: Rows left out at the beginning of every pass.
            together: Neighbouring rows that stay neighbours.
            info: What tells this data from other data.
            limits: Of who reads the rows.
        """
        if batch_size % together:
            raise DataError(
                f"Rows belong together by {together}; given a batch size of {batch_size}, no multiple of that."
            )
        self.rows, self.batch_size, self.seed, self.shuffled = rows, batch_size, seed, shuffle > 0
        self.limits = limits
        size = max(shuffle or UNSHUFFLED, batch_size)
        self.size, self.skip, self.together = -(-size // together) * together, skip, together
        self._info = dict(info or rows.describe())
        self._pass, self._next_step = 0, 0
        self._cursor: Cursor | None = None
        self._window: _Window | None = None

    @property
    def info(self) -> dict[str, Any]:
        return self._info

    def batch(self, step: int) -> Batch:
        if step < self._next_step:
            self._rewind()
        while self._next_step < step:
            self._take()
        return self._batch_of(self._take(), f"The batch of step {step}")

    def check(self) -> None:
        if self._next_step == 0:
            self._batch_of(self._take(), "The first batch")
            self._rewind()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"data": self.info, "step": self._next_step, "pass": self._pass}
        window = self._window
        if window is not None and (self._pass, window.number, window.dealt) != (0, 0, 0):
            state["window"] = {
                "number": window.number, "place": window.place, "dealt": window.dealt, "digest": window.digest(),
            }  # fmt: skip
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._refuse_other(state)
        self._rewind()
        if state.get("window") is None:
            return
        self._pass = state["pass"]
        if not any(self._found_again(state["window"], reread) for reread in (False, True)):
            raise DataError(
                "The rows at the place where the run stopped are not those that it saw: the data or the tokenizer has changed, "
                "or the data comes in another order each time. Give what the run was begun with, or begin a new run."
            )
        self._next_step = state["step"]

    def one_pass(self) -> Iterator[Batch]:
        """Batches of the data read once from the beginning; the last may be smaller."""
        self._window, self._cursor, self._pass = None, None, 0
        kept: list[Any] = []
        while self._next_window(begin_anew=False) is not None:
            kept += self._deal(self.size)
            while len(kept) >= self.batch_size:
                yield self._batch_of(kept[: self.batch_size], "A batch")
                kept = kept[self.batch_size :]
        if kept:
            yield self._batch_of(kept, "The last batch")

    def _batch_of(self, rows: list[Any], what: str) -> Batch:
        batch = stack_rows(rows)
        self.limits.refuse(batch.tokens, what, batch.attention_mask)
        return batch

    def _found_again(self, known: Mapping[str, Any], reread: bool) -> bool:
        """Whether the window that a state tells of is the current one now."""
        try:
            cursor = self.rows.open()
            cursor.go_to(known["place"], reread)
            window = self._read_window(cursor, known["number"])
        except DataError:
            if reread:
                raise
            return False
        if window is None or window.digest() != known["digest"]:
            return False
        window.dealt, self._window, self._cursor = known["dealt"], window, cursor
        return True

    def _rewind(self) -> None:
        """Stand at the beginning, where possible without reading anything again."""
        if self._pass == 0 and self._window is not None and self._window.number == 0:
            self._window.dealt = 0
        else:
            self._window, self._cursor = None, None
        self._pass, self._next_step = 0, 0

    def _take(self) -> list[Any]:
        """Rows of the next batch."""
        rows: list[Any] = []
        while len(rows) < self.batch_size:
            window = self._window
            if window is None or window.dealt == len(window.rows):
                self._next_window()
            rows += self._deal(self.batch_size - len(rows))
        self._next_step += 1
        return rows

    def _deal(self, most: int) -> list[Any]:
        window = self._window
        assert window is not None
        picked = window.order[window.dealt : window.dealt + most]
        window.dealt += len(picked)
        return [window.rows[i] for i in picked]

    def _next_window(self, begin_anew: bool = True) -> _Window | None:
        """The window behind the current one becomes the current one; None at the end of the pass, unless it begins anew."""
        number = 0 if self._window is None else self._window.number + 1
        found = self._read_window(self._opened(), number)
        if found is None and (number == 0 or begin_anew):
            if number == 0:
                raise self._nothing()
            self._pass, self._cursor = self._pass + 1, None
            found = self._read_window(self._opened(), 0)
            if found is None:
                raise self._nothing()
        if found is not None:
            self._window = found
        return found

    def _opened(self) -> Cursor:
        if self._cursor is None:
            self._cursor = self.rows.open()
            for _ in range(self.skip):
                next(self._cursor, None)
        return self._cursor

    def _read_window(self, cursor: Cursor, number: int) -> _Window | None:
        """The next rows, in the order in which they are dealt out; None where none are left."""
        place, rows = cursor.place(), []
        for row in cursor:
            rows.append(row)
            if len(rows) == self.size:
                break
        rows = rows[: len(rows) - len(rows) % self.together]
        if not rows:
            return None
        groups = torch.arange(len(rows) // self.together)
        if self.shuffled:
            seed = hashlib.sha256(f"{self.seed} {self._pass} {number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
            groups = groups[torch.randperm(len(groups), generator=generator)]
        order = (groups[:, None] * self.together + torch.arange(self.together)).flatten().tolist()
        return _Window(number, place, rows, order)

    def _nothing(self) -> DataError:
        if self._pass:
            return DataError(
                "The data ran out before the steps did, and it cannot be read again: it is a one-time iterator. Give a file, a "
                "dataset, or an object whose __iter__ begins anew."
            )
        skipped = f" behind the first {self.skip} rows" if self.skip else ""
        found = f"; it has {self._cursor.read} tokens in all" if isinstance(self._cursor, JoinedCursor) else ""
        return DataError(f"The data fills no row{skipped}{found}. Give more of it, or shorter rows (length=...).")
