"""Does importance predict what ablating a component does? Measured one component at a time, position by position."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
