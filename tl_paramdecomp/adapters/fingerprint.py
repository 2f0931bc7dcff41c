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
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters.computed import tensor_state
from tl_paramdecomp.sites import Fingerprint

N_PROJECTIONS = 4
N_SAMPLED = 512  # entries by which a change of a whole tensor is noticed where torch has not counted one
EXACT = 1e-9  # relative difference that summation order and hosts' copies may cause within one dtype
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    """What tells two fingerprints apart, to the coarser dtype's rounding, in words; None when they are of the same weights."""
    if known == found:
        return None
    if known.shape != found.shape:
        return f"shape {list(found.shape)} instead of {list(known.shape)}"
    coarse = max(torch.finfo(getattr(torch, f.dtype)).eps for f in (known, found))
    tolerance = EXACT if known.dtype == found.dtype else 4 * coarse
    scale, bias_scale = max(known.norm, found.norm, 1e-30), max(known.bias_norm, found.bias_norm, 1e-30)
    if abs(known.norm - found.norm) > tolerance * scale:
        return f"norm {found.norm:.6g} instead of {known.norm:.6g}"
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
    states: tuple[Hashable, ...]
    entries: tuple[Tensor, ...]
    found: Fingerprint

    @classmethod
    def of(cls, parameters: Sequence[Tensor], found: Fingerprint) -> "Remembered":
        """A fingerprint that was just taken."""
        refs, states = map(weakref.ref, parameters), map(tensor_state, parameters)
        return cls(tuple(refs), tuple(states), tuple(map(sampled, parameters)), found)

    def is_of(self, parameters: Sequence[Tensor], samples: dict[int, Tensor]) -> bool:
        """Whether these are the very same parameters, unchanged since as far as torch counts and some entries show.

        `samples` keeps the entries of tensors that were looked at just now.
        """
        if len(parameters) != len(self.parameters):
            return False
        for tensor, ref, state, entries in zip(parameters, self.parameters, self.states, self.entries):
            if ref() is not tensor or state is None or state != tensor_state(tensor):
                return False
            if id(tensor) not in samples:
                samples[id(tensor)] = sampled(tensor)
            if not torch.equal(entries, samples[id(tensor)]):
                return False
        return True


def sampled(tensor: Tensor) -> Tensor:
    """The bits of entries from all over a tensor; a change of all of it changes some of them.

    torch counts the in-place changes of a tensor, but not those made through `.data`, as merging an adapter does.
    """
    entries = torch.take(tensor.detach(), _spread(tensor.numel(), tensor.device))
    return entries.view(_BITS[tensor.element_size()])


@functools.lru_cache(maxsize=256)
def _spread(n: int, device: torch.device) -> Int[Tensor, " entries"]:
    """Indices into a flattened tensor, one at random from each of as many stretches."""
    k = min(n, N_SAMPLED)
    generator = torch.Generator().manual_seed(n)
    drawn = torch.rand(k, generator=generator, dtype=torch.float64)
    starts = (torch.arange(k, dtype=torch.float64) + drawn) * (n / max(k, 1))
    return starts.long().clamp(max=n - 1).to(device)


@functools.lru_cache(maxsize=64)
def _signs(n: int, seed: int) -> Float[Tensor, "projection n"]:
    """Random signs times magnitudes in [0.5, 1.5): no entry is weighted by zero, no two rows alike."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1) + n)
    signs = torch.randint(0, 2, (N_PROJECTIONS, n), generator=generator).double() * 2 - 1
    return signs * (0.5 + torch.rand(N_PROJECTIONS, n, generator=generator, dtype=torch.float64))
