"""How far the model with masked components is from the target, in the field's units."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.methods.base import KL_NEEDS
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.patching.interventions import MaskKind, importance_masks
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows


class Sparsity(NamedTuple):
    """How many components matter."""

    l0: dict[str, float]
    """Components with importance above the threshold, mean over positions, by site."""
    alive: dict[str, int]
    """Components above the threshold at one position at least, by site."""


def kl_divergence(
    target: Float[Tensor, "batch pos vocab"],
    output: Float[Tensor, "batch pos vocab"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> float:
    """KL(target || output) in nats, summed over the vocabulary, mean over the positions that count."""
    log_p, log_q = (torch.log_softmax(logits.float(), -1) for logits in (target, output))
    per_position = (log_p.exp() * (log_p - log_q)).sum(-1)
    scored = torch.ones_like(per_position) if attention_mask is None else attention_mask.to(per_position)
    return ((per_position * scored).sum() / scored.sum()).item()


def masked_kl(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    masks: Masks,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> float:
    """KL of the model with masked components from the model itself, on these tokens.

    Raises:
        UnsupportedModelError: The model gives no logits.
        TargetMismatchError, DeviceError: As `patched`.
    """
    check_rows(tokens, attention_mask)
    adapter = adapt(model)
    need_logits(adapter, KL_NEEDS, "evaluate compares outputs by their mean square")
    with torch.no_grad():
        target = adapter.forward(tokens, attention_mask)
        with patched(model, decomposition, masks):
            return kl_divergence(target, adapter.forward(tokens, attention_mask), attention_mask)


def kl_by_mask_kind(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    kinds: Sequence[MaskKind] = ("unmasked", "stochastic", "importance", "rounded", "adversarial", "random", "zero"),
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """KL under each kind of mask; `stochastic` and `adversarial` of one draw each.

    Raises:
        NoImportanceError: A kind needs importances and there are none.
    """
    return {
        kind: masked_kl(
            model,
            decomposition,
            tokens,
            importance_masks(model, decomposition, tokens, kind, seed=seed, attention_mask=attention_mask),
            attention_mask,
        )
        for kind in kinds
    }


def sparsity(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    threshold: float = 0.1,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Sparsity:
    """L0 per position and number of alive components of every site.

    Raises:
        NoImportanceError: The decomposition has no importance function.
    """
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition)
    with torch.no_grad():
        inputs = adapter.capture(tokens, list(decomposition), attention_mask).inputs
        l0, alive = {}, {}
        for name, importance in decomposition.importances(inputs, attention_mask).items():
            active = importance.lower > threshold
            active = active.flatten(0, -2) if attention_mask is None else active[attention_mask.bool()]
            l0[name] = active.sum(-1).float().mean().item()
            alive[name] = int(active.any(0).sum())
    return Sparsity(l0, alive)
