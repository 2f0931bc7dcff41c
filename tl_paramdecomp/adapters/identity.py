"""Identity maps inserted before linear weights, and decomposed like weights: a ground truth for decompositions.

Before every linear site NAME stands a virtual site `NAME.pre_identity` with W = I [d_in, d_in] and no bias: x is NAME's
own input, y = x, and what is made of y becomes NAME's input. Of the components of I as many must matter as NAME's input
has dimensions (Bushnaq, Braun, Sharkey 2025, arXiv 2506.20790, and its authors' code).

No module is put anywhere. With x' what the identity's function returns, NAME's output becomes

    y + (x' - x) W

which is y itself, bit for bit, while x' is x; NAME's own function, if there is one, then sees x' and that output.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters.fingerprint import N_PROJECTIONS
from tl_paramdecomp.sites import Fingerprint, SiteCall, SiteFn, SitePattern, WeightSite, resolve_name, select_sites

SUFFIX = ".pre_identity"


def is_identity(name: str) -> bool:
    """Whether this names an inserted identity."""
    return name.endswith(SUFFIX)


def behind(name: str) -> str:
    """The site that an inserted identity stands before; any other name as it is."""
    return name.removesuffix(SUFFIX)


def identity_before(site: WeightSite) -> WeightSite:
    """The identity that stands before a linear site."""
    names = tuple(f"{alias}{SUFFIX}" for alias in site.aliases)
    return WeightSite(f"{site.name}{SUFFIX}", site.d_in, site.d_in, aliases=names)


# --- names -----------------------------------------------------------------------------------------------------------
def select(sites: Mapping[str, WeightSite], pattern: SitePattern, refused: Mapping[str, str]) -> dict[str, WeightSite]:
    """`select_sites`, where names and globs that end in `.pre_identity` select inserted identities, and only they do."""
    if callable(pattern):
        return select_sites(sites, pattern, refused)
    globs = [pattern] if isinstance(pattern, str) else list(pattern)
    inserted = [glob for glob in globs if is_identity(glob)]
    plain = [glob for glob in globs if not is_identity(glob)]
    chosen = select_sites(sites, plain, refused) if plain or not inserted else {}
    chosen |= select_sites(_identities(sites), inserted, _refused_identities(sites, refused)) if inserted else {}
    return {name: chosen[name] for name in in_order(sites, chosen)}


def in_order(sites: Mapping[str, WeightSite], names: Collection[str]) -> list[str]:
    """Names of sites and inserted identities in execution order."""
    return [each for name in sites for each in (f"{name}{SUFFIX}", name) if each in names]


def resolve(sites: Mapping[str, WeightSite], name: str, refused: Mapping[str, str]) -> str:
    """`resolve_name`, for inserted identities too."""
    if is_identity(name):
        return resolve_name(_identities(sites), name, _refused_identities(sites, refused))
    return resolve_name(sites, name, refused)


def _identities(sites: Mapping[str, WeightSite]) -> dict[str, WeightSite]:
    return {f"{name}{SUFFIX}": identity_before(site) for name, site in sites.items() if site.kind == "linear"}


def _refused_identities(sites: Mapping[str, WeightSite], refused: Mapping[str, str]) -> dict[str, str]:
    why = "an embedding looks rows up by index, so that no identity can stand before it"
    tables = {name: why for site in sites.values() if site.kind == "embedding" for name in (site.name, *site.aliases)}
    return {f"{name}{SUFFIX}": reason for name, reason in (tables | dict(refused)).items()}


# --- what an identity is ---------------------------------------------------------------------------------------------
def identity_fingerprint(found: Fingerprint) -> Fingerprint:
    """Fingerprint of an inserted identity, which tells models apart: the weight behind stands where a site's bias would."""
    n, norm = found.shape[0], math.sqrt(found.shape[0])
    projections = (*(0.0,) * N_PROJECTIONS, *found.projections[:N_PROJECTIONS])
    means = (found.means[0] * norm / max(found.norm, 1e-30), found.means[1] * norm / max(found.norm, 1e-30))
    return replace(found, shape=(n, n), norm=norm, bias_norm=found.norm, projections=projections, means=means)


def folded(
    weights: Mapping[str, Float[Tensor, "_in _out"]], weight: Callable[[str], Tensor]
) -> dict[str, Float[Tensor, "_in _out"]]:
    """New weights of the sites alone: W, read by `weight`, becomes I' W where the identity before it became I'."""
    made = {name: new for name, new in weights.items() if not is_identity(name)}
    for name, new in weights.items():
        if is_identity(name):
            old = made[behind(name)] if behind(name) in made else weight(behind(name)).detach()
            wide = torch.promote_types(new.dtype, old.dtype)
            made[behind(name)] = (new.to(wide) @ old.to(wide)).to(old.dtype)
    return made


# --- running ---------------------------------------------------------------------------------------------------------
def composed(fns: Mapping[str, SiteFn], weight: Callable[[str], Tensor]) -> Mapping[str, SiteFn]:
    """Functions at sites alone that do what these do at sites and at the identities before them."""

    def through(name: str, call: SiteCall) -> Tensor:
        site = behind(name)
        x = fns[name](SiteCall(call.x, call.x, None, call.span))
        if x is not call.x:
            w = weight(site)
            y = call.y + (x - call.x).to(w.dtype) @ w
            call = replace(call, x=x, y=y.to(call.y.dtype))
        return fns[site](call) if site in fns else call.y

    made = {name: fn for name, fn in fns.items() if not is_identity(name)}
    return made | {behind(name): functools.partial(through, name) for name in fns if is_identity(name)}
