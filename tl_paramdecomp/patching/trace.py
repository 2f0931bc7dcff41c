"""Components patched inside an nnsight trace, in forward order, as the user's own interventions are."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.convolution import patch_span
from tl_paramdecomp.adapters.identity import composed
from tl_paramdecomp.adapters.interception import host_output, matching_rows
from tl_paramdecomp.adapters.nnsight import NNsightAdapter, Standing, generate_call, running_body
from tl_paramdecomp.adapters.passes import cached_columns, input_rows, prompt_columns
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import SiteNotFiredError, UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.patching.act_patches import ActPatches
from tl_paramdecomp.patching.hooks import changes_of, claims_of, site_fns
from tl_paramdecomp.patching.target import checked_adapter, claimed
from tl_paramdecomp.sites import SiteCall, Span


def patch_trace(model: Any, decomposition: Decomposition, masks: Masks | ActPatches) -> None:
    """Patch components from within `model.trace(...)`, `tracer.invoke(...)`, `model.edit(...)` or `tracer.iter[...]`.

    Give masks, as `patched` takes, or patches of activations, as `patched_acts` takes.

    It visits the changed sites in forward order, so call it before reading anything that comes after the first of them;
    what comes before may have been read. In an invoke it reaches that invoke's rows only. In generation it reaches the
    step it is called in; call it under `for _ in tracer.iter[:]` to reach all.

    Raises:
        UnsupportedModelError: The model is not of nnsight, or is not being traced.
        SiteNotFiredError: The trace has gone by a changed site already, or so far that its positions are not known.
        UnsupportedSiteError: A site's output is shared by several invokes.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    if not isinstance(adapter, NNsightAdapter):
        raise UnsupportedModelError(
            f"patch_trace is for nnsight models; on this {adapter.host} model use patched(...)."
        )
    changes = changes_of(decomposition, masks)
    fns, standing = composed(site_fns(decomposition, changes), adapter.weight), adapter.standing()
    in_order = [name for name in adapter.wirings if name in fns]
    for name in in_order:
        if standing.is_past(f"{adapter.envoy(adapter.wirings[name].owner).path}.input"):  # a trace does not go back
            raise SiteNotFiredError(
                f"patch_trace comes too late for {name}: this trace has read something that the model computes after it. Call "
                "patch_trace first, and read afterwards."
            )
    by_position = any(change.by_position for change in changes.values())
    columns, length = _columns(model, standing) if by_position else (Span(), None)
    with claimed(adapter.core, claims_of(decomposition, changes)):
        pass  # a context around the trace may patch the same sites
    for owner, names in itertools.groupby(in_order, key=lambda name: adapter.wirings[name].owner):
        envoy = adapter.envoy(owner)
        x, y = envoy.input, envoy.output  # once for all the sites of a fused module: a trace does not go back
        for name in names:
            wiring = adapter.wirings[name]
            rows = matching_rows(x, y, wiring)
            _refuse_shared_rows(name, rows.y)
            span = columns if wiring.patches is None else patch_span(rows.y)
            # an unembedding may see the last ones alone
            if wiring.patches is None and length is not None and rows.y.ndim > 2:
                span = replace(span, start=span.start + length - rows.y.shape[-2])
            new = fns[name](SiteCall(rows.x, rows.y, adapter.bias(name), span))
            y = host_output(new, y, wiring)
        envoy.output = y


def _columns(model: Any, standing: Standing) -> tuple[Span, int | None]:
    """Columns that the present step of a trace computes, and how many, from what the model is called with."""
    step = standing.step
    args, kwargs = model.inputs if standing.call is None else standing.call
    tokens = input_rows(args, kwargs)
    length = None if tokens is None else tokens.shape[1]
    start = cached_columns(kwargs) if standing.call is None else _cached_before(kwargs, length or 1)
    end = start + (length or 1)
    generate = generate_call(adapt(model).root)
    if generate is not None:
        prompt = prompt_columns(*generate)
        return Span(start, prompt, generating=True, prompt_known=prompt is not None), length
    prompt = end - step if step or not start else start  # a cache in the first step is of an earlier call
    return Span(start, prompt, generating="use_cache" in kwargs or prompt < end), length


def _cached_before(kwargs: Mapping[str, Any], length: int) -> int:
    """Columns in the key/value cache before a pass that is under way, and may have added its own already."""
    now = cached_columns(kwargs)
    if not now or not hasattr(kwargs["past_key_values"], "get_seq_length"):
        return now  # tuples of an older transformers do not grow
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    ends: list[int] = []
    if isinstance(mask, Tensor):
        ends = [mask.shape[1]] if mask.ndim == 2 else []  # one entry for each column, cached or new
    elif isinstance(positions, Tensor):
        ends = [int(positions.max()) + 1]  # without a mask there is no padding
    layers = {layer.get_seq_length() for layer in getattr(kwargs["past_key_values"], "layers", ())}
    if len(layers) == 2 and max(layers) - min(layers) == length:
        ends.append(max(layers))  # some layers have run, others have not
    for end in ends:
        if end - length in (now, now - length):
            return end - length
    raise SiteNotFiredError(
        "This trace is amid a forward pass with a key/value cache, and neither an attention mask [batch, columns] nor "
        "position_ids say which positions it computes. Call patch_trace before reading anything else in this trace or step."
    )


def _refuse_shared_rows(name: str, y: Tensor) -> None:
    """Raise UnsupportedSiteError at a look-up that invokes share, as position embeddings are, once for the whole batch."""
    mediator = running_body()
    group = getattr(mediator, "batch_group", None)
    total = getattr(getattr(getattr(mediator, "interleaver", None), "batcher", None), "total", None)
    if name == "pos_embed.W_pos" and group and total and group[1] < total and y.shape[0] == 1:
        raise UnsupportedSiteError(
            f"{name} is looked up once for all invokes of this trace, so that one of them cannot have it patched alone; "
            "trace its prompt on its own."
        )
