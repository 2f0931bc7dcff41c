"""Warnings of runs that go where nothing more is learned: importances that are all 0 or all 1, and those that blow up.

The slope of g^p at g near 0 grows without bound where p < 1: with the importance function's gradients unclipped, a long run
may go well for hundreds of thousands of steps and then lose all it has learned, while the total loss hardly shows it.
"""

import statistics
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tl_paramdecomp.errors import CollapseWarning
from tl_paramdecomp.methods.method import ParameterGroup

LINES, STEPS, SHARE = 10, 100, 0.05
"""Importances must stay all alike for so many logged steps, so many steps, and such a share of the run."""
GROWTH, IN_A_ROW, MEMORY, FEWEST = 30.0, 3, 50, 10
"""Gradient norms must be so many times their median over the logged steps before, so often in a row; steps the median is over,
and how many it takes at least."""


class CollapseWatch:
    """Looks at logged figures, and warns once a run of each thing that goes wrong.

    Args:
        groups: What is trained.
        components: Components of all sites; None for a method that has no importances.
        method: The method's settings as JSON-able values.
        steps: Steps of the run.
    """

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
                f"importance minimality goes down to p = {self.power:g} < 1, and the importance function's gradients are not "
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
        self._alike = (kind, since, lines + 1) if kind == known else (kind, step, 1)
        kind, since, lines = self._alike
        if not kind or lines < LINES or step - since < self.patience:
            return
        if kind == "zeros":
            self._warn(
                kind, f"no component has been important at any position since step {since} (L0 = 0, step {step} now). Lower "
                "the coefficient of importance minimality or the importance function's learning rate.",
            )  # fmt: skip
        else:
            self._warn(
                kind, f"all {components} components have been important at every position since step {since} (step {step} "
                "now). Raise the coefficient of importance minimality, or see that reconstruction can succeed with fewer.",
            )  # fmt: skip

    def _look_at_norm(self, step: int, norm: float) -> None:
        usual = statistics.median(self._norms) if len(self._norms) >= FEWEST else float("inf")
        self._norms.append(norm)
        self._large = self._large + 1 if norm > GROWTH * usual > 0.0 else 0
        if self._large >= IN_A_ROW:
            power = "" if self.power is None else f" (p down to {self.power:g})"
            self._warn(
                "blow-up",
                f"the gradient norm of the importance function is {norm:.3g} at step {step}, where {usual:.3g} was usual: "
                f"importance minimality{power} may be about to undo what was learned. Begin anew with "
                "clip_importance=1.0.",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"{text[0].upper()}{text[1:]}", CollapseWarning, stacklevel=2)


def smallest_power(settings: Any) -> float | None:
    """The smallest p of any importance minimality in a method's settings; None where there is none."""
    found: list[float] = []
    if isinstance(settings, Mapping):
        if settings.get("type") == "ImportanceMinimality" and settings.get("penalty") == "power":
            found += [settings["p_start"], settings["p_end"]]
        found += _inside(settings.values())
    elif isinstance(settings, list | tuple):
        found += _inside(settings)
    return min(found, default=None)


def _inside(parts: Iterable[Any]) -> list[float]:
    return [power for power in map(smallest_power, parts) if power is not None]
