"""Subnetworks: low-rank directions over several weights at once, K of them, as stacked factors.

At one site subnetwork k is the matrix A_k B_k^T [d_in, d_out] of rank r, and a vector b_k where the site's bias takes part.
Where a sample's gradient is G = sum_t x_t g_t^T, with x_t what the weight reads and g_t the gradient of what it writes, all
that is needed of it comes from x and g, and G itself is never formed:

    <G, A_k B_k^T> = sum_t (x_t A_k) . (g_t B_k)          |G|^2 = sum_ts (x_t . x_s) (g_t . g_s)

Local Loss Landscape Decomposition (Chrisman, Bushnaq and Sharkey 2025, arXiv 2504.00194) has dense subnetworks and gradients;
these are the same numbers. At a norm, which writes y = xhat * w + b, subnetwork k is a vector of changes of w and one of b;
gradients are sum_t g_t * xhat_t and sum_t g_t, and nothing is factored.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.components.importance import module_key
from tl_paramdecomp.errors import ComponentIndexError, ShapeError
from tl_paramdecomp.sites import Fingerprint, NormSite, WeightSite

Backend = Literal["auto", "factored", "dense"]
"""How gradients meet subnetworks: from x and g, or from gradients formed some samples at a time; `auto`: whichever takes fewer
operations at that site."""
SIDES = ("encoder", "decoder")
CHUNK = 1 << 24
"""Numbers of dense gradients that exist at once."""


class SampleGradient(NamedTuple):
    """Gradients of N scalars with respect to one site's weight, as the factors of their sums of outer products."""

    x: Shaped[Tensor, "n pos *d_in"]
    """What the weight read; indices for an embedding."""
    g: Float[Tensor, "n pos d_out"]
    """Gradient of each scalar with respect to what the weight wrote."""

    @property
    def bias(self) -> Float[Tensor, "n d_out"]:
        """Gradients of the bias."""
        return self.g.sum(1)

    def squared_norm(self) -> Float[Tensor, " n"]:
        """Squared norm of each gradient of W."""
        if self.x.is_floating_point():
            reads = self.x @ self.x.transpose(1, 2)
        else:
            reads = (self.x.unsqueeze(2) == self.x.unsqueeze(1)).to(self.g.dtype)
        return (reads * (self.g @ self.g.transpose(1, 2))).sum((1, 2))

    def dense(self, rows: slice, d_in: int) -> Float[Tensor, "some d_in d_out"]:
        """Gradients of W for some of the scalars."""
        x, g = self.x[rows], self.g[rows]
        if not x.is_floating_point():
            x = torch.nn.functional.one_hot(x, d_in).to(g.dtype)
        return x.transpose(1, 2) @ g


class GainGradient(NamedTuple):
    """Gradients of N scalars with respect to one norm's gain and bias."""

    gain: Float[Tensor, "n width"]
    bias: Float[Tensor, "n width"]

    def squared_norm(self) -> Float[Tensor, " n"]:
        """Squared norm of each gradient of the gain."""
        return self.gain.square().sum(-1)


Gradients = Mapping[str, SampleGradient | GainGradient]
"""Of the same N scalars, by site and norm."""


def select(gradients: Gradients, rows: Tensor | slice) -> dict[str, SampleGradient | GainGradient]:
    """Gradients of some of the scalars."""
    return {
        name: type(of)(*(t[rows.to(t.device) if isinstance(rows, Tensor) else rows] for t in of))
        for name, of in gradients.items()
    }


