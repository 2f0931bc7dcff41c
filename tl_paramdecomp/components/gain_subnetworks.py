"""What subnetworks are at a normalisation: K vectors of changes of its gain, and K of its bias.

A norm writes y = xhat * w + b, so that a scalar's gradient with respect to w is sum_t g_t * xhat_t, and with respect to b
sum_t g_t; both are vectors, and nothing is factored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.sites import NormSite


class GainGradient(NamedTuple):
    """Gradients of N scalars with respect to one norm's gain and bias."""

    gain: Float[Tensor, "n width"]
    bias: Float[Tensor, "n width"]

    def squared_norm(self, bias: bool) -> Float[Tensor, " n"]:
        """Squared norm of each gradient of the gain, and of the bias where it counts."""
        found = self.gain.square().sum(-1)
        return found + self.bias.square().sum(-1) if bias else found

    def select(self, rows: Tensor | slice) -> "GainGradient":
        """Gradients of some of the scalars."""
        rows = rows.to(self.gain.device) if isinstance(rows, Tensor) else rows
        return GainGradient(self.gain[rows], self.bias[rows])


class GainSubnetworks(nn.Module):
    """What K subnetworks are at one norm.

    Raises:
        ShapeError: The vectors do not fit the norm.
    """

    def __init__(self, site: NormSite, gain: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        for name, given in (("gain", gain), ("bias", bias)):
            if given is not None and tuple(given.shape) != (len(gain), site.width):
                wanted = [len(gain), site.width]
                raise ShapeError(f"{name} of {site.name} must be {wanted}; given {list(given.shape)}.")
        self.site = site
        self.gain: Float[Tensor, "K width"] = nn.Parameter(gain.detach().clone().contiguous())
        self.bias: Float[Tensor, "K width"] | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone().contiguous())

    @property
    def n_components(self) -> int:
        """K, the number of subnetworks."""
        return len(self.gain)

    def inner(self, gradient: GainGradient, backend: str = "auto") -> Float[Tensor, "n K"]:
        """<G_n, subnetwork k> at this norm; every backend takes it the same way."""
        found = gradient.gain @ self.gain.T
        return found if self.bias is None else found + gradient.bias @ self.bias.T

    def gram(self) -> Float[Tensor, "K K"]:
        """Inner products of all pairs of subnetworks at this norm."""
        found = self.gain @ self.gain.T
        return found if self.bias is None else found + self.bias @ self.bias.T

    def squared_norms(self) -> Float[Tensor, " K"]:
        """Squared norm of each subnetwork at this norm."""
        found = self.gain.square().sum(-1)
        return found if self.bias is None else found + self.bias.square().sum(-1)

    def tensor_norms(self) -> list[Float[Tensor, " K"]]:
        """Norms of each subnetwork's gain, and of its bias, at this norm."""
        return [tensor.norm(dim=-1) for tensor in self.parameters()]

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " K"]) -> None:
        """Multiply each subnetwork, in place."""
        for tensor in self.parameters():
            tensor.mul_(factors[:, None])


def random_gains(
    norms: Sequence[NormSite], K: int, biases: frozenset[str], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, GainSubnetworks]:
    """K vectors of normal numbers at each norm.

    Args:
        norms: Where.
        K: How many.
        biases: Norms whose bias takes part.
        dtype: Of the vectors.
        generator: Draws them, on the CPU.
    """
    made = {}
    for norm in norms:
        n = 2 if norm.name in biases else 1
        vectors = [torch.randn(K, norm.width, generator=generator).to(dtype) for _ in range(n)]
        made[norm.name] = GainSubnetworks(norm, *vectors)
    return made


def pairwise_gains(gradients: Sequence[GainGradient], bias: bool) -> Float[Tensor, "n n"]:
    """Inner products of all pairs of gradients at one norm, in float64 on the CPU."""
    gains = torch.cat([gradient.gain for gradient in gradients]).double()
    found = gains @ gains.T
    if bias:
        biases = torch.cat([gradient.bias for gradient in gradients]).double()
        found = found + biases @ biases.T
    return found.cpu()
