"""Adapters: how a host's model is read and run. They know hosts; they know no components.

`adapt(model)` picks the adapter by the model's type, without importing any host library.
"""

import importlib
import weakref
from collections.abc import Hashable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters.base import Captured, ModelAdapter
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import SitePattern, WeightSite

__all__ = ["Captured", "ModelAdapter", "adapt", "find_sites", "site_weight"]

HOSTS = {
    ("transformer_lens", "TransformerBridge"): ("transformer_bridge", "TransformerBridgeAdapter"),
    ("transformer_lens", "HookedTransformer"): ("hooked_transformer", "HookedTransformerAdapter"),
    ("nnsight", "Envoy"): ("nnsight", "NNsightAdapter"),
    ("torch", "Module"): ("torch_module", "TorchModuleAdapter"),
}
"""A host's package and class -> the file here and the adapter in it; the first that a model is an instance of."""
_ADAPTERS: "weakref.WeakKeyDictionary[Any, tuple[Hashable, ModelAdapter]]" = weakref.WeakKeyDictionary()


def adapt(model: Any) -> ModelAdapter:
    """The adapter of a model; made once, and anew when the host's flags have changed since.

    Raises:
        UnsupportedModelError: The model is of no supported host, is remote, or has no weight that can be read.
    """
    adapter_class = _adapter_class(model)
    known = _ADAPTERS.get(model)
    if known is None or known[0] != known[1].signature():
        adapter = adapter_class(model)
        known = _ADAPTERS[model] = (adapter.signature(), adapter)
    return known[1]


def find_sites(model: Any, pattern: SitePattern = "*") -> dict[str, WeightSite]:
    """Weight sites of a model that a pattern selects, in execution order.

    Args:
        model: A HookedTransformer, TransformerBridge, nnsight model, transformers model or torch module.
        pattern: A glob over canonical names and the host's own names (`*` also crosses dots), a list of globs, or a
            predicate over `WeightSite`. Globs and names that end in `.pre_identity` select the identities that can be
            inserted before linear weights, which nothing else selects.

    Raises:
        NoMatchingSiteError: Nothing matches; the message names the nearest names.
        UnsupportedModelError: The model, or the one site asked for, cannot be decomposed exactly.
    """
    return adapt(model).select(pattern)


def site_weight(model: Any, name: str) -> Float[Tensor, "d_in d_out"]:
    """W [d_in, d_out] of one site, detached; the heads of W_Q, W_K, W_V and W_O flattened, GPT-2's c_attn split.

    For an inserted identity that is I.

    Raises:
        NoMatchingSiteError: There is no site of that name or alias.
        UnsupportedSiteError: The weight is quantised or on the meta device.
    """
    adapter = adapt(model)
    return adapter.weight(adapter.resolve(name)).detach()


def _adapter_class(model: Any) -> type[ModelAdapter]:
    kind = type(model).__name__
    bases = {(base.__module__.split(".")[0], base.__name__) for base in type(model).__mro__}
    lens = {name for package, name in bases if package == "transformer_lens"}
    if lens & {"RemoteBridge", "VLLMBridge"} or kind == "RemoteBridge":
        raise UnsupportedModelError(f"{kind} holds no weights on this side; boot the model locally instead.")
    if lens & {"HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"}:
        raise UnsupportedModelError(
            f"{kind} is not supported; decoder-only models as HookedTransformer or TransformerBridge are."
        )
    for host, (file, name) in HOSTS.items():
        if host in bases:
            return getattr(importlib.import_module(f"tl_paramdecomp.adapters.{file}"), name)
    raise UnsupportedModelError(
        f"Expected a HookedTransformer, TransformerBridge, nnsight model, transformers model or torch.nn.Module, "
        f"not {kind}."
    )