class Part(nn.Module):
    """What K subnetworks are at one site or norm: changes of its weight or gain, and of its bias where that takes part;
    ShapeError where the tensors do not fit the site or each other."""

    site: Any
    bias: Float[Tensor, "K width"] | None

    def __init__(
        self, site: WeightSite | NormSite, shapes: Mapping[str, Sequence[int]], **given: Tensor | None
    ) -> None:
        super().__init__()
        self.site = site
        for name, tensor in given.items():
            if tensor is not None and tuple(tensor.shape) != tuple(shapes[name]):
                raise ShapeError(f"{name} of {site.name} must be {list(shapes[name])}; given {list(tensor.shape)}.")
            own = None if tensor is None else nn.Parameter(tensor.detach().clone().contiguous())
            self.register_parameter(name, own)

    @property
    def n_components(self) -> int:
        """K, the number of subnetworks."""
        return len(next(self.parameters()))

    def inner(self, gradient: Any, backend: Backend = "auto") -> Float[Tensor, "n K"]:
        """<G_n, subnetwork k> here, of gradients of this kind."""
        return self._with_bias(self._inner(gradient, backend), lambda bias: gradient.bias @ bias.T)

    def squared_norm(self, gradient: Any) -> Float[Tensor, " n"]:
        """Squared norm of each gradient over the tensors that take part."""
        return self._with_bias(gradient.squared_norm(), lambda _: gradient.bias.square().sum(-1))

    def gram(self) -> Float[Tensor, "K K"]:
        """Inner products of all pairs of subnetworks here."""
        return self._with_bias(self._gram(), lambda bias: bias @ bias.T)

    def squared_norms(self) -> Float[Tensor, " K"]:
        """Squared norm of each subnetwork here."""
        return self._with_bias(self._squares(), lambda bias: bias.square().sum(-1))

    def tensor_norms(self) -> list[Float[Tensor, " K"]]:
        """Norms of each subnetwork's change of the weight or gain, and of the bias."""
        return [self._squares().sqrt(), *([] if self.bias is None else [self.bias.norm(dim=-1)])]

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " K"]) -> None:
        """Multiply each subnetwork, in place."""
        for name, tensor in self.named_parameters():  # a matrix is a product of two
            tensor.mul_(factors.sqrt()[:, None, None] if name in ("A", "B") else factors[:, None])

    def change(self, x: Tensor, deltas: Mapping[int, float | Tensor]) -> Float[Tensor, "..."]:
        """What is written more at x where the model is moved so far along these subnetworks; gradients reach the deltas."""
        ks, like = list(deltas), next(self.parameters())
        scale = torch.stack([torch.as_tensor(d, dtype=like.dtype, device=like.device) for d in deltas.values()])
        return self._with_bias(self._change(x, ks, scale), lambda bias: scale @ bias[ks])

    def _with_bias(self, found: Tensor, of_bias: Callable[[Tensor], Tensor]) -> Tensor:
        return found if self.bias is None else found + of_bias(self.bias)

    # what a kind of part says of its weight or gain alone
    direction: Callable[[int], Tensor]
    """What subnetwork k adds to the weight or gain."""
    _inner: Callable[[Any, Backend], Tensor]
    _gram: Callable[[], Tensor]
    _squares: Callable[[], Tensor]
    _change: Callable[[Tensor, list[int], Tensor], Tensor]


class GainSubnetworks(Part):
    """K vectors of changes of one norm's gain, and of its bias."""

    gain: Float[Tensor, "K width"]

    def __init__(self, site: NormSite, gain: Tensor, bias: Tensor | None = None) -> None:
        shape = (len(gain), site.width)
        super().__init__(site, {"gain": shape, "bias": shape}, gain=gain, bias=bias)

    def direction(self, k: int) -> Float[Tensor, " width"]:
        return self.gain[k]

    def tensor_norms(self) -> list[Float[Tensor, " K"]]:
        return [tensor.norm(dim=-1) for tensor in self.parameters()]

    def _inner(self, gradient: GainGradient, backend: Backend) -> Float[Tensor, "n K"]:
        return gradient.gain @ self.gain.T

    def _gram(self) -> Float[Tensor, "K K"]:
        return self.gain @ self.gain.T

    def _squares(self) -> Float[Tensor, " K"]:
        return self.gain.square().sum(-1)

    def _change(self, x: Tensor, ks: list[int], scale: Tensor) -> Tensor:
        return x.to(self.gain.dtype) * (scale @ self.gain[ks])


