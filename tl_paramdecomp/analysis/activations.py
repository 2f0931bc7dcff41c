"""What components do on given tokens: their activations and causal importances, from a clean forward pass."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.patching.target import checked_adapter


def component_acts(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, "batch pos C"]]:
    """Component activations h = x V of every site, of the model as it stands (other patches included).

    Raises:
        TargetMismatchError, DeviceError: The model is not the decomposition's target, or is elsewhere.
    """
    adapter = checked_adapter(model, decomposition)
    with torch.no_grad():
        inputs = adapter.capture(tokens, list(decomposition), attention_mask).inputs
        return {name: decomposition[name].acts(x) for name, x in inputs.items()}


def causal_importances(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, "batch pos C"]]:
    """Causal importances in [0, 1] of every component at every position.

    Raises:
        NoImportanceError: The decomposition has no importance function.
        TargetMismatchError, DeviceError: The model is not the decomposition's target, or is elsewhere.
    """
    adapter = checked_adapter(model, decomposition)
    with torch.no_grad():
        inputs = adapter.capture(tokens, list(decomposition), attention_mask).inputs
        return {name: g.lower.clamp(0.0, 1.0) for name, g in decomposition.importances(inputs).items()}
