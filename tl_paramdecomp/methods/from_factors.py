"""Decompositions from factors that are already there."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.sites import resolve_name


def from_factors(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Decomposition:
    """A decomposition of a model's sites into given components.

    Args:
        model: The target model, on any host.
        factors: V [d_in, C] and U [C, d_out] by site name or alias; V U need not be W, the delta component is the rest.

    Raises:
        NoMatchingSiteError: A name is no site of the model.
        ShapeError, DtypeError: Factors do not fit their site.
    """
    adapter = adapt(model)
    if not factors:
        raise ShapeError("from_factors needs V and U for at least one site.")
    named = {resolve_name(adapter.sites, name, adapter.refused): pair for name, pair in factors.items()}
    for name, pair in named.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ShapeError(f"{name} needs a pair (V, U); given {type(pair).__name__} of length {len(pair)}.")
    ordered = {name: (named[name][0], named[name][1]) for name in adapter.sites if name in named}
    return describe(adapter, ordered)


def describe(
    adapter: ModelAdapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    importance: ImportanceConfig | None = None,
    generator: torch.Generator | None = None,
) -> Decomposition:
    """A decomposition that remembers which target its factors belong to."""
    sites = {name: adapter.sites[name] for name in factors}
    fingerprints = {name: adapter.fingerprint(name) for name in factors}
    target = type(adapter.root).__name__ if adapter.host in ("torch", "nnsight") else type(adapter.model).__name__
    origin = {"host": adapter.host, "target": target, "processing": adapter.processing, "versions": versions()}
    return Decomposition(factors, sites, fingerprints, importance, origin, generator)


def versions() -> dict[str, str]:
    """Versions of the libraries that matter to a result; those not installed are left out."""
    found = {}
    for package in ("tl-paramdecomp", "torch", "transformer-lens", "nnsight", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