class SiteSubnetworks(Part):
    """K matrices A_k B_k^T of one site, and K vectors of its bias."""

    A: Float[Tensor, "K d_in r"]
    B: Float[Tensor, "K d_out r"]

    def __init__(self, site: WeightSite, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
        K, _, r = A.shape
        shapes = {"A": (K, site.d_in, r), "B": (K, site.d_out, r), "bias": (K, site.d_out)}
        super().__init__(site, shapes, A=A, B=B, bias=bias)

    @property
    def rank(self) -> int:
        """r, the rank of each matrix."""
        return self.A.shape[2]

    def matrix(self, k: int) -> Float[Tensor, "d_in d_out"]:
        """A_k B_k^T."""
        return self.A[k] @ self.B[k].T

    def direction(self, k: int) -> Float[Tensor, "d_in d_out"]:
        return self.matrix(k)

    def _inner(self, gradient: SampleGradient, backend: Backend) -> Float[Tensor, "n K"]:
        (K, d_in, r), d_out, pos = self.A.shape, self.site.d_out, gradient.g.shape[1]
        if backend == "auto":
            few = gradient.x.is_floating_point() and pos * K * r * (d_in + d_out) > (pos + K) * d_in * d_out
            backend = "dense" if few else "factored"
        return self._inner_dense(gradient) if backend == "dense" else self._inner_factored(gradient)

    def _inner_factored(self, gradient: SampleGradient) -> Float[Tensor, "n K"]:
        n, pos, _ = gradient.g.shape
        # a causal model's scalar has no gradient at positions after its own, about half of all
        kept = (gradient.g != 0).any(-1).flatten().nonzero().flatten()
        x, g = gradient.x.flatten(0, 1)[kept], gradient.g.flatten(0, 1)[kept]
        reads = self._along(x, self.A) if x.is_floating_point() else self.A.permute(1, 0, 2)[x]
        products = (reads * self._along(g, self.B)).sum(-1)
        return products.new_zeros(n, products.shape[1]).index_add(0, kept // pos, products)

    def _along(self, rows: Float[Tensor, "m width"], factor: Float[Tensor, "K width r"]) -> Float[Tensor, "m K r"]:
        return (rows @ factor.permute(1, 0, 2).flatten(1)).unflatten(-1, (-1, self.rank))

    def _inner_dense(self, gradient: SampleGradient) -> Float[Tensor, "n K"]:
        matrices = (self.A @ self.B.transpose(1, 2)).flatten(1)
        n = max(1, CHUNK // matrices.shape[1])
        # what a chunk's product needs is the gradients, which are cheaper to form again than to keep
        parts = [
            _DenseInner.apply(matrices, gradient, slice(first, first + n), self.site.d_in)
            for first in range(0, len(gradient.g), n)
        ]
        return torch.cat(parts)

    def _gram(self) -> Float[Tensor, "K K"]:
        reads, writes = (f.transpose(1, 2).flatten(0, 1) for f in (self.A, self.B))
        product = (reads @ reads.T) * (writes @ writes.T)
        K, r = len(self.A), self.rank
        return product if r == 1 else product.view(K, r, K, r).sum((1, 3))

    def _squares(self) -> Float[Tensor, " K"]:
        return ((self.A.transpose(1, 2) @ self.A) * (self.B.transpose(1, 2) @ self.B)).sum((1, 2)).clamp(min=0.0)

    def _change(self, x: Tensor, ks: list[int], scale: Tensor) -> Tensor:
        read = (self.A[ks] * scale[:, None, None]).permute(1, 0, 2).flatten(1)
        h = read[x] if not x.is_floating_point() else x.to(read.dtype) @ read
        return h @ self.B[ks].permute(1, 0, 2).flatten(1).T


class _DenseInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrices: Tensor, gradient: SampleGradient, rows: slice, d_in: int) -> Tensor:  # type: ignore[override]
        ctx.gradient, ctx.rows, ctx.d_in = gradient, rows, d_in
        return gradient.dense(rows, d_in).flatten(1) @ matrices.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad.T @ ctx.gradient.dense(ctx.rows, ctx.d_in).flatten(1), None, None, None


class Subnetworks(nn.Module, Mapping[str, Any]):
    """K subnetworks over several sites and norms; a Mapping from name to what they are there (`Part`), sites first."""

    __hash__ = nn.Module.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        sizes = {part.n_components for part in parts.values()}
        if len(sizes) != 1:
            raise ShapeError(f"Subnetworks need at least one site, and as many at each; given {sorted(sizes)}.")
        self.parts = nn.ModuleDict({module_key(name): part for name, part in parts.items()})
        self.K = sizes.pop()

    @property
    def device(self) -> torch.device:
        """The first part's; parts live where their site does."""
        return next(self.parameters()).device

    def __getitem__(self, site: str) -> Any:
        return self.parts[module_key(site)]

    def __iter__(self) -> Iterator[str]:
        return (part.site.name for part in self.parts.values())  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.parts)

    def inner(self, gradients: Gradients, backend: Backend = "auto") -> Float[Tensor, "n K"]:
        """<G_n, subnetwork k>, summed over sites and norms."""
        return self._summed(part.inner(gradients[name], backend) for name, part in self.items())

    def squared_norm(self, gradients: Gradients) -> Float[Tensor, " n"]:
        """Squared norm of each gradient over the tensors that the subnetworks reach."""
        return self._summed(part.squared_norm(gradients[name]) for name, part in self.items())

    def gram(self) -> Float[Tensor, "K K"]:
        """Inner products of all pairs."""
        return self._summed(part.gram() for part in self.values())

    def norms(self) -> Float[Tensor, " K"]:
        """Norm of each subnetwork over all its tensors together."""
        return self._summed(part.squared_norms() for part in self.values()).sqrt()

    def _summed(self, values: Iterable[Tensor]) -> Tensor:
        """The sum over parts, on the first one's device."""
        return torch.stack([value.to(self.device) for value in values]).sum(0)

    def rescale(self, factors: Float[Tensor, " K"]) -> None:
        """Multiply each subnetwork, in place."""
        for part in self.values():
            part.rescale(factors.to(next(part.parameters()).device))

    @torch.no_grad()
    def normalise(self, kind: Literal["l2", "paper_code"] = "l2") -> None:
        """Bring every subnetwork to norm 1, in place.

        `l2` is the norm over all tensors together, at once; `paper_code` the published code's step towards a sum of the
        tensors' norms of 1, each divided by the square root of that sum.
        """
        if kind == "l2":
            size = self.norms()
        else:
            lengths = [norms.to(self.device) for part in self.values() for norms in part.tensor_norms()]
            size = functools.reduce(torch.add, lengths).sqrt()
        self.rescale(1.0 / size.clamp(min=1e-30))


def random_subnetworks(
    sites: Mapping[str, WeightSite],
    ranks: Mapping[str, int],
    K: int,
    biases: Collection[str],
    dtype: torch.dtype,
    generator: torch.Generator,
    norms: Mapping[str, NormSite],
) -> Subnetworks:
    """K subnetworks with normal factors (and gains), drawn on the CPU and scaled to norm 1.

    `ranks` are r of each site, `biases` the sites and norms whose bias takes part, `norms` those whose gain does.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    parts: dict[str, Part] = {}
    for name, site in sites.items():
        A, B = normal(K, site.d_in, ranks[name]), normal(K, site.d_out, ranks[name])
        parts[name] = SiteSubnetworks(site, A, B, normal(K, site.d_out) if name in biases else None)
    for name, norm in norms.items():
        parts[name] = GainSubnetworks(norm, normal(K, norm.width), normal(K, norm.width) if name in biases else None)
    made = Subnetworks(parts)
    made.normalise()
    return made


def pairwise_gains(gradients: Sequence[GainGradient], bias: bool) -> Float[Tensor, "n n"]:
    """Inner products of all pairs of gradients at one norm, in float64 on the CPU."""
    kinds = ("gain", "bias") if bias else ("gain",)
    wholes = (torch.cat([getattr(gradient, kind) for gradient in gradients]).double() for kind in kinds)
    return torch.stack([whole @ whole.T for whole in wholes]).sum(0).cpu()


# --- the decomposition ---------------------------------------------------------------------------------------------------
class Direction(NamedTuple):
    """What one subnetwork is at one site."""

    weight: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, " d_out"] | None


class GainDirection(NamedTuple):
    """What one subnetwork is at one norm."""

    gain: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None


class SubnetworkDecomposition(Saved):
    """Low-rank directions in the space of chosen weights that sparsely reconstruct the gradients of each sample's divergence.

    They do not sum to the weights, and no token has a mask over them. Found by `L3D`.

    Args:
        encoder: Whose inner products with a gradient are the coefficients.
        decoder: Whose weighted sum reconstructs it; its subnetworks, of norm 1, are the directions to move along.
        sites: The sites by name.
        fingerprints: Of the weights and gains they belong to.
        threshold: Absolute coefficient from which a subnetwork counts as active, learned in training.
        info: Where it came from; anything JSON can hold.
        norms: The norms by name, where their gains take part.
    """

    threshold: Float[Tensor, ""]
    holds = "subnetworks"
    says = {"kind"}, {"norms"}

    def __init__(
        self,
        encoder: Subnetworks,
        decoder: Subnetworks,
        sites: Mapping[str, WeightSite],
        fingerprints: Mapping[str, Fingerprint],
        threshold: float = 0.0,
        info: Mapping[str, Any] | None = None,
        norms: Mapping[str, NormSite] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.sites = dict(sites)
        self.norms = dict(norms or {})
        self.fingerprints = dict(fingerprints)
        self.info = dict(info or {})
        parameter = next(encoder.parameters())
        self.register_buffer("threshold", torch.tensor(threshold, dtype=parameter.dtype, device=parameter.device))

    def device_of(self, site: str) -> torch.device:
        return next(self.decoder[site].parameters()).device

    def __iter__(self):
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def n_subnetworks(self) -> int:
        """K."""
        return self.decoder.K

    def subnetwork(self, k: int) -> dict[str, Any]:
        """The direction of one subnetwork: a `Direction` at each site, a `GainDirection` at each norm.

        Raises:
            ComponentIndexError: There is no such subnetwork.
        """
        k, found = self.index(k), {}
        for name, part in self.decoder.items():
            bias = None if part.bias is None else part.bias[k].detach()
            found[name] = (GainDirection if name in self.norms else Direction)(part.direction(k).detach(), bias)
        return found

    def index(self, k: int) -> int:
        """A subnetwork's number, counted from the start, or ComponentIndexError; negatives count from the end."""
        if not -self.n_subnetworks <= k < self.n_subnetworks:
            raise ComponentIndexError(f"There is no subnetwork {k}; there are {self.n_subnetworks}, numbered from 0.")
        return k % self.n_subnetworks

    # --- files ------------------------------------------------------------------------------------------------------
    def _as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"threshold": self.threshold}
        for side in SIDES:
            for name, part in getattr(self, side).items():
                tensors |= {f"{side}:{name}.{key}": tensor for key, tensor in part.named_parameters()}
        return tensors, {"norms": [asdict(norm) for norm in self.norms.values()]} if self.norms else {}

    @classmethod
    def _assembled(
        cls, tensors: dict[str, Tensor], values: dict[str, Any], *, sites: Any, norms: Any, **origin: Any
    ) -> "SubnetworkDecomposition":
        if len({tensor.dtype for tensor in tensors.values()}) > 1 or not all(t.numel() for t in tensors.values()):
            raise ValueError("a tensor is empty, or they are of several dtypes")
        left, sides = dict(tensors), []
        for side in SIDES:
            parts: dict[str, Part] = {}
            for name, site in {**sites, **norms}.items():
                kind, keys = (GainSubnetworks, ("gain",)) if name in norms else (SiteSubnetworks, ("A", "B"))
                factors = [left.pop(f"{side}:{name}.{key}") for key in keys]
                parts[name] = kind(site, *factors, left.pop(f"{side}:{name}.bias", None))
            sides.append(Subnetworks(parts))
        threshold = left.pop("threshold")
        if left or threshold.ndim or list(sides[0]) != [*sites, *norms]:
            raise ValueError(f"there are too many tensors ({', '.join(left)}), several thresholds or too few names")
        shapes = [{name: tensor.shape for name, tensor in side.state_dict().items()} for side in sides]
        if shapes[0] != shapes[1]:
            raise ValueError("encoder and decoder are of different shapes")
        return cls(sides[0], sides[1], sites, threshold=float(threshold), norms=norms, **origin)
