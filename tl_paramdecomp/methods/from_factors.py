"""Decompositions from factors that are already there."""

import contextlib
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.identity import in_order
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import check_ties
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError, ShapeError


def from_factors(
    model: Any, factors: Mapping[str, tuple[Tensor, Tensor]], tied: Mapping[str, str] | None = None
) -> Decomposition:
    """A decomposition of a model's sites into given components.

    Args:
        model: The target model, on any host.
        factors: V [d_in, C] and U [C, d_out] by site name or alias; V U need not be W, the delta component is the rest.
        tied: Sites that take another site's factors transposed, each with that site: {"unembed.W_U": "embed.W_E"}. They
            share parameters; the model's own weights must be each other's transpose.

    Raises:
        NoMatchingSiteError: A name is no site of the model; a tie takes no globs.
        ShapeError, DtypeError: Factors do not fit their site.
        SettingError: A tie that cannot be.
    """
    adapter = adapt(model)
    if not factors:
        raise ShapeError("from_factors needs V and U for at least one site.")
    named = {adapter.resolve(name): pair for name, pair in factors.items()}
    for name, pair in named.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ShapeError(f"{name} needs a pair (V, U); given {type(pair).__name__} of length {len(pair)}.")
    ties = resolved_ties(adapter, named, tied or {}, given=named)
    ordered = {name: (named[name][0], named[name][1]) for name in in_order(adapter.sites, named)}
    return describe(adapter, ordered, tied=ties)


def describe(
    adapter: ModelAdapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    importance: ImportanceConfig | None = None,
    generator: torch.Generator | None = None,
    tied: Mapping[str, str] | None = None,
) -> Decomposition:
    """A decomposition that remembers which target its factors belong to; sites by canonical names, ties from `resolved_ties`,
    and the generator seeds the importance function's start."""
    names = in_order(adapter.sites, {*factors, *(tied or ())})
    sites = {name: adapter.site(name) for name in names}
    fingerprints = {name: adapter.fingerprint(name) for name in names}
    return Decomposition(factors, sites, fingerprints, importance, origin_of(adapter), generator, tied)


def origin_of(adapter: ModelAdapter) -> dict[str, Any]:
    """What is stored of where a decomposition came from."""
    target = type(adapter.root).__name__ if adapter.host in ("torch", "nnsight") else type(adapter.model).__name__
    return {"host": adapter.host, "target": target, "processing": adapter.processing, "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of the libraries that matter to a result; those not installed are left out."""
    found = {}
    for package in ("tl-paramdecomp", "torch", "transformer-lens", "nnsight", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# --- ties -------------------------------------------------------------------------------------------------------------
def resolved_ties(
    adapter: ModelAdapter,
    sites: Collection[str],
    tied: Mapping[str, str],
    *,
    counts: Mapping[str, int] | None = None,
    given: Collection[str] | None = None,
) -> dict[str, str]:
    """Ties by canonical names, after seeing that the target's own weights are each other's transpose.

    `sites` are those to decompose and `counts` C of each, where it is chosen site by site; `given` are sites that have
    factors already (None: all that are not tied will get some). NoMatchingSiteError of an unknown name, else SettingError
    or ShapeError.
    """
    found: dict[str, str] = {}
    for names in tied.items():
        try:
            name, source = map(adapter.resolve, names)
        except NoMatchingSiteError as error:
            raise NoMatchingSiteError(f"A tie names two sites exactly, by name or alias. {error}") from error
        if name in found:
            raise SettingError(f"{name} is tied twice, to {found[name]} and to {source}; choose one.")
        found[name] = source
    own = [name for name in sites if name not in found] if given is None else given
    every = sites if given is None else in_order(adapter.sites, {*sites, *found})
    check_ties(found, {name: adapter.site(name) for name in every}, own)
    for name, source in found.items():
        if counts is not None and counts[name] != counts[source]:
            raise SettingError(
                f"{name} is tied to {source}, but n_components gives them {counts[name]} and {counts[source]}; give both the "
                "same number."
            )
        _check_weights(adapter, name, source)
    return found


def _check_weights(adapter: ModelAdapter, name: str, source: str) -> None:
    """See that W of one site is W^T of the other, up to the rounding of the coarser of their dtypes."""
    weight, other = adapter.weight(name).detach(), adapter.weight(source).detach().T
    if weight.dtype == other.dtype and torch.equal(weight, other):
        return
    coarse = max((torch.finfo(t.dtype) for t in (weight, other)), key=lambda info: info.eps)
    dtype = torch.promote_types(torch.promote_types(weight.dtype, other.dtype), torch.float32)
    weight, other = weight.to(dtype), other.to(weight.device, dtype)
    difference = (weight - other).abs()
    allowed = torch.maximum(weight.abs(), other.abs()).clamp(min=coarse.smallest_normal) * coarse.eps
    if not (difference <= allowed).all():  # not a number is no transpose either
        raise SettingError(
            f"{name} cannot be tied to {source}: the target's own weights are not each other's transpose (largest difference "
            f"{difference.max().item():.3g}, largest entry {weight.abs().max().item():.3g}). Leave the tie out, or load the "
            "model without processing its weights (folding, centring), if that is what parted them."
        )
