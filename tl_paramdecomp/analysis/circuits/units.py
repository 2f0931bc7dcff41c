"""What a circuit is made of, and a task's metric with some of it kept and all else ablated, resampled or set against it.

A unit is a set of components that are kept or ablated together, so that single components, whole neurons and whole heads can
be compared. A component by itself is a unit of SPD or of singular vectors; an MLP neuron is what it reads and what it writes;
a head is all its components in its four matrices.

    y = x W + b - sum_c (1 - m_c) (h_c - a_c) U_c - (1 - d) x (W - V U)

m_c is 1 inside the circuit; outside it is 0, or whatever a kind of masks makes it. a_c is what a removed component's activation
becomes: 0 (its weight is gone), its mean, or that of the corrupt prompt. The bias always stays, and d, the delta component's
mask, is the same everywhere.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.adversary import ascended
from tl_paramdecomp.patching.target import frozen
from tl_paramdecomp.settings import fit
from tl_paramdecomp.sites import SiteCall, SiteFn

Granularity = Literal["components", "neurons and heads"]
Value = Literal["zero", "mean", "corrupt"]
"""What an ablated component's activation becomes: 0, its mean over the task's clean prompts by position, or its activation on
the corrupt prompt at that position."""


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


# --- runs with units masked ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskRuns:
    """Runs of a model on a task with its units masked."""

    adapter: ModelAdapter
    decomposition: Decomposition
    units: Units
    task: Any
    metric: Callable[[Tensor, Any], Tensor]
    delta: float = 1.0
    baseline: Mapping[str, Float[Tensor, "*rows C"]] | None = None
    """Activations that ablated components take; None: 0."""

    def logits(self, keep: Float[Tensor, "*rows n"] | None = None) -> Float[Tensor, "prompts vocab"]:
        """Logits at the answers' positions; `keep` is [n], [prompts, n] or [prompts, pos, n], None is the model itself."""
        with contextlib.nullcontext() if keep is None else self._masked(keep):
            output = self.adapter.forward(self.task.clean, self.task.attention_mask)
        return self.task.at_answer(output)

    def values(self, keep: Float[Tensor, "*rows n"] | None = None) -> Float[Tensor, " prompts"]:
        """The metric of each prompt."""
        return self.metric(self.logits(keep), self.task)

    def mean(self, keep: Float[Tensor, "*rows n"] | None = None) -> float:
        """The metric's mean over prompts, without gradients."""
        with torch.no_grad():
            return self.values(keep).mean().item()

    @contextlib.contextmanager
    def _masked(self, keep: Tensor) -> Iterator[None]:
        if keep.ndim == 2:
            keep = keep.unsqueeze(1)
        dtype = next(iter(self.decomposition.values())).V.dtype
        spread = self.units.spread(keep.to(dtype))
        masks = self.decomposition.masks().replaced({name: (m, self.delta) for name, m in spread.items()})
        fns = {}
        for name, mask in masks.changed().items():
            fn = functools.partial(mask.output, self.decomposition[name])
            if self.baseline is not None:
                fn = functools.partial(_with_baseline, fn, self.decomposition[name], spread[name], self.baseline[name])
            fns[name] = fn
        with self.adapter.intercept(fns):
            yield

    @contextlib.contextmanager
    def frozen(self) -> Iterator["TaskRuns"]:
        """Within this context nothing of the model or its components learns."""
        with frozen(self.adapter), frozen(self.decomposition):
            yield self


def _with_baseline(fn: SiteFn, components: Components, m: Tensor, baseline: Tensor, call: SiteCall) -> Tensor:
    written = ((1.0 - m) * baseline) @ components.U
    return fn(call) + written.to(call.y.dtype)


