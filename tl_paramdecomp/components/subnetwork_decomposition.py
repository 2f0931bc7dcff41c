"""A decomposition into subnetworks: an encoder and a decoder dictionary, the threshold between them, and their target."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.components.subnetworks import GainSubnetworks, Part, SiteSubnetworks, Subnetworks
from tl_paramdecomp.errors import ComponentIndexError
from tl_paramdecomp.sites import Fingerprint, NormSite, WeightSite

SIDES = ("encoder", "decoder")


class Direction(NamedTuple):
    """What one subnetwork is at one site."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


class GainDirection(NamedTuple):
    """What one subnetwork is at one norm."""

    gain: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None


class SubnetworkDecomposition(Saved):
    """Low-rank directions in the space of chosen weights that sparsely reconstruct the gradients of each sample's divergence.

    They do not sum to the weights, and no token has a mask over them. Found by `L3D`.

    Args:
        encoder: Whose inner products with a gradient are the coefficients.
        decoder: Whose weighted sum reconstructs it; its subnetworks, of norm 1, are the directions to move along.
        sites: The sites by name.
        fingerprints: Of the weights and gains they belong to.
        threshold: Absolute coefficient from which a subnetwork counts as active, learned in training.
        info: Where it came from; anything JSON can hold.
        norms: The norms by name, where their gains take part.
    """

    threshold: Float[Tensor, ""]
    holds = "subnetworks"
    says = {"kind"}, {"norms"}

    def __init__(
        self,
        encoder: Subnetworks,
        decoder: Subnetworks,
        sites: Mapping[str, WeightSite],
        fingerprints: Mapping[str, Fingerprint],
        threshold: float = 0.0,
        info: Mapping[str, Any] | None = None,
        norms: Mapping[str, NormSite] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.sites = dict(sites)
        self.norms = dict(norms or {})
        self.fingerprints = dict(fingerprints)
        self.info = dict(info or {})
        parameter = next(encoder.parameters())
        self.register_buffer("threshold", torch.tensor(threshold, dtype=parameter.dtype, device=parameter.device))

    def device_of(self, site: str) -> torch.device:
        """Where a site's subnetworks are."""
        return next(self.decoder[site].parameters()).device

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def n_subnetworks(self) -> int:
        """K."""
        return self.decoder.K

    def subnetwork(self, k: int) -> dict[str, Any]:
        """The direction of one subnetwork: a `Direction` at each site, a `GainDirection` at each norm.

        Raises:
            ComponentIndexError: There is no such subnetwork.
        """
        k = self.index(k)
        found: dict[str, Direction | GainDirection] = {}
        for name, part in self.decoder.items():
            bias = None if part.bias is None else part.bias[k].detach()
            if name in self.norms:
                found[name] = GainDirection(part.direction(k).detach(), bias)
            else:
                found[name] = Direction(part.direction(k).detach(), bias)
        return found

    def index(self, k: int) -> int:
        """A subnetwork's number, counted from the start; negatives count from the end.

        Raises:
            ComponentIndexError: There is no such subnetwork.
        """
        if not -self.n_subnetworks <= k < self.n_subnetworks:
            raise ComponentIndexError(f"There is no subnetwork {k}; there are {self.n_subnetworks}, numbered from 0.")
        return k % self.n_subnetworks

    # --- files ------------------------------------------------------------------------------------------------------
    def _as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"threshold": self.threshold}
        for side in SIDES:
            for name, part in getattr(self, side).items():
                tensors |= {f"{side}:{name}.{key}": tensor for key, tensor in part.named_parameters()}
        return tensors, {"norms": [asdict(norm) for norm in self.norms.values()]} if self.norms else {}

    @classmethod
    def _assembled(
        cls, tensors: dict[str, Tensor], values: dict[str, Any], *, sites: Any, norms: Any, **origin: Any
    ) -> "SubnetworkDecomposition":
        if len({tensor.dtype for tensor in tensors.values()}) > 1 or not all(t.numel() for t in tensors.values()):
            raise ValueError("a tensor is empty, or they are of several dtypes")
        left, sides = dict(tensors), []
        for side in SIDES:
            parts: dict[str, Part] = {}
            for name, site in sites.items():
                A, B = (left.pop(f"{side}:{name}.{letter}") for letter in ("A", "B"))
                parts[name] = SiteSubnetworks(site, A, B, left.pop(f"{side}:{name}.bias", None))
            for name, norm in norms.items():
                key = f"{side}:{name}"
                parts[name] = GainSubnetworks(norm, left.pop(f"{key}.gain"), left.pop(f"{key}.bias", None))
            sides.append(Subnetworks(parts))
        threshold = left.pop("threshold")
        if left or threshold.ndim or list(sides[0]) != [*sites, *norms]:
            raise ValueError(f"there are too many tensors ({', '.join(left)}), several thresholds or too few names")
        shapes = [{name: tensor.shape for name, tensor in side.state_dict().items()} for side in sides]
        if shapes[0] != shapes[1]:
            raise ValueError("encoder and decoder are of different shapes")
        return cls(sides[0], sides[1], sites, threshold=float(threshold), norms=norms, **origin)
