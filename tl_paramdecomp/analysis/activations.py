"""What components do on given tokens: their activations and causal importances, from a clean forward pass."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows


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
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition)
    with torch.no_grad():
        inputs = adapter.capture(tokens, list(decomposition), attention_mask).inputs
        return {name: decomposition[name].acts(x) for name, x in inputs.items()}


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
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition)
    with torch.no_grad():
        inputs = adapter.capture(tokens, list(decomposition), attention_mask).inputs
        return {name: g.lower.clamp(0.0, 1.0) for name, g in decomposition.importances(inputs, attention_mask).items()}
