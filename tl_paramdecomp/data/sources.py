"""Where the batches of a run come from: rows picked by number, rows of a stream, batches that are made.

Batches are a function of the seed and the step, so that a run resumed at a step sees what it would have seen. Every process
of a run sees the same batches and takes its own rows of them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters.limits import UNLIMITED, Limits
from tl_paramdecomp.data.batch import Batch, Row, digest_of_rows, row_or_batch, stack_rows
from tl_paramdecomp.data.documents import JoinedRows
from tl_paramdecomp.data.streams import Items, ListItems, Place
from tl_paramdecomp.data.tables import Table
from tl_paramdecomp.data.tokenizer import RowTokenizer
from tl_paramdecomp.errors import DataError


class BatchSource(ABC):
    """Where batches come from."""

    limits: Limits = UNLIMITED
    """Of who reads the rows; what does not keep to them is refused."""
    writer: RowTokenizer | None = None
    """What wrote the rows, where they were text."""
    _info: dict[str, Any] | None = None

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step, of all processes together; steps are asked for in order."""

    def comes_again(self, steps: int) -> bool:
        """Whether so many steps are known to take some rows more than once."""
        return False

    def one_pass(self) -> Iterator[Batch]:
        """Batches of the data read once, from the beginning; the last may be smaller; DataError where it has no end."""
        raise DataError(f"Data that is a {self.info['form']} has no end; give rows, or batches of them.")

    @property
    def info(self) -> dict[str, Any]:
        """What tells this data from other data, as values that JSON can hold; the same in every process."""
        return {"form": type(self).__name__} if self._info is None else self._info

    def check(self) -> Batch | None:
        """See that there is a first batch and that the model can read it, else DataError, and stand as before; the batch, or
        all rows, where they can be looked at beforehand."""
        return None

    def state(self) -> dict[str, Any]:
        """Where the source stands after the last batch, as values that JSON can hold."""
        return {"data": self.info}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where another source of the same data stood, so that the next batch is bit for bit what it would have given;
        DataError where it was of other data."""
        known, own = state.get("data", self.info), self.info
        differing = [key for key in {**known, **own} if known.get(key) != own.get(key)]
        if differing:
            told = "; ".join(f"{k:.40} was {known.get(k)!r:.80} and is {own.get(k)!r:.80}" for k in differing[:5])
            raise DataError(f"The run was begun with other data ({told}); give the same, or begin a new run.")


def permutation(seed: int, n: int, together: int) -> list[int]:
    """An order of n numbers in which groups of neighbours stay together."""
    groups = torch.randperm(n // together, generator=torch.Generator().manual_seed(seed)) * together
    return (groups[:, None] + torch.arange(together)).flatten().tolist()


class RowSource(BatchSource):
    """Random access to rows: each pass is a new permutation, drawn from the seed, of groups of `together` neighbours."""

    def __init__(
        self, rows: Any, batch_size: int, seed: int, attention_mask: Tensor | None = None, together: int = 1,
        shuffled: bool = True, limits: Limits = UNLIMITED, info: Mapping[str, Any] | None = None, first: int = 0,
        read: Callable[[Any], Row | Batch] | None = None,
    ) -> None:  # fmt: skip
        """Rows from the `first` one on; `read` makes rows of what is no tensor of them."""
        self.n_rows = len(rows) - first
        if self.n_rows == 0:
            raise DataError("The data has no rows.")
        if self.n_rows % together or batch_size % together:
            raise DataError(
                f"Rows belong together by {together}; given {self.n_rows} rows and a batch size of {batch_size}, which must "
                "both be multiples of that."
            )
        self.together, self.shuffled, self.limits, self.first = together, shuffled, limits, first
        self.rows, self.batch_size, self.seed, self.attention_mask = rows, batch_size, seed, attention_mask
        self._tensor = rows if isinstance(rows, Tensor) and read is None else None
        self._read = row_or_batch if read is None else read
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._info = None if info is None else dict(info)

    def batch(self, step: int) -> Batch:
        return self._picked(range(step * self.batch_size, (step + 1) * self.batch_size))

    def comes_again(self, steps: int) -> bool:
        return steps * self.batch_size > len(self.rows)

    def one_pass(self) -> Iterator[Batch]:
        for begin in range(0, self.n_rows, self.batch_size):
            yield self._picked(range(begin, min(begin + self.batch_size, self.n_rows)))

    def _picked(self, places: Iterable[int]) -> Batch:
        picked = [self._row(place) for place in places]
        if self._tensor is None:
            return stack_rows(map(self._readable, picked))
        index = torch.tensor(picked, device=self._tensor.device)
        return Batch(self._tensor[index], None if self.attention_mask is None else self.attention_mask[index])

    def _readable(self, number: int) -> Row:
        """A row that is in no tensor, seen to be such as the model can read."""
        row = Row(*self._read(self.rows[self.first + number]))
        one = stack_rows([row])
        self.limits.refuse(one.tokens, "The data", one.attention_mask, self.first + number)
        return row

    @property
    def info(self) -> dict[str, Any]:
        if self._info is None:
            self._info = {
                "form": "rows", "rows": len(self.rows), "digest": digest_of_rows(self.rows, every=isinstance(self.rows, Table)),
                "batch_size": self.batch_size, "seed": self.seed, "shuffled": self.shuffled, "together": self.together,
            }  # fmt: skip
        return self._info

    def check(self) -> Batch:
        if self._tensor is not None:
            self.limits.refuse(self._tensor, "The tensor of token rows", self.attention_mask)
            return Batch(self._tensor, self.attention_mask)
        for number in range(self.n_rows) if isinstance(self.rows, Table) else ():  # in memory: all of it is looked at
            self._readable(number)
        return self.batch(0)

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, self.n_rows)
        if not self.shuffled:
            return offset
        if self._epoch[0] != epoch:
            number = self.seed * 1_000_003 + epoch  # of a clock's nanoseconds, more than torch takes
            number = number if abs(number) < 1 << 63 else number % (1 << 63)
            self._epoch = (epoch, permutation(number, self.n_rows, self.together))
        return self._epoch[1][offset]


class MadeSource(BatchSource):
    """Batches made by a function of the step's number, which is asked for each step once."""

    def __init__(self, make: Callable[[int], Any], limits: Limits = UNLIMITED) -> None:
        self.make, self.limits, self._info = make, limits, {"form": "function of the step"}

    def batch(self, step: int) -> Batch:
        batch = Batch.of(self.make(step))
        self.limits.refuse(batch.tokens, f"The batch made for step {step}", batch.attention_mask)
        return batch


