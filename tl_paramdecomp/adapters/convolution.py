"""Convolutions as linear maps of patches.

    conv(x) = patches(x) W + b,    W [d_in, d_out] = weight.flatten(1)^T,    d_in = channels x entries of the kernel

A patch is what the kernel lies on at one position of the zero-padded input. Positions are numbered row by row, as the
output's are.
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.sites import Span


@dataclass(frozen=True)
class Patches:
    """Where a convolution's kernel is laid down; one entry for each axis of the image."""

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after

    @property
    def d_in(self) -> int:
        """Numbers in a patch."""
        return self.channels * math.prod(self.kernel)

    def read(self, x: Float[Tensor, "*image"]) -> Float[Tensor, "*batch positions d_in"]:
        """Patches of an image [channels, ...] or a batch of images; entries in the order of the weight's."""
        axes = len(self.kernel)
        batch = x.ndim - axes - 1
        x = nn.functional.pad(x, [n for pair in reversed(self.padding) for n in pair])
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(batch + 1 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x.movedim(batch, batch + axes)
        return x.flatten(batch + axes).flatten(batch, batch + axes - 1)

    def match(self, x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """x [..., positions, d_in] and y [..., positions, d_out] of one call; ShapeError where positions are others by now."""
        patches, rows = self.read(x), y.flatten(-len(self.kernel)).transpose(-1, -2)
        if patches.shape[:-1] != rows.shape[:-1]:
            raise ShapeError(
                f"{name} gives {list(y.shape)} for {list(x.shape)}, which are not the {patches.shape[-2]} positions of stride "
                f"{self.stride}, dilation {self.dilation} and padding {self.padding}; was the module changed after it was "
                "first read? Give a copy of the model."
            )
        return patches, rows

    def image(self, rows: Float[Tensor, "*batch positions d_out"], like: Tensor) -> Float[Tensor, "*image"]:
        """Rows as an output image again, in the memory layout of the host's own."""
        made = rows.transpose(-1, -2).unflatten(-1, like.shape[-len(self.kernel) :])
        return made.contiguous() if like.is_contiguous() else made  # hosts view the one and not the other


def patches_of(module: _ConvNd) -> Patches:
    """Where a plain convolution lays its kernel down."""
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        given = (0,) * len(kernel) if module.padding == "valid" else module.padding
        padding = tuple((int(n), int(n)) for n in given)
    return Patches(module.in_channels, kernel, tuple(module.stride), dilation, padding)


def why_no_patches(module: _ConvNd) -> str | None:
    """Why a convolution is not one linear map of patches; None where it is."""
    kind = type(module).__name__
    if isinstance(module, LazyModuleMixin):
        return f"{kind} has no weight before its first forward pass; run one"
    if isinstance(module, _ConvTransposeNd):
        return f"{kind} adds what neighbouring positions write: a transposed convolution has no patch for each output"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return f"{kind} is none of nn.Conv1d and nn.Conv2d"
    if module.groups != 1:
        return f"it has {module.groups} groups of channels, each with a matrix of its own; only groups=1 is one matrix"
    if module.padding_mode != "zeros":
        return f"it pads with padding_mode={module.padding_mode!r}; only 'zeros' is known"
    return None


def computes_as_torch(module: nn.Module) -> bool:
    """Whether a module is a convolution whose forward is torch's own."""
    own: Any = type(module)
    kind = next((k for k in (nn.Conv1d, nn.Conv2d) if isinstance(module, k)), None)
    return kind is not None and own.forward is kind.forward and own._conv_forward is kind._conv_forward


def patch_span(y: Float[Tensor, "*batch positions d_out"]) -> Span:
    """The columns of one convolution's call: all of its own positions, which are no columns of token rows."""
    return Span(0, y.shape[-2]) if y.ndim >= 3 else Span()
