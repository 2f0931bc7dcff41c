"""Everything that the next step of a run depends on, and what one step does to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.methods.base import LossReport, Method, ParameterGroup
from tl_paramdecomp.training.data import BatchSource


@dataclass
class TrainingState:
    """A run between two steps; a checkpoint holds all of it."""

    decomposition: Any
    groups: list[ParameterGroup]
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
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

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.decomposition.parameters()).device

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as `{number of the parameter}.{name}`."""
        state = self.optimiser.state_dict()["state"]
        return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}

    def load_optimiser_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimiser_tensors` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})


def start_state(
    method: Method[Any],
    decomposition: Any,
    device: torch.device,
    seed: int,
    source: BatchSource,
    background: BatchSource | None,
) -> TrainingState:
    """A run before its first step; only what the method trains has gradients."""
    groups = method.parameter_groups(decomposition)
    for parameter in (p for group in groups for p in group.parameters):
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.lr} for g in groups], weight_decay=0.0, fused=_can_fuse(groups)
    )
    generator = torch.Generator(device=device).manual_seed(seed)
    return TrainingState(decomposition, groups, optimiser, generator, source, background)


def _can_fuse(groups: Sequence[ParameterGroup]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g.parameters)


def optimise(groups: Sequence[ParameterGroup], optimiser: torch.optim.Optimizer, factor: float) -> dict[str, Tensor]:
    """One optimiser step with each group's gradient clipped apart; returns the norms before clipping.

    A norm that is not finite clips nothing, so that the gradients at fault can still be told from the others.
    """
    norms = {}
    for group, settings in zip(groups, optimiser.param_groups, strict=True):
        settings["lr"] = group.lr * factor
        norm = nn.utils.get_total_norm([p.grad for p in group.parameters if p.grad is not None])
        if group.clip is not None:
            nn.utils.clip_grads_with_norm_(group.parameters, group.clip, norm.nan_to_num(nan=0.0, posinf=0.0))
        norms[group.name] = norm
    optimiser.step()
    return norms


def figures_of(report: LossReport, norms: Mapping[str, Tensor], state: TrainingState) -> dict[str, float]:
    """What is worth logging of a step."""
    named = {
        "loss": report.total,
        **report.terms,
        **report.figures(),
        **{f"grad_norm_{n}": v for n, v in norms.items()},
    }
    rates = {
        f"lr_{g.name}": settings["lr"] for g, settings in zip(state.groups, state.optimiser.param_groups, strict=True)
    }
    return {name: float(value.detach()) for name, value in named.items()} | rates
