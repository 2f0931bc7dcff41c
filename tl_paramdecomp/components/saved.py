"""What every method makes: a module that knows where it came from, and can be saved and loaded.

Loading sees that sites, norms and fingerprints are as sound as a model would have given them.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tl_paramdecomp.components import files
from tl_paramdecomp.components.disk import in_short
from tl_paramdecomp.errors import DecompositionFileError, SettingError
from tl_paramdecomp.settings import as_declared
from tl_paramdecomp.sites import Fingerprint, NormSite, WeightSite

Made = TypeVar("Made", bound="Saved")
Site = TypeVar("Site", bound=WeightSite | NormSite)


class Saved(nn.Module):
    """Something learned of a model's weights; it holds no model."""

    holds: ClassVar[str]
    """What it is made of, in words; `kind` in its file, where components say nothing."""
    info: dict[str, Any]
    """Where it came from: host, method, versions; anything JSON can hold."""
    fingerprints: dict[str, Fingerprint]
    """Of the weights it belongs to, by site."""

    @property
    def gives_importances(self) -> bool:
        """Whether every token has importances of its components."""
        return False

    def device_of(self, site: str) -> torch.device:
        """Where what belongs to a site is."""
        return next(self.parameters()).device

    def sharded_parts(self) -> list[nn.Module]:
        """Modules whose parameters may be kept in shards, each brought together where it is read.

        Raises:
            SettingError: It cannot be kept so.
        """
        raise SettingError(f"shard=True is for components; {self.holds} (L3D) are held by every process. Leave it out.")

    # --- files ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def _as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors, and what JSON holds beside them."""

    @classmethod
    @abstractmethod
    def _assembled(cls: type[Made], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Made:
        """Of what `_as_saved` gave; anything may be wrong with it, and raise anything."""

    def save(self, folder: str | Path) -> Path:
        """Write `components.safetensors` and `decomposition.json` into a folder; whenever that ends, the folder holds what
        it held before or what is saved now.

        Raises:
            DecompositionFileError: The folder cannot be written, or holds something else; a number is NaN or infinite, or
                `info` is nothing that JSON has.
        """
        return files.save_parts(Path(folder), *self._as_saved())

    @classmethod
    def load(cls: type[Made], folder: str | Path, device: torch.device | str = "cpu") -> Made:
        """Read what `save` wrote.

        Raises:
            DecompositionFileError: The folder or a file is missing, broken, foreign or of a newer format.
            DeviceError: There is no such device.
        """
        tensors, metadata = files.load_parts(Path(folder), device)
        found = metadata.get("kind") or "components"
        if found != cls.holds:
            opener = "Decomposition" if found == "components" else "SubnetworkDecomposition"
            raise DecompositionFileError(f"{folder} holds {found}, not {cls.holds}; open it with {opener}.load.")
        try:
            return cls._assembled(tensors, metadata)
        except Exception as error:  # a damaged file may go wrong anywhere
            raise DecompositionFileError(
                f"{folder} holds {found} whose files do not agree with each other ({in_short(error)}); it is damaged or was "
                "edited. Copy it again from where it was saved."
            ) from error


def check_keys(metadata: Mapping[str, Any], needed: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuse JSON that lacks a part or has an unknown one, by a KeyError."""
    for wrong, what in ((set(needed) - metadata.keys(), "lacks"), (metadata.keys() - {*needed, *optional}, "also has")):
        if wrong:
            raise KeyError(f"the JSON {what} {', '.join(sorted(wrong))}")


def named_sites(kind: type[Site], saved: Any) -> dict[str, Site]:
    """Sites or norms by name; TypeError or ValueError where they are none that a model can have."""
    found: dict[str, Site] = {}
    sites: list[Site] = as_declared(saved, list[kind])
    for site in sites:
        if site.name in found:
            raise ValueError(f"{site.name} is there twice")
        widths = (site.d_in, site.d_out) if isinstance(site, WeightSite) else (site.width,)
        if min(widths) < 1:
            raise ValueError(f"{site.name} is {list(widths)} wide")
        if isinstance(site, WeightSite):
            heads, side = site.n_heads, site.head_side
            width = site.d_in if side == "in" else site.d_out
            if (heads is None) != (side is None) or (heads is not None and (heads < 1 or width % heads)):
                raise ValueError(f"{site.name} divides {width} dimensions among {heads} heads on side {side}")
        found[site.name] = site
    return found


def fingerprints_of(names: Collection[str], saved: Any) -> dict[str, Fingerprint]:
    """A fingerprint for each of these sites and norms; TypeError or ValueError where they are none, or of others."""
    found = as_declared(saved, dict[str, Fingerprint])
    if found.keys() != set(names):
        raise ValueError(f"there are fingerprints of {', '.join(found)}, and the sites are {', '.join(names)}")
    for name, values in found.items():
        dtype = getattr(torch, values.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name} was of {values.dtype!r}, which is no floating-point dtype")
    return found
