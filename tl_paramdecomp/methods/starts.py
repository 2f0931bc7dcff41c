"""Where components start: exact bases of a weight, V U = W, worked out rather than learned; or random factors warmed up to it.

Components of a basis are balanced, |V_c| = |U_c|, so that their activations are on one scale.
"""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError
from tl_paramdecomp.methods.method import Progress
from tl_paramdecomp.sites import WeightSite

Start = Literal["auto", "neurons", "svd", "whitened", "random", "random_fan_out"]


def initial_factors(
    site: WeightSite,
    weight: Float[Tensor, "d_in d_out"],
    n_components: int,
    start: Start,
    generator: torch.Generator,
    moments: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """V and U to start from, with C = n_components.

    `neurons`: one component per neuron (column or row of W on its larger side), with |V_c| = |U_c|; V U = W; SettingError
    where C is too small. `svd`: singular directions; V U = W from the rank on. Spare components read at random and write
    nothing. `whitened`: the same behind the data's own scale, by `moments` of the site's inputs. `random`: standard normal
    over sqrt(fan), unrelated to W. `random_fan_out`: the same with V over sqrt(d_out), as the published code has it.
    `auto`: neurons for MLP matrices where C allows it, else svd.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if start == "auto":
        start = "neurons" if ".mlp." in site.name and n_components >= max(wide.shape) else "svd"
    if start == "neurons":
        if n_components < max(wide.shape):
            raise SettingError(
                f"start='neurons' needs one component for each of the {max(wide.shape)} neurons of {site.name}; "
                f"C is {n_components}. Raise n_components or use start='svd'."
            )
        V, U = neuron_factors(wide)
    elif start in ("svd", "whitened"):
        V, U = svd_factors(wide) if moments is None else whitened_factors(wide.double(), moments)
        V, U = V[:, :n_components], U[:n_components]
    else:
        fan = site.d_out if start == "random_fan_out" else site.d_in
        V = torch.randn(site.d_in, n_components, generator=generator) / math.sqrt(fan)
        U = torch.randn(n_components, site.d_out, generator=generator) / math.sqrt(n_components)
    V, U = V.to(wide.device, wide.dtype), U.to(wide.device, wide.dtype)
    spare = n_components - V.shape[1]
    if spare:
        scale = V.square().mean().sqrt()
        extra = torch.randn(site.d_in, spare, generator=generator).to(V) * scale
        V, U = torch.cat([V, extra], 1), torch.cat([U, U.new_zeros(spare, site.d_out)])
    return V, U


def warm_up(
    adapter: ModelAdapter,
    decomposition: Decomposition,
    steps: int,
    lr: float,
    weight_decay: float,
    progress: Progress,
    enough: float = 1e-6,
) -> None:
    """Bring V U to W before training, by AdamW on the relative error alone; over at once where it already is.

    The learning rate falls linearly to 0. Only the sites whose relative squared error is above `enough` take part.
    """
    if steps == 0:
        return

    def error(components: Components, weight: Tensor) -> Tensor:
        return (weight - components.product()).square().sum() / weight.square().sum().clamp(min=1e-30)

    with torch.no_grad():
        every = [(c, adapter.weight(name).detach().to(c.V.dtype)) for name, c in decomposition.items()]
        pairs = [(components, weight) for components, weight in every if error(components, weight) > enough]
    if not pairs:
        return
    parameters = list(dict.fromkeys(p for components, _ in pairs for p in components.parameter_pair))  # once where tied
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1.0 / steps, total_iters=steps)
    with torch.enable_grad():
        for _ in progress("warm-up", steps):
            loss = torch.stack([error(*pair) for pair in pairs]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for parameter in parameters:
        parameter.grad = None


def by_site(numbers: Mapping[str, int], sites: Mapping[str, WeightSite], what: str) -> dict[str, int]:
    """The number of each site, from numbers by glob, the first match counting; NoMatchingSiteError where a glob matches no
    site, or a site none."""
    for glob in numbers:
        if not fnmatch.filter(sites, glob):
            raise NoMatchingSiteError(f"{what} names {glob!r}, which matches none of {', '.join(sites)}.")
    found = {}
    for name in sites:
        glob = next((g for g in numbers if fnmatch.fnmatchcase(name, g)), None)
        if glob is None:
            raise NoMatchingSiteError(f"{what} says nothing of {name}; add a glob for it, or '*' last.")
        found[name] = numbers[glob]
    return found


# --- exact bases ------------------------------------------------------------------------------------------------------
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
    """Singular directions of S^(1/2) W, unwhitened: the first k of them keep most of the output x W of any k; V U = W.

    `moments` are second moments S = E[x x^T] of the inputs; of an embedding, how often each row is looked up. `ridge`, a share
    of the mean moment, is added to all of them, so that directions without data stay defined.
    """
    S = moments.to(torch.float64)
    S = S / S.sum().clamp(min=TINY) if S.ndim == 1 else S / S.trace().clamp(min=TINY)
    values, axes = (S, None) if S.ndim == 1 else torch.linalg.eigh(S)
    root = (values.clamp(min=0.0) + ridge / len(S)).sqrt().unsqueeze(-1)
    left, U = svd_factors(root * (weight.to(S) if axes is None else axes.T @ weight.to(S)))
    V, U = balanced(left / root if axes is None else axes @ (left / root), U)
    return V.to(weight.dtype), U.to(weight.dtype)


def balanced(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Factors:
    """The same components with |V_c| = |U_c|."""
    lengths_in, lengths_out = V.norm(dim=0).clamp(min=TINY), U.norm(dim=1).clamp(min=TINY)
    scale = (lengths_out / lengths_in).sqrt()
    return V * scale, U / scale.unsqueeze(-1)
