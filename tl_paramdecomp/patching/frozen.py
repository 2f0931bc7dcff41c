"""A model as it is while it is studied: in evaluation mode, and nothing of it learns."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(root: nn.Module) -> Iterator[None]:
    """The target without gradients and in evaluation mode; afterwards every flag is as it was."""
    gradients = [(p, p.requires_grad) for p in root.parameters()]
    modes = [(module, module.training) for module in root.modules()]
    try:
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        for module, training in modes:
            module.training = training
