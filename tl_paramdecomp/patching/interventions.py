"""Masks made from causal importances: the ways in which a decomposition is used and tried."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.adversary import source_masks, start_sources, worst_sources
from tl_paramdecomp.methods.reconstruction import stochastic_masks
from tl_paramdecomp.methods.step import LossStep, measure_of
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.settings import Count, Positive, Seed, fit
from tl_paramdecomp.sites import check_rows

MaskName = Literal["importance", "rounded", "stochastic", "random", "zero", "unmasked", "adversarial"]


def importance_masks(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    kind: MaskName = "importance",
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
    if kind not in get_args(MaskName):
        raise SettingError(f"Mask kind {kind!r} is none of {', '.join(get_args(MaskName))}.")
    seed, steps = fit(seed, Seed, "seed"), fit(steps, Count, "steps")
    threshold, step_size = fit(threshold, float, "threshold"), fit(step_size, Positive, "step_size")
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    given: dict[str, tuple[Tensor, Tensor | float]] = {}
    if kind in ("zero", "unmasked", "random"):
        for name, c in decomposition.items():
            same = c.V.new_full((c.n_components,), float(kind == "unmasked"))
            shape = (*tokens.shape, c.n_components)
            drawn = kind == "random"
            m = torch.rand(shape, generator=generator, device=same.device, dtype=same.dtype) if drawn else same
            given[name] = (m, 0.0)
        return decomposition.masks().replaced(given)
    with torch.no_grad():
        step = LossStep.of(adapter, decomposition, tokens, attention_mask, generator, measure=measure_of(adapter))
        if kind in ("importance", "rounded"):
            for name, g in step.importances.items():
                given[name] = (g.lower if kind == "importance" else (g.lower > threshold).to(g.lower), 0.0)
        else:
            if kind == "stochastic":
                made = stochastic_masks(step)
            else:
                made = source_masks(step, worst_sources(step, start_sources(step), steps, step_size))
            given = {name: (mask.m, mask.d) for name, mask in made.items()}
    return decomposition.masks().replaced(given)
