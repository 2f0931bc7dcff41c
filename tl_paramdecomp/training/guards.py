"""What stops a run that goes wrong, and warns of one that is about to.

1. After every step one check, on the device, of all losses, gradient norms and parameters; only its answer is read back.
2. Where it fails, what is at fault is looked for: terms, gradients by parameter, parameters.
3. The run stops there (`stop`), or the step is taken back as if it had not been, and the run goes on (`skip`).
4. Nothing that is not finite goes into a checkpoint.
5. A warning says where importances are all 0 or all 1, or blow up: the slope of g^p at g near 0 has no bound where p < 1, and
   with the importance function's gradients unclipped a long run may lose all it has learned, while the loss hardly shows it.
"""

import statistics
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_paramdecomp.errors import CollapseWarning, DivergedError
from tl_paramdecomp.methods.method import LossReport, ParameterGroup
from tl_paramdecomp.training.checkpoint import readable, state_tensors
from tl_paramdecomp.training.config import OnNonfinite
from tl_paramdecomp.training.distributed import own_part
from tl_paramdecomp.training.state import SavedState, TrainingState

NAMED = 3
"""Parameters that a message names before it counts."""
ADVICE = (
    "Lower the learning rates or clip gradients, in a new run_dir; or let the same call go on with on_nonfinite='skip', which "
    "leaves such steps out."
)


class FiniteGuard:
    """Sees that every step leaves finite numbers; to take a step back, `skip` keeps a copy of all that it changes."""

    def __init__(self, on_nonfinite: OnNonfinite = "stop", max_skips: int = 10) -> None:
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self.skipped, self.in_a_row = 0, 0
        self.fault = ""
        """What was wrong with the step that was last taken back."""
        self._before: Snapshot | None = None

    def before_step(self, state: TrainingState) -> None:
        """Note what the step may have to be taken back to."""
        if self.on_nonfinite == "skip":
            self._before = Snapshot(state)

    def after_step(self, report: LossReport, norms: Mapping[str, Tensor], state: TrainingState, kept: str) -> bool:
        """Whether the step stands; otherwise the state is as before it. `kept` tells of the last good checkpoint. DivergedError
        where something is not finite, and steps are not taken back, or too many were, or it was so before."""
        before, self._before = self._before, None
        if not state.processes.any_of(not bool(finite(report, norms, state)))[0]:
            self.in_a_row = 0
            return True
        step, self.fault = state.done + 1, fault_of(report, norms, state)
        if before is None:
            raise DivergedError(f"At step {step}, {self.fault} {kept} {ADVICE}")
        before.put_back(state)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if bad := _nonfinite_parameters(state):
            raise DivergedError(
                f"Before step {step}, {_listed(bad)} was not finite, which no step changes. {kept} {ADVICE}"
            )
        if self.in_a_row > self.max_skips:
            raise DivergedError(
                f"{self.in_a_row} steps in a row were not finite (max_skips={self.max_skips}). At step {step}, {self.fault} "
                f"{kept} Lower the learning rates or clip gradients, in a new run_dir."
            )
        return False

    def check(self, state: SavedState, kept: str) -> None:
        """Raise DivergedError rather than save what is not finite."""
        numbers = {name: t for name, t in state_tensors(state) if t.is_floating_point() and t.numel()}
        sound = torch.stack([t.isfinite().all().to(state.device) for t in numbers.values()])
        if not bool(sound.all()):
            bad = [name for name, is_sound in zip(numbers, sound.tolist(), strict=True) if not is_sound]
            raise DivergedError(
                f"After step {state.done}, {_listed(bad)} is not finite, and is not saved. {kept} {ADVICE}"
            )

    def counts(self) -> dict[str, int]:
        """What a resumed run must know."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Take over another's counts."""
        self.skipped, self.in_a_row = int(counts.get("skipped", 0)), int(counts.get("in_a_row", 0))


class Snapshot:
    """Copies of everything a step changes, besides random numbers and the data's position."""

    def __init__(self, state: TrainingState) -> None:
        self.decomposition = _copies(state.decomposition.state_dict())
        self.optimiser = {p: _copies(values) for p, values in state.optimiser.state.items()}
        self.memory = _copies(state.memory)

    @torch.no_grad()
    def put_back(self, state: TrainingState) -> None:
        """Make the state what it was."""
        for name, tensor in state.decomposition.state_dict().items():
            tensor.copy_(self.decomposition[name])
        state.optimiser.state.clear()
        state.optimiser.state.update(self.optimiser)
        state.memory = self.memory


def _copies(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in tensors.items()}


def finite(report: LossReport, norms: Mapping[str, Tensor], state: TrainingState) -> Bool[Tensor, ""]:
    """Whether all losses, gradients and parameters of a step are finite; nothing is read back from the device.

    Squares of gradients are what the optimiser keeps: where those overflow, so do the norms. Of parameters in shards each
    process looks at its own: the largest of NaN and a number may be the number, where processes are asked for it.
    """
    parts = [own_part(p.detach()) for group in state.groups for p in group.parameters]
    largest = nn.utils.get_total_norm([part for part in parts if part.numel()], float("inf"))
    values: list[Float[Tensor, ""]] = [report.total, *report.terms.values(), *norms.values(), largest]
    return torch.stack([value.detach().isfinite().reshape(()).to(state.device) for value in values]).all()


