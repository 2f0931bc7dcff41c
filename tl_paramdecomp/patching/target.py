"""The model that is patched: it is the one a decomposition was made from, and two patches of a site have a common meaning."""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.boundary import evaluating, one_thread
from tl_paramdecomp.adapters.fingerprint import centring_differs, differs
from tl_paramdecomp.adapters.identity import SUFFIX, behind, is_identity
from tl_paramdecomp.adapters.wiring import read_parameter
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.components.subnetworks import Part
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import DeviceError, PatchConflictError, TargetMismatchError

_ACTIVE: "weakref.WeakKeyDictionary[Any, list[dict[str, Claim]]]" = weakref.WeakKeyDictionary()
"""By the torch module that holds the weights, so that an nnsight model and the module it wraps share their claims."""
_LOCK = threading.Lock()


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


@contextlib.contextmanager
def frozen(studied: ModelAdapter | nn.Module) -> Iterator[None]:
    """A target, or a decomposition, without gradients and in evaluation mode; afterwards every flag is as it was.
    PatchConflictError where another thread uses it."""
    target = isinstance(studied, ModelAdapter)
    with studied.evaluating() if target else evaluating(studied):
        learning = [p for p in (studied.root if target else studied).parameters() if p.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


# --- what is patched at present ------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Claim:
    """What one context does to one site."""

    components: Components | Part
    touched: frozenset[int] | None = None
    """Components that it is about; None: all."""
    additive: bool = False
    """It only adds to the output: the delta mask stays 1."""
    in_weights: bool = False
    """The site holds other weights meanwhile."""

    def joins(self, other: "Claim") -> bool:
        """Whether both can hold at once: corrections add up, unless they are to the same component."""
        if not (self.additive and other.additive):
            return False
        if self.components is not other.components:
            return True
        every = frozenset(range(self.components.n_components))
        mine, others = (every if claim.touched is None else claim.touched for claim in (self, other))
        return not mine & others


@contextlib.contextmanager
def claimed(root: Any, claims: Mapping[str, Claim]) -> Iterator[None]:
    """Note what happens to which sites of a model, or raise PatchConflictError: another thread uses it, or two patches of one
    site have no common meaning."""
    own = dict(claims)
    with one_thread(root):
        with _LOCK:
            stack = _ACTIVE.setdefault(root, [])
            for other in stack:
                _refuse_conflicts(own, other)
            stack.append(own)
        try:
            yield
        finally:
            with _LOCK:
                stack[:] = [other for other in stack if other is not own]


def _refuse_conflicts(own: Mapping[str, Claim], other: Mapping[str, Claim]) -> None:
    for name, claim in own.items():
        if name in other and not claim.joins(other[name]):
            raise PatchConflictError(
                f"{name} is already patched on this model. Patches of one site combine when each leaves the delta "
                "mask at 1 and they change different components; these do not. Leave the other context first, or "
                "put both into one set of masks."
            )
        partner = behind(name) if is_identity(name) else f"{name}{SUFFIX}"
        if partner in other and not (claim.in_weights or other[partner].in_weights):
            raise PatchConflictError(
                f"{behind(name)} and the identity before it are patched by two contexts, neither of which knows the "
                "input that the other leaves. Leave the other context first, or put both into one set of masks."
            )


def edited_sites(root: Any) -> frozenset[str]:
    """Sites of a model whose weights are edited at present."""
    return frozenset(name for claims in _ACTIVE.get(root, ()) for name, claim in claims.items() if claim.in_weights)


def is_patched(root: Any) -> bool:
    """Whether any context is open on a model."""
    return bool(_ACTIVE.get(root))
