"""What components do on given tokens: their activations and causal importances, from a clean forward pass."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows, resolve_name


class Sparsity(NamedTuple):
    """How many components matter."""

    l0: dict[str, float]
    """Components with importance above the threshold, mean over positions, by site."""
    alive: dict[str, int]
    """Components above the threshold at one position at least, by site."""


def component_acts(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, "batch ... C"]]:
    """Component activations h = x V of every site, of the model as it stands (other patches included).

    Raises:
        DtypeError, ShapeError: Tokens or mask are not token rows.
        TargetMismatchError, DeviceError: The model is not the decomposition's target, or is elsewhere.
    """
    with torch.no_grad():
        found = _inputs(model, decomposition, tokens, attention_mask)
        return {name: decomposition[name].acts(x) for name, x in found.items()}


def site_acts(
    model: Any,
    decomposition: Decomposition,
    site: str,
    tokens: Shaped[Tensor, "batch ..."],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    head: int | None = None,
) -> Float[Tensor, "batch ... C"]:
    """Component activations of one site, as `ActPatches.from_acts` takes them: by head where a head's part of x is patched."""
    name = resolve_name(decomposition.sites, site)
    components = decomposition[name]
    with torch.no_grad():
        x = checked_adapter(model, decomposition).capture(tokens, [name], attention_mask).inputs[name]
        return components.head_acts(x) if head is not None and components.site.head_side == "in" else components.acts(x)


def causal_importances(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, "batch ... C"]]:
    """Causal importances in [0, 1] of every component at every position.

    Raises:
        NoImportanceError: The decomposition has no importance function.
        DtypeError, ShapeError: Tokens or mask are not token rows.
        TargetMismatchError, DeviceError: The model is not the decomposition's target, or is elsewhere.
    """
    return {name: g.clamp(0.0, 1.0) for name, g in _importances(model, decomposition, tokens, attention_mask)}


def sparsity(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    threshold: float = 0.1,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Sparsity:
    """L0 per position and number of alive components of every site."""
    l0, alive = {}, {}
    for name, g in _importances(model, decomposition, tokens, attention_mask):
        active = at_real(g, attention_mask) > threshold
        l0[name] = active.sum(-1).float().mean().item()
        alive[name] = int(active.any(0).sum())
    return Sparsity(l0, alive)


def at_real(values: Float[Tensor, "batch *pos C"], attention_mask: Int[Tensor, "batch pos"] | None) -> Tensor:
    """Values [n, C] at the positions that count; a site that writes once for a row, such as a pooler, has one for each row."""
    if attention_mask is None:
        return values.flatten(0, -2)
    real = attention_mask.bool()
    return values[real if values.ndim > 2 else real.any(1)]


def _inputs(
    model: Any, decomposition: Decomposition, tokens: Tensor, attention_mask: Tensor | None
) -> dict[str, Tensor]:
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    return adapter.capture(tokens, list(decomposition), attention_mask).inputs


@torch.no_grad()
def _importances(
    model: Any, decomposition: Decomposition, tokens: Tensor, attention_mask: Tensor | None
) -> list[tuple[str, Float[Tensor, "batch *pos C"]]]:
    inputs = _inputs(model, decomposition, tokens, attention_mask)
    return [(name, g.lower) for name, g in decomposition.importances(inputs, attention_mask).items()]
