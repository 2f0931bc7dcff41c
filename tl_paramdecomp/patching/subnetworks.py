"""Moving a model along subnetworks: W + sum_k delta_k D_k, and gains alike, through hooks or in the weights themselves.

From "Local Loss Landscape Decomposition" (arXiv 2504.00194, section 3.3).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.adapters.identity import folded
from tl_paramdecomp.components.subnetworks import Part, SubnetworkDecomposition
from tl_paramdecomp.errors import SettingError, ShapeError
from tl_paramdecomp.patching.hooks import intercepted
from tl_paramdecomp.patching.target import Claim, checked_adapter, claimed
from tl_paramdecomp.sites import SiteFn, SitePattern, select_sites


@entered_once
def perturbed(
    model: Any,
    decomposition: SubnetworkDecomposition,
    deltas: Mapping[int, float | Tensor],
    *,
    sites: SitePattern | None = None,
    in_weights: bool = False,
) -> Iterator[Any]:
    """Within this context, which gives the model, it runs with its weights moved along subnetworks, however it is called.

    Args:
        model: The target, on any host.
        decomposition: From `L3D`.
        deltas: How far along which subnetworks, which have norm 1 over all their tensors. Through hooks, gradients pass to
            deltas that are tensors.
        sites: Only there; None: at all sites of the decomposition. Globs select its norms too, predicates its sites alone.
        in_weights: Change the weights themselves and restore them, instead of correcting what sites write. The same model to
            rounding.

    Raises:
        ComponentIndexError: There is no such subnetwork.
        SettingError, ShapeError: A subnetwork stands twice; a delta is more than one number.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    known: Any = decomposition.sites if callable(sites) else {**decomposition.sites, **decomposition.norms}
    chosen = known if sites is None else select_sites(known, sites)
    moved = {decomposition.index(k): delta for k, delta in deltas.items()}
    if len(moved) < len(deltas):
        raise SettingError(f"A subnetwork may stand once; given {', '.join(map(str, deltas))}.")
    for k, delta in deltas.items():
        if isinstance(delta, Tensor) and delta.ndim:
            raise ShapeError(f"A delta is one number; that of subnetwork {k} is of shape {list(delta.shape)}.")
    parts = {name: decomposition.decoder[name] for name in chosen} if moved else {}
    claims = {
        name: Claim(part, frozenset(moved), additive=not in_weights, in_weights=in_weights)
        for name, part in parts.items()
    }
    fns = {name: moved_part(part, moved) for name, part in parts.items()}
    with claimed(adapter.core, claims), _replaced(adapter, parts, moved) if in_weights else intercepted(adapter, fns):
        yield model


@contextlib.contextmanager
def _replaced(adapter: ModelAdapter, parts: Mapping[str, Part], deltas: Mapping[int, float | Tensor]) -> Iterator[None]:
    """Within this context the moved weights, gains and biases stand in the model itself."""
    weights, biases, gains = {}, {}, {}

    def along(tensor_of: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([float(delta) * tensor_of(k) for k, delta in deltas.items()]).sum(0)

    with torch.no_grad():
        for name, part in parts.items():
            moved = along(part.direction)
            if adapter.is_norm(name):
                gains[name], bias = adapter.gain(name) + moved, adapter.gain_bias(name)
            else:
                weights[name], bias = adapter.weight(name) + moved, adapter.bias(name)
            if part.bias is not None and bias is not None:
                biases[name] = bias + along(part.bias.__getitem__)
        weights = folded(weights, adapter.weight)
    with adapter.replaced_weights(weights | gains), adapter.replaced_weights(biases, biases=True):
        yield


def moved_part(part: Part, deltas: Mapping[int, float | Tensor]) -> SiteFn:
    """The function that moves a site or a norm along subnetworks: it writes y + sum_k delta_k (x A_k B_k^T + b_k)."""
    return lambda call: call.y + part.change(call.x, deltas).to(call.y.dtype)