def baseline_of(
    adapter: ModelAdapter, decomposition: Decomposition, task: Any, value: Value
) -> dict[str, Float[Tensor, "*rows C"]] | None:
    """Activations that ablated components take."""
    if fit(value, Value, "value") == "zero":
        return None
    tokens = task.clean if value == "mean" else task.corrupt
    if tokens is None:
        raise DataError(f"The task {task.name} has no corrupt prompts, whose activations value='corrupt' takes.")
    with torch.no_grad(), frozen(adapter):
        inputs = adapter.capture(tokens, list(decomposition), task.attention_mask).inputs
        acts = {name: decomposition[name].acts(x) for name, x in inputs.items()}
    if value == "corrupt":
        return acts
    scored = torch.ones_like(tokens) if task.attention_mask is None else task.attention_mask
    weight = (scored / scored.sum(0).clamp(min=1)).unsqueeze(-1)
    return {name: (a * weight.to(a)).sum(0) if a.shape[0] == len(tokens) else a for name, a in acts.items()}


def capped_mean(runs: TaskRuns, keep: Float[Tensor, " n"], best: Float[Tensor, " prompts"], sign: float) -> float:
    """Mean over prompts, none counting for more than the model makes of it; `sign` -1 where smaller is better."""
    with torch.no_grad():
        return (sign * torch.minimum(sign * runs.values(keep), sign * best)).mean().item()


# --- masks outside of a circuit --------------------------------------------------------------------------------------
def stochastic_value(
    runs: TaskRuns, inside: Float[Tensor, " n"], generator: torch.Generator, draws: int = 4, coins: bool = False
) -> float:
    """Outside masks uniform in [0, 1], drawn anew for every unit, prompt and position; or outside units kept or ablated by the
    toss of a coin, the same for all prompts; mean over draws.
    """
    shape, found = (len(inside),) if coins else (*runs.task.clean.shape, len(inside)), []
    for _ in range(draws):
        r = torch.rand(shape, generator=generator, device=inside.device, dtype=inside.dtype)
        found.append(runs.mean(inside + (1.0 - inside) * ((r < 0.5).to(r) if coins else r)))
    return sum(found) / draws


def adversarial_value(
    runs: TaskRuns, inside: Float[Tensor, " n"], generator: torch.Generator, steps: int = 20, sign: float = 1.0
) -> float:
    """The worst mean under masks outside that all prompts and positions share: sign descent, the worst value met."""
    source = torch.rand(len(inside), generator=generator, device=inside.device, dtype=inside.dtype)
    worst = float("inf")
    for i in range(steps + 1):
        leaf = source.clone().requires_grad_(i < steps)
        with torch.set_grad_enabled(i < steps):
            value = sign * runs.values(inside + (1.0 - inside) * leaf).mean()
        worst = min(worst, value.item())
        if i < steps:
            (gradient,) = torch.autograd.grad(value, leaf)
            source = ascended(source, -gradient, min(1.0, 2.0 / steps))
    return sign * worst


def mask_gradients(runs: TaskRuns, steps: int = 8) -> Float[Tensor, " n"]:
    """Integrated gradients (arXiv 1703.01365) over one mask that all units share; they sum to m(model) - m(none)."""
    total = torch.zeros(len(runs.units), device=runs.adapter.device)
    for i in range(steps):
        keep = torch.full_like(total, (i + 0.5) / steps).requires_grad_(True)
        with torch.enable_grad():
            value = runs.values(keep).mean()
        total += torch.autograd.grad(value, keep)[0] / steps
    return total


def mask_sensitivities(
    runs: TaskRuns, generator: torch.Generator, draws: int = 8, low: float = 0.5
) -> Float[Tensor, " n"]:
    """|gradient| of each prompt's metric by each unit's mask, mean over prompts and over masks drawn from [low, 1]."""
    total = torch.zeros(len(runs.units), device=runs.adapter.device)
    shape = (len(runs.task.clean), len(total))
    for _ in range(draws):
        drawn = torch.rand(shape, generator=generator, device=total.device)
        keep = (low + (1.0 - low) * drawn).requires_grad_(True)
        with torch.enable_grad():
            value = runs.values(keep).sum()
        total += torch.autograd.grad(value, keep)[0].abs().mean(0) / draws
    return total
