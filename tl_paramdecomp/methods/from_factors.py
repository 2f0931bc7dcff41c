"""Decompositions from factors that are already there."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.identity import in_order
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.methods.ties import named_ties, resolved_ties


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
    ties = named_ties(adapter, tied or {})
    sites = in_order(adapter.sites, {*named, *ties})
    ordered = {name: (named[name][0], named[name][1]) for name in in_order(adapter.sites, named)}
    return describe(adapter, ordered, tied=resolved_ties(adapter, sites, ties, given=named))


def describe(
    adapter: ModelAdapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    importance: ImportanceConfig | None = None,
    generator: torch.Generator | None = None,
    tied: Mapping[str, str] | None = None,
) -> Decomposition:
    """A decomposition that remembers which target its factors belong to.

    Args:
        adapter: The target's.
        factors: V and U of each site that is not tied, by canonical names.
        importance: Its causal-importance function.
        generator: Seeds the importance function's start.
        tied: From `resolved_ties`.
    """
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
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
