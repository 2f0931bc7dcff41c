"""What every host adapter offers: the model's weight sites, their weights, and a way to run it with functions at them."""

import contextlib
import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters.fingerprint import fingerprint
from tl_paramdecomp.adapters.interception import Interception, OnError
from tl_paramdecomp.adapters.wiring import Wiring, find_module, read_bias, read_parameter, read_weight, stored_weight
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import Fingerprint, SiteCall, SiteFn, WeightSite


class Captured(NamedTuple):
    """One clean forward pass."""

    logits: Float[Tensor, "batch ..."]
    inputs: dict[str, Tensor]
    """x of each captured site: [batch, pos, d_in], or indices [batch, pos] for an embedding."""


class _Remembered(NamedTuple):
    """A fingerprint, and the parameters it was taken of in the state they were in."""

    parameters: "tuple[weakref.ref[Tensor], ...]"
    states: tuple[Hashable, ...] | None
    found: Fingerprint

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the very same parameters, unchanged since."""
        alive = len(parameters) == len(self.parameters) and all(
            ref() is t for ref, t in zip(self.parameters, parameters)
        )
        return alive and self.states is not None and self.states == _states(parameters)


def _states(parameters: Sequence[Tensor]) -> tuple[Hashable, ...] | None:
    """What changes with every in-place change; None for inference tensors, which keep no count."""
    try:
        return tuple((t._version, t.data_ptr(), t.dtype) for t in parameters)
    except RuntimeError:
        return None


class ModelAdapter(ABC):
    """Reads and runs one host model. It knows hosts; it knows no components.

    It refers to the model weakly, so that a cached adapter never keeps a model alive.
    """

    host: ClassVar[str]
    """The host's name in messages and saved files."""

    def __init__(self, model: Any) -> None:
        self._model_ref = weakref.ref(model)
        self._fingerprints: dict[str, _Remembered] = {}
        self.wirings: dict[str, Wiring] = {}
        self.refused: dict[str, str] = {}
        """Names this host has but cannot decompose exactly, each with the reason."""

    @property
    def model(self) -> Any:
        """The host object the user holds."""
        model = self._model_ref()
        if model is None:
            raise UnsupportedModelError("The model this adapter was made for is gone; keep a reference to it.")
        return model

    @property
    def root(self) -> nn.Module:
        """The torch module tree that holds the weights."""
        return self.model

    @property
    def processing(self) -> str | None:
        """What the host did to the weights after loading, such as folding LayerNorm; None when they are as trained."""
        return None

    def signature(self) -> Hashable:
        """Flags of the host that change the wiring; an adapter made under other flags is made anew."""
        return None

    @property
    def sites(self) -> dict[str, WeightSite]:
        """Weight sites by canonical name, in execution order."""
        return {name: wiring.site for name, wiring in self.wirings.items()}

    # --- reading ----------------------------------------------------------------------------------------------------
    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """W of a site, attached to the host's parameter."""
        return read_weight(self.root, self.wirings[name])

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """Bias of a site, attached to the host's parameter, or None."""
        return read_bias(self.root, self.wirings[name])

    def fingerprint(self, name: str, fresh: bool = False) -> Fingerprint:
        """Fingerprint of a site's weight and bias; remembered until a parameter changes, unless `fresh`."""
        parameters, known = self._parameters_of(name), self._fingerprints.get(name)
        if not fresh and known is not None and known.is_of(parameters):
            return known.found
        found = fingerprint(self.weight(name), self.bias(name))
        self._fingerprints[name] = _Remembered(tuple(map(weakref.ref, parameters)), _states(parameters), found)
        return found

    def _parameters_of(self, name: str) -> list[Tensor]:
        wiring = self.wirings[name]
        bias = getattr(find_module(self.root, wiring.owner), wiring.bias, None) if wiring.bias else None
        return [t for t in (read_parameter(self.root, wiring), bias) if t is not None]

    # --- running ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def intercept(
        self, fns: Mapping[str, SiteFn], on_error: OnError | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Within this context every forward pass of the host runs with these functions at its sites.

        Args:
            fns: A function for each site.
            on_error: Told what goes wrong at a site, which then leaves its output; None: it is raised.

        Raises:
            SiteNotFiredError: From the forward pass, where a site was not reached.
        """

    @abstractmethod
    def forward(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Logits of token rows, the way the host computes them."""

    def capture(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        names: Sequence[str],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Captured:
        """Logits and site inputs of the model as it stands.

        Raises:
            UnsupportedSiteError: A site is called more than once.
        """
        inputs: dict[str, Tensor] = {}

        with self.intercept({name: functools.partial(_keep_input, inputs, name, len(tokens)) for name in names}):
            logits = self.forward(tokens, attention_mask)
        return Captured(logits, inputs)

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter."""
        return next(self.root.parameters()).device

    # --- changing weights -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def replaced_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> Iterator[None]:
        """Within this context the sites hold other weights; afterwards the very same parameters are back.

        The host's parameter object is swapped, never written to, so a tied neighbour keeps its own and restoring is
        exact. Sites fused into one parameter are swapped together.
        """
        with contextlib.ExitStack() as stack:
            for name, matrix in weights.items():
                wiring = self.wirings[name]
                stored = stored_weight(self.root, wiring, matrix)
                stack.enter_context(swapped_parameter(find_module(self.root, wiring.owner), wiring.weight, stored))
            yield

    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        """Set the sites' weights for good. A tied weight is untied first, so that only the named side changes."""
        for name, matrix in weights.items():
            wiring = self.wirings[name]
            owner = find_module(self.root, wiring.owner)
            stored = stored_weight(self.root, wiring, matrix)
            if wiring.site.tied_to is not None or any(w.site.tied_to == name for w in self.wirings.values()):
                owner._parameters[wiring.weight] = nn.Parameter(stored, read_parameter(self.root, wiring).requires_grad)
                continue
            with torch.no_grad():
                read_parameter(self.root, wiring).data.copy_(stored)


def _keep_input(inputs: dict[str, Tensor], name: str, batch: int, call: SiteCall) -> Tensor:
    """A site's function that leaves its output and keeps its input."""
    if name in inputs:
        raise UnsupportedSiteError(
            f"{name} is called more than once in a forward pass, so that it has no single input to capture."
        )
    inputs[name] = call.x.expand(batch, *call.x.shape[1:]) if call.x.shape[0] == 1 else call.x
    return call.y


@contextlib.contextmanager
def swapped_parameter(owner: nn.Module, attribute: str, tensor: Tensor) -> Iterator[None]:
    """Hold another tensor under a parameter's name."""
    slots: list[Any] = [owner._parameters, owner._buffers, owner.__dict__]
    slot = next((s for s in slots if attribute in s), None)
    if slot is None:
        raise UnsupportedModelError(f"{type(owner).__name__} computes its {attribute}; it cannot be replaced.")
    old = slot[attribute]
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    slot[attribute] = new
    try:
        yield
    finally:
        slot[attribute] = old


def make_interception(adapter: ModelAdapter, fns: Mapping[str, SiteFn], on_error: OnError | None) -> Interception:
    """The shared engine set up for one adapter."""
    return Interception(adapter.root, adapter.wirings, fns, on_error)
