"""Circuits: which units carry a task, and how far that can be believed.

A circuit is a set of units (components; or neurons and heads) of a decomposition. With m the task's metric, its normalised
faithfulness is

    f(C) = (m(C) - m(none)) / (m(model) - m(none))

where m(C) has everything outside of C ablated and m(none) everything. That alone says little: what is outside may be set to
anything, so f is given under stochastic, random and adversarial masks as well, beside a random circuit of the same size, the
complement, and each unit's own part. Measures: Wang et al. 2022 (arXiv 2211.00593, section 4), MIB (arXiv 2504.13151).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters.outputs import need_answers
from tl_paramdecomp.analysis.circuits.search import LearnedMasks, members, pruned, shortest_good
from tl_paramdecomp.analysis.circuits.units import (
    TaskRuns,
    Units,
    Value,
    adversarial_value,
    baseline_of,
    capped_mean,
    component_units,
    mask_gradients,
    mask_sensitivities,
    stochastic_value,
)
from tl_paramdecomp.analysis.contexts.component_streams import chosen_components
from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.analysis.tasks.metrics import TaskMetric, default_metric, normalised_faithfulness
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.patching.target import checked_adapter

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all units at which MIB measures circuits."""
STEPS = 20
"""Of the adversary of an evaluation."""
RANDOM = 8
"""Random circuits of the same size."""
SINGLE = 64
"""Units that are removed one by one; of larger circuits so many are drawn."""


