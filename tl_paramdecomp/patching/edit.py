"""Constant masks as edited weights: for a while, or for good in a copy of the model."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masked_output import masked_weight
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.patching.hooks import claimed, site_masks
from tl_paramdecomp.patching.target import checked_adapter


@contextlib.contextmanager
def edited_weights(model: Any, decomposition: Decomposition, masks: Masks) -> Iterator[Any]:
    """Within this context the masks are in the weights themselves: W' = V diag(m) U + d (W - V U).

    The parameters are swapped, not written to: afterwards the same objects are back, bit for bit, and a tied embedding is
    tied again; only the named side of it changes meanwhile.

    Raises:
        MaskNotConstantError: A mask differs over batch or position.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    weights = _edited(model, decomposition, masks)
    adapter = adapt(model)
    with claimed(model, dict.fromkeys(weights, False)), adapter.replaced_weights(weights):
        yield model


def edited_model(model: Any, decomposition: Decomposition, masks: Masks) -> Any:
    """A deep copy of the model with the masks in its weights for good, to be saved like any model of its kind.

    A tied embedding is untied in the copy (`config.tie_word_embeddings` becomes False), so that saving and loading keeps
    the edit of the named side alone.

    Raises:
        MaskNotConstantError: A mask differs over batch or position.
        TargetMismatchError, DeviceError: As `patched`.
    """
    weights = _edited(model, decomposition, masks)
    made = copy.deepcopy(model)
    adapt(made).write_weights(weights)
    return made


def _edited(model: Any, decomposition: Decomposition, masks: Masks) -> dict[str, Tensor]:
    adapter = checked_adapter(model, decomposition)
    weights = {}
    with torch.no_grad():
        for name, mask in site_masks(decomposition, masks).items():
            components = decomposition[name]
            resolved = mask.constant(components.V.device, components.V.dtype)
            weights[name] = masked_weight(components, resolved, adapter.weight(name).detach())
    return weights
