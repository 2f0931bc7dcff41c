"""Everything that the next step of a run depends on, and what one step does to it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tl_paramdecomp.data.sources import BatchSource
from tl_paramdecomp.methods.method import LossReport, Method, ParameterGroup
from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.parallel import ALONE, ProcessGroup
from tl_paramdecomp.training.distributed import brought_together, clip, like, whole


@dataclass
class TrainingState:
    """A run between two steps; a checkpoint holds all of it."""

    decomposition: Any
    groups: list[ParameterGroup]
    optimiser: torch.optim.Optimizer
    numbers: RandomNumbers
    """Draws every mask of the run."""
    source: BatchSource
    background: BatchSource | None = None
    """The second stream of rows, for methods that take one."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What the method remembers, such as an adversary's sources."""
    done: int = 0
    """Steps taken."""
    settled: bool = True
    """False while a step is under way: what is here then belongs to no number of steps."""
    processes: ProcessGroup = ALONE
    accumulate: int = 1
    """Micro-batches of every process."""
    goes_over_rows: Callable[[str], bool] = lambda key: False
    """Whether what is remembered under a key has an entry for each row, so that each process has its own."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.decomposition.parameters()).device

    @property
    def division(self) -> dict[str, int]:
        """Among how many a batch is divided: processes, and micro-batches of each."""
        return {"processes": self.processes.world, "accumulate": self.accumulate}

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as `{number of the parameter}.{name}`; what is kept in shards is brought together."""
        state = self.optimiser.state_dict()["state"]
        return {f"{index}.{key}": whole(value) for index, values in state.items() for key, value in values.items()}

    def load_optimiser_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimiser_tensors` gave."""
        parameters = [p for group in self.groups for p in group.parameters]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = like(parameters[int(index)], tensor)
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})

    def saved(self) -> "SavedState":
        """What a checkpoint holds, brought together from all processes, each of which must ask."""
        memory = {
            key: torch.cat(self.processes.every(t)) if self.goes_over_rows(key) else t for key, t in self.memory.items()
        }
        places = {
            "data": self.source.state(),
            "background": None if self.background is None else self.background.state(),
        }
        return SavedState(
            self.done, self.device, brought_together(self.decomposition), self.optimiser_tensors(), memory,
            random_tensors(self.numbers, self.processes), places, self.division, [g.parameters for g in self.groups],
        )  # fmt: skip


class SavedState(NamedTuple):
    """A run between two steps, as a checkpoint holds it."""

    done: int
    device: torch.device
    decomposition: Any
    optimiser: dict[str, Tensor]
    memory: dict[str, Tensor]
    random: dict[str, Tensor]
    places: dict[str, Any]
    """Where the data stand."""
    division: dict[str, int]
    """Processes, and micro-batches of each."""
    parameters: list[Sequence[Tensor]]
    """What is trained, group by group."""


def start_state(
    method: Method[Any],
    decomposition: Any,
    numbers: RandomNumbers,
    source: BatchSource,
    background: BatchSource | None,
    processes: ProcessGroup = ALONE,
    accumulate: int = 1,
) -> TrainingState:
    """A run before its first step; only what the method trains has gradients."""
    groups = method.parameter_groups(decomposition)
    for parameter in (p for group in groups for p in group.parameters):
        parameter.requires_grad_(True)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g.parameters)
    optimiser = torch.optim.AdamW([{"params": g.parameters, "lr": g.lr} for g in groups], weight_decay=0.0, fused=fused)
    return TrainingState(
        decomposition, groups, optimiser, numbers, source, background,
        processes=processes, accumulate=accumulate, goes_over_rows=method.goes_over_rows,
    )  # fmt: skip


def optimise(groups: Sequence[ParameterGroup], optimiser: torch.optim.Optimizer, factor: float) -> dict[str, Tensor]:
    """One optimiser step with each group's gradient clipped apart; returns the norms before clipping.

    A norm that is not finite clips nothing, so that the gradients at fault can still be told from the others.
    """
    norms = {}
    for group, settings in zip(groups, optimiser.param_groups, strict=True):
        settings["lr"] = group.lr * factor
        norm = whole(nn.utils.get_total_norm([p.grad for p in group.parameters if p.grad is not None]))
        if group.clip is not None:
            clip(group.parameters, group.clip, norm.nan_to_num(nan=0.0, posinf=0.0))
        norms[group.name] = norm
    optimiser.step()
    return norms


def figures_of(report: LossReport, norms: Mapping[str, Tensor], state: TrainingState) -> dict[str, float]:
    """What is worth logging of a step."""
    norms = {f"grad_norm_{name}": norm for name, norm in norms.items()}
    named = {"loss": report.total, **report.terms, **report.figures(), **norms}
    groups = zip(state.groups, state.optimiser.param_groups, strict=True)
    rates = {f"lr_{group.name}": settings["lr"] for group, settings in groups}
    return {name: float(value.detach()) for name, value in named.items()} | rates


def random_tensors(numbers: RandomNumbers, processes: ProcessGroup) -> dict[str, Tensor]:
    """The state of the masks' generators of every process, and of this one's global ones of torch, CUDA, numpy and Python.

    Data code draws from the global ones.
    """
    found = {"torch": torch.get_rng_state()}
    for name, state in numbers.own.state().items():
        for rank, each in enumerate(processes.every(state)):
            found[f"masks.{rank}.{name}"] = each
    if numbers.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(numbers.device)
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    if kind == "MT19937":  # a user may have put another kind there
        found["numpy"] = torch.tensor([*np.asarray(keys).tolist(), place, has_gauss], dtype=torch.int64)
        found["numpy.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    version, words, gauss = random.getstate()
    found["python"] = torch.tensor([version, *words], dtype=torch.int64)
    found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    return found


def set_random(
    tensors: Mapping[str, Tensor], numbers: RandomNumbers, processes: ProcessGroup, step: int, as_before: bool = True
) -> None:
    """Put every source where `random_tensors` found it; the masks begin anew where batches are not divided as they were.
    KeyError or RuntimeError where something is missing, or is of a device of another kind."""
    if as_before:
        own = f"masks.{processes.rank}."
        state = {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
        numbers.own.restore({"": state.pop(""), **state})
    else:
        numbers.begin_anew(processes.rank, step)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and numbers.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], numbers.device)
    if "numpy" in tensors:
        *keys, place, has_gauss = tensors["numpy"].tolist()
        gauss = tensors["numpy.gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    version, *words = tensors["python"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python.gauss"].tolist()), None)))
