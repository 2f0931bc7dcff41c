"""Fingerprints of weights: whether a model holds the weights a decomposition was made from.

A fingerprint of W keeps its norms and a few seeded random projections `r^T W s` with random-sign vectors of unequal
magnitudes, so that every entry takes part and a single changed entry shows. Everything is summed in float64, so that
two hosts of one model agree to rounding.
"""

import functools
import math
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.sites import Fingerprint

N_PROJECTIONS = 4
EXACT = 1e-9
"""Relative difference that summation order and hosts' copies may cause within one dtype."""


def fingerprint(weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"] | None) -> Fingerprint:
    """Fingerprint of one site's weight and bias."""
    w = weight.detach().to(torch.float64)
    b = None if bias is None else bias.detach().to(torch.float64)
    rows, columns = (_signs(n, seed).to(w.device) for seed, n in enumerate(w.shape))
    projections = ((rows @ w) * columns).sum(-1)
    bias_projections = torch.zeros_like(projections) if b is None else (columns * b).sum(-1)
    return Fingerprint(
        shape=(w.shape[0], w.shape[1]),
        dtype=str(weight.dtype).removeprefix("torch."),
        norm=w.norm().item(),
        bias_norm=0.0 if b is None else b.norm().item(),
        projections=(*projections.tolist(), *bias_projections.tolist()),
        means=(w.mean(0).norm().item() * math.sqrt(w.shape[0]), w.mean(1).norm().item() * math.sqrt(w.shape[1])),
    )


def differs(known: Fingerprint, found: Fingerprint) -> str | None:
    """What tells two fingerprints apart, in words; None when they are of the same weights.

    Weights stored in different dtypes are compared within the coarser one's rounding.
    """
    if known.shape != found.shape:
        return f"shape {list(found.shape)} instead of {list(known.shape)}"
    coarse = max(torch.finfo(getattr(torch, f.dtype)).eps for f in (known, found))
    tolerance = EXACT if known.dtype == found.dtype else 4 * coarse
    scale = max(known.norm, found.norm, 1e-30)
    if abs(known.norm - found.norm) > tolerance * scale:
        return f"norm {found.norm:.6g} instead of {known.norm:.6g}"
    bias_scale = max(known.bias_norm, found.bias_norm, 1e-30)
    if abs(known.bias_norm - found.bias_norm) > tolerance * bias_scale:
        return f"bias norm {found.bias_norm:.6g} instead of {known.bias_norm:.6g}"
    for i, (a, b) in enumerate(zip(known.projections, found.projections, strict=True)):
        if abs(a - b) > tolerance * (scale if i < N_PROJECTIONS else bias_scale):
            return "the entries of the weight" if i < N_PROJECTIONS else "the entries of the bias"
    return None


def centring_differs(known: Fingerprint, found: Fingerprint) -> bool:
    """Whether exactly one of the two weights is centred, as folding LayerNorm or centring writing weights leaves them."""
    centred = [[mean < 1e-4 * f.norm for mean in f.means] for f in (known, found)]
    return known.shape == found.shape and centred[0] != centred[1]


class Remembered(NamedTuple):
    """A fingerprint, and the parameters it was taken of in the state they were in."""

    parameters: "tuple[weakref.ref[Tensor], ...]"
    states: tuple[Hashable, ...] | None
    entries: tuple[Tensor, ...]
    found: Fingerprint

    @classmethod
    def of(cls, parameters: Sequence[Tensor], found: Fingerprint) -> "Remembered":
        """A fingerprint that was just taken."""
        return cls(tuple(map(weakref.ref, parameters)), _states(parameters), tuple(map(sampled, parameters)), found)

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the very same parameters, unchanged since as far as torch counts and some entries show."""
        alive = len(parameters) == len(self.parameters) and all(
            ref() is t for ref, t in zip(self.parameters, parameters)
        )
        counted = alive and self.states is not None and self.states == _states(parameters)
        return counted and all(torch.equal(known, sampled(t)) for known, t in zip(self.entries, parameters))


def _states(parameters: Sequence[Tensor]) -> tuple[Hashable, ...] | None:
    """What changes with every in-place change; None for inference tensors, which keep no count."""
    try:
        return tuple((t._version, t.data_ptr(), t.dtype) for t in parameters)
    except RuntimeError:
        return None


N_SAMPLED = 512
"""Entries by which a change of a whole tensor is noticed where torch has not counted one."""


def sampled(tensor: Tensor) -> Tensor:
    """The bits of entries from all over a tensor; a change of all of it changes some of them.

    torch counts the in-place changes of a tensor, but not those made through `.data`, as merging an adapter does.
    """
    bits = tensor.detach().view(_BITS[tensor.element_size()])
    if tensor.is_contiguous():
        return bits.view(-1).index_select(0, _spread(tensor.shape, tensor.device)[0])
    return bits[_spread(tensor.shape, tensor.device)[1]]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache(maxsize=256)
def _spread(shape: torch.Size, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Indices of entries, one at random from each of as many stretches: of the flattened tensor, and by axis."""
    n = math.prod(shape)
    k = min(n, N_SAMPLED)
    generator = torch.Generator().manual_seed(n)
    starts = torch.arange(k, dtype=torch.float64) * (n / max(k, 1))
    flat = (starts + torch.rand(k, generator=generator, dtype=torch.float64) * (n / max(k, 1))).long().clamp(max=n - 1)
    flat = flat.to(device)
    return flat, torch.unravel_index(flat, shape)


@functools.lru_cache(maxsize=64)
def _signs(n: int, seed: int) -> Float[Tensor, "projection n"]:
    """Random signs times magnitudes in [0.5, 1.5): no entry is weighted by zero, no two rows alike."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1) + n)
    signs = torch.randint(0, 2, (N_PROJECTIONS, n), generator=generator).double() * 2 - 1
    return signs * (0.5 + torch.rand(N_PROJECTIONS, n, generator=generator, dtype=torch.float64))
