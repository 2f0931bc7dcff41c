"""A target with nothing in it: what a method finds there, it would find anywhere.

Sparse autoencoders have looked as interpretable on randomly initialised transformers as on trained ones (arXiv 2501.17727);
the same question is put to decompositions of weights.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import PatchConflictError
from tl_paramdecomp.patching.target import is_patched


@contextlib.contextmanager
def shuffled_weights(model: Any, seed: int = 0) -> Iterator[Any]:
    """Within this context the entries of every weight site are dealt out anew, each matrix and table within its own.

    Their distribution stays, their structure is gone; biases and norm gains stay, an unembedding that is the embedding
    transposed stays that. The same shuffle on every host of one model. Decompositions made within are of the shuffled model.
    The parameters are swapped, not written to: afterwards the same objects are back.

    Raises:
        PatchConflictError: The model is patched at present.
    """
    adapter = adapt(model)
    if is_patched(adapter.core):
        raise PatchConflictError("shuffled_weights changes the weights; leave the contexts that patch the model first.")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(adapter.wirings):
        weight = adapter.weight(name).detach()
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weights[name] = weight.flatten()[order].view_as(weight)
    tables = ("embed.W_E", "unembed.W_U")
    if all(name in weights for name in tables):
        embed, unembed = (adapter.weight(name).detach() for name in tables)
        if embed.shape == unembed.T.shape and torch.equal(embed, unembed.T):
            weights[tables[1]] = weights[tables[0]].T.contiguous()
    with adapter.replaced_weights(weights):
        yield model
