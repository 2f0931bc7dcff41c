"""Seeing that a model is the one a decomposition was made from, before anything is patched."""

from typing import Any

from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.fingerprint import centring_differs, differs
from tl_paramdecomp.adapters.identity import behind, is_identity
from tl_paramdecomp.adapters.wiring import read_parameter
from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import DeviceError, TargetMismatchError
from tl_paramdecomp.patching.claims import edited_sites


def check_target(model: Any, decomposition: Saved) -> None:
    """See that a model's weights are those a decomposition was made from; reads every entry of them anew.

    Raises:
        TargetMismatchError: They are not; the message names the sites, and says when the weights look processed
            (folded LayerNorm, centred weights), which is the usual cause.
    """
    _compare(adapt(model), decomposition, fresh=True)


def checked_adapter(
    model: Any, decomposition: Saved, tokens: Tensor | None = None, attention_mask: Tensor | None = None
) -> ModelAdapter:
    """The adapter of the decomposition's own target, its weights compared by remembered fingerprints (else
    TargetMismatchError), the components on the same devices (else DeviceError).

    Sites that `edited_weights` edits at present are not compared. Where token rows are given, it warns if they begin otherwise
    than those that the decomposition was made on.
    """
    adapter = adapt(model)
    _compare(adapter, decomposition, fresh=False, skip=edited_sites(adapter.core))
    root = adapter.root
    for name in decomposition.fingerprints:
        wiring = adapter.wiring(name)  # of no norm
        # W itself may be a copy, head by head
        device = adapter.gain(name).device if wiring is None else read_parameter(root, wiring).device
        here = decomposition.device_of(name)
        if here != device:
            raise DeviceError(
                f"The components of {name} are on {here}, the model's weight on {device}; "
                f"move them with decomposition.to({str(device)!r})."
            )
    if tokens is not None:
        warn_of_other_start(decomposition, tokens, attention_mask)
    return adapter


def _compare(adapter: ModelAdapter, decomposition: Saved, fresh: bool, skip: frozenset[str] = frozenset()) -> None:
    wrong: dict[str, str] = {}
    centred = False
    compared = [name for name in decomposition.fingerprints if behind(name) not in skip]
    for name in compared:
        if adapter.wiring(name) is None and not adapter.is_norm(name):
            reason = adapter.refused.get(name) or adapter.norms.refused.get(name)
            wrong[name] = f"not a site of this model{f' ({reason})' if reason else ''}"
    for name, found in adapter.fingerprints((name for name in compared if name not in wrong), fresh).items():
        known = decomposition.fingerprints[name]
        difference = differs(known, found)
        if difference:
            wrong[name] = f"{behind(name)} holds another weight" if is_identity(name) else difference
            centred |= centring_differs(known, found)
    if wrong:
        raise TargetMismatchError(_message(adapter, decomposition, wrong, centred))


def _message(adapter: ModelAdapter, decomposition: Saved, wrong: dict[str, str], centred: bool) -> str:
    listed = "; ".join(f"{name}: {what}" for name, what in list(wrong.items())[:4])
    more = f" (and {len(wrong) - 4} more sites)" if len(wrong) > 4 else ""
    text = f"The weights of this model are not those the decomposition was made from. {listed}{more}."
    made_on = decomposition.info.get("processing")
    if adapter.processing != made_on or centred:
        here = adapter.processing or "as trained"
        text += (
            f" They look processed on one side only (here: {here}; decomposed: {made_on or 'as trained'}): load the "
            "model unprocessed, with transformer_lens.HookedTransformer.from_pretrained_no_processing(name) or "
            "transformer_lens.model_bridge.TransformerBridge.boot_transformers(name) without "
            "enable_compatibility_mode(), or load it the way it was when it was decomposed."
        )
    else:
        text += " Load the model and revision it was made from, or decompose this one."
    return text
