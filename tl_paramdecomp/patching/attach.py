"""Components as hook points: read by `run_with_cache`, edited by `run_with_hooks`, patched by TransformerLens' tools.

At every decomposed site the host gains the hook point `<site>.hook_component_acts`, through which h = x V passes:

    y' = y + (a - h) U        with a what the user's hooks leave of h

so that without an edit the model is itself, bit for bit. Without the error term the site writes b + a U alone.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.adapters.lens import LensAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import corrected
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.patching.claims import Claim, claimed
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteCall, SiteFn

HOOK_NAME = "hook_component_acts"


@entered_once
def attached(model: Any, decomposition: Decomposition, use_error_term: bool = True) -> Iterator[Any]:
    """Within this context component activations are hook points of a TransformerLens model.

    Args:
        model: A HookedTransformer or TransformerBridge.
        decomposition: Made from this model's weights.
        use_error_term: Keep the delta component, computed on the current input with all its gradients (an autoencoder's
            error term in SAELens is a detached constant of the clean run instead). Without it a site writes the sum of
            its components alone.

    Yields:
        The model. `<site>.hook_component_acts` is [batch, pos, C].

    Raises:
        UnsupportedModelError: The model is not of TransformerLens, or already has such hook points.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    if not isinstance(adapter, LensAdapter):
        raise UnsupportedModelError(
            f"attached is for TransformerLens models; on this {adapter.host} model read activations with "
            "tl_paramdecomp.component_acts(...) and patch with tl_paramdecomp.patched(...)."
        )
    names = {name: f"{name}.{HOOK_NAME}" for name in decomposition}
    with (
        claimed(adapter.core, {n: Claim(decomposition[n], additive=use_error_term) for n in names}),
        adapter.hook_points(list(names.values())) as points,
        adapter.intercept({n: _through(decomposition[n], points[names[n]], use_error_term) for n in names}),
    ):
        yield model


def _through(components: Components, point: Any, use_error_term: bool) -> SiteFn:
    def apply(call: SiteCall) -> Tensor:
        h = components.acts(call.x)
        if h.shape[0] == 1 and h.shape[:-1] != call.y.shape[:-1]:
            h = h.expand(*call.y.shape[:-1], -1)
        acts = point(h.clone())  # a copy, so that hooks may write into it
        change = (acts - h if use_error_term else acts) @ components.U
        return corrected(components, call.y, call.bias, float(use_error_term), change)

    return apply
