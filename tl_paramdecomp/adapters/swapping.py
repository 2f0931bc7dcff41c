"""Holding another tensor under a parameter's name, and putting the very same parameter back."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tl_paramdecomp.adapters.computed import is_computed, overruled, sources
from tl_paramdecomp.errors import UnsupportedModelError


@contextlib.contextmanager
def swapped_parameter(owner: nn.Module, attribute: str, tensor: Tensor) -> Iterator[None]:
    """Hold another tensor under a parameter's name, or that of a tensor which the module computes.

    Raises:
        UnsupportedModelError: The module keeps nothing of that name.
    """
    slots: list[Any] = [owner._parameters, owner._buffers, owner.__dict__]
    slot = next((s for s in slots if attribute in s), None)
    if is_computed(owner, attribute) or slot is None:
        if not hasattr(type(owner), attribute) and slot is None:
            raise UnsupportedModelError(f"{type(owner).__name__} keeps no {attribute} that could be replaced.")
        learns = any(part.requires_grad for part in sources(owner, attribute))
        new = nn.Parameter(tensor) if learns else tensor
        with overruled(owner, attribute, new):
            yield
        return
    old = slot[attribute]
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    slot[attribute] = new
    try:
        yield
    finally:
        slot[attribute] = old
