"""Components patched into a running model: as a context on any host, or as plain TransformerLens hooks and hook points."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.adapters.identity import behind
from tl_paramdecomp.adapters.lens import HookPair, LensAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import corrected
from tl_paramdecomp.components.masks import Masks, SiteChange, SiteChanges
from tl_paramdecomp.errors import NoMatchingSiteError, UnsupportedModelError
from tl_paramdecomp.patching.target import Claim, checked_adapter, claimed
from tl_paramdecomp.sites import SiteCall, SiteFn

HOOK_NAME = "hook_component_acts"


@entered_once
def patched(model: Any, decomposition: Decomposition, masks: SiteChanges[Any]) -> Iterator[Any]:
    """Within this context, which gives the model, it runs with its components masked, however it is called.

    `run_with_cache`, `run_with_hooks` (the user's functions see the patched values), `generate`, `stop_at_layer`,
    `reset_hooks`, autocast and nnsight traces work inside. Contexts nest; patches of one site combine while all of them
    leave the delta mask at 1 and each changes other components. One patched model per thread.

    Args:
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        masks: From `decomposition.masks()` or `importance_masks`.

    Raises:
        TargetMismatchError: The model holds other weights.
        DeviceError: The components are on another device.
        PatchConflictError: A site is already patched, and the two patches have no common meaning.
        SiteNotFiredError: From a forward pass that did not reach a patched site.
    """
    adapter = checked_adapter(model, decomposition)
    changes = changes_of(decomposition, masks)
    with (
        claimed(adapter.core, claims_of(decomposition, changes)),
        intercepted(adapter, site_fns(decomposition, changes)),
    ):
        yield model


def fwd_hooks(model: Any, decomposition: Decomposition, masks: Masks) -> list[HookPair]:
    """The patch as plain (name, function) pairs for TransformerLens' `run_with_hooks` and `hooks`.

    Pairs see no key/value cache: masks by position raise at a decoding step, where `patched` works. Give hooks of your
    own that edit a site's input before these, and hooks that read its output after them.

    Raises:
        UnsupportedModelError: The model is not of TransformerLens.
        UnsupportedSiteError: A site has no hook points at its input and output.
        TargetMismatchError, DeviceError: As `patched`.
    """
    adapter = _of_lens(model, decomposition, "fwd_hooks", "use tl_paramdecomp.patched(...)")
    pairs: list[HookPair] = []
    changed = changes_of(decomposition, masks)
    for site in dict.fromkeys(map(behind, changed)):  # a site and the identity before it are one pair
        here = {name: mask for name, mask in changed.items() if behind(name) == site}
        by_position = any(mask.by_position for mask in here.values())
        pairs += adapter.fwd_hook_pairs(site_fns(decomposition, here), by_position)
    return pairs


@entered_once
def attached(model: Any, decomposition: Decomposition, use_error_term: bool = True) -> Iterator[Any]:
    """Within this context, which gives the model, component activations are hook points of a TransformerLens model.

    Through `<site>.hook_component_acts` passes h = x V [batch, pos, C], and the site writes y' = y + (a - h) U with a what
    the user's hooks leave of h: without an edit the model is itself, bit for bit. Without the error term it writes b + a U
    alone.

    Args:
        model: A HookedTransformer or TransformerBridge.
        decomposition: Made from this model's weights.
        use_error_term: Keep the delta component, computed on the current input with all its gradients (an autoencoder's
            error term in SAELens is a detached constant of the clean run instead). Without it a site writes the sum of
            its components alone.

    Raises:
        UnsupportedModelError: The model is not of TransformerLens, or already has such hook points.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    advice = "read activations with tl_paramdecomp.component_acts(...) and patch with tl_paramdecomp.patched(...)"
    adapter = _of_lens(model, decomposition, "attached", advice)
    names = {name: f"{name}.{HOOK_NAME}" for name in decomposition}
    with (
        claimed(adapter.core, {n: Claim(decomposition[n], additive=use_error_term) for n in names}),
        adapter.hook_points(list(names.values())) as points,
        adapter.intercept({n: _through(decomposition[n], points[names[n]], use_error_term) for n in names}),
    ):
        yield model


def _of_lens(model: Any, decomposition: Decomposition, what: str, advice: str) -> LensAdapter:
    adapter = checked_adapter(model, decomposition)
    if not isinstance(adapter, LensAdapter):
        raise UnsupportedModelError(f"{what} is for TransformerLens models; on this {adapter.host} model {advice}.")
    return adapter


def _through(components: Components, point: Any, use_error_term: bool) -> SiteFn:
    def apply(call: SiteCall) -> Tensor:
        h = components.acts(call.x)
        if h.shape[0] == 1 and h.shape[:-1] != call.y.shape[:-1]:
            h = h.expand(*call.y.shape[:-1], -1)
        acts = point(h.clone())  # a copy, so that hooks may write into it
        change = (acts - h if use_error_term else acts) @ components.U
        return corrected(components, call.y, call.bias, float(use_error_term), change)

    return apply


def changes_of(decomposition: Decomposition, given: SiteChanges[Any]) -> dict[str, Any]:
    """What masks or patches change; NoMatchingSiteError where the decomposition has no such sites with as many components."""
    changes = given.changed()
    for name, change in changes.items():
        if name not in decomposition or decomposition[name].n_components != change.n_components:
            raise NoMatchingSiteError(
                f"The {type(given).__name__} speak of {change.n_components} components of {name}, which this decomposition "
                "does not have; begin with its own masks(), or with act_patches(decomposition)."
            )
    return changes


def site_fns(decomposition: Decomposition, changes: Mapping[str, SiteChange]) -> dict[str, SiteFn]:
    """The functions that an adapter runs at the sites."""
    return {name: functools.partial(change.output, decomposition[name]) for name, change in changes.items()}


def claims_of(decomposition: Decomposition, changes: Mapping[str, SiteChange]) -> dict[str, Claim]:
    """What running under these changes does to each site."""
    return {n: Claim(decomposition[n], change.touched, additive=change.keeps_delta) for n, change in changes.items()}


def intercepted(adapter: Any, fns: Mapping[str, SiteFn]) -> contextlib.AbstractContextManager[None]:
    """`adapter.intercept`, or nothing at all where there is nothing to run."""
    return adapter.intercept(fns) if fns else contextlib.nullcontext()
