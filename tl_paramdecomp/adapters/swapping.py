"""Holding another tensor under a parameter's name, and putting the very same parameter back."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tl_paramdecomp.errors import UnsupportedModelError


@contextlib.contextmanager
def swapped_parameter(owner: nn.Module, attribute: str, tensor: Tensor) -> Iterator[None]:
    """Hold another tensor under a parameter's name.

    Raises:
        UnsupportedModelError: The module keeps nothing of that name.
    """
    slots: list[Any] = [owner._parameters, owner._buffers, owner.__dict__]
    slot = next((s for s in slots if attribute in s), None)
    if slot is None:
        raise UnsupportedModelError(f"{type(owner).__name__} computes its {attribute}; it cannot be replaced.")
    old = slot[attribute]
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    slot[attribute] = new
    try:
        yield
    finally:
        slot[attribute] = old
