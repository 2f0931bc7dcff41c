"""A target with nothing in it: what a method finds there, it would find anywhere.

Sparse autoencoders have looked as interpretable on randomly initialised transformers as on trained ones (arXiv 2501.17727);
the same question is put to decompositions of weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import PatchConflictError
from tl_paramdecomp.patching.claims import is_patched


@contextlib.contextmanager
def shuffled_weights(model: Any, seed: int = 0) -> Iterator[Any]:
    """Within this context the entries of every weight matrix and embedding table are dealt out anew, each within its own.

    Their distribution stays, their structure is gone; biases and norm gains stay, tied tables stay tied. Decompositions made
    within are of that model. Afterwards the weights are back, bit for bit.

    Args:
        model: On any host. Which entry goes where depends on how the host stores its weights.
        seed: Of the shuffle.

    Raises:
        PatchConflictError: The model is patched at present.
    """
    adapter = adapt(model)
    if is_patched(adapter.root):
        raise PatchConflictError("shuffled_weights changes the weights; leave the contexts that patch the model first.")
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight in _wholes(adapter.root):
                kept.append((weight, weight.detach().clone()))
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
        yield model
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def _wholes(root: nn.Module) -> list[Tensor]:
    """Weights of two dimensions or more, once for each storage: the largest, where others are views of it."""
    largest: dict[int, Tensor] = {}
    for parameter in root.parameters():
        key = parameter.untyped_storage().data_ptr()
        if parameter.ndim > 1 and (key not in largest or parameter.numel() > largest[key].numel()):
            largest[key] = parameter
    return list(largest.values())
