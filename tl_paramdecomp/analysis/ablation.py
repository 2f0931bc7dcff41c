"""Which component matters here: every component of a site ablated on its own, many at once as rows of one batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.patching.target import checked_adapter

RowMetric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
"""From logits to one number per row, such as the log probability of an answer at the last position."""


class ComponentEffect(NamedTuple):
    """One component and what ablating it changes."""

    site: str
    component: int
    effect: float
    """Metric with the component ablated minus metric of the model."""


def ablation_effects(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "1 pos"],
    metric: RowMetric,
    rows_at_once: int = 128,
) -> dict[str, Float[Tensor, " C"]]:
    """Change of a metric when each component is ablated on its own at every position.

    Row r of a batch runs the same prompt with component r removed, so that a site costs C / `rows_at_once` passes.

    Raises:
        TargetMismatchError, DeviceError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    found = {}
    with torch.no_grad():
        base = metric(adapter.forward(tokens))
        for name, components in decomposition.items():
            effects = []
            for some in torch.arange(components.n_components).split(rows_at_once):
                m = torch.ones(len(some), 1, components.n_components, dtype=components.V.dtype, device=tokens.device)
                m[torch.arange(len(some)), 0, some] = 0.0
                with patched(model, decomposition, decomposition.masks().with_values(name, m)):
                    effects.append(metric(adapter.forward(tokens.expand(len(some), -1))) - base)
            found[name] = torch.cat(effects)
    return found


def strongest(effects: dict[str, Float[Tensor, " C"]], n: int = 1) -> list[ComponentEffect]:
    """The components whose ablation lowers the metric most, strongest first."""
    flat = [
        ComponentEffect(site, c, value) for site, values in effects.items() for c, value in enumerate(values.tolist())
    ]
    return sorted(flat, key=lambda effect: effect.effect)[:n]


def answer_log_prob(answers: tuple[int, ...]) -> RowMetric:
    """Log of the probability that the next token is one of the answers, at the last position."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return torch.log_softmax(logits[:, -1].float(), -1)[:, list(answers)].logsumexp(-1)

    return metric


def next_token_probs(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, " vocab"]:
    """Probabilities of the next token, of the model as it stands."""
    with torch.no_grad():
        return torch.softmax(adapt(model).forward(tokens)[0, -1].float(), -1)
