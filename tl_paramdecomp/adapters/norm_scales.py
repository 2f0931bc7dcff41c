"""Normalisations with their denominators held: the affine map that each of them is on one prompt.

LayerNorm and RMSNorm are y = s z w + b with z = x - mean(x) or x, and s = 1 / sqrt(mean(z^2) + eps) for each row. Held, s is a
constant: the output is the module's own, bit for bit, and its derivative is that of the affine map. s is read off y, so that
epsilon need not be known; a module that is no such map on the rows at hand is refused.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters.norms import ATTRIBUTES, COARSE, is_called_norm
from tl_paramdecomp.adapters.passes import first_argument
from tl_paramdecomp.errors import UnsupportedModelError


class NormCall(NamedTuple):
    """One normalisation's call in a forward pass."""

    bias: Float[Tensor, " width"] | None
    leaf: Float[Tensor, "*rows width"]  # zeros added to its output, whose gradient is the output's


@contextlib.contextmanager
def opened_norms(root: nn.Module, hold: bool) -> Iterator[dict[str, list[NormCall]]]:
    """Within this context every normalisation's output has a leaf for its gradient; `hold` holds the denominators.

    A normalisation is every module whose class, or one it is derived from, is named so; a module that is held and is neither
    LayerNorm nor RMSNorm is an UnsupportedModelError from the forward pass. Gives the calls of one pass by the module's path.
    """
    calls: dict[str, list[NormCall]] = {}

    def opened(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        x, named = first_argument(args, kwargs), f"{path} ({type(module).__name__})"
        if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape):
            if hold:
                raise UnsupportedModelError(f"{named} is no map of rows whose denominator can be held.")
            return output
        gain, bias = _affine(module, x.shape[-1])
        leaf = torch.zeros_like(output).requires_grad_(True)
        calls.setdefault(path, []).append(NormCall(bias, leaf))  # one for each of query, key and value on some hosts
        return (_held(named, module, gain, bias, x, output) if hold else output) + leaf

    with contextlib.ExitStack() as stack:
        for path, module in root.named_modules():
            if is_called_norm(module):
                hook = functools.partial(opened, path)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield calls


def _affine(module: nn.Module, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Gain and bias of a normalisation or of the one that it wraps; None where it has none."""
    named = ((name.rpartition(".")[2], p.detach()) for name, p in module.named_parameters())
    held = {name: parameter for name, parameter in named if parameter.shape == (width,)}
    weight, bias = next((pair for pair in ATTRIBUTES if pair[0] in held), ("", ""))
    return held.get(weight), held.get(bias)


def _held(
    named: str, module: nn.Module, gain: Tensor | None, bias: Tensor | None, x: Tensor, y: Tensor
) -> Float[Tensor, "*rows width"]:
    """y itself, with the derivative of the affine map that it is on these rows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        written = y.to(wide) if bias is None else y.to(wide) - bias.to(wide)
        size = float(written.abs().max())
        bound = COARSE.get(y.dtype, 2e-4) * size
        offsets = (0.0,) if gain is None else (0.0, 1.0)
        forms = [_fitted(c, o, gain, x.to(wide), written) for c, o in itertools.product((True, False), offsets)]
        best = min(forms, key=lambda form: form.error)
        if best.error > bound:
            raise UnsupportedModelError(
                f"{named} is neither LayerNorm nor RMSNorm times its gain on these rows, so that its denominator cannot be "
                "held; pass frozen_norms=False."
            )
        other = next(form for form in forms if form.centred != best.centred and form.offset == best.offset)
        if other.error <= bound:  # rows that have no mean
            shifted = type(module).forward(module, x + x.std())
            same = float((shifted - y).abs().max()) < 1e-2 * size
            best = best if best.centred == same else other
    affine = _centred(x.to(wide), best.centred) * (
        best.scale if gain is None else best.scale * (gain.to(wide) + best.offset)
    )
    return y.detach() + (affine - affine.detach()).to(y.dtype)


class _Form(NamedTuple):
    """One form that a normalisation may have, fitted to its output."""

    centred: bool
    offset: float  # added to the gain: 1 in Gemma
    scale: Float[Tensor, "*rows 1"]
    error: float


def _fitted(centred: bool, offset: float, gain: Tensor | None, x: Tensor, written: Tensor) -> _Form:
    z = _centred(x, centred)
    z = z if gain is None else z * (gain.to(x.dtype) + offset)
    scale = (z * written).sum(-1, keepdim=True) / z.pow(2).sum(-1, keepdim=True).clamp(min=1e-30)
    return _Form(centred, offset, scale, float((z * scale - written).abs().max()))


def _centred(x: Float[Tensor, "*rows width"], centred: bool) -> Float[Tensor, "*rows width"]:
    return x - x.mean(-1, keepdim=True) if centred else x
