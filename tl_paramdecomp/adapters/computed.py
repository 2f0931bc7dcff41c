"""Tensors that a module computes from others: parametrizations, and what older utilities of torch recompute in pre-hooks.

`torch.nn.utils.parametrize` computes a tensor whenever it is read. `torch.nn.utils.weight_norm`, `spectral_norm` and `prune`
compute it before each forward pass and leave it on the module, where it is stale in between; here it is computed anew. What
cannot be read without changing the model, or differs from look to look, is refused.
"""

import contextlib
import copy
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tl_paramdecomp.errors import PatchConflictError, UnsupportedSiteError

OVERRULED = "_overruled_tensors"  # marks a class made by `overrule`, and holds the tensors by name
_STEADY: "weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]]" = weakref.WeakKeyDictionary()
"""By parametrization and mode, whether it gives the same tensor at each look."""


# --- reading ----------------------------------------------------------------------------------------------------------
def read_tensor(owner: nn.Module, attribute: str, name: str = "") -> Any:
    """The tensor that a forward pass would use now; None where the module holds none. Errors call the site `name`.

    UnsupportedSiteError where it cannot be read without changing it, or is another one each time.
    """
    if attribute in owner._parameters:
        return owner._parameters[attribute]
    if _is_overruled(owner, attribute):
        return getattr(owner, attribute)
    part, hook = _parametrization(owner, attribute), _hook(owner, attribute)
    if part is not None:
        _check_steady(owner, attribute, part, name)
    elif isinstance(hook, SpectralNorm):
        if owner.training:
            raise _unsteady(owner, attribute, name, "spectral_norm")
        return hook.compute_weight(owner, do_power_iteration=False)
    elif hook is not None:
        return hook.compute_weight(owner) if isinstance(hook, WeightNorm) else hook.apply_mask(owner)
    return getattr(owner, attribute, None)


def peeked(owner: nn.Module, attribute: str) -> Any:
    """A tensor for the sake of its shape and number type, which leaves the module as it is; None where there is none."""
    part = None if _is_overruled(owner, attribute) else _parametrization(owner, attribute)
    with torch.no_grad(), _untouched(part) if part is not None else contextlib.nullcontext():
        return getattr(owner, attribute, None)


def tensor_state(tensor: Any) -> Hashable:
    """What changes with every change that torch counts; None where it counts none: inference tensors, and what is no tensor."""
    if not isinstance(tensor, Tensor) or tensor.is_inference():
        return None
    return id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device


def is_computed(owner: nn.Module, attribute: str) -> bool:
    """Whether a module computes this tensor, in a way that is known."""
    return _parametrization(owner, attribute) is not None or _hook(owner, attribute) is not None


def why_unknown(owner: nn.Module, attribute: str) -> str | None:
    """Why a tensor that should be a parameter may be another one in a forward pass; None where it is known to be it."""
    held = attribute in owner._parameters or attribute in owner._buffers or _is_overruled(owner, attribute)
    hook = _hook(owner, attribute)
    known = hook is not None and all(part in owner._parameters for part in _parts(hook, attribute))
    if held or known or _parametrization(owner, attribute) is not None:
        return None
    return (
        f"its {attribute} is no parameter but an attribute that something else sets, perhaps from a hook or a module around "
        "it; compute it by torch.nn.utils.parametrize, or make it an nn.Parameter"
    )


def computed_tensors(owner: nn.Module) -> dict[str, list[str]]:
    """Names of the tensors that a module computes, each with the module's own tensors that it is computed from."""
    parametrized: Any = owner.parametrizations if parametrize.is_parametrized(owner) else ()
    hooks = ((_tensor_name(hook), hook) for hook in owner._forward_pre_hooks.values())
    return {name: [] for name in parametrized} | {name: _parts(hook, name) for name, hook in hooks if name is not None}


def sources(owner: nn.Module, attribute: str) -> list[Tensor]:
    """The parameters that a tensor is computed from."""
    part, hook = _parametrization(owner, attribute), _hook(owner, attribute)
    if part is not None:
        return list(part.parameters())
    held = [] if hook is None else [owner._parameters.get(part) for part in _parts(hook, attribute)]
    return [parameter for parameter in held if parameter is not None]


def plain_type(module: nn.Module) -> type:
    """A module's type as it was before its tensors were parametrized or overruled."""
    kind = type(module)
    while OVERRULED in vars(kind):
        kind = kind.__bases__[0]
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


# --- changing ---------------------------------------------------------------------------------------------------------
def overrule(owner: nn.Module, attribute: str, tensor: Tensor | None) -> None:
    """Hold a tensor under the name of one that the module computes, which is not used meanwhile; None: compute it again."""
    kind = type(owner)
    base = kind.__bases__[0] if OVERRULED in vars(kind) else kind
    held = {name: each for name, each in getattr(kind, OVERRULED, {}).items() if name != attribute}
    held |= {} if tensor is None else {attribute: tensor}
    own = {name: property(lambda module, held=each: held, lambda *given: None) for name, each in held.items()}
    own |= {OVERRULED: held, "__deepcopy__": _refuse_copy}
    own |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__reduce_ex__": _refuse_copy}
    owner.__class__ = type(base.__name__, (base,), own) if held else base


