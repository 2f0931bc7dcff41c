"""Components patched inside an nnsight trace, in forward order, as the user's own interventions are."""

from typing import Any

from tl_paramdecomp.adapters.interception import host_output, matching_rows
from tl_paramdecomp.adapters.nnsight import NNsightAdapter
from tl_paramdecomp.adapters.torch_module import cached_columns, input_rows
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masked_output import site_fn
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.patching.hooks import site_masks
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteCall, Span


def patch_trace(model: Any, decomposition: Decomposition, masks: Masks) -> None:
    """Patch components from within `with model.trace(...)`, `tracer.invoke(...)`, `model.edit(...)` or `tracer.iter[...]`.

    It visits the changed sites in forward order, so call it before reading anything that comes after the first of them.
    In an invoke it reaches that invoke's rows only. In generation it reaches the step it is called in; call it under
    `for _ in tracer.iter[:]` to reach all.

    Raises:
        UnsupportedModelError: The model is not of nnsight.
        TargetMismatchError, DeviceError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    if not isinstance(adapter, NNsightAdapter):
        raise UnsupportedModelError(f"patch_trace is for nnsight models; on this {adapter.host} model use patched(...).")
    changed = site_masks(decomposition, masks)
    span = _span(model) if any(mask.by_position for mask in changed.values()) else None
    for name, mask in changed.items():
        wiring = adapter.wirings[name]
        envoy = adapter.envoy(wiring.owner)
        x, y = envoy.input, envoy.output
        rows = matching_rows(x, y, wiring)
        here = span or Span(prompt=rows.y.shape[-2] if rows.y.ndim > 2 else None)
        new = site_fn(decomposition[name], mask)(SiteCall(rows.x, rows.y, adapter.bias(name), here))
        envoy.output = host_output(new, y, wiring)


def _span(model: Any) -> Span:
    """Where the present step of a trace stands in its rows, from what the model was called with."""
    args, kwargs = model.inputs
    tokens, start = input_rows(args, kwargs), cached_columns(kwargs)
    length = tokens.shape[1] if tokens is not None else 1
    return Span(start, start + length if start == 0 else start, generating=start > 0)
