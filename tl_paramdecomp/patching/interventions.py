"""What to put in a component's place: masks made from importances, mean activations, and what the delta component writes
elsewhere."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.data.rows import batches_of
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import DataError, SettingError, ShapeError
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


# --- activations -------------------------------------------------------------------------------------------------------
def activation_means(
    model: Any,
    decomposition: Decomposition,
    tokens: Any,
    by_position: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    rows_at_once: int = 64,
) -> dict[str, Float[Tensor, "*pos C"]]:
    """Mean component activations of every site, of the model as it stands; only sums are kept of each batch.

    Args:
        model: The target, on any host.
        decomposition: Made from its weights.
        tokens: Token rows [rows, pos], batches of them (each perhaps with its attention mask, as a pair), or rows in any
            other form that `decompose` takes.
        by_position: A mean for each position [pos, C], over rows of one length; otherwise over all positions [C].
        attention_mask: Of one tensor of rows: 1 where a position counts.
        rows_at_once: Rows of one forward pass, where `tokens` is one tensor.

    Raises:
        DataError: There are no rows, or a position that no row counts.
        ShapeError: By position, rows of several lengths or of a model without positions.
        DtypeError, ShapeError: Tokens or mask are not token rows.
        TargetMismatchError, DeviceError: As `component_acts`.
    """
    adapter = checked_adapter(model, decomposition)
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for rows, mask in batches_of(tokens, rows_at_once, attention_mask, model=adapter, decomposition=decomposition):
        check_rows(rows, mask)
        if not sums:
            warn_of_other_start(decomposition, rows, mask)
        with torch.no_grad():
            inputs = adapter.capture(rows, list(decomposition), mask).inputs
            for name, x in inputs.items():
                acts = decomposition[name].acts(x).double()
                if by_position and acts.ndim != 3:
                    raise ShapeError(f"{name} has no position axis ({list(acts.shape)}); leave by_position out.")
                weight = acts.new_ones(acts.shape[:-1]) if mask is None or acts.ndim != 3 else mask.to(acts)
                axes = 0 if by_position else tuple(range(acts.ndim - 1))
                total, count = (acts * weight.unsqueeze(-1)).sum(axes), weight.sum(axes).unsqueeze(-1)
                if name in sums and sums[name].shape != total.shape:
                    raise ShapeError(
                        f"Means by position need rows of one length; some have {len(sums[name])}, others {len(total)}."
                    )
                sums[name] = total + sums.get(name, 0.0)
                counts[name] = count + counts.get(name, 0.0)
    if not sums:
        raise DataError("Means over no rows: give token rows [rows, pos], or batches of them.")
    if any(bool((count == 0).any()) for count in counts.values()):
        raise DataError(
            "No row counts at some position: its attention mask is 0 in all of them. Cut that position off."
        )
    return {name: (sums[name] / counts[name]).to(decomposition[name].V.dtype) for name in decomposition}


def delta_writes(
    model: Any,
    decomposition: Decomposition,
    tokens: Shaped[Tensor, "batch ..."],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Float[Tensor, "batch ... d_out"]]:
    """What every site's delta component writes, x (W - V U), of the model as it stands; for `ActPatches.delta`.

    Raises:
        DtypeError, ShapeError: Tokens or mask are not token rows.
        TargetMismatchError, DeviceError: As `component_acts`.
    """
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition)
    found = {}
    with torch.no_grad():
        for name, x in adapter.capture(tokens, list(decomposition), attention_mask).inputs.items():
            components, weight = decomposition[name], adapter.weight(name)
            wide = torch.promote_types(weight.dtype, components.V.dtype)
            rest = weight.to(wide) - components.product().to(wide)
            is_lookup = components.site.kind == "embedding"
            found[name] = nn.functional.embedding(x, rest) if is_lookup else x.to(wide) @ rest
    return found