@dataclass(frozen=True)
class Circuit(Record, what="circuit"):
    """A circuit and its measures on one task; f is normalised faithfulness."""

    task: str
    """Its name."""
    metric: str
    """Its name."""
    granularity: str
    """What one unit is."""
    method: str
    """What ordered the units."""
    direction: str
    """`noising`: clean prompts run, and what is outside of the circuit is ablated."""
    value: str
    """What an ablated component's activation becomes."""
    delta: float
    """The delta component's mask."""
    prompts: int
    """Held-out prompts it was measured on."""
    components: dict[str, list[int]]
    """By site."""
    labels: list[str]
    """Of its units, strongest first where they were ordered."""
    units: int
    """How many are inside."""
    parameters: float
    """How many they have."""
    all_units: int
    """Units of the whole model."""
    all_parameters: float
    """Their parameters."""
    model: float
    """m(model): the metric's mean over prompts."""
    none: float
    """m(none)."""
    metrics: dict[str, float]
    """m(C) by kind of masks outside: ablated, stochastic, random, adversarial."""
    faithfulness: dict[str, float]
    """f(C) by kind of masks outside."""
    random_circuits: list[float]
    """f of random circuits of as many units."""
    complement: float
    """f of everything but the circuit: 0 where the circuit is complete."""
    incompleteness: float
    """Mean |f(C without K) - f(all without K)| over random halves K of the circuit."""
    drops: list[float]
    """f with the unit minus f without it, f(C) - f(C without v), for units v (at most 64 of them): small ones are not
    needed."""
    groups: dict[str, float]
    """f(C) by template."""
    curve: list[list[float]]
    """[share of units, f] of the first units of the order, at MIB's sizes; empty where there is no order."""
    cpr: float | None
    """Area below the curve, by the trapezoid rule over shares: what small circuits reach (MIB)."""
    cmd: float | None
    """Area between the curve and 1: how far circuits are from the model at any size (MIB)."""
    seed: int
    """Of all that is drawn."""

    def check(self) -> None:
        if not self.random_circuits:
            raise ValueError("there are no random circuits")
        if self.metrics.keys() != self.faithfulness.keys() or any(len(place) != 2 for place in self.curve):
            raise ValueError("the metric and faithfulness are of other masks, or the curve is no list of pairs")

    def tables(self) -> list[Table]:
        found = {"nothing (the model)": (self.model, 1.0)}
        found |= {kind: (value, self.faithfulness[kind]) for kind, value in self.metrics.items()}
        found |= {"everything ablated": (self.none, 0.0)}
        rows = [[kind, *(f"{value:.3f}" for value in values)] for kind, values in found.items()]
        title = f"{self.task}: circuit of {self.granularity}, {self.method}"
        return [plain_table(title, "outside of the circuit", self.metric, "faithfulness", rows=rows)]

    def footnotes(self) -> list[str]:
        drops = sorted(self.drops)
        lines = [
            f"{self.units} of {self.all_units} units, {self.parameters:,.0f} of {self.all_parameters:,.0f} parameters; "
            f"{self.direction}, value {self.value}, delta {self.delta:g}, {self.prompts} prompts.",
            f"Random circuits of that size: f {min(self.random_circuits):.3f} to {max(self.random_circuits):.3f}. "
            f"Complement: {self.complement:.3f}. Incompleteness: {self.incompleteness:.3f}.",
        ]
        if drops:
            middle, ends = drops[len(drops) // 2], f"({drops[0]:.3f} to {drops[-1]:.3f})"
            lines.append(f"One unit removed: f falls by {middle:.3f} in the median {ends}.")
        if self.groups:
            lines.append(f"By template: f {min(self.groups.values()):.3f} to {max(self.groups.values()):.3f}.")
        if self.cpr is not None and self.cmd is not None:
            lines.append(f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}.")
        return lines


def find_circuit(
    model: Any,
    decomposition: Decomposition,
    task: Task,
    *,
    metric: TaskMetric | None = None,
    method: Literal["gradients", "integrated", "masks"] | LearnedMasks = "gradients",
    scores: Mapping[str, Float[Tensor, " _C"]] | None = None,
    units: Units | None = None,
    faithfulness: float = 0.9,
    stochastic: float | None = 0.8,
    value: Value = "zero",
    delta: float = 1.0,
    prune: bool = True,
    held_out: Task | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Circuit:
    """The units that keep a task's metric, found on one set of prompts and measured on another.

    Args:
        decomposition: Made from its weights; factors stay as they are.
        metric: Of the answers' logits; None: the task's own.
        method: What orders units: `gradients` (absolute values, under random masks between one half and 1), `integrated`
            (signed, over one mask that all share; they sum to the metric's difference), or `masks` (learned against an
            adversary).
        scores: Given in place of the method: one number for each component by site, larger for what must stay.
        units: What a circuit is made of; None: single components.
        faithfulness: f that the circuit must reach with all others ablated, where no prompt counts for more than the model
            itself makes of it: one that overshoots does not make up for one that fails.
        stochastic: f that it must reach with all others masked at random; None: whatever it is.
        value: What ablated components' activations become.
        prune: Remove what is not needed, one unit after the other.
        held_out: Prompts to measure on; None: the same.
        seed: Of masks and random circuits.

    Raises:
        SettingError: No such method, or thresholds that no circuit can reach.
        NormalisationError: m(model) and m(none) are too close to be told apart.
        DataError: `corrupt` without corrupt prompts.
        TargetMismatchError, DeviceError: As `patched`.
    """
    if not 0.0 < faithfulness < 1.0 or (stochastic is not None and not stochastic < 1.0):
        raise SettingError(f"Wanted faithfulness lies between 0 and 1; given {faithfulness} and {stochastic}.")
    runs = _runs(model, decomposition, task, metric, units, value, delta)
    with runs.frozen():
        with torch.no_grad():
            best = runs.values()
        full, none = best.mean().item(), runs.mean(torch.zeros(len(runs.units), device=runs.adapter.device))
        normalised_faithfulness(full, full, none)
        sign = 1.0 if full > none else -1.0
        name, order = _order(runs, method, scores, sign, seed, progress)

        def good(inside: Tensor) -> bool:
            if normalised_faithfulness(capped_mean(runs, inside, best, sign), full, none) < faithfulness:
                return False
            if stochastic is None:
                return True
            value = stochastic_value(runs, inside, _generator(runs, seed), draws=1)
            return normalised_faithfulness(value, full, none) >= stochastic

        chosen = order[: shortest_good(order, good)]
        if prune:
            chosen = pruned(chosen, len(runs.units), good, progress)
    measured = runs if held_out is None else _runs(model, decomposition, held_out, metric, runs.units, value, delta)
    return _measured(measured, chosen, order, f"{name}, pruned" if prune else name, value, seed)


def evaluate_circuit(
    model: Any,
    decomposition: Decomposition,
    task: Task,
    components: Mapping[str, Sequence[int]],
    *,
    metric: TaskMetric | None = None,
    units: Units | None = None,
    value: Value = "zero",
    delta: float = 1.0,
    seed: int = 0,
) -> Circuit:
    """The measures of a circuit that is given: components by site. Arguments as in `find_circuit`.

    Raises:
        NoMatchingSiteError, ComponentIndexError: There is no such site or component.
        SettingError: Some units are inside in part only, or there is none.
        NormalisationError, TargetMismatchError, DeviceError: As `find_circuit`.
    """
    runs = _runs(model, decomposition, task, metric, units, value, delta)
    inside = chosen_components(decomposition, components)
    chosen = sorted({unit for name, own in inside.items() for unit in runs.units.owner[name][own].tolist()})
    whole = runs.units.members(torch.tensor(chosen))
    if any(set(whole[name]) - set(inside.get(name, ())) for name in whole):
        raise SettingError(f"Some {runs.units.granularity} are inside in part only; give all components of each.")
    return _measured(runs, torch.tensor(chosen, device=runs.adapter.device), None, "given", value, seed)


def _runs(
    model: Any, decomposition: Decomposition, task: Task, metric: TaskMetric | None, units: Units | None, value: Value,
    delta: float,
) -> TaskRuns:  # fmt: skip
    adapter = checked_adapter(model, decomposition, task.clean, task.attention_mask)
    need_answers(adapter, task)
    task = task.to(adapter.device)
    return TaskRuns(
        adapter, decomposition, units or component_units(decomposition), task, metric or default_metric(task), delta,
        baseline_of(adapter, decomposition, task, value),
    )  # fmt: skip


def _order(
    runs: TaskRuns, method: Any, scores: Any, sign: float, seed: int, progress: bool
) -> tuple[str, Int[Tensor, " n"]]:
    """Units, the most needed first, and what ordered them."""
    if scores is not None:
        found = torch.zeros(len(runs.units), device=runs.adapter.device)
        for name, owner in runs.units.owner.items():
            found.index_add_(0, owner.to(found.device), scores[name].to(found))
        return "given scores", found.argsort(descending=True)
    if method == "gradients":
        return "gradients", mask_sensitivities(runs, _generator(runs, seed)).argsort(descending=True)
    if method == "integrated":
        return "integrated gradients", (sign * mask_gradients(runs)).argsort(descending=True)
    if method == "masks" or isinstance(method, LearnedMasks):
        learned = method if isinstance(method, LearnedMasks) else LearnedMasks()
        return "learned masks", learned.scores(runs, _generator(runs, seed), progress).argsort(descending=True)
    raise SettingError(f"method is 'gradients', 'integrated', 'masks' or LearnedMasks(...); given {method!r}.")


def _generator(runs: TaskRuns, seed: int) -> torch.Generator:
    return torch.Generator(device=runs.adapter.device).manual_seed(seed)


def _measured(
    runs: TaskRuns, chosen: Int[Tensor, " some"], order: Int[Tensor, " n"] | None, method: str, value: Value, seed: int
) -> Circuit:
    n, generator = len(runs.units), _generator(runs, seed + 1)
    inside = members(chosen, n)
    with runs.frozen():
        full, none = runs.mean(), runs.mean(torch.zeros_like(inside))

        def f(metric: float) -> float:
            return normalised_faithfulness(metric, full, none)

        sign = 1.0 if full > none else -1.0
        metrics = {
            "ablated": runs.mean(inside),
            "stochastic": stochastic_value(runs, inside, generator),
            "random": stochastic_value(runs, inside, generator, coins=True),
            f"adversarial, {STEPS} steps": adversarial_value(runs, inside, generator, STEPS, sign),
        }

        def shuffled(n: int) -> Tensor:
            return torch.randperm(n, generator=generator, device=inside.device)

        shuffles = [shuffled(n) for _ in range(RANDOM)]
        halves, apart = [chosen[shuffled(len(chosen))] for _ in range(4)], []
        for half in halves:
            removed = members(half[: max(1, len(half) // 2)], n)
            apart.append(abs(f(runs.mean(inside - removed)) - f(runs.mean(1.0 - removed))))
        single = halves[0][:SINGLE]
        drops = [f(metrics["ablated"]) - f(runs.mean(inside - members(unit[None], n))) for unit in single]
        curve, sizes = [], [max(1, round(share * n)) for share in MIB_SIZES]
        if order is not None:
            curve = [[k / n, f(runs.mean(members(order[:k], n)))] for k in sizes]
        return Circuit(
            task=runs.task.name, metric=getattr(runs.metric, "name", type(runs.metric).__name__),
            granularity=runs.units.granularity, method=method, direction="noising", value=value, delta=runs.delta,
            prompts=len(runs.task.clean), components=runs.units.members(chosen),
            labels=[runs.units.labels[i] for i in chosen.tolist()], units=len(chosen),
            parameters=runs.units.parameters[chosen.cpu()].sum().item(), all_units=n,
            all_parameters=runs.units.parameters.sum().item(), model=full, none=none, metrics=metrics,
            faithfulness={kind: f(metric) for kind, metric in metrics.items()},
            random_circuits=[f(runs.mean(members(order[: len(chosen)], n))) for order in shuffles],
            complement=f(runs.mean(1.0 - inside)), incompleteness=sum(apart) / len(apart), drops=drops,
            groups=_by_group(runs, inside), curve=curve, cpr=_area(curve, lambda y: y),
            cmd=_area(curve, lambda y: abs(1.0 - y)), seed=seed,
        )  # fmt: skip


def _area(curve: Sequence[Sequence[float]], of: Callable[[float], float]) -> float | None:
    """Trapezoids over the shares of units, linear axis."""
    return sum((b[0] - a[0]) * (of(a[1]) + of(b[1])) / 2.0 for a, b in itertools.pairwise(curve)) if curve else None


def _by_group(runs: TaskRuns, inside: Float[Tensor, " n"]) -> dict[str, float]:
    """f of each template whose prompts the model and the empty circuit tell apart."""
    if not runs.task.groups:
        return {}
    with torch.no_grad():
        values = [runs.values(keep) for keep in (inside, None, torch.zeros_like(inside))]
    found = {}
    for group in dict.fromkeys(runs.task.groups):
        rows = torch.tensor([g == group for g in runs.task.groups], device=inside.device)
        c, full, none = (v[rows].mean().item() for v in values)
        if abs(full - none) > 1e-3:
            found[group] = (c - none) / (full - none)
    return found
