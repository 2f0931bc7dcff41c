"""Data read item by item, from a place that can be written down and gone back to.

A place is a small JSON-able value: a number where items can be picked by number, the dataset's own `state_dict` where it has
one, and otherwise how many items were read, which are then read again and skipped.

Measured, a state after every 13th item: shuffled streams of `datasets` go on with other items at 23 of 24 places (3.6 and 5.2),
mapped ones at 23 of 24, filtered at 7 of 8 and batched at 5 of 6 in 3.6, none in 5.2; passes over one object share a state.
So rows are shuffled here (`sources`), passes are over copies, and what is read at a place is compared with what was there.
"""

import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tl_paramdecomp.components.disk import in_short
from tl_paramdecomp.errors import DataError

Place = dict[str, Any]
"""Where a pass stands: in front of the item that comes next; as values that JSON can hold."""


class Items(ABC):
    """Data that can be read from the beginning, item by item."""

    replayed: bool = False
    """Whether a later pass may differ from the first, so that a resumed run has to read every pass again."""
    strays: bool = False
    """Whether a place may lead elsewhere, so that what is read there has to be compared."""

    @abstractmethod
    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        """Items, each with the place behind it.

        Args:
            place: Where to begin, as given beside the last item that is not wanted; None: at the beginning.
            reread: Get there by reading from the beginning, also where there is a shorter way.
        """

    def __iter__(self) -> Iterator[Any]:
        return (item for item, _ in self.read())

    def describe(self) -> dict[str, Any]:
        """What tells these items from others, as values that JSON can hold; cheap, and the same in another process."""
        return {"kind": type(self).__name__}


class ListItems(Items):
    """Items that can be picked by number: a list, a tuple, a `datasets` Dataset."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        for i in range(place["read"] if place else 0, len(self.items)):
            yield self.items[i], {"read": i + 1}

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self.items).__name__, "items": len(self.items)}


class StreamedItems(Items):
    """A `datasets` IterableDataset. Each pass is over a copy, so that passes under way at once do not disturb each other."""

    strays = True

    def __init__(self, dataset: Any, name: str = "the dataset") -> None:
        self.dataset, self.name = dataset, name
        self._keeps_place: bool | None = None if _exact(getattr(dataset, "_ex_iterable", None)) else False

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        copy, done = own_copy(self.dataset), 0
        state, wanted = (place.get("dataset"), place["read"]) if place else (None, 0)
        if state is not None and not reread and hasattr(copy, "load_state_dict"):
            copy.load_state_dict(state)
            done = wanted
        items, under_way = iter(copy), _Pass()
        if hasattr(items, "close"):  # also before the interpreter's end takes the dataset's modules away
            weakref.finalize(under_way, items.close)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"Reading {self.name} failed after {done} items ({in_short(error)}). If the network broke down, "
                    "try again later: a run with a run_dir goes on from its checkpoint."
                ) from error
            done += 1
            if done > wanted:
                yield item, {"read": done, "dataset": self._state(copy)}

    def _state(self, copy: Any) -> Any:
        if self._keeps_place is False or not hasattr(copy, "state_dict"):
            return None
        state = copy.state_dict()
        if self._keeps_place is None:
            try:
                self._keeps_place = json.loads(json.dumps(state)) == state
            except (TypeError, ValueError):
                self._keeps_place = False
        return state if self._keeps_place else None

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self.dataset).__name__, "columns": getattr(self.dataset, "column_names", None)}


class _Pass:
    """Lives as long as a pass over a dataset."""


class PlainItems(Items):
    """Anything that can be iterated; read again and skipped where a place has to be found again."""

    replayed = True

    def __init__(self, items: Iterable[Any]) -> None:
        self.items, self._taken = items, 0

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        once = isinstance(self.items, Iterator)  # what was taken of it is gone
        for done, item in enumerate(self.items, 1 + (self._taken if once else 0)):
            self._taken = done
            if done > (place["read"] if place else 0):
                yield item, {"read": done}

    def describe(self) -> dict[str, Any]:  # nothing else is known before they are read
        return {"kind": type(self.items).__name__}


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
    made = object.__new__(type(dataset))
    made.__dict__.update(vars(dataset))
    for name in ("_ex_iterable", "ex_iterable"):
        if getattr(made, name, None) is not None:
            setattr(made, name, own_copy(getattr(made, name)))
    if hasattr(made, "ex_iterables"):
        made.ex_iterables = [own_copy(part) for part in made.ex_iterables]
    return made


def _exact(examples: Any) -> bool:
    """Whether a chain of parts may come back by its own state, which lacks shuffle buffers, and in some versions mixtures."""
    if hasattr(examples, "buffer_size") or hasattr(examples, "ex_iterables"):
        return False
    return not hasattr(examples, "ex_iterable") or _exact(examples.ex_iterable)
