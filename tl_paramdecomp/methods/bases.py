"""Exact bases of a weight: factors with V U = W, worked out rather than learned.

Components of a basis are balanced, |V_c| = |U_c|, so that their activations are on one scale.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.sites import WeightSite

Factors = tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]
TINY = 1e-12
"""Stands for a length of 0 where one divides by it."""


def svd_factors(weight: Float[Tensor, "d_in d_out"]) -> Factors:
    """Singular directions, largest first: C = min(d_in, d_out)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values.sqrt()
    return left * root, root.unsqueeze(-1) * right


def neuron_factors(weight: Float[Tensor, "d_in d_out"]) -> Factors:
    """One component per column of W, or per row where there are more of them: C = max(d_in, d_out)."""
    d_in, d_out = weight.shape
    vectors = weight if d_out >= d_in else weight.T
    root = vectors.norm(dim=0).clamp(min=TINY).sqrt()
    own, unit = vectors / root, torch.diag(root)
    return (own, unit) if d_out >= d_in else (unit, own.T.contiguous())


def head_factors(site: WeightSite, weight: Float[Tensor, "d_in d_out"]) -> Factors:
    """Singular directions of each head by itself, head after head; every component reads or writes one head alone."""
    assert site.n_heads is not None
    side = 0 if site.head_side == "in" else 1
    parts = [svd_factors(part) for part in weight.chunk(site.n_heads, side)]
    if side == 0:
        return torch.block_diag(*(V for V, _ in parts)), torch.cat([U for _, U in parts])
    return torch.cat([V for V, _ in parts], 1), torch.block_diag(*(U for _, U in parts))


def random_factors(weight: Float[Tensor, "d_in d_out"], generator: torch.Generator) -> Factors:
    """Random orthogonal directions on the smaller side of W, and what W makes of each: C = min(d_in, d_out)."""
    d_in, d_out = weight.shape
    n = min(d_in, d_out)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(noise).Q.to(weight.device, weight.dtype)
    return balanced(directions, directions.T @ weight) if d_in <= d_out else balanced(weight @ directions, directions.T)


def whitened_factors(
    weight: Float[Tensor, "d_in d_out"],
    moments: Float[Tensor, "d_in d_in"] | Float[Tensor, " d_in"],
    ridge: float = 1e-6,
) -> Factors:
    """Singular directions of S^(1/2) W, unwhitened: the first k of them keep most of the output x W of any k.

    Args:
        weight: W.
        moments: Second moments S = E[x x^T] of the inputs; of an embedding, how often each row is looked up.
        ridge: Share of the mean moment that is added to all of them, so that directions without data stay defined.
            V U = W whatever it is.
    """
    S = moments.to(torch.float64)
    S = S / S.sum().clamp(min=TINY) if S.ndim == 1 else S / S.trace().clamp(min=TINY)
    floor = ridge / len(S)
    if S.ndim == 1:
        root = (S + floor).sqrt().unsqueeze(-1)
        left, U = svd_factors(root * weight.to(S))
        V = left / root
    else:
        values, axes = torch.linalg.eigh(S)
        root = (values.clamp(min=0.0) + floor).sqrt().unsqueeze(-1)
        left, U = svd_factors(root * (axes.T @ weight.to(S)))
        V = axes @ (left / root)
    V, U = balanced(V, U)
    return V.to(weight.dtype), U.to(weight.dtype)


def balanced(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Factors:
    """The same components with |V_c| = |U_c|."""
    lengths_in, lengths_out = V.norm(dim=0).clamp(min=TINY), U.norm(dim=1).clamp(min=TINY)
    scale = (lengths_out / lengths_in).sqrt()
    return V * scale, U / scale.unsqueeze(-1)
