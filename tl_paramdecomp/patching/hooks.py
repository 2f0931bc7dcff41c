"""Components patched into a running model: as a context on any host, or as plain TransformerLens hooks."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.adapters.identity import behind
from tl_paramdecomp.adapters.lens import HookPair, LensAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masked_output import site_fn
from tl_paramdecomp.components.masks import Masks, SiteMask
from tl_paramdecomp.errors import NoMatchingSiteError, UnsupportedModelError
from tl_paramdecomp.patching.claims import Claim, claimed
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteFn


@entered_once
def patched(model: Any, decomposition: Decomposition, masks: Masks) -> Iterator[Any]:
    """Within this context the model runs with its components masked, however it is called.

    `run_with_cache`, `run_with_hooks` (the user's functions see the patched values), `generate`, `stop_at_layer`,
    `reset_hooks`, autocast and nnsight traces work inside. Contexts nest; patches of one site combine while all of them
    leave the delta mask at 1 and each changes other components. One patched model per thread.

    Args:
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        masks: From `decomposition.masks()` or `importance_masks`.

    Yields:
        The model.

    Raises:
        TargetMismatchError: The model holds other weights.
        DeviceError: The components are on another device.
        PatchConflictError: A site is already patched, and the two patches have no common meaning.
        SiteNotFiredError: From a forward pass that did not reach a patched site.
    """
    adapter = checked_adapter(model, decomposition)
    changed = site_masks(decomposition, masks)
    fns = {name: site_fn(decomposition[name], mask) for name, mask in changed.items()}
    with claimed(adapter.core, claims_of(decomposition, changed)), intercepted(adapter, fns):
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
    adapter = checked_adapter(model, decomposition)
    if not isinstance(adapter, LensAdapter):
        raise UnsupportedModelError(
            f"fwd_hooks is for TransformerLens models; for this {adapter.host} model use tl_paramdecomp.patched(...)."
        )
    pairs: list[HookPair] = []
    changed = site_masks(decomposition, masks)
    for site in dict.fromkeys(map(behind, changed)):  # a site and the identity before it are one pair
        here = {name: mask for name, mask in changed.items() if behind(name) == site}
        fns = {name: site_fn(decomposition[name], mask) for name, mask in here.items()}
        pairs += adapter.fwd_hook_pairs(fns, any(mask.by_position for mask in here.values()))
    return pairs


def site_masks(decomposition: Decomposition, masks: Masks) -> dict[str, SiteMask]:
    """The masks that change something, of sites that the decomposition has with as many components.

    Raises:
        NoMatchingSiteError: The masks belong to another decomposition.
    """
    changed = masks.changed()
    for name, mask in changed.items():
        if name not in decomposition or decomposition[name].n_components != mask.n_components:
            raise NoMatchingSiteError(
                f"The masks speak of {mask.n_components} components of {name}, which this decomposition does not have; "
                "make them with its own masks()."
            )
    return changed


def claims_of(decomposition: Decomposition, changed: Mapping[str, SiteMask]) -> dict[str, Claim]:
    """What running under these masks does to each site."""
    return {name: Claim(decomposition[name], mask, additive=mask.keeps_delta) for name, mask in changed.items()}


@contextlib.contextmanager
def intercepted(adapter: Any, fns: Mapping[str, SiteFn]) -> Iterator[None]:
    """`adapter.intercept`, or nothing at all where there is nothing to run."""
    if not fns:
        yield
        return
    with adapter.intercept(fns):
        yield
