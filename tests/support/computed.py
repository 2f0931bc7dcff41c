"""Ways in which a module computes its weight from other tensors, each with what the weight is, in closed form."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.utils as utils
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


class Squashed(nn.Module):
    """tanh(w s), a parametrization that a user may write."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, like.numel()).reshape(like.shape).to(like.dtype))

    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w * self.scale)


class Way(NamedTuple):
    """One way of computing a tensor."""

    apply: Callable[[nn.Module, str], Any]
    value: Callable[[nn.Module, str], Tensor]


def _squash(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Squashed(getattr(module, name)))


def _squashed(module: nn.Module, name: str) -> Tensor:
    part: Any = module.parametrizations[name]  # pyright: ignore[reportIndexIssue]
    return torch.tanh(part.original * part[0].scale)


def _old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        utils.weight_norm(module, name)
    with torch.no_grad():  # stale until the next forward pass
        getattr(module, f"{name}_g").mul_(1.7)


def _pruned(module: nn.Module, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        prune.random_unstructured(module, name, amount=0.3)
    original = getattr(module, f"{name}_orig").detach()  # perhaps another's as well
    setattr(module, f"{name}_orig", nn.Parameter(original * 1.7))


def _normed(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.reshape(len(v), -1).norm(dim=1).view_as(g)


def _over_sigma(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return w / (u @ w.flatten(1) @ v)


WAYS = {
    "user's": Way(_squash, _squashed),
    "weight_norm": Way(
        parametrizations.weight_norm,
        lambda m, n: _normed(m.parametrizations[n].original0, m.parametrizations[n].original1),  # pyright: ignore
    ),
    "spectral_norm": Way(
        parametrizations.spectral_norm,
        lambda m, n: _over_sigma(
            m.parametrizations[n].original,
            m.parametrizations[n][0]._u,
            m.parametrizations[n][0]._v,  # pyright: ignore
        ),
    ),
    "old weight_norm": Way(_old_weight_norm, lambda m, n: _normed(getattr(m, f"{n}_g"), getattr(m, f"{n}_v"))),
    "old spectral_norm": Way(
        utils.spectral_norm,
        lambda m, n: _over_sigma(*(getattr(m, f"{n}_{part}") for part in ("orig", "u", "v"))),
    ),
    "prune": Way(_pruned, lambda m, n: getattr(m, f"{n}_orig") * getattr(m, f"{n}_mask")),
}
