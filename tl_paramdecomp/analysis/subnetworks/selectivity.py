"""What a subnetwork is about: the samples it matters to most, the tokens it promotes, and whether moving along it changes
just those samples.

From "Local Loss Landscape Decomposition" (arXiv 2504.00194, section 3 and its tables of top samples); the comparison of top
samples with all others is this project's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.analysis.subnetworks.impacts import impacts, method_of, output_derivative, scored_of
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.divergence import kl, log_probabilities, mean_square
from tl_paramdecomp.methods.sample_gradients import SampleDivergence
from tl_paramdecomp.patching.subnetworks import perturbed
from tl_paramdecomp.patching.target import checked_adapter, frozen
from tl_paramdecomp.settings import Count, Positive, Seed, fit
from tl_paramdecomp.sites import check_rows

TINY = 1e-12
"""Changes below this are rounding."""


class TopSample(NamedTuple):
    """A sample that a subnetwork matters to."""

    row: int
    position: int | None
    """Of the output that is compared; None for a model whose outputs have no positions."""
    impact: float


def top_samples(
    found: Float[Tensor, "rows *pos K"], k: int, n: int = 10, distinct_rows: bool = True
) -> list[TopSample]:
    """The samples of largest impact, largest first; samples without impact are left out.

    Args:
        found: From `impacts`.
        distinct_rows: One position of each row.
    """
    values = found[..., k]
    positions = None
    if values.ndim > 1 and distinct_rows:
        values, positions = values.max(1)
    order = values.flatten().topk(min(n, values.numel())).indices.tolist()
    tops = []
    for place in order:
        row, position = (place, None) if values.ndim == 1 else divmod(place, values.shape[1])
        position = position if positions is None else int(positions[row])
        tops.append(TopSample(row, position, float(values.flatten()[place])))
    return [top for top in tops if top.impact > 0]


class TopLogits(NamedTuple):
    """The outputs (tokens) that a subnetwork moves most, by row."""

    slopes: Float[Tensor, "rows n"]
    """Change of the logit per unit along the subnetwork, moved minus unmoved, largest absolute value first."""
    indices: Int[Tensor, "rows n"]


def top_logits(
    model: Any,
    decomposition: SubnetworkDecomposition,
    k: int,
    tokens: Shaped[Tensor, "rows ..."],
    n: int = 10,
    *,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
) -> TopLogits:
    """Logits that change most along decoder subnetwork k, at the last position of each row that counts.

    Raises:
        SettingError: `n` is not between 1 and the number of outputs.
        ComponentIndexError: There is no such subnetwork.
        TargetMismatchError, DeviceError, ShapeError: As `patched`.
    """
    slopes = output_derivative(model, decomposition, k, tokens, attention_mask)
    if slopes.ndim == 3:
        scored = scored_of(slopes.shape[:-1], attention_mask, slopes.device)
        last = (scored * torch.arange(slopes.shape[1], device=slopes.device)).argmax(1)
        slopes = slopes[torch.arange(len(slopes), device=slopes.device), last]
    if not 1 <= n <= slopes.shape[-1]:
        raise SettingError(f"n lies between 1 and the {slopes.shape[-1]} outputs; given {n}.")
    indices = slopes.abs().topk(n).indices
    return TopLogits(slopes.gather(-1, indices), indices)


@dataclass(frozen=True)
class Selectivity:
    """How far outputs change when a model is moved along each subnetwork: on the samples it matters to, and on the rest. A
    divergence, so without a sign."""

    delta: float
    """How far the model is moved."""
    subnetworks: list[int]
    """Which."""
    top: list[float]
    """Mean divergence from the model as it is, over the top samples of each subnetwork and both signs of delta; nats for
    language models."""
    rest: list[float]
    """The same over all other samples."""

    @property
    def ratios(self) -> list[float]:
        """Top over rest of each subnetwork; infinite where only the top samples change, 0 where none do."""
        pairs = zip(self.top, self.rest, strict=True)
        return [t / r if r > TINY else (float("inf") if t > TINY else 0.0) for t, r in pairs]


def causal_selectivity(
    model: Any,
    decomposition: SubnetworkDecomposition,
    tokens: Shaped[Tensor, "rows ..."],
    *,
    delta: float = 1.0,
    top: int = 10,
    subnetworks: Sequence[int] | None = None,
    found: Float[Tensor, "rows *pos K"] | None = None,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
    rows_at_once: int = 64,
    seed: int = 0,
) -> Selectivity:
    """Move the model along each subnetwork, both ways, and compare its top samples with all others.

    Top samples come from impacts, which are derivatives; what is compared is the finite change of the outputs, in the
    divergence that the subnetworks were learned for.

    Args:
        tokens: Rows that it was not trained on; every position of a language model's is a sample.
        delta: How far; subnetworks have norm 1.
        top: Samples of largest impact, from distinct rows.
        subnetworks: Which; None: all.
        found: Their `impacts` on these rows; None: worked out here, with `seed`.
        attention_mask: 1 where a position counts.

    Raises:
        DataError: Not more rows than top samples.
        SettingError: No run of L3D is stored with it; delta or top is not positive.
        ComponentIndexError, TargetMismatchError, DeviceError, ShapeError: As `perturbed`.
    """
    check_rows(tokens, attention_mask)
    delta, top, seed = fit(delta, Positive, "delta"), fit(top, Count, "top"), fit(seed, Seed, "seed")
    rows_at_once = fit(rows_at_once, Count, "rows_at_once")
    if len(tokens) <= top:
        raise DataError(f"Top samples are compared with others: give more than {top} rows; given {len(tokens)}.")
    adapter, method = checked_adapter(model, decomposition, tokens, attention_mask), method_of(decomposition)
    every = range(decomposition.n_subnetworks)
    chosen = [decomposition.index(k) for k in (every if subnetworks is None else subnetworks)]
    if found is None:
        found = impacts(model, decomposition, tokens, attention_mask=attention_mask, seed=seed)
    changes = _changes(adapter, decomposition, chosen, delta, tokens, attention_mask, rows_at_once, method.divergence)
    scored = scored_of(found.shape[:-1], attention_mask, changes.device)
    tops, rests = [], []
    for k, change in zip(chosen, changes, strict=True):
        best = torch.zeros_like(scored)
        for sample in top_samples(found, k, top):
            best[sample.row if sample.position is None else (sample.row, sample.position)] = True
        tops.append(change[best].mean().item() if bool(best.any()) else 0.0)
        rests.append(change[scored & ~best].mean().item())
    return Selectivity(delta, chosen, tops, rests)


@torch.no_grad()
def _changes(
    adapter: ModelAdapter, decomposition: SubnetworkDecomposition, chosen: Sequence[int], delta: float, tokens: Tensor,
    attention_mask: Tensor | None, rows_at_once: int, divergence: SampleDivergence,
) -> Float[Tensor, "some rows *pos"]:  # fmt: skip
    """Divergence of the moved model's outputs from the model's, mean of both signs."""
    parts = []
    with frozen(adapter):
        for start in range(0, len(tokens), rows_at_once):
            rows = slice(start, start + rows_at_once)
            batch = Batch(tokens, attention_mask).rows(rows).to(adapter.device)
            before, changes = adapter.forward(*batch), []
            for k in chosen:
                both = []
                for sign in (1.0, -1.0):
                    with perturbed(adapter.model, decomposition, {k: sign * delta}):
                        after = adapter.forward(*batch)
                        if divergence == "kl":
                            both.append(kl(log_probabilities(before), log_probabilities(after)).clamp(min=0.0))
                        else:
                            both.append(mean_square(before, after))
                changes.append(torch.stack(both).mean(0))
            parts.append(torch.stack(changes))
    return torch.cat(parts, 1)
