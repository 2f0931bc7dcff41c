"""Holding another tensor under a parameter's name, and putting the very same parameter back.

Contexts may end in any order: the tensor is what those that are still open make of the original, one after the other.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from tl_paramdecomp.adapters.computed import is_computed, overrule, read_tensor, sources, tensor_state
from tl_paramdecomp.errors import PatchConflictError, UnsupportedModelError

Change = Callable[[Tensor], Tensor]  # from a tensor to the one to hold in its place


class _Swap:
    """A tensor in whose place others stand at present."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        slots: list[Any] = [owner._parameters, owner._buffers, owner.__dict__]
        slot, computed = next((s for s in slots if attribute in s), None), is_computed(owner, attribute)
        if slot is None and not computed and not hasattr(type(owner), attribute):
            raise UnsupportedModelError(f"{type(owner).__name__} keeps no {attribute} that could be replaced.")
        self.owner, self.attribute = owner, attribute
        self.slot = None if computed else slot
        self.original: Any = read_tensor(owner, attribute) if self.slot is None else self.slot[attribute]
        self.learns = any(part.requires_grad for part in (*sources(owner, attribute), self.original))
        self.changes: list[Change] = []
        self.state: Hashable = None  # that of what was put there

    def update(self) -> None:
        """Put what the changes make of the original in its place, or the original back."""
        held = self.original
        if self.changes:
            held = functools.reduce(lambda tensor, change: change(tensor), self.changes, held.detach())
            if isinstance(self.original, nn.Parameter) or (self.slot is None and self.learns):
                held = nn.Parameter(held, requires_grad=self.learns)
        if self.slot is None:
            overrule(self.owner, self.attribute, held if self.changes else None)
        else:
            self.slot[self.attribute] = held
        self.state = tensor_state(self.held) if self.changes else None

    @property
    def held(self) -> Any:
        """What is in that place."""
        return getattr(self.owner, self.attribute) if self.slot is None else self.slot.get(self.attribute)

    def is_written(self) -> bool:
        """Whether somebody has changed what was put there, as far as torch counts (through `.data` it does not)."""
        return self.state is not None and self.state != tensor_state(self.held)


_SWAPS: "weakref.WeakKeyDictionary[nn.Module, dict[str, _Swap]]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


@contextlib.contextmanager
def changed_tensor(owner: nn.Module, attribute: str, change: Change) -> Iterator[None]:
    """Hold what a change makes of a parameter, or of a tensor which the module computes (UnsupportedModelError if it has none).

    PatchConflictError at the end, where the held tensor was written to meanwhile: the original is back, without that.
    """
    with _LOCK:
        swaps = _SWAPS.setdefault(owner, {})
        swap = swaps.setdefault(attribute, swaps.get(attribute) or _Swap(owner, attribute))
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
    """`changed_tensor` to a tensor that does not depend on the one before."""
    return changed_tensor(owner, attribute, lambda old: tensor)
