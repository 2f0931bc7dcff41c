"""What the first batches of a run say of its target, before anything is trained.

1. The zero-mask distance Z: how far outputs move where every component and the delta component of all sites are removed. It is
   what there is to explain; other distances, and the price of a component, are best read as shares of it.
2. Second moments of the inputs of each site, for starts that follow the data's own scale.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.divergence import KL, MeanSquare
from tl_paramdecomp.methods.loss import ZERO_MASK, Loss
from tl_paramdecomp.methods.method import Progress
from tl_paramdecomp.methods.step import Measure
from tl_paramdecomp.sites import SiteCall, WeightSite

ZERO_POSITIONS, MOMENT_POSITIONS = 1024, 16384
"""Positions over which Z and second moments are taken, at least, where so many batches are enough."""
MOST_BATCHES = 64


def note_zero_mask(
    made: Decomposition,
    adapter: ModelAdapter,
    batches: Callable[[int], Batch] | None,
    measure: Measure,
    losses: Iterable[Loss],
) -> None:
    """Write Z into a new decomposition's `info`, where a loss's weight follows from it; errors as `zero_mask_distance`.

    It is not measured for nothing: rows that a function makes may be made once only.
    """
    if all(loss.coefficient is not None for loss in losses):
        return
    if batches is not None and adapter.device.type != "meta":  # of an outline nothing is measured
        made.info[ZERO_MASK] = zero_mask_distance(adapter, made.sites, batches, measure)


def zero_mask_distance(
    adapter: ModelAdapter, sites: Mapping[str, WeightSite], batches: Callable[[int], Batch], measure: Measure
) -> dict[str, float | int | str]:
    """Z: the mean distance of the target's outputs from themselves where every site writes its bias alone.

    Args:
        adapter: The target's.
        sites: Removed all at once.
        batches: Rows by number; the first are taken, until there are `ZERO_POSITIONS`.
        measure: What outputs are compared by.

    Returns:
        For `info["zero_mask"]`: the measure, the distance (nats per position, or a mean square) and the positions.

    Raises:
        SettingError: The outputs do not change: there is nothing to explain.
        DataError: No position counts.
    """
    total, positions = 0.0, 0
    for batch in _first(batches, ZERO_POSITIONS):
        batch = batch.to(adapter.device)
        scored = None if batch.attention_mask is None else batch.attention_mask.bool()
        with torch.no_grad():
            target = (KL if measure == "kl" else MeanSquare)(
                adapter.forward(batch.tokens, batch.attention_mask), scored
            )
            with adapter.intercept(dict.fromkeys(sites, _removed)):
                distance = target.of(adapter.forward(batch.tokens, batch.attention_mask)).item()
        total, positions = total + distance * len(target.target), positions + len(target.target)
    if not positions:
        raise DataError(
            f"No position of the first {MOST_BATCHES} batches counts: their attention masks are 0. Give others."
        )
    if not total > 0.0:
        raise SettingError(
            f"Removing {', '.join(sites)} changes no output on the first {positions} positions (Z = {total:g}): there is "
            "nothing to explain. Choose other sites, or give rows on which they matter."
        )
    return {"measure": measure, "distance": total / positions, "positions": positions}


def second_moments(
    adapter: ModelAdapter,
    sites: Mapping[str, WeightSite],
    batches: Callable[[int], Batch],
    n: int | None,
    progress: Progress,
) -> dict[str, Float[Tensor, "..."]]:
    """Sums of x x^T over the scored positions of n batches, by site; of an embedding, how often each row is read.

    The passes end behind the last of the sites. `n=None`: until there are `MOMENT_POSITIONS`.
    """
    sums: dict[str, Tensor] = {}
    if n is None:
        n = sum(1 for _ in _first(batches, MOMENT_POSITIONS))
    end = adapter.block_after(sites)
    for i in progress("inputs", n):
        batch = batches(i).to(adapter.device)
        with torch.no_grad():
            inputs = adapter.capture(batch.tokens, list(sites), batch.attention_mask, until=end).inputs
        scored = None if batch.attention_mask is None else batch.attention_mask.bool()
        for name, x in inputs.items():
            if sites[name].kind == "embedding":
                rows = x.expand(batch.tokens.shape).flatten() if scored is None else x.expand(scored.shape)[scored]
                found = torch.bincount(rows, minlength=sites[name].d_in).double()
            else:
                rows = (x.flatten(0, -2) if scored is None else x[scored]).double()
                found = rows.T @ rows
            sums[name] = sums[name] + found if name in sums else found
    return sums


def _first(batches: Callable[[int], Batch], positions: int) -> Iterator[Batch]:
    """The first batches, until they have so many positions."""
    seen = 0
    for i in range(MOST_BATCHES):
        if seen >= positions:
            return
        batch = batches(i)
        tokens = batch.tokens  # inputs of toys are no tokens, and have no positions
        seen += len(tokens) if tokens.is_floating_point() else tokens.numel()
        yield batch


def _removed(call: SiteCall) -> Tensor:
    """A site's function that leaves its bias alone."""
    nothing = torch.zeros_like(call.y)
    return nothing if call.bias is None else nothing + call.bias
