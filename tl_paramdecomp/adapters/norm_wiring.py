"""Where a normalisation lives in a tree of torch modules, and what multiplies its gain.

LayerNorm and RMSNorm are affine in their gains: y = xhat * w + b, or xhat * (1 + w) in Gemma. xhat is worked out anew from
what the module reads; by which formula, its trial says (`norms.probed`). A gain's offset does not matter to a move along it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters.computed import read_tensor
from tl_paramdecomp.adapters.swapping import swapped_parameter
from tl_paramdecomp.adapters.wiring import Tap, find_module
from tl_paramdecomp.errors import UnsupportedSiteError
from tl_paramdecomp.sites import NormSite


@dataclass(frozen=True)
class NormWiring:
    """How one normalisation is read, written and intercepted in a tree of torch modules."""

    site: NormSite
    path: str
    """Dotted path of the module that is called."""
    owner: str
    """Dotted path of the module that holds the gain."""
    weight: str
    """Attribute of the owner that holds it."""
    bias: str | None
    """Attribute that holds the bias, or None."""
    x: Tap
    y: Tap
    centred: bool = False
    """LayerNorm, which takes the mean away first; else RMSNorm."""
    eps: float | None = 0.0
    """Added to the mean square under the root; None: the smallest step of the number type, as `torch.nn.RMSNorm` has it."""
    in_float32: bool = False
    """Whether the module normalises in float32 whatever it is given."""
    offset: float = 0.0
    """Added to the gain: 1 in Gemma."""

    def normalised(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """xhat, in the number type in which the module works it out: float32 at least."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        x = x.float() if self.in_float32 or x.dtype in (torch.bfloat16, torch.float16) else x
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def read_gain(root: nn.Module, wiring: NormWiring) -> Float[Tensor, " width"]:
    """Gain of a norm, attached to the host's parameter.

    Raises:
        UnsupportedSiteError: The module holds none any more.
    """
    gain = read_tensor(find_module(root, wiring.owner), wiring.weight, wiring.site.name)
    if not isinstance(gain, Tensor) or gain.shape != (wiring.site.width,):
        raise UnsupportedSiteError(
            f"{wiring.site.name} holds no gain of {wiring.site.width} entries any more; was LayerNorm folded meanwhile?"
        )
    return gain


def read_norm_bias(root: nn.Module, wiring: NormWiring) -> Float[Tensor, " width"] | None:
    """Bias of a norm, attached to the host's parameter, or None."""
    return read_tensor(find_module(root, wiring.owner), wiring.bias, wiring.site.name) if wiring.bias else None


@contextlib.contextmanager
def replaced_gains(
    root: nn.Module,
    wirings: Mapping[str, NormWiring],
    gains: Mapping[str, Float[Tensor, " _width"]],
    biases: Mapping[str, Float[Tensor, " _width"]],
) -> Iterator[None]:
    """Within this context norms hold other gains and biases; afterwards the very same parameters are back.

    Raises:
        UnsupportedSiteError: A norm adds no bias.
    """
    with contextlib.ExitStack() as stack:
        for name, gain in gains.items():
            owner, old = find_module(root, wirings[name].owner), read_gain(root, wirings[name])
            stack.enter_context(swapped_parameter(owner, wirings[name].weight, gain.detach().to(old.dtype)))
        for name, bias in biases.items():
            attribute, old = wirings[name].bias, read_norm_bias(root, wirings[name])
            if attribute is None or old is None:
                raise UnsupportedSiteError(f"{name} adds no bias that could be replaced.")
            owner = find_module(root, wirings[name].owner)
            stack.enter_context(swapped_parameter(owner, attribute, bias.detach().to(old.dtype)))
        yield
