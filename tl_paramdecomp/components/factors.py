"""Components of one weight site: V [d_in, C] reads, U [C, d_out] writes, component c is the rank-one V[:, c] U[c, :].

`h = x V` are the component activations. For an embedding site x is a tensor of indices and h their rows of V.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.errors import DeviceError, DtypeError, SettingError, ShapeError
from tl_paramdecomp.sites import WeightSite

R = TypeVar("R")


class Components(nn.Module):
    """A trainable sum of rank-one components of one linear map; errors as of `check_factors`."""

    def __init__(self, site: WeightSite, V: Tensor, U: Tensor) -> None:
        super().__init__()
        check_factors(site, V, U)
        self.site = site
        self.V: Float[Tensor, "d_in C"] = nn.Parameter(V.detach().clone().contiguous())
        self.U: Float[Tensor, "C d_out"] = nn.Parameter(U.detach().clone().contiguous())

    @property
    def parameter_pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that hold V and U (those of another site where this one is tied)."""
        return self.V, self.U  # type: ignore[return-value]

    def forward(self, use: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """What a function makes of the components and further arguments: training reads V and U within such calls, to each of
        which `torch.distributed.fsdp` brings them whole where they are kept in shards."""
        return use(self, *args, **kwargs)

    @property
    def n_components(self) -> int:
        """C, the number of components."""
        return self.V.shape[1]

    def product(self) -> Float[Tensor, "d_in d_out"]:
        """V U, the sum of all components."""
        return self.V @ self.U

    def component(self, c: int) -> Float[Tensor, "d_in d_out"]:
        """The rank-one matrix of component c."""
        return torch.outer(self.V[:, c], self.U[c])

    def acts(self, x: Shaped[Tensor, "..."], only: Int[Tensor, " some"] | None = None) -> Float[Tensor, "..."]:
        """Component activations h = x V [..., C] of inputs x [..., d_in] or indices [...], or those of some components."""
        return read(self.site, x, self.V if only is None else self.V[:, only])

    def head_acts(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... head C"]:
        """Activations head by head, for a site whose input divides into heads; they sum to `acts(x)`."""
        assert self.site.head_side == "in", f"what {self.site.name} reads does not divide into heads"
        return read(self.site, x, self.V, by_head=True)

    def extra_repr(self) -> str:
        return f"{self.site.name}: {self.site.d_in} -> {self.site.d_out}, C={self.n_components}"


def read(
    site: WeightSite, x: Shaped[Tensor, "..."], V: Float[Tensor, "d_in C"], by_head: bool = False
) -> Float[Tensor, "..."]:
    """h = x V [..., C] of inputs [..., d_in], or the rows of V at an embedding's indices [...].

    By head [..., head, C]: what each head reads of it, or for each head that writes the whole.
    """
    if site.kind == "embedding":
        return nn.functional.embedding(x, V)
    x = x.to(V.dtype)
    if by_head and site.head_side == "in":
        heads = (site.n_heads or 1, -1)
        return torch.einsum("...hi,hic->...hc", x.unflatten(-1, heads), V.unflatten(0, heads))
    h = x @ V
    return h.unsqueeze(-2).expand(*h.shape[:-1], site.n_heads or 1, -1) if by_head else h


def write(
    site: WeightSite, h: Float[Tensor, "..."], U: Float[Tensor, "C d_out"], by_head: bool = False
) -> Float[Tensor, "... d_out"]:
    """h U, of activations as `read` gives them."""
    if by_head and site.head_side == "out":
        return torch.einsum("...hc,chd->...hd", h, U.unflatten(1, (site.n_heads or 1, -1))).flatten(-2)
    return (h.sum(-2) if by_head else h) @ U


class TiedComponents(Components):
    """Components that are another site's, transposed: V = source.U^T and U = source.V^T are views of its parameters.

    They hold no parameter of their own; gradients at V and U arrive at the source's. Component c is then the transpose of
    the source's component c.
    """

    def __init__(self, site: WeightSite, source: Components) -> None:
        nn.Module.__init__(self)
        self.site = site
        self._source = (source,)  # in a tuple, so that torch does not take the source for a part of this module

    @property
    def V(self) -> Float[Tensor, "d_in C"]:  # type: ignore[override]  # noqa: N802
        """U^T of the source."""
        return self._source[0].U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:  # type: ignore[override]  # noqa: N802
        """V^T of the source."""
        return self._source[0].V.T

    @property
    def parameter_pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self._source[0].parameter_pair

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tied to {self._source[0].site.name}"


def check_factors(site: WeightSite, V: Any, U: Any) -> None:
    """Raise ShapeError, DtypeError or DeviceError unless these are V [d_in, C] and U [C, d_out] of a site."""
    for letter, tensor in (("V", V), ("U", U)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DtypeError(f"{letter} of {site.name} must be a floating-point tensor, not {given}.")
    fits = V.ndim == U.ndim == 2 and V.shape[1] == U.shape[0] and (V.shape[0], U.shape[1]) == (site.d_in, site.d_out)
    if not fits or V.shape[1] == 0:
        raise ShapeError(
            f"{site.name} needs V [d_in={site.d_in}, C] and U [C, d_out={site.d_out}] with C >= 1; "
            f"given V {list(V.shape)} and U {list(U.shape)}."
        )
    if V.dtype != U.dtype:
        raise DtypeError(f"V and U of {site.name} must have one dtype; given {V.dtype} and {U.dtype}.")
    if V.device != U.device:
        raise DeviceError(f"V and U of {site.name} must be on one device; given {V.device} and {U.device}.")


def check_ties(tied: Mapping[str, str], sites: Mapping[str, WeightSite], given: Collection[str]) -> None:
    """Refuse ties that cannot be, of a site to the one whose components it takes, by a SettingError, or a ShapeError where the
    shape of one is not that of the other transposed; some of the sites are `given` factors."""
    for name, source in tied.items():
        what = f"{name} is tied to {source}"
        for side in (name, source):
            if side not in sites:
                raise SettingError(f"{what}, but {side} is not among the sites: {', '.join(sites)}. Decompose both.")
        if name == source:
            raise SettingError(f"{name} is tied to itself; name the site whose components it should take.")
        if source in tied:
            raise SettingError(
                f"{what}, which is itself tied to {tied[source]}; ties do not form chains. Tie both to one site that is not "
                "tied, if the shapes allow it."
            )
        if name in given:
            raise SettingError(f"{what}, and so takes V and U from there; give factors for {source} alone.")
        if source not in given:
            raise SettingError(f"{what}, which has no factors; give V and U for {source}.")
        if sites[name].kind == sites[source].kind == "embedding":
            raise SettingError(
                f"{what}, and both look rows up by index. An embedding can be tied to a linear map, such as embed.W_E to "
                "unembed.W_U."
            )
        shape, other = ([sites[side].d_in, sites[side].d_out] for side in (name, source))
        if shape != other[::-1]:
            raise ShapeError(
                f"{name} {shape} cannot be tied to {source} {other}: it must have the shape of the other transposed, "
                f"{other[::-1]}."
            )
