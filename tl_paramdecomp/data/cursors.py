"""Reading data item by item, from a place that can be written down and gone back to.

`Items` are data that can be read from their beginning; a `Cursor` is one pass over them. Its place is a small JSON-able value:
a number where items can be picked by number, the dataset's own `state_dict` where it has one that is exact, and otherwise how
many items were read, which are then read again and skipped.
"""

import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tl_paramdecomp.errors import DataError

Place = dict[str, Any]
"""Where a cursor stands, as values that JSON can hold."""


class Cursor(ABC):
    """One pass over items."""

    def __iter__(self) -> "Cursor":
        return self

    @abstractmethod
    def __next__(self) -> Any:
        """The next item."""

    @abstractmethod
    def place(self) -> Place:
        """Where the cursor stands: in front of the item that comes next."""

    @abstractmethod
    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        """Stand where a cursor over the same items stood.

        Args:
            place: What `place` gave there.
            reread: Get there by reading from the beginning, also where there is a shorter way.
        """


class Items(ABC):
    """Data that can be read from the beginning, item by item."""

    replayed: bool = False
    """Whether a later pass may differ from the first, so that a resumed run has to read every pass again."""

    @abstractmethod
    def open(self) -> Cursor:
        """A new pass from the beginning."""

    def __iter__(self) -> Iterator[Any]:
        return self.open()

    def describe(self) -> dict[str, Any]:
        """What tells these items from others, as values that JSON can hold; cheap, and the same in another process."""
        return {"kind": type(self).__name__}


class ListItems(Items):
    """Items that can be picked by number: a list, a tuple, a `datasets` Dataset."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def open(self) -> Cursor:
        """A new pass from the beginning."""
        return _ListCursor(self.items)

    def describe(self) -> dict[str, Any]:
        """Kind and number."""
        return {"kind": type(self.items).__name__, "items": len(self.items)}


class _ListCursor(Cursor):
    def __init__(self, items: Any) -> None:
        self._items, self._next = items, 0

    def __next__(self) -> Any:
        if self._next >= len(self._items):
            raise StopIteration
        self._next += 1
        return self._items[self._next - 1]

    def place(self) -> Place:
        return {"read": self._next}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        self._next = place["read"]


class StreamedItems(Items):
    """A `datasets` IterableDataset. Each pass is over a copy, so that passes under way at once do not disturb each other."""

    def __init__(self, dataset: Any, name: str = "the dataset") -> None:
        self.dataset, self.name = dataset, name

    def open(self) -> Cursor:
        """A new pass from the beginning."""
        return _StreamedCursor(self.dataset, self.name)

    def describe(self) -> dict[str, Any]:
        """Kind and columns."""
        return {"kind": type(self.dataset).__name__, "columns": getattr(self.dataset, "column_names", None)}


class _StreamedCursor(Cursor):
    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name
        self._keeps_place = None if _exact(getattr(dataset, "_ex_iterable", None)) else False
        self._close: Any = None
        self._begin()

    def _begin(self, state: Mapping[str, Any] | None = None) -> None:
        if self._close is not None:
            self._close()
        self._copy, self._read = own_copy(self._dataset), 0
        self._state = state  # a dataset takes a state over when it is read, and tells another until then
        if state is not None:
            self._copy.load_state_dict(state)
        self._iterator = iter(self._copy)
        if hasattr(self._iterator, "close"):  # also before the interpreter's end takes the dataset's modules away
            self._close = weakref.finalize(self, self._iterator.close)

    def __next__(self) -> Any:
        try:
            item = next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            raise DataError(
                f"Reading {self._name} failed after {self._read} items ({told_in_one_line(error)}). If the network broke down, "
                "try again later: a run with a run_dir goes on from its checkpoint."
            ) from error
        self._read, self._state = self._read + 1, None
        return item

    def place(self) -> Place:
        state = self._state
        if state is None and self._keeps_place is not False and hasattr(self._copy, "state_dict"):
            state = self._copy.state_dict()
        if self._keeps_place is None:
            self._keeps_place = state is not None and _survives_json(state)
        return {"read": self._read, "dataset": state if self._keeps_place else None}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        state = place.get("dataset")
        if state is not None and not reread and hasattr(self._copy, "load_state_dict"):
            self._begin(state)
            self._read = place["read"]
            return
        self._begin()
        while self._read < place["read"] and next(self, _END) is not _END:
            pass


class PlainItems(Items):
    """Anything that can be iterated; read again and skipped where a place has to be found again."""

    replayed = True

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def open(self) -> Cursor:
        """A new pass from the beginning; what is left, where the items are a one-time iterator."""
        return _PlainCursor(self.items)

    def describe(self) -> dict[str, Any]:
        """Kind alone: nothing else is known before they are read."""
        return {"kind": type(self.items).__name__}


class _PlainCursor(Cursor):
    def __init__(self, items: Iterable[Any]) -> None:
        self._items, self._iterator, self._read = items, iter(items), 0

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._read += 1
        return item

    def place(self) -> Place:
        return {"read": self._read}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        if place["read"] < self._read:
            self._iterator, self._read = iter(self._items), 0
        while self._read < place["read"] and next(self, _END) is not _END:
            pass


_END = object()


def items_of(data: Any) -> Items:
    """Items of any iterable data, by the cheapest way back to a place that its kind has."""
    if isinstance(data, Items):
        return data
    if isinstance(data, list | tuple):
        return ListItems(data)
    if getattr(data, "_ex_iterable", None) is not None:
        return StreamedItems(data)
    if hasattr(data, "column_names") and hasattr(data, "__len__") and isinstance(data, Sequence | Iterable):
        return ListItems(data)
    return PlainItems(data)


def own_copy(dataset: Any) -> Any:
    """A copy of an IterableDataset that shares nothing which reading changes.

    The dataset keeps its place in itself and in the chain of its parts, so that two passes over one object move each other.
    `copy.copy` does not part them, for its `__setstate__` takes over the very `__dict__`; `copy.deepcopy` copies the data too.
    """
    made = _shallow(dataset)
    examples = getattr(dataset, "_ex_iterable", None)
    if examples is not None:
        made._ex_iterable = _own_examples(examples)
    return made


def _own_examples(examples: Any) -> Any:
    made = _shallow(examples)
    if hasattr(examples, "ex_iterable"):
        made.ex_iterable = _own_examples(examples.ex_iterable)
    if hasattr(examples, "ex_iterables"):
        made.ex_iterables = [_own_examples(part) for part in examples.ex_iterables]
    return made


def _exact(examples: Any) -> bool:
    """Whether a chain of parts comes back exactly by its own state.

    A shuffle buffer's contents are not in the state, and parts that mix several datasets have not come back in every version.
    """
    if hasattr(examples, "buffer_size") or hasattr(examples, "ex_iterables"):
        return False
    return not hasattr(examples, "ex_iterable") or _exact(examples.ex_iterable)


def _shallow(thing: Any) -> Any:
    made = object.__new__(type(thing))
    made.__dict__.update(vars(thing))
    return made


def _survives_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def told_in_one_line(error: BaseException) -> str:
    """Kind and first line of an error, for the message of another."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
