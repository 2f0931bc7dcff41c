"""Masks made from causal importances: the ways in which a decomposition is used and tried."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.adversary import source_masks, start_sources, worst_sources
from tl_paramdecomp.methods.reconstruction import stochastic_masks
from tl_paramdecomp.methods.step import LossStep, SiteMasks, measure_of
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows

MaskValues: TypeAlias = tuple[Tensor, "Tensor | float"]
"""(m, d) of one site."""

MaskKind = Literal["importance", "rounded", "stochastic", "random", "zero", "unmasked", "adversarial"]


def importance_masks(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    kind: MaskKind = "importance",
    *,
    threshold: float = 0.1,
    seed: int = 0,
    steps: int = 20,
    step_size: float = 0.1,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Masks:
    """Masks for these tokens from the importances of their clean forward pass.

    Args:
        model: The target model.
        decomposition: With an importance function (`zero`, `random` and `unmasked` need none).
        tokens: Token rows.
        kind: With g the importances and r uniform in [0, 1]:
            `importance` m = g; `rounded` m = [g > threshold]; `stochastic` m = g + (1 - g) r with a uniform delta mask;
            `random` m = r; `zero` m = 0; `unmasked` m = 1; `adversarial` m = g + (1 - g) s with s (and the delta mask)
            found by sign gradient ascent on the KL, shared by all rows and positions. The delta mask is 0 where
            nothing else is said.
        threshold: For `rounded`.
        seed: Draws r, and where the adversary starts.
        steps: Of the adversary.
        step_size: Of the adversary; steps times size should be about 2.
        attention_mask: 1 where positions count; the adversary does not look at the others.

    Raises:
        NoImportanceError: The kind needs importances and there are none.
        SettingError: No such kind.
        DtypeError, ShapeError: Tokens or mask are not token rows.
        TargetMismatchError, DeviceError: As `patched`.
    """
    if kind not in get_args(MaskKind):
        raise SettingError(f"Mask kind {kind!r} is none of {', '.join(get_args(MaskKind))}.")
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    masks = decomposition.masks()
    if kind in ("zero", "unmasked", "random"):
        return masks.replaced(_without_importances(decomposition, tokens, kind, generator))
    with torch.no_grad():
        step = LossStep.of(adapter, decomposition, tokens, attention_mask, generator, measure=measure_of(adapter))
        importances = step.importances
        if kind == "importance":
            return masks.replaced({name: (g.lower, 0.0) for name, g in importances.items()})
        if kind == "rounded":
            return masks.replaced({name: ((g.lower > threshold).to(g.lower), 0.0) for name, g in importances.items()})
        if kind == "stochastic":
            return masks.replaced(_as_values(stochastic_masks(step)))
        return masks.replaced(
            _as_values(source_masks(step, worst_sources(step, start_sources(step), steps, step_size)))
        )


def _as_values(masks: SiteMasks) -> dict[str, MaskValues]:
    return {name: (mask.m, mask.d) for name, mask in masks.items()}


def _without_importances(
    decomposition: Decomposition, tokens: Tensor, kind: str, generator: torch.Generator
) -> dict[str, MaskValues]:
    def values(C: int, like: Tensor) -> Float[Tensor, "... C"]:
        if kind == "random":
            return torch.rand((*tokens.shape, C), generator=generator, device=like.device, dtype=like.dtype)
        return like.new_full((C,), 1.0 if kind == "unmasked" else 0.0)

    return {name: (values(c.n_components, c.V.detach()), 0.0) for name, c in decomposition.items()}
