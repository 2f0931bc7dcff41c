"""Holding another tensor under a parameter's name, and putting the very same parameter back.

Contexts may end in any order: the tensor is what those that are still open make of the original, one after the other.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tl_paramdecomp.adapters.computed import is_computed, overrule, read_tensor, sources
from tl_paramdecomp.errors import PatchConflictError, UnsupportedModelError

Change = Callable[[Tensor], Tensor]
"""From a tensor to the one to hold in its place."""


@dataclass(eq=False)
class _Swap:
    """A tensor in whose place others stand at present."""

    original: Any
    put: Callable[[Any], None]
    """Holds a tensor in that place, or the original again."""
    held: Callable[[], Any]
    """Reads what is in that place."""
    changes: list[Change] = field(default_factory=list)
    state: tuple[Hashable, ...] | None = None
    """That of what was put there."""

    def update(self) -> None:
        held = self.original
        if self.changes:
            held = held.detach()
            for change in self.changes:
                held = change(held)
        self.put(held)
        self.state = _state(self.held()) if self.changes else None

    def is_written(self) -> bool:
        """Whether somebody has changed what was put there, as far as torch counts."""
        return self.state is not None and self.state != _state(self.held())


def _state(tensor: Any) -> tuple[Hashable, ...] | None:
    """What changes with every change that torch counts; None for inference tensors, of which it counts none."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return id(tensor), tensor._version, tensor.dtype, tensor.device


_SWAPS: "weakref.WeakKeyDictionary[nn.Module, dict[str, _Swap]]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


@contextlib.contextmanager
def changed_tensor(owner: nn.Module, attribute: str, change: Change) -> Iterator[None]:
    """Hold what a change makes of a parameter, or of a tensor which the module computes.

    Raises:
        UnsupportedModelError: The module keeps nothing of that name.
        PatchConflictError: At the end, where the held tensor was written to meanwhile: the original is back, without that.
    """
    with _LOCK:
        swaps = _SWAPS.setdefault(owner, {})
        swap = swaps.setdefault(attribute, swaps.get(attribute) or _swap(owner, attribute))
        swap.changes.append(change)
    try:
        with _LOCK:
            swap.update()
        yield
        written = swap.is_written()
    finally:
        with _LOCK:
            swap.changes = [other for other in swap.changes if other is not change]
            swap.update()
            if not swap.changes:
                swaps.pop(attribute, None)
    if written:
        raise PatchConflictError(
            f"The {attribute} of {type(owner).__name__} was changed (loaded, moved, converted or trained) while it was edited, "
            "and that change is gone: the weight from before the edit is back. Change the model outside of such a context, or "
            "the copy that edited_model(...) makes."
        )


def swapped_parameter(owner: nn.Module, attribute: str, tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Hold another tensor under a parameter's name, or that of a tensor which the module computes.

    Raises:
        UnsupportedModelError: The module keeps nothing of that name.
    """
    return changed_tensor(owner, attribute, lambda old: tensor)


def _swap(owner: nn.Module, attribute: str) -> _Swap:
    slots: list[Any] = [owner._parameters, owner._buffers, owner.__dict__]
    slot = next((s for s in slots if attribute in s), None)
    if is_computed(owner, attribute) or slot is None:
        if not hasattr(type(owner), attribute) and slot is None:
            raise UnsupportedModelError(f"{type(owner).__name__} keeps no {attribute} that could be replaced.")
        learns = any(part.requires_grad for part in sources(owner, attribute))
        original = read_tensor(owner, attribute)

        def put_computed(held: Any) -> None:
            overrule(owner, attribute, None if held is original else nn.Parameter(held) if learns else held)

        return _Swap(original, put_computed, functools.partial(getattr, owner, attribute))
    old = slot[attribute]

    def put(held: Any) -> None:
        if held is not old and isinstance(old, nn.Parameter):
            held = nn.Parameter(held, requires_grad=old.requires_grad)
        slot[attribute] = held

    return _Swap(old, put, functools.partial(slot.get, attribute))
