"""What a circuit is made of: single components, whole neurons, or whole heads, so that all of them can be compared.

A unit is a set of components that are kept or ablated together. A component by itself is a unit of SPD or of singular vectors;
an MLP neuron is what it reads and what it writes; a head is all its components in its four matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import SettingError

Granularity = Literal["components", "neurons and heads"]


@dataclass(frozen=True, eq=False)
class Units:
    """n disjoint sets of components of one decomposition."""

    granularity: Granularity
    labels: tuple[str, ...]
    owner: Mapping[str, Int[Tensor, " C"]]
    """By site, the unit that each component belongs to."""
    parameters: Float[Tensor, " n"]
    """Numbers that a unit is made of: entries of its components' vectors that are not 0, ones of a one-hot side left out."""

    def __len__(self) -> int:
        return len(self.labels)

    def spread(self, keep: Float[Tensor, "*rows n"]) -> dict[str, Float[Tensor, "*rows C"]]:
        """Component masks by site, from one number for each unit."""
        return {name: keep[..., owner.to(keep.device)] for name, owner in self.owner.items()}

    def members(self, chosen: Int[Tensor, " some"]) -> dict[str, list[int]]:
        """Components of some units, by site; sites without any are left out."""
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[chosen.cpu()] = True
        found = {name: kept[owner.cpu()].nonzero().flatten().tolist() for name, owner in self.owner.items()}
        return {name: components for name, components in found.items() if components}


def component_units(decomposition: Decomposition) -> Units:
    """Every component by itself."""
    labels, owner, parameters, first = [], {}, [], 0
    for name, components in decomposition.items():
        C = components.n_components
        labels += [f"{name}[{c}]" for c in range(C)]
        owner[name] = torch.arange(first, first + C)
        parameters.append(_entries(components.V.T) + _entries(components.U))
        first += C
    return Units("components", tuple(labels), owner, torch.cat(parameters).cpu())


def neuron_and_head_units(decomposition: Decomposition) -> Units:
    """Whole MLP neurons and attention heads of a decomposition by `NeuronBasis`.

    A neuron is its column of W_in (and W_gate) with its row of W_out; a head of W_Q and W_O goes with the key/value head that
    serves it, which several heads may share: those are then one unit.

    Raises:
        SettingError: The decomposition is no neuron basis, or has sites outside of attention and MLPs.
    """
    labels: dict[str, int] = {}
    owner: dict[str, Tensor] = {}
    shared = {name.rpartition(".")[0]: 0 for name in decomposition}
    for name, components in decomposition.items():
        if components.site.n_heads:
            block = name.rpartition(".")[0]
            shared[block] = min(shared[block] or components.site.n_heads, components.site.n_heads)
    for name, components in decomposition.items():
        block, _, weight = name.rpartition(".")
        of_neuron, heads = weight in ("W_in", "W_gate", "W_out"), components.site.n_heads
        if not of_neuron and heads is None:
            raise SettingError(f"{name} is no matrix of attention or an MLP; it has neither neurons nor heads.")
        wrote = components.U if weight in ("W_in", "W_gate") else components.V.T
        if heads is not None:
            groups = _heads(name, components) * shared[block] // heads
        elif components.n_components == wrote.shape[-1] and bool(((wrote != 0).sum(-1) == 1).all()):
            groups = (wrote != 0).int().argmax(-1)
        else:
            raise SettingError(f"{name} is not decomposed into neurons; decompose it by NeuronBasis().")
        kind = "neuron" if heads is None else "head"
        keys = [f"{block} {kind} {g}" for g in groups.tolist()]
        owner[name] = torch.tensor([labels.setdefault(key, len(labels)) for key in keys])
    parameters = torch.zeros(len(labels))
    for name, components in decomposition.items():
        parameters.index_add_(0, owner[name], (_entries(components.V.T) + _entries(components.U)).cpu())
    return Units("neurons and heads", tuple(labels), owner, parameters)


def _heads(name: str, components: Components) -> Int[Tensor, " C"]:
    """The head that each component lies in."""
    side = components.V.T if components.site.head_side == "in" else components.U
    by_head = side.unflatten(-1, (components.site.n_heads or 1, -1)).abs().amax(-1) > 1e-6 * side.abs().max()
    if not bool((by_head.sum(-1) == 1).all()):
        raise SettingError(f"Components of {name} span several heads; decompose it by NeuronBasis().")
    return by_head.int().argmax(-1).cpu()


def _entries(rows: Float[Tensor, "C d"]) -> Float[Tensor, " C"]:
    """Entries that are not 0; none where there is only one, which names a neuron."""
    n = (rows != 0).sum(-1).float()
    return torch.where(n == 1, torch.zeros_like(n), n)
