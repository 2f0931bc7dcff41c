"""What a host's model holds: weight sites by name, their weights and gains, and other ones in their places."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters import identity
from tl_paramdecomp.adapters.computed import made_plain, peeked, read_tensor, why_unknown
from tl_paramdecomp.adapters.fingerprint import Remembered, fingerprint
from tl_paramdecomp.adapters.identity import behind, is_identity
from tl_paramdecomp.adapters.norms import Norms, NormWiring, find_norms, norm_candidates, read_norm_bias
from tl_paramdecomp.adapters.swapping import changed_tensor
from tl_paramdecomp.adapters.wiring import READABLE, Wiring, find_module, read_bias, read_parameter, read_weight
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import Fingerprint, SitePattern, WeightSite


class ModelWeights:
    """The weights of one host model. It refers to the model weakly, so that a cached adapter never keeps a model alive."""

    core_path: ClassVar[str] = ""  # dotted path of `core` in `root`

    def __init__(self, model: Any) -> None:
        self._model_ref = weakref.ref(model)
        self._fingerprints: dict[str, Remembered] = {}
        self.wirings: dict[str, Wiring] = {}
        self.refused: dict[str, str] = {}  # names this host has but cannot decompose exactly, each with the reason
        self.blocks_path = ""  # dotted path, in transformers, of the list of residual blocks; empty where none is known

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
    def core(self) -> nn.Module:
        """The innermost module that holds the weights: the same one for every host around it."""
        return find_module(self.root, self.core_path)

    # --- finding sites ----------------------------------------------------------------------------------------------
    def add(self, wiring: Wiring, may_be_attribute: bool = False) -> None:
        """Take a site in, or note why its weight cannot be read; an attribute that is no parameter may be stale."""
        owner, name = find_module(self.root, wiring.owner), wiring.site.name
        unknown = None if may_be_attribute else why_unknown(owner, wiring.weight)
        dtype = peeked(owner, wiring.weight).dtype
        if unknown is not None:
            self.refused[name] = unknown
        elif dtype not in READABLE:
            self.refused[name] = f"its weight is stored as {dtype}; load the model unquantised"
        else:
            self.wirings[name] = wiring

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Note names that cannot be decomposed, which are no sites any more."""
        self.refused |= reasons
        self.wirings = {name: wiring for name, wiring in self.wirings.items() if name not in reasons}

    # --- sites by name ----------------------------------------------------------------------------------------------
    @property
    def sites(self) -> dict[str, WeightSite]:
        """Weight sites by canonical name, in execution order."""
        return {name: wiring.site for name, wiring in self.wirings.items()}

    def select(self, pattern: SitePattern) -> dict[str, WeightSite]:
        """Sites that a pattern selects, in execution order; what ends in `.pre_identity` selects inserted identities."""
        return identity.select(self.sites, pattern, self.refused)

    def resolve(self, name: str) -> str:
        """Canonical name of a site or inserted identity, from that or an alias."""
        return identity.resolve(self.sites, name, self.refused)

    def wiring(self, name: str) -> Wiring | None:
        """Where a site is in the host (for an inserted identity: the site behind it); None where there is none."""
        found = self.wirings.get(behind(name))
        return None if found is not None and is_identity(name) and found.site.kind != "linear" else found

    def site(self, name: str) -> WeightSite:
        """A site, or an inserted identity, by its canonical name."""
        found = self.wirings[behind(name)].site
        return identity.identity_before(found) if is_identity(name) else found

    # --- reading ----------------------------------------------------------------------------------------------------
    def weight(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """W of a site, attached to the host's parameter; I for an inserted identity."""
        wiring = self.wirings[behind(name)]
        if is_identity(name):
            like = read_parameter(self.root, wiring)
            return torch.eye(wiring.site.d_in, dtype=like.dtype, device=like.device)
        return read_weight(self.root, wiring)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        """Bias of a site, attached to the host's parameter, or None."""
        return None if is_identity(name) else read_bias(self.root, self.wirings[name])

    def fingerprint(self, name: str, fresh: bool = False) -> Fingerprint:
        """Fingerprint of a site's weight and bias, or a norm's; remembered until a parameter changes, unless `fresh`.

        A change that torch does not count (through `.data`) is noticed where it is of a whole tensor.
        """
        return self.fingerprints([name], fresh)[name]

    def fingerprints(self, names: Iterable[str], fresh: bool = False) -> dict[str, Fingerprint]:
        """`fingerprint` of several; a parameter that sites share is looked at once."""
        samples: dict[int, Tensor] = {}
        return {name: self._fingerprint(name, fresh, samples) for name in names}

    def _fingerprint(self, name: str, fresh: bool, samples: dict[int, Tensor]) -> Fingerprint:
        if is_identity(name):
            return identity.identity_fingerprint(self._fingerprint(behind(name), fresh, samples))
        wiring, known = self.wirings.get(name) or self.norms.wirings[name], self._fingerprints.get(name)
        is_norm = isinstance(wiring, NormWiring)
        held = self.gain(name) if is_norm else read_parameter(self.root, wiring)
        bias = read_tensor(find_module(self.root, wiring.owner), wiring.bias, name) if wiring.bias else None
        parameters = [held] if bias is None else [held, bias]
        if fresh or known is None or not known.is_of(parameters, samples):
            found = fingerprint(held[None], bias) if is_norm else fingerprint(self.weight(name), self.bias(name))
            known = self._fingerprints[name] = Remembered.of(parameters, found)
        return known.found

    # --- normalisation gains ----------------------------------------------------------------------------------------
    @functools.cached_property
    def norms(self) -> Norms:
        """The host's normalisations with gains, which are no weight sites; each is tried out when first asked for."""
        return find_norms(self.root, norm_candidates(self.core, self.core_path, self.blocks_path))

    def is_norm(self, name: str) -> bool:
        """Whether this names a normalisation, and no weight site or inserted identity."""
        return behind(name) not in self.wirings and name in self.norms.wirings

    def gain(self, name: str) -> Float[Tensor, " width"]:
        """Gain of a norm, attached to the host's parameter; UnsupportedSiteError where the module holds none any more."""
        wiring = self.norms.wirings[name]
        gain = read_tensor(find_module(self.root, wiring.owner), wiring.weight, name)
        if not isinstance(gain, Tensor) or gain.shape != (wiring.site.width,):
            raise UnsupportedSiteError(
                f"{name} holds no gain of {wiring.site.width} entries any more; was LayerNorm folded meanwhile?"
            )
        return gain

    def gain_bias(self, name: str) -> Float[Tensor, " width"] | None:
        """Bias of a norm, attached to the host's parameter, or None."""
        return read_norm_bias(self.root, self.norms.wirings[name])

    # --- changing weights -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def replaced_weights(self, weights: Mapping[str, Float[Tensor, "..."]], biases: bool = False) -> Iterator[None]:
        """Within this context sites hold other weights [d_in, d_out], or norms other gains; or add other `biases`.

        The host's parameter object is swapped, never written to, so that a tied neighbour keeps its own and restoring is
        exact. UnsupportedSiteError where a site or norm adds none.
        """
        with contextlib.ExitStack() as stack:
            for name, new in weights.items():
                wiring = self.wirings.get(name) or self.norms.wirings[name]
                owner, attribute = find_module(self.root, wiring.owner), wiring.bias if biases else wiring.weight
                if attribute is None or read_tensor(owner, attribute, name) is None:
                    raise UnsupportedSiteError(f"{name} adds no {'bias' if biases else 'gain'} that could be replaced.")
                change = wiring.stored_bias if biases else wiring.stored_weight
                stack.enter_context(changed_tensor(owner, attribute, functools.partial(change, new)))
            yield

    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        """Set the sites' weights for good, as parameters that nothing else shares: only the named maps change.

        UnsupportedSiteError where a weight is computed in a way that is not known, or cannot be parted from another's.
        """
        for name, matrix in weights.items():
            wiring = self.wirings[name]
            owner, attribute = find_module(self.root, wiring.owner), wiring.weight
            old = read_parameter(self.root, wiring)
            stored = wiring.stored_weight(matrix, old)
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(stored, old.requires_grad)
            elif attribute in owner._buffers:
                owner._buffers[attribute] = stored
            else:
                made_plain(owner, attribute, stored)
