"""Subnetworks: low-rank directions over several weights at once, K of them, as stacked factors.

At one site subnetwork k is the matrix A_k B_k^T [d_in, d_out] of rank r, and a vector b_k where the site's bias takes part.
Where a sample's gradient is G = sum_t x_t g_t^T, with x_t what the weight reads and g_t the gradient of what it writes, all
that is needed of it comes from x and g, and G itself is never formed:

    <G, A_k B_k^T> = sum_t (x_t A_k) . (g_t B_k)          |G|^2 = sum_ts (x_t . x_s) (g_t . g_s)

Local Loss Landscape Decomposition (Chrisman, Bushnaq and Sharkey 2025, arXiv 2504.00194) has dense subnetworks and gradients;
these are the same numbers. What subnetworks are at normalisation gains is in `gain_subnetworks`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.gain_subnetworks import GainGradient, GainSubnetworks, random_gains
from tl_paramdecomp.components.importance import module_key
from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.sites import NormSite, WeightSite

Backend = Literal["auto", "factored", "dense"]
"""How gradients meet subnetworks: from x and g, or from gradients formed some samples at a time; `auto`: whichever takes fewer
operations at that site."""
CHUNK = 1 << 24
"""Numbers of dense gradients that exist at once."""


class SampleGradient(NamedTuple):
    """Gradients of N scalars with respect to one site's weight, as the factors of their sums of outer products."""

    x: Shaped[Tensor, "n pos *d_in"]
    """What the weight read; indices for an embedding."""
    g: Float[Tensor, "n pos d_out"]
    """Gradient of each scalar with respect to what the weight wrote."""

    def squared_norm(self, bias: bool) -> Float[Tensor, " n"]:
        """Squared norm of each gradient of W, and of b where it counts."""
        if self.x.is_floating_point():
            reads = self.x @ self.x.transpose(1, 2)
        else:
            reads = (self.x.unsqueeze(2) == self.x.unsqueeze(1)).to(self.g.dtype)
        norm = (reads * (self.g @ self.g.transpose(1, 2))).sum((1, 2))
        return norm + self.g.sum(1).square().sum(-1) if bias else norm

    def select(self, rows: Tensor | slice) -> "SampleGradient":
        """Gradients of some of the scalars."""
        rows = rows.to(self.g.device) if isinstance(rows, Tensor) else rows
        return SampleGradient(self.x[rows], self.g[rows])

    def dense(self, rows: slice, d_in: int) -> Float[Tensor, "some d_in d_out"]:
        """Gradients of W for some of the scalars."""
        x, g = self.x[rows], self.g[rows]
        if not x.is_floating_point():
            x = torch.nn.functional.one_hot(x, d_in).to(g.dtype)
        return x.transpose(1, 2) @ g


class SiteSubnetworks(nn.Module):
    """What K subnetworks are at one site.

    Raises:
        ShapeError: The factors do not fit the site or each other.
    """

    def __init__(self, site: WeightSite, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        K, _, r = A.shape
        wanted = {"A": (K, site.d_in, r), "B": (K, site.d_out, r), "bias": (K, site.d_out)}
        for name, given in (("A", A), ("B", B), ("bias", bias)):
            if given is not None and tuple(given.shape) != wanted[name]:
                raise ShapeError(f"{name} of {site.name} must be {list(wanted[name])}; given {list(given.shape)}.")
        self.site = site
        self.A: Float[Tensor, "K d_in r"] = nn.Parameter(A.detach().clone().contiguous())
        self.B: Float[Tensor, "K d_out r"] = nn.Parameter(B.detach().clone().contiguous())
        self.bias: Float[Tensor, "K d_out"] | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone().contiguous())

    @property
    def n_components(self) -> int:
        """K, the number of subnetworks."""
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        """r, the rank of each matrix."""
        return self.A.shape[2]

    def matrix(self, k: int) -> Float[Tensor, "d_in d_out"]:
        """A_k B_k^T."""
        return self.A[k] @ self.B[k].T

    def reads(self, x: Shaped[Tensor, "*rows"]) -> Float[Tensor, "*out K r"]:
        """x A_k of every subnetwork."""
        if not x.is_floating_point():
            return self.A.permute(1, 0, 2)[x]
        return (x @ self.A.permute(1, 0, 2).flatten(1)).unflatten(-1, (-1, self.rank))

    def inner(self, gradient: SampleGradient, backend: Backend = "auto") -> Float[Tensor, "n K"]:
        """<G_n, subnetwork k> at this site."""
        if self._dense(gradient, backend):
            found = self._inner_dense(gradient)
        else:
            found = self._inner_factored(gradient)
        return found if self.bias is None else found + gradient.g.sum(1) @ self.bias.T

    def _dense(self, gradient: SampleGradient, backend: Backend) -> bool:
        if backend != "auto":
            return backend == "dense"
        if not gradient.x.is_floating_point():
            return False
        (K, d_in, r), d_out, pos = self.A.shape, self.site.d_out, gradient.g.shape[1]
        return pos * K * r * (d_in + d_out) > (pos + K) * d_in * d_out

    def _inner_factored(self, gradient: SampleGradient) -> Float[Tensor, "n K"]:
        n, pos, _ = gradient.g.shape
        # a causal model's scalar has no gradient at positions after its own, about half of all
        kept = (gradient.g != 0).any(-1).flatten().nonzero().flatten()
        x, g = gradient.x.flatten(0, 1)[kept], gradient.g.flatten(0, 1)[kept]
        writes = (g @ self.B.permute(1, 0, 2).flatten(1)).unflatten(-1, (-1, self.rank))
        products = (self.reads(x) * writes).sum(-1)
        return products.new_zeros(n, products.shape[1]).index_add(0, kept // pos, products)

    def _inner_dense(self, gradient: SampleGradient) -> Float[Tensor, "n K"]:
        matrices = (self.A @ self.B.transpose(1, 2)).flatten(1)
        n = max(1, CHUNK // matrices.shape[1])
        # what a chunk's product needs is the gradients, which are cheaper to form again than to keep
        parts = [
            _DenseInner.apply(matrices, gradient, slice(first, first + n), self.site.d_in)
            for first in range(0, len(gradient.g), n)
        ]
        return torch.cat(parts)

    def gram(self) -> Float[Tensor, "K K"]:
        """Inner products of all pairs of subnetworks at this site."""
        K, r = len(self.A), self.rank
        if r == 1:
            a, b = self.A.squeeze(-1), self.B.squeeze(-1)
            found = (a @ a.T) * (b @ b.T)
        else:
            reads, writes = (f.transpose(1, 2).flatten(0, 1) for f in (self.A, self.B))
            product = (reads @ reads.T) * (writes @ writes.T)
            found = product.view(K, r, K, r).sum((1, 3))
        return found if self.bias is None else found + self.bias @ self.bias.T

    def squared_norms(self) -> Float[Tensor, " K"]:
        """Squared Frobenius norm of each subnetwork at this site."""
        found = self._squared_matrix_norms()
        return found if self.bias is None else found + self.bias.square().sum(-1)

    def tensor_norms(self) -> list[Float[Tensor, " K"]]:
        """Norms of each subnetwork's matrix, and of its bias, at this site."""
        found = [self._squared_matrix_norms().sqrt()]
        return found if self.bias is None else [*found, self.bias.norm(dim=-1)]

    def _squared_matrix_norms(self) -> Float[Tensor, " K"]:
        return ((self.A.transpose(1, 2) @ self.A) * (self.B.transpose(1, 2) @ self.B)).sum((1, 2)).clamp(min=0.0)

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " K"]) -> None:
        """Multiply each subnetwork, in place."""
        root = factors.sqrt()[:, None, None]
        self.A.mul_(root)
        self.B.mul_(root)
        if self.bias is not None:
            self.bias.mul_(factors[:, None])


