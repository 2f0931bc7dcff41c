"""How the model runs under each kind of mask: sums over positions, so that parts of a batch add up to the whole.

With g the importances of a clean pass, a kind says which m in [0, 1] stands for each component:

    unmasked     1                      zero     0                   random   r, uniform, whatever g
    importance   g                      rounded  [g > threshold]     stochastic   g + (1 - g) r
    permuted     [g' > threshold], g' the importances of the site's components dealt out anew: a control

and each is run with the delta component absent, kept, or (stochastic, as in training) masked by a uniform number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.methods.divergence import KL, kl, mean_square
from tl_paramdecomp.methods.step import LossStep, Measure, SiteMasks

Delta = Literal["absent", "kept", "masked"]
Kind = Literal["unmasked", "importance", "rounded", "stochastic", "random", "zero", "permuted"]


@dataclass(frozen=True)
class MaskKind:
    """One way of masking all components."""

    kind: Kind
    delta: Delta = "absent"
    threshold: float | None = None
    """Of `rounded` and `permuted`."""

    @property
    def name(self) -> str:
        """In tables."""
        return self.kind if self.threshold is None else f"{self.kind} {self.threshold:g}"


DELTAS: tuple[Delta, Delta] = ("absent", "kept")
KINDS = (
    *(MaskKind(kind, delta) for kind in ("unmasked", "importance") for delta in DELTAS),
    *(MaskKind("rounded", delta, at) for at in (0.0, 0.1, 0.5) for delta in DELTAS),
    *(MaskKind("stochastic", delta) for delta in ("masked", *DELTAS)),
    *(MaskKind(kind, delta) for kind in ("random", "zero") for delta in DELTAS),
    MaskKind("permuted", "absent", 0.1),
)
"""Of the whole model."""
SITE_KINDS = (
    MaskKind("unmasked"), MaskKind("importance"), MaskKind("rounded", threshold=0.1), MaskKind("stochastic", "masked"),
    MaskKind("zero"),
)  # fmt: skip
"""Of one matrix at a time."""


class Sums(NamedTuple):
    """Totals over scored outputs, in nats; they add up."""

    kl: float = 0.0
    agree: float = 0.0
    """Positions whose likeliest token is the target's."""
    positions: int = 0
    ce: float = 0.0
    """Cross-entropy of the row's own next tokens."""
    predicted: int = 0
    """Positions that have a next token."""
    square: float = 0.0
    """Mean square over the width, where outputs are no logits."""

    def plus(self, other: "Sums") -> "Sums":
        """Totals of both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))  # type: ignore[arg-type]

    def mean(self, measure: Measure) -> float:
        """KL, or mean square, of one output."""
        return (self.kl if measure == "kl" else self.square) / self.positions


class Target(NamedTuple):
    """What the model itself gives where outputs are scored, one after the other."""

    log_p: Float[Tensor, "n width"]
    """Log probabilities of next tokens; or outputs as they are, where they are no logits."""
    following: Int[Tensor, " n"] | None
    """The row's own next token, -1 where there is none, or it is padding; None where outputs are no logits."""

    @classmethod
    def of(cls, step: LossStep) -> "Target":
        """The target of a step, as its divergence compares outputs."""
        if not isinstance(step.divergence, KL):
            return cls(step.divergence.target, None)
        following = torch.full_like(step.tokens, -1)
        following[:, :-1] = step.tokens[:, 1:]
        if step.scored is not None:
            following[:, :-1][~step.scored[:, 1:]] = -1
        rows = following.flatten() if step.scored is None else following[step.scored]
        return cls(step.divergence.target, rows)

    def distances(self, output: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """KL of other logits at the same positions from it; or mean square over the width."""
        if self.following is not None:
            return kl(self.log_p, torch.log_softmax(output.to(self.log_p.dtype), -1))
        return mean_square(self.log_p, output)

    def sums(self, output: Float[Tensor, "n width"]) -> Sums:
        """How far other outputs at the same positions are from it."""
        if self.following is None:
            return Sums(positions=len(output), square=self.distances(output).double().sum().item())
        log_q = torch.log_softmax(output.to(self.log_p.dtype), -1)
        agree = self.log_p.argmax(-1) == log_q.argmax(-1)
        followed = self.following >= 0
        ce = -log_q[followed].gather(-1, self.following[followed].unsqueeze(-1))
        distance = kl(self.log_p, log_q).double().sum().item()
        return Sums(distance, int(agree.sum()), len(log_q), ce.double().sum().item(), int(followed.sum()))


def masks_of(
    step: LossStep, kind: MaskKind, generator: torch.Generator, dealt: Mapping[str, Int[Tensor, " C"]] | None = None
) -> SiteMasks:
    """Masks of every site; `dealt` says which component's importance each one is given, for `permuted`."""
    masks = {}
    for name, importance in step.importances.items():
        g = importance.lower
        if kind.kind == "permuted":
            assert dealt is not None
            g = g[..., dealt[name]]
        if kind.kind in ("rounded", "permuted"):
            g = (g > (kind.threshold or 0.0)).to(g)
        drawn = kind.kind in ("stochastic", "random")
        q = torch.rand(g.shape, generator=generator, device=g.device, dtype=g.dtype) if drawn else g.new_ones(())
        if kind.kind == "unmasked":
            q = g.new_zeros(())
        if kind.kind in ("random", "zero"):
            g = torch.zeros_like(g)
        a: Tensor | float = 1.0 if kind.delta == "absent" else 0.0
        if kind.delta == "masked":
            a = torch.rand(g.shape[:-1], generator=generator, device=g.device, dtype=g.dtype)
        masks[name] = InterpolatedMask(g, q, a)
    return masks