@dataclass
class _Window:
    """Rows that are dealt out together, or one batch."""

    number: int
    """Windows of the pass before this one."""
    place: Place | None
    """Where its first row stands in the data; None: at the beginning."""
    rows: list[Row | Batch]
    order: list[int]
    dealt: int = 0

    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            found.update(f"{len(row.tokens)} ".encode() + row.tokens.cpu().numpy().tobytes())
        return found.hexdigest()[:16]


class StreamSource(BatchSource):
    """Batches, or rows that come one after another and are shuffled within windows; the data is read again at its end.

    1. Read the next `window` rows, or one batch; their place in the data is that of the first.
    2. Deal them out in an order drawn from the seed, the pass and the window's number.
    3. A saved state is the window's place, how many rows of it are dealt out, and a digest of the rows, which says on the way
       back whether they are the same. Where they are not, as a `datasets` stream's own state does not always lead back exactly,
       the pass is read again from its beginning.
    """

    def __init__(
        self, rows: Items, batch_size: int, seed: int = 0, window: int = 1, shuffled: bool = False, skip: int = 0,
        together: int = 1, info: Mapping[str, Any] | None = None, limits: Limits = UNLIMITED,
        writer: RowTokenizer | None = None, read: Callable[[Any], Row | Batch] | None = None,
    ) -> None:  # fmt: skip
        """`read` makes rows or batches of the items (None: they are some); windows have `window` rows, but at least those of a
        batch; the first `skip` rows of every pass are left out; `info` tells this data from other data (None: its kind alone).
        """
        if batch_size % together:
            raise DataError(f"Rows belong together by {together}; a batch size of {batch_size} is no multiple of that.")
        self.rows, self.batch_size, self.seed, self.shuffled, self.skip = rows, batch_size, seed, shuffled, skip
        self.limits, self.writer, self.together, self._read = limits, writer, together, read or row_or_batch
        self.size = -(-max(window, batch_size) // self.together) * self.together
        self._replayed = rows.replayed and info is None
        """Whether each pass may be another, so that a resumed run reads every one again."""
        self._compared = rows.strays or info is not None
        """Whether what is read at a place is compared with what was there."""
        plain = {"form": "stream", "batch_size": batch_size}
        self._info = {**plain, "items": rows.describe()} if info is None else dict(info)
        self._pass, self._next_step = 0, 0
        self._reading: Iterator[tuple[Any, Place]] | None = None
        self._place: Place | None = None
        self._window: _Window | None = None

    def batch(self, step: int) -> Batch:
        if step < self._next_step:
            self._rewind()
        found = None
        while found is None or self._next_step <= step:  # where no state was restored, what was used is read again
            found = self._take()
            self._next_step += 1
        return self._readable(found, f"The batch of step {step}")

    def one_pass(self) -> Iterator[Batch]:
        self._window, self._reading, self._pass = None, None, 0
        while (batch := self._take(begin_anew=False)) is not None:
            yield self._readable(batch, "A batch")

    def check(self) -> Batch | None:
        if self._next_step:
            return None
        first = self._take()
        assert first is not None
        self._readable(first, "The first batch")
        self._rewind()
        data = self.rows.items if isinstance(self.rows, ListItems) and self._read is row_or_batch else None
        if isinstance(data, list | tuple):  # in memory: all of it is looked at
            for i, item in enumerate(data):
                found = row_or_batch(item)
                batch = found if isinstance(found, Batch) else stack_rows([found])
                self.limits.refuse(batch.tokens, f"Item {i} of the {type(data).__name__}", batch.attention_mask)
        return first

    def state(self) -> dict[str, Any]:
        state = {"data": self.info, "step": self._next_step, "pass": self._pass}
        window = self._window
        if window is None or (self._pass, window.number, window.dealt) == (0, 0, 0):
            return state
        known = {"number": window.number + 1, "place": self._place, "dealt": 0, "digest": None}
        if self._compared or window.dealt < len(window.rows):
            digest = window.digest() if self._compared else None
            known = {"number": window.number, "place": window.place, "dealt": window.dealt, "digest": digest}
        return {**state, "window": known}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._rewind()
        known = state.get("window")
        if known is None and "place" in state:  # as runs of 0.1.0 saved it
            known = {"number": -1, "place": state["place"], "dealt": 0, "digest": None}
        if known is None:
            return
        for _ in range(state["pass"] if self._replayed else 0):
            for _ in self._reading or self.rows.read():
                pass
            self._window, self._reading, self._place = None, None, None
        self._pass = state["pass"]
        if not any(self._found_again(known, reread) for reread in (False, True)):
            raise DataError(
                "The rows at the place where the run stopped are not those that it saw: the data or the tokenizer has changed, "
                "or the data comes in another order each time. Give what the run was begun with, or begin a new run."
            )
        self._next_step = state["step"]

    def _found_again(self, known: Mapping[str, Any], reread: bool) -> bool:
        """Whether the window that a state tells of is the current one now."""
        window, place = self._window, known["place"]
        if self._pass or window is None or window.number != known["number"]:  # else it was looked at already
            if self._replayed and self._reading is not None:  # a new pass might be another
                while self._place != place and (item := next(self._reading, None)) is not None:
                    self._place = item[1]
            else:
                self._reading, self._place = self.rows.read(place, reread), place
            if known["digest"] is None and not known["dealt"]:  # nothing to compare, and perhaps nothing left
                self._window = _Window(known["number"] - 1, place, [], [])
                return True
            try:
                window = self._read_window(known["number"])
            except DataError:
                if reread:
                    raise
                return False
        if window is None or known["dealt"] > len(window.rows) or known["digest"] not in (None, window.digest()):
            self._window = None
            return False
        window.dealt, self._window = known["dealt"], window
        return True

    def _readable(self, batch: Batch, what: str) -> Batch:
        self.limits.refuse(batch.tokens, what, batch.attention_mask)
        return batch

    def _rewind(self) -> None:
        """Stand at the beginning, where possible without reading anything again."""
        if self._pass == 0 and self._window is not None and self._window.number == 0 and self._window.rows:
            self._window.dealt = 0
        else:
            self._window, self._reading = None, None
        self._pass, self._next_step = 0, 0

    def _take(self, begin_anew: bool = True) -> Batch | None:
        """The next batch; None, or a smaller one, at the end of a pass after which the data does not begin anew."""
        rows: list[Row] = []
        while len(rows) < self.batch_size:
            window = self._window
            if window is None or window.dealt == len(window.rows):
                window = self._next_window(begin_anew)
            if window is None:
                break
            picked = window.order[window.dealt : window.dealt + self.batch_size - len(rows)]
            window.dealt += len(picked)
            for row in (window.rows[i] for i in picked):
                if isinstance(row, Batch):
                    return row
                rows.append(row)
        return stack_rows(rows) if rows else None

    def _next_window(self, begin_anew: bool = True) -> _Window | None:
        """The window behind the current one becomes the current one; None at the end of the pass, unless it begins anew."""
        number = 0 if self._window is None else self._window.number + 1
        found = self._read_window(number)
        if found is None and number and begin_anew:
            self._pass, self._reading = self._pass + 1, None
            found = self._read_window(0)
        if found is not None:
            self._window = found
        elif begin_anew or (not number and "items" not in self.info):  # who asks for one pass says what it is to be
            raise self._nothing()
        return found

    def _read_window(self, number: int) -> _Window | None:
        """The next rows, in the order in which they are dealt out; None where none are left."""
        if self._reading is None:
            self._reading, self._place = self.rows.read(), None
            for _ in range(self.skip):
                self._place = next(self._reading, (None, self._place))[1]
        place, rows = self._place, []
        for item, after in self._reading:
            rows.append(self._read(item))
            self._place = after
            if len(rows) == self.size or isinstance(rows[-1], Batch):
                break
        rows = rows[: len(rows) - len(rows) % self.together]
        if not rows:
            return None
        order = list(range(len(rows)))
        if self.shuffled:
            seed = hashlib.sha256(f"{self.seed} {self._pass} {number}".encode()).digest()
            order = permutation(int.from_bytes(seed[:8], "big") >> 1, len(rows), self.together)
        return _Window(number, place, rows, order)

    def _nothing(self) -> DataError:
        if self._pass:
            return DataError(
                "The data ran out before the steps did, and it cannot be read again: it is a one-time iterator. Give a list, "
                "a tensor, a file, a dataset, or an object whose __iter__ begins anew."
            )
        skipped, counted = f" behind the first {self.skip} rows" if self.skip else "", ""
        if isinstance(self.rows, JoinedRows) and not self.rows.replayed:
            counted = f"; it has {self.rows.n_tokens()} tokens in all"
        return DataError(f"The data fills no row{skipped}{counted}. Give more of it, or shorter rows (length=...).")
