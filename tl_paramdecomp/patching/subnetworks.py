"""Moving a model along subnetworks: W + sum_k delta_k D_k, through hooks or in the weights themselves.

From "Local Loss Landscape Decomposition" (arXiv 2504.00194, section 3.3).
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters.identity import folded
from tl_paramdecomp.components.subnetwork_decomposition import SubnetworkDecomposition
from tl_paramdecomp.components.subnetworks import SiteSubnetworks
from tl_paramdecomp.errors import SettingError, ShapeError
from tl_paramdecomp.patching.claims import Claim, claimed
from tl_paramdecomp.patching.hooks import intercepted
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteCall, SiteFn, SitePattern, select_sites


@contextlib.contextmanager
def perturbed(
    model: Any,
    decomposition: SubnetworkDecomposition,
    deltas: Mapping[int, float | Tensor],
    *,
    sites: SitePattern | None = None,
    in_weights: bool = False,
) -> Iterator[Any]:
    """Within this context the model runs with its weights moved along subnetworks, however it is called.

    Args:
        model: The target, on any host.
        decomposition: From `L3D`.
        deltas: How far along which subnetworks, which have norm 1 over all their tensors. Through hooks, gradients pass to
            deltas that are tensors.
        sites: Only there; None: at all sites of the decomposition.
        in_weights: Change the weights themselves and restore them, instead of correcting what sites write. The same model to
            rounding.

    Yields:
        The model.

    Raises:
        ComponentIndexError: There is no such subnetwork.
        SettingError, ShapeError: A subnetwork stands twice; a delta is more than one number.
        TargetMismatchError, DeviceError, PatchConflictError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    chosen = list(decomposition.sites if sites is None else select_sites(decomposition.sites, sites))
    moved = {decomposition.index(k): delta for k, delta in deltas.items()}
    if len(moved) < len(deltas):
        raise SettingError(f"A subnetwork may stand once; given {', '.join(map(str, deltas))}.")
    for k, delta in deltas.items():
        if isinstance(delta, Tensor) and delta.ndim:
            raise ShapeError(f"A delta is one number; that of subnetwork {k} is of shape {list(delta.shape)}.")
    parts = {name: decomposition.decoder[name] for name in chosen} if moved else {}
    claims = {
        name: Claim(part, additive=not in_weights, in_weights=in_weights, only=frozenset(moved))
        for name, part in parts.items()
    }
    with claimed(adapter.root, claims), contextlib.ExitStack() as stack:
        if in_weights:
            with torch.no_grad():
                weights = {name: adapter.weight(name) + _matrix(part, moved) for name, part in parts.items()}
                weights = folded(weights, adapter.weight)
                biases = {
                    name: adapter.bias(name) + _vector(part, moved)  # type: ignore[operator]
                    for name, part in parts.items()
                    if part.bias is not None
                }
            stack.enter_context(adapter.replaced_weights(weights))
            stack.enter_context(adapter.replaced_biases(biases))
        else:
            stack.enter_context(intercepted(adapter, {name: moved_site(part, moved) for name, part in parts.items()}))
        yield model


def moved_site(part: SiteSubnetworks, deltas: Mapping[int, float | Tensor]) -> SiteFn:
    """A site's function that writes y + sum_k delta_k (x A_k B_k^T + b_k)."""
    ks = list(deltas)

    def run(call: SiteCall) -> Tensor:
        A, B = part.A[ks], part.B[ks]
        scale = torch.stack([torch.as_tensor(delta, dtype=A.dtype, device=A.device) for delta in deltas.values()])
        read = (A * scale[:, None, None]).permute(1, 0, 2).flatten(1)
        h = read[call.x] if not call.x.is_floating_point() else call.x.to(read.dtype) @ read
        change = h @ B.permute(1, 0, 2).flatten(1).T
        if part.bias is not None:
            change = change + scale @ part.bias[ks]
        return call.y + change.to(call.y.dtype)

    return run


def _matrix(part: SiteSubnetworks, deltas: Mapping[int, float | Tensor]) -> Float[Tensor, "d_in d_out"]:
    return torch.stack([float(delta) * part.matrix(k) for k, delta in deltas.items()]).sum(0)


def _vector(part: SiteSubnetworks, deltas: Mapping[int, float | Tensor]) -> Float[Tensor, " d_out"]:
    assert part.bias is not None
    return torch.stack([float(delta) * part.bias[k] for k, delta in deltas.items()]).sum(0)
