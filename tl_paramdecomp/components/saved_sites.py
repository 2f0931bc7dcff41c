"""Sites, norms and fingerprints from a file's JSON, as sound as a model would have given them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from tl_paramdecomp.components.plain import as_declared, in_short
from tl_paramdecomp.errors import DecompositionFileError
from tl_paramdecomp.sites import Fingerprint, NormSite, WeightSite

Site = TypeVar("Site", bound=WeightSite | NormSite)


def disagreement(folder: str | Path, what: str, error: Exception) -> DecompositionFileError:
    """What to raise where the parts of a folder do not fit together."""
    return DecompositionFileError(
        f"{folder} holds {what} whose files do not agree with each other ({in_short(error)}); it is damaged or was edited. "
        "Copy it again from where it was saved."
    )


def check_keys(metadata: Mapping[str, Any], needed: Collection[str], optional: Collection[str] = ()) -> None:
    """Refuse JSON that lacks a part or has an unknown one.

    Raises:
        KeyError: It does.
    """
    for wrong, what in ((set(needed) - metadata.keys(), "lacks"), (metadata.keys() - {*needed, *optional}, "also has")):
        if wrong:
            raise KeyError(f"the JSON {what} {', '.join(sorted(wrong))}")


def named_sites(kind: type[Site], saved: Any) -> dict[str, Site]:
    """Sites or norms by name.

    Raises:
        TypeError, ValueError: They are none that a model can have.
    """
    found: dict[str, Site] = {}
    sites: list[Site] = as_declared(saved, list[kind])
    for site in sites:
        if site.name in found:
            raise ValueError(f"{site.name} is there twice")
        widths = (site.d_in, site.d_out) if isinstance(site, WeightSite) else (site.width,)
        if min(widths) < 1:
            raise ValueError(f"{site.name} is {list(widths)} wide")
        if isinstance(site, WeightSite):
            _check_heads(site)
        found[site.name] = site
    return found


def fingerprints_of(names: Collection[str], saved: Any) -> dict[str, Fingerprint]:
    """A fingerprint for each of these sites and norms.

    Raises:
        TypeError, ValueError: They are none, or of other sites.
    """
    found = as_declared(saved, dict[str, Fingerprint])
    if found.keys() != set(names):
        raise ValueError(f"there are fingerprints of {', '.join(found)}, and the sites are {', '.join(names)}")
    for name, values in found.items():
        dtype = getattr(torch, values.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name} was of {values.dtype!r}, which is no floating-point dtype")
    return found


def _check_heads(site: WeightSite) -> None:
    if (site.n_heads is None) != (site.head_side is None):
        raise ValueError(f"{site.name} has {site.n_heads} heads on side {site.head_side}")
    if site.n_heads is not None:
        width = site.d_in if site.head_side == "in" else site.d_out
        if site.n_heads < 1 or width % site.n_heads:
            raise ValueError(f"{site.name} divides {width} dimensions among {site.n_heads} heads")
