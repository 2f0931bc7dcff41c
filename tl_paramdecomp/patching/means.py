"""What to put in a component's place: mean activations over many rows, and what the delta component writes elsewhere."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.data.rows import batches_of
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import DataError, ShapeError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import check_rows


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
                total, count = _totals(decomposition[name].acts(x).double(), mask, by_position, name)
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


def _totals(
    acts: Float[Tensor, "batch ... C"], mask: Tensor | None, by_position: bool, name: str
) -> tuple[Float[Tensor, "*pos C"], Tensor]:
    """Sums over what counts, and how much counts."""
    if by_position and acts.ndim != 3:
        raise ShapeError(f"{name} has no position axis ({list(acts.shape)}); leave by_position out.")
    weight = acts.new_ones(acts.shape[:-1]) if mask is None or acts.ndim != 3 else mask.to(acts)
    total, axes = acts * weight.unsqueeze(-1), 0 if by_position else tuple(range(acts.ndim - 1))
    return total.sum(axes), weight.sum(axes).unsqueeze(-1)
