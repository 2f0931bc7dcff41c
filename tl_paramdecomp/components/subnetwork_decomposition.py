"""A decomposition into subnetworks: an encoder and a decoder dictionary, the threshold between them, and their target."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components import files
from tl_paramdecomp.components.decomposition import fingerprint_of
from tl_paramdecomp.components.saved import Saved
from tl_paramdecomp.components.subnetworks import SiteSubnetworks, Subnetworks
from tl_paramdecomp.errors import ComponentIndexError, DecompositionFileError
from tl_paramdecomp.sites import Fingerprint, WeightSite

KIND = "subnetworks"
SIDES = ("encoder", "decoder")


class Direction(NamedTuple):
    """What one subnetwork is at one site."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


class SubnetworkDecomposition(Saved):
    """Low-rank directions in the space of chosen weights that sparsely reconstruct the gradients of each sample's divergence.

    They do not sum to the weights, and no token has a mask over them. Found by `L3D`.

    Args:
        encoder: Whose inner products with a gradient are the coefficients.
        decoder: Whose weighted sum reconstructs it; its subnetworks, of norm 1, are the directions to move along.
        sites: The sites by name.
        fingerprints: Of the weights they belong to.
        threshold: Absolute coefficient from which a subnetwork counts as active, learned in training.
        info: Where it came from; anything JSON can hold.
    """

    threshold: Float[Tensor, ""]

    def __init__(
        self,
        encoder: Subnetworks,
        decoder: Subnetworks,
        sites: Mapping[str, WeightSite],
        fingerprints: Mapping[str, Fingerprint],
        threshold: float = 0.0,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.sites = dict(sites)
        self.fingerprints = dict(fingerprints)
        self.info = dict(info or {})
        parameter = next(encoder.parameters())
        self.register_buffer("threshold", torch.tensor(threshold, dtype=parameter.dtype, device=parameter.device))

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def n_subnetworks(self) -> int:
        """K."""
        return self.decoder.K

    def subnetwork(self, k: int) -> dict[str, Direction]:
        """The direction of one subnetwork at each site.

        Raises:
            ComponentIndexError: There is no such subnetwork.
        """
        k = self.index(k)
        return {
            name: Direction(part.matrix(k).detach(), None if part.bias is None else part.bias[k].detach())
            for name, part in self.decoder.items()
        }

    def index(self, k: int) -> int:
        """A subnetwork's number, counted from the start; negatives count from the end.

        Raises:
            ComponentIndexError: There is no such subnetwork.
        """
        if not -self.n_subnetworks <= k < self.n_subnetworks:
            raise ComponentIndexError(f"There is no subnetwork {k}; there are {self.n_subnetworks}, numbered from 0.")
        return k % self.n_subnetworks

    # --- files ------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write `components.safetensors` and `decomposition.json` into a folder, atomically.

        Raises:
            DecompositionFileError: The folder cannot be written, or holds something else.
        """
        tensors = {"threshold": self.threshold}
        for side in SIDES:
            for name, part in getattr(self, side).items():
                tensors |= {f"{side}:{name}.{key}": tensor for key, tensor in part.named_parameters()}
        metadata = {
            "kind": KIND,
            "sites": [asdict(site) for site in self.sites.values()],
            "fingerprints": {name: asdict(found) for name, found in self.fingerprints.items()},
            "info": self.info,
        }
        return files.save_parts(Path(folder), tensors, metadata)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "SubnetworkDecomposition":
        """Read what `save` wrote.

        Raises:
            DecompositionFileError: The folder or a file is missing, broken, foreign or of a newer format.
            DeviceError: There is no such device.
        """
        tensors, metadata = files.load_parts(Path(folder), device)
        if metadata.get("kind") != KIND:
            raise DecompositionFileError(
                f"{folder} holds components, not subnetworks; open it with Decomposition.load."
            )
        try:
            sites = {s["name"]: WeightSite(**{**s, "aliases": tuple(s["aliases"])}) for s in metadata["sites"]}
            sides = []
            for side in SIDES:
                parts = {}
                for name, site in sites.items():
                    A, B = (tensors[f"{side}:{name}.{letter}"] for letter in ("A", "B"))
                    parts[name] = SiteSubnetworks(site, A, B, tensors.get(f"{side}:{name}.bias"))
                sides.append(Subnetworks(parts))
            fingerprints = {name: fingerprint_of(values) for name, values in metadata["fingerprints"].items()}
            return cls(sides[0], sides[1], sites, fingerprints, float(tensors["threshold"]), metadata["info"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DecompositionFileError(
                f"{folder} holds subnetworks whose files do not agree with each other ({type(error).__name__}: {error}); it is "
                "damaged or was edited. Copy it again from where it was saved."
            ) from error