class _DenseInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrices: Tensor, gradient: SampleGradient, rows: slice, d_in: int) -> Tensor:  # type: ignore[override]
        ctx.gradient, ctx.rows, ctx.d_in = gradient, rows, d_in
        return gradient.dense(rows, d_in).flatten(1) @ matrices.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad.T @ ctx.gradient.dense(ctx.rows, ctx.d_in).flatten(1), None, None, None


Part = SiteSubnetworks | GainSubnetworks
"""What subnetworks are at one site or norm; each takes the gradients of its own kind."""
Gradients = Mapping[str, SampleGradient | GainGradient]
"""Of the same N scalars, by site and norm."""


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
        return self._summed(gradients[n].squared_norm(p.bias is not None) for n, p in self.items())

    def gram(self) -> Float[Tensor, "K K"]:
        """Inner products of all pairs."""
        return self._summed(part.gram() for part in self.values())

    def norms(self) -> Float[Tensor, " K"]:
        """Norm of each subnetwork over all its tensors together."""
        return self._summed(part.squared_norms() for part in self.values()).sqrt()

    def _summed(self, values: Iterable[Tensor]) -> Tensor:
        """The sum over parts, on the first one's device; parts live where their site does."""
        device = next(self.parameters()).device
        return torch.stack([value.to(device) for value in values]).sum(0)

    @torch.no_grad()
    def rescale(self, factors: Float[Tensor, " K"]) -> None:
        """Multiply each subnetwork, in place."""
        for part in self.values():
            part.rescale(factors.to(next(part.parameters()).device))

    @torch.no_grad()
    def normalise(self, kind: Literal["l2", "paper_code"] = "l2") -> None:
        """Bring every subnetwork to norm 1, in place.

        Args:
            kind: `l2`: the norm over all tensors together, at once. `paper_code`: the published code's step towards a sum of
                the tensors' norms of 1, each divided by the square root of that sum.
        """
        if kind == "l2":
            self.rescale(1.0 / self.norms().clamp(min=1e-30))
            return
        total = torch.zeros(self.K, dtype=next(self.parameters()).dtype, device=next(self.parameters()).device)
        for part in self.values():
            for norms in part.tensor_norms():
                total += norms.to(total.device)
        self.rescale(1.0 / total.sqrt().clamp(min=1e-30))


def random_subnetworks(
    sites: Mapping[str, WeightSite],
    ranks: Mapping[str, int],
    K: int,
    biases: frozenset[str],
    dtype: torch.dtype,
    generator: torch.Generator,
    norms: Mapping[str, NormSite] | None = None,
) -> Subnetworks:
    """K subnetworks with normal factors (and gains), scaled to norm 1.

    Args:
        sites: Where.
        ranks: r at each site.
        K: How many.
        biases: Sites and norms whose bias takes part.
        dtype: Of the factors.
        generator: Draws them, on the CPU.
        norms: Norms whose gains take part.
    """
    parts: dict[str, Part] = {}
    for name, site in sites.items():
        shapes = [(K, site.d_in, ranks[name]), (K, site.d_out, ranks[name])]
        shapes += [(K, site.d_out)] if name in biases else []
        parts[name] = SiteSubnetworks(site, *(torch.randn(s, generator=generator).to(dtype) for s in shapes))
    parts |= random_gains(list((norms or {}).values()), K, biases, dtype, generator)
    made = Subnetworks(parts)
    made.normalise()
    return made
