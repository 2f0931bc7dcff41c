"""What `evaluate` measures: figures under each kind of mask, the worst masks, and whether importance predicts effects.

With g the importances of a clean pass, a kind says which m in [0, 1] stands for each component:

    unmasked     1                      zero     0                   random   r, uniform, whatever g
    importance   g                      rounded  [g > threshold]     stochastic   g + (1 - g) r
    permuted     [g' > threshold], g' the importances of the site's components dealt out anew: a control

and each is run with the delta component absent, kept, or (stochastic, as in training) masked by a uniform number. Sums over
positions let parts of a batch add up to the whole.

The adversary has one source for each component, shared by all rows and positions of all batches: masks are m = g + (1 - g) s,
the delta mask is a source of its own. Sources start at random and climb the KL over the whole data by sign steps; a source
shared by everything can only find faults that are systematic. The worst sources that were seen are what counts, so that a
climb never ends below its start.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.methods.adversary import ascended, source_masks
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


# --- the adversary ----------------------------------------------------------------------------------------------------
def climb(batches: Callable[[], Iterable[LossStep]], steps: int, generator: torch.Generator) -> list[float]:
    """KL under random sources and after each step of projected gradient ascent, over batches given anew each time."""
    # steps of 2 / steps let sources cross [0, 1] and back
    size = min(1.0, 2.0 / steps)
    sources: dict[str, Tensor] = {}
    for name, g in ((name, i.lower) for name, i in next(iter(batches())).importances.items()):
        sources[name] = torch.rand(g.shape[-1] + 1, generator=generator, device=g.device, dtype=g.dtype)
    values = []
    for i in range(steps + 1):
        kl, gradients = _value_and_gradient(batches(), sources, wanted=i < steps)
        values.append(kl)
        sources = {name: ascended(sources[name], gradient, size) for name, gradient in gradients.items()}
    return values


def _value_and_gradient(
    batches: Iterable[LossStep], sources: dict[str, Tensor], wanted: bool
) -> tuple[float, dict[str, Tensor]]:
    """KL over all scored positions, and its gradient with respect to the sources where that is wanted."""
    total, count = 0.0, 0
    leaves = {name: s.detach().requires_grad_(wanted) for name, s in sources.items()}
    gradients: dict[str, Tensor] = {}
    for step in batches:
        positions = len(step.divergence.target)
        with torch.set_grad_enabled(wanted):
            kl = step.divergence.of(step.run_masked(source_masks(step, leaves, detached=True))) * positions
        if wanted and kl.requires_grad:  # nothing that is compared may come after the sites
            found = torch.autograd.grad(kl, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(leaves, found, strict=True):
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        total, count = total + kl.item(), count + positions
    return total / count, gradients


# --- specificity ------------------------------------------------------------------------------------------------------
class Specificity(NamedTuple):
    """Importance against measured effect, over pairs of a component and a position."""

    auroc: float | None
    """Chance that a pair with an effect has the higher importance than one without; None where there are not both."""
    spearman: float | None
    """Rank correlation; None where one side is constant."""
    important: float | None
    """Mean KL of ablating a component where its importance is above 0.5, nats."""
    unimportant: float | None
    """The same where it is below 0.01."""
    pairs: int


def specificity(
    importance: Float[Tensor, " pairs"], effect: Float[Tensor, " pairs"], threshold: float = 1e-3
) -> Specificity:
    """Figures of pairs; an effect, in nats, counts as one from the threshold on."""
    g, e = importance.double().flatten(), effect.double().flatten()
    return Specificity(auroc(g, e >= threshold), spearman(g, e), _mean(e[g > 0.5]), _mean(e[g < 0.01]), len(g))


def auroc(score: Float[Tensor, " n"], label: Bool[Tensor, " n"]) -> float | None:
    """Area under the ROC curve; ties count half (Mann-Whitney)."""
    yes, no = int(label.sum()), int((~label).sum())
    if not yes or not no:
        return None
    return ((ranks(score)[label].sum() - yes * (yes + 1) / 2) / (yes * no)).item()


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float | None:
    """Correlation of ranks, ties at their mean rank."""
    x, y = (ranks(t) - (len(t) + 1) / 2 for t in (a, b))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x @ y / scale).item() if scale > 0 else None


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


def _mean(values: Float[Tensor, " n"]) -> float | None:
    return values.mean().item() if len(values) else None