def _refuse_copy(module: nn.Module, *args: Any) -> Any:
    raise PatchConflictError(
        f"The weights of this {type(module).__name__} are edited at present, in the place of computed ones, and a copy could "
        "not go back to computing them. Copy it after the context has ended, or call tl_paramdecomp.edited_model(...) there."
    )


def made_plain(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Make a computed tensor a parameter for good; what it was computed from is dropped, and unchanged where others use it.

    UnsupportedSiteError where it is not known how it is computed.
    """
    kept = nn.Parameter(tensor, any(part.requires_grad for part in sources(owner, attribute)))
    part, hook = _parametrization(owner, attribute), _hook(owner, attribute)
    if part is not None:
        kind = type(owner)  # a copied module shares its class, and so its properties, with the original
        fields = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        own: Any = type(kind.__name__, kind.__bases__, fields)
        owner.__class__ = own
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=not part.is_tensor)
    elif isinstance(hook, WeightNorm):
        remove_weight_norm(owner, attribute)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(owner, attribute)
    elif hook is not None:
        owner._parameters[f"{attribute}_orig"] = nn.Parameter(tensor.clone())  # prune.remove writes to it
        prune.remove(owner, attribute)
    else:
        raise UnsupportedSiteError(
            f"{type(owner).__name__} computes its {attribute} in a way that is not known, so that an edit of it cannot be "
            "kept; make it an nn.Parameter first, or use edited_weights(...) or patched(...)."
        )
    owner._buffers.pop(attribute, None)
    owner._parameters[attribute] = kept


def deep_copy(root: nn.Module) -> nn.Module:
    """A deep copy of a tree of modules, some of whose tensors may be computed.

    `copy.deepcopy` takes no tensor that was computed with its graph and kept. And parametrized classes have a `__deepcopy__`
    of their own, which a TransformerBridge's wrapper passes on as if it were its own: the wrapper would be lost.
    """
    kept = (value for module in root.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
    kinds = {type(module) for module in root.modules() if parametrize.is_parametrized(module)}
    names = ("__deepcopy__", "__getstate__")
    own = [(kind, key, vars(kind)[key]) for kind in kinds for key in names if key in vars(kind)]
    for kind, key, _ in own:
        delattr(kind, key)
    try:
        return copy.deepcopy(root, memo)
    finally:
        for kind, key, method in own:
            setattr(kind, key, method)


# --- the ways ---------------------------------------------------------------------------------------------------------
def _is_overruled(owner: nn.Module, attribute: str) -> bool:
    return attribute in getattr(type(owner), OVERRULED, ())


def _parametrization(owner: nn.Module, attribute: str) -> Any:
    """The parametrization that computes this tensor, or None."""
    held: Any = owner._modules.get("parametrizations") if parametrize.is_parametrized(owner, attribute) else None
    return None if held is None else held[attribute]


def _hook(owner: nn.Module, attribute: str) -> Any:
    """The pre-hook of an older utility that computes this tensor, or None."""
    return next((hook for hook in owner._forward_pre_hooks.values() if _tensor_name(hook) == attribute), None)


def _tensor_name(hook: Any) -> str | None:
    if isinstance(hook, (WeightNorm, SpectralNorm)):
        return hook.name
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else None


def _parts(hook: Any, attribute: str) -> list[str]:
    return [f"{attribute}_{end}" for end in (("g", "v") if isinstance(hook, WeightNorm) else ("orig",))]


def _check_steady(owner: nn.Module, attribute: str, part: nn.Module, name: str) -> None:
    """Refuse a parametrization that changes as it is read (UnsupportedSiteError)."""
    own = [module for module in part.children() if not type(module).__module__.startswith("torch.nn.utils.")]
    if any(type(module).__name__ == "_SpectralNorm" and module.training for module in part.children()):
        raise _unsteady(owner, attribute, name, "spectral_norm")
    known = _STEADY.setdefault(part, {})
    if own and part.training not in known:
        known[part.training] = _gives_the_same(owner, attribute, part)
    if own and not known[part.training]:
        raise _unsteady(owner, attribute, name, type(own[0]).__name__)


@torch.no_grad()
def _gives_the_same(owner: nn.Module, attribute: str, part: nn.Module) -> bool:
    """Whether a parametrization gives one tensor twice and changes no buffer."""
    with _untouched(part) as before:
        first, second = getattr(owner, attribute), getattr(owner, attribute)
        return torch.equal(first, second) and all(torch.equal(buffer, kept) for buffer, kept in before)


@contextlib.contextmanager
def _untouched(part: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """After this context a parametrization's buffers and the random state are as they were; yields the buffers and copies."""
    before = [(buffer, buffer.clone()) for buffer in part.buffers()]
    devices = {tensor.device for tensor in part.parameters() if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield before
    finally:
        for buffer, kept in before:
            if not torch.equal(buffer, kept):
                buffer.copy_(kept)


def _unsteady(owner: nn.Module, attribute: str, name: str, by: str) -> UnsupportedSiteError:
    return UnsupportedSiteError(
        f"The {attribute} of {name or type(owner).__name__} is computed by {by}, which gives another tensor each time it is "
        "read. Put the model in eval mode, if that makes it one tensor, or make it a plain parameter: "
        "torch.nn.utils.parametrize.remove_parametrizations(module, name), or remove_spectral_norm(module)."
    )
