"""A model as it is while it is studied: in evaluation mode, and nothing of it learns."""

import contextlib
from collections.abc import Iterator

from torch import nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.boundary import evaluating


@contextlib.contextmanager
def frozen(studied: ModelAdapter | nn.Module) -> Iterator[None]:
    """A target, or a decomposition, without gradients and in evaluation mode; afterwards every flag is as it was.
    PatchConflictError where another thread uses it."""
    target = isinstance(studied, ModelAdapter)
    with studied.evaluating() if target else evaluating(studied):
        learning = [p for p in (studied.root if target else studied).parameters() if p.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
