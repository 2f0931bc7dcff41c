"""Constant masks as edited weights: for a while, or for good in a copy of the model."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.adapters.computed import deep_copy
from tl_paramdecomp.adapters.identity import behind, folded, is_identity
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masked_output import masked_weight
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import PatchConflictError
from tl_paramdecomp.patching.hooks import changes_of
from tl_paramdecomp.patching.target import Claim, checked_adapter, claimed, is_patched


@entered_once
def edited_weights(model: Any, decomposition: Decomposition, masks: Masks) -> Iterator[Any]:
    """Within this context the masks are in the weights themselves: W' = V diag(m) U + d (W - V U).

    Masks of an inserted identity make it I', and the weight behind it I' W'. The parameters are swapped, not written to:
    afterwards the same objects are back, bit for bit, and shared ones are shared again; only the named side changes meanwhile.
    Where a module computes its weight from others (a parametrization, weight norm, pruning), W' stands in its place.

    Raises:
        MaskNotConstantError: A mask differs over batch or position.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    weights = _edited(model, decomposition, masks)
    adapter = adapt(model)
    changed = masks.changed()
    claims = {behind(name): Claim(decomposition[name], in_weights=True) for name in changed}
    claims |= {name: Claim(decomposition[name], in_weights=True) for name in changed}
    with claimed(adapter.core, claims), adapter.replaced_weights(weights):
        yield model


def edited_model(model: Any, decomposition: Decomposition, masks: Masks) -> Any:
    """A deep copy of the model with the masks in its weights for good, to be saved like any model of its kind.

    An edited weight becomes a parameter of its own in the copy: one that other maps share is parted from theirs, a tied
    embedding untied (`config.tie_word_embeddings` becomes False, so that saving and loading keeps the edit of the named side
    alone), and one that is computed from others (a parametrization, weight norm, pruning) is so no more.

    Raises:
        MaskNotConstantError: A mask differs over batch or position.
        UnsupportedSiteError: A weight is computed in a way that is not known, or a bridge keeps it in one matrix with another
            site's.
        PatchConflictError: The model is patched at present, so that a copy would carry the hooks along.
        TargetMismatchError, DeviceError: As `patched`.
    """
    weights = _edited(model, decomposition, masks)
    if is_patched(adapt(model).core):
        raise PatchConflictError(
            "edited_model copies the model, and this one is patched at present; leave the contexts around it first."
        )
    made = _copied(model)
    adapt(made).write_weights(weights)
    return made


def _copied(model: Any) -> Any:
    """A deep copy of a model that works like the model."""
    adapter = adapt(model)
    root = deep_copy(adapter.root)
    _share_again(adapter.root, root)
    if adapter.host != "nnsight":
        return root
    kept = ("task", "tokenizer", "rename")  # a copied nnsight model cannot be traced; the module is wrapped anew
    given = {name: getattr(model, name if name != "rename" else "_rename", None) for name in kept}
    return type(model)(root, **{name: value for name, value in given.items() if value})


def _share_again(root: nn.Module, made: nn.Module) -> None:
    """Make parameters of a copy views of one another where the original's are, as a bridge's q, k and v are of GPT-2's c_attn;
    copying each by itself parts them, and a later save would find them unedited."""
    groups: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for old, new in zip(root.parameters(), made.parameters()):
        groups[old.untyped_storage().data_ptr()].append((old, new))
    for pairs in groups.values():
        whole, copied = max(pairs, key=lambda pair: pair[0].numel())
        if len(pairs) > 1 and whole.is_contiguous() and whole.untyped_storage().nbytes() == whole.nbytes:
            for old, new in pairs:
                new.data = copied.data.as_strided(old.shape, old.stride(), old.storage_offset())


def _edited(model: Any, decomposition: Decomposition, masks: Masks) -> dict[str, Tensor]:
    adapter = checked_adapter(model, decomposition)
    weights = {}
    with torch.no_grad():
        for name, mask in changes_of(decomposition, masks).items():
            components = decomposition[name]
            resolved = mask.constant(components.V.device, components.V.dtype)
            weight = adapter.weight(name).detach()
            if is_identity(name):  # not rounded before it is multiplied
                weight = weight.to(torch.promote_types(weight.dtype, components.V.dtype))
            weights[name] = masked_weight(components, resolved, weight)
        return folded(weights, adapter.weight)
