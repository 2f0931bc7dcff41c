"""Where components start: exact bases of W, or random factors warmed up to it."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.base import Progress
from tl_paramdecomp.methods.bases import neuron_factors, svd_factors
from tl_paramdecomp.sites import WeightSite

Start = Literal["auto", "neurons", "svd", "random", "random_fan_out"]


def initial_factors(
    site: WeightSite, weight: Float[Tensor, "d_in d_out"], n_components: int, start: Start, generator: torch.Generator
) -> tuple[Float[Tensor, "d_in C"], Float[Tensor, "C d_out"]]:
    """V and U to start from.

    Args:
        site: The site.
        weight: Its W.
        n_components: C.
        start: `neurons`: one component per neuron (column or row of W on its larger side), with |V_c| = |U_c|; V U = W.
            `svd`: singular directions; V U = W from the rank on. Spare components read at random and write nothing.
            `random`: standard normal over sqrt(fan), unrelated to W. `random_fan_out`: the same with V over sqrt(d_out),
            as the published code has it. `auto`: neurons for MLP matrices where C allows it, else svd.
        generator: Draws what is random.

    Raises:
        SettingError: C is too small for one component per neuron.
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
    elif start == "svd":
        V, U = svd_factors(wide)
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
    pairs = []
    for name, components in decomposition.items():
        weight = adapter.weight(name).detach().to(components.V.dtype)
        with torch.no_grad():
            error = (weight - components.product()).square().sum() / weight.square().sum().clamp(min=1e-30)
        if error > enough:
            pairs.append((components, weight))
    if not pairs:
        return
    parameters = list(dict.fromkeys(p for components, _ in pairs for p in components.parameter_pair))  # once where tied
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1.0 / steps, total_iters=steps)
    with torch.enable_grad():
        for _ in progress("warm-up", steps):
            errors = [(w - c.product()).square().sum() / w.square().sum().clamp(min=1e-30) for c, w in pairs]
            loss = torch.stack(errors).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for parameter in parameters:
        parameter.grad = None