def fault_of(report: LossReport, norms: Mapping[str, Tensor], state: TrainingState) -> str:
    """A sentence on what of a step is not finite: the first of losses, gradients and parameters, and where."""
    terms = [name for name, value in report.terms.items() if not bool(value.isfinite().all())]
    gradients = _not_finite(state, {name: p.grad for name, p in _named(state).items() if p.grad is not None})
    if terms or not bool(report.total.isfinite()):
        where = f", nor is the gradient of {_listed(gradients)}" if gradients else ""
        return f"the loss is {report.total.item()}: {', '.join(terms) or 'the sum'} is not finite{where}."
    if gradients:
        return f"the gradient of {_listed(gradients)} is not finite, though all losses are."
    if large := [name for name, norm in norms.items() if not bool(norm.isfinite())]:
        return f"the gradient norm of {', '.join(large)} is too large for the optimiser."
    return f"{_listed(_nonfinite_parameters(state))} is not finite after the step, though losses and gradients are."


def _nonfinite_parameters(state: TrainingState) -> list[str]:
    return _not_finite(state, _named(state))


def _not_finite(state: TrainingState, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are not finite on any process."""
    bad = state.processes.any_of(*(not bool(own_part(t.detach()).isfinite().all()) for t in tensors.values()))
    return [name for name, is_bad in zip(tensors, bad, strict=True) if is_bad]


def _named(state: TrainingState) -> dict[str, Tensor]:
    return {readable(name): p for name, p in state.decomposition.named_parameters()}


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


LINES, STEPS, SHARE = 10, 100, 0.05
"""Importances must stay all alike for so many logged steps, so many steps, and such a share of the run."""
GROWTH, IN_A_ROW, MEMORY, FEWEST = 30.0, 3, 50, 10
"""Gradient norms must be so many times their median over the logged steps before, so often in a row; steps the median is over,
and how many it takes at least."""


class CollapseWatch:
    """Looks at logged figures, and warns once a run of each thing that goes wrong; `components` is None without importances."""

    def __init__(
        self, groups: Sequence[ParameterGroup], components: int | None, method: Mapping[str, Any], steps: int
    ) -> None:
        self.components, self.patience = components, max(STEPS, SHARE * steps)
        self.unclipped = any(group.name == "importance" and group.clip is None for group in groups)
        self.power = smallest_power(method)
        self.warned: set[str] = set()
        """What was warned of."""
        self._alike: tuple[str, int, int] = ("", 0, 0)
        """All 0 or all 1; since which step; for how many logged steps."""
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._large = 0

    def begin(self) -> None:
        """Look at the settings."""
        if self.unclipped and self.power is not None and self.power < 1.0:
            self._warn(
                "settings",
                f"Importance minimality goes down to p = {self.power:g} < 1, and the importance function's gradients are not "
                "clipped (clip_importance=None): its slope at importances near 0 has no bound. Set clip_importance=1.0.",
            )

    def look(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at the figures of a logged step."""
        if self.components is not None and "l0" in figures:
            self._look_at_l0(step, figures["l0"], self.components)
        if self.unclipped and "grad_norm_importance" in figures:
            self._look_at_norm(step, figures["grad_norm_importance"])

    def _look_at_l0(self, step: int, l0: float, components: int) -> None:
        kind = "zeros" if l0 == 0.0 else "ones" if l0 >= components * (1.0 - 1e-6) else ""
        known, since, lines = self._alike
        since, lines = (since, lines + 1) if kind == known else (step, 1)
        self._alike = (kind, since, lines)
        texts = {
            "zeros": f"No component has been important at any position since step {since} (L0 = 0, step {step} now). Lower "
            "the coefficient of importance minimality or the importance function's learning rate.",
            "ones": f"All {components} components have been important at every position since step {since} (step {step} "
            "now). Raise the coefficient of importance minimality, or see that reconstruction can succeed with fewer.",
        }
        if kind and lines >= LINES and step - since >= self.patience:
            self._warn(kind, texts[kind])

    def _look_at_norm(self, step: int, norm: float) -> None:
        usual = statistics.median(self._norms) if len(self._norms) >= FEWEST else float("inf")
        self._norms.append(norm)
        self._large = self._large + 1 if norm > GROWTH * usual > 0.0 else 0
        if self._large >= IN_A_ROW:
            power = "" if self.power is None else f" (p down to {self.power:g})"
            self._warn(
                "blow-up",
                f"The gradient norm of the importance function is {norm:.3g} at step {step}, where {usual:.3g} was usual: "
                f"importance minimality{power} may be about to undo what was learned. Begin anew with clip_importance=1.0.",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(text, CollapseWarning, stacklevel=2)


def smallest_power(settings: Any) -> float | None:
    """The smallest p of any importance minimality in a method's settings; None where there is none."""
    found: list[float | None] = []
    if isinstance(settings, Mapping):
        if settings.get("type") == "ImportanceMinimality" and settings.get("penalty") == "power":
            found = [settings["p_start"], settings["p_end"]]
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        found += map(smallest_power, settings)
    return min((power for power in found if power is not None), default=None)
