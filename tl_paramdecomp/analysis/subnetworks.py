"""What subnetworks do: impacts, top samples and logits, whether moving along one changes just those, and held-out gradients.

The impact of subnetwork k on a sample is |<E_k, grad D>|, the mean over references ("Local Loss Landscape Decomposition", arXiv
2504.00194, section 3.2). With J the derivative of the outputs along E_k, which one forward pass in forward mode gives for all
positions at once, it is |c . J| with c the divergence's gradient at the output: no backward pass for each reference.

Impacts are sizes, without a sign. Where a subnetwork's effect has one (`output_derivative`), it is the output of the model
moved along it minus the output of the model, per unit: with the movement minus without it.

Top samples are those of the paper's tables; the comparison of top samples with all others is this project's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.subnetworks import (
    CHUNK,
    GainGradient,
    Gradients,
    SampleGradient,
    SubnetworkDecomposition,
    Subnetworks,
    pairwise_gains,
)
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.divergence import kl, log_probabilities, mean_square
from tl_paramdecomp.methods.l3d import L3D, reconstruction
from tl_paramdecomp.methods.sample_gradients import GradientPass, SampleDivergence, all_gradients, output_gradient
from tl_paramdecomp.methods.step import KL_NEEDS
from tl_paramdecomp.patching.subnetworks import moved_part, perturbed
from tl_paramdecomp.patching.target import checked_adapter, frozen
from tl_paramdecomp.settings import TYPE, Count, Positive, Seed, fit, from_settings, kinds_of
from tl_paramdecomp.sites import check_rows

TINY = 1e-12
"""Changes below this are rounding."""


def impacts(
    model: Any,
    decomposition: SubnetworkDecomposition,
    tokens: Shaped[Tensor, "rows ..."],
    references: int = 10,
    *,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "rows *pos K"]:
    """How much each subnetwork matters to each sample: mean over references of |<E_k, grad D(output, reference)>|.

    Args:
        tokens: Rows; every position of a language model's is a sample.
        references: Other samples of these rows that each output is compared with, drawn anew for each sample.
        attention_mask: 1 where a position counts; impacts at the others are 0, and none of them is a reference.
        seed: Of the references.

    Raises:
        SettingError: There is no run in the decomposition that says which divergence it is of.
        DataError: Fewer than two samples.
        TargetMismatchError, DeviceError, ShapeError: As `patched`.
    """
    check_rows(tokens, attention_mask)
    references, seed = fit(references, Count, "references"), fit(seed, Seed, "seed")
    adapter, method = checked_adapter(model, decomposition, tokens, attention_mask), method_of(decomposition)
    if method.divergence == "kl":
        need_logits(adapter, KL_NEEDS, "decompose it with L3D(divergence='mse')")
    generator = torch.Generator(device=adapter.device).manual_seed(seed)
    tokens, attention_mask = Batch(tokens, attention_mask).to(adapter.device)
    with torch.no_grad(), frozen(adapter):
        output = adapter.forward(tokens, attention_mask)
        shape = output.shape[:-1]
        scored = scored_of(shape, attention_mask, output.device)
        kept = scored.flatten().nonzero().flatten()
        if len(kept) < 2:
            raise DataError(f"Impacts compare samples with each other; given {len(kept)}.")
        flat = output.flatten(0, -2)[kept]
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        values = torch.softmax(flat, -1) if method.divergence == "kl" else flat
        found = torch.zeros(len(kept), decomposition.n_subnetworks, dtype=flat.dtype, device=flat.device)
        device, n = kept.device, len(kept)
        turns = [torch.randint(1, n, (n,), generator=generator, device=device) for _ in range(references)]
        against = [(torch.arange(n, device=device) + turn) % n for turn in turns]
        # the divergence's gradient is affine in the reference: one part of the product serves all of them
        alone = output_gradient(flat, torch.zeros_like(flat), method.divergence)
        share = 1.0 if method.divergence == "kl" else (2.0 if method.divergence == "mse" else 1.0) / flat.shape[-1]
        for k in range(decomposition.n_subnetworks):
            J = _derivative(adapter, decomposition.encoder, k, tokens, attention_mask).flatten(0, -2)[kept]
            of_sample = (alone * J).sum(-1)
            for other in against:
                found[:, k] += (of_sample - share * (values[other] * J).sum(-1)).abs() / references
        whole = found.new_zeros(scored.numel(), found.shape[1])
        whole[kept] = found
    return whole.view(*shape, -1)


def output_derivative(
    model: Any,
    decomposition: SubnetworkDecomposition,
    k: int,
    tokens: Shaped[Tensor, "rows ..."],
    attention_mask: Int[Tensor, "rows pos"] | None = None,
) -> Float[Tensor, "rows *pos width"]:
    """How outputs (logits) change per unit along decoder subnetwork k, at delta 0, moved minus unmoved: its top entries are
    what it promotes.

    Raises:
        ComponentIndexError: There is no such subnetwork.
        TargetMismatchError, DeviceError, ShapeError: As `patched`.
    """
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    tokens, attention_mask = Batch(tokens, attention_mask).to(adapter.device)
    with torch.no_grad(), frozen(adapter):
        return _derivative(adapter, decomposition.decoder, decomposition.index(k), tokens, attention_mask)


def scored_of(shape: Sequence[int], attention_mask: Tensor | None, device: torch.device) -> Bool[Tensor, "rows *pos"]:
    """Outputs that count: all of those without positions."""
    if attention_mask is None or len(shape) < 2:
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)
    return attention_mask.to(device).bool()


def _derivative(
    adapter: ModelAdapter, side: Subnetworks, k: int, tokens: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Derivative of the outputs along one subnetwork, in forward mode."""
    parameter = next(side.parameters())
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        delta = forward_ad.make_dual(zero, torch.ones_like(zero))
        with adapter.intercept({name: moved_part(part, {k: delta}) for name, part in side.items()}):
            output = adapter.forward(tokens, attention_mask)
        tangent = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if tangent is None else tangent.clone()


def method_of(decomposition: SubnetworkDecomposition) -> L3D:
    """The method that made it."""
    method = decomposition.info.get("run", {}).get("method")
    if not isinstance(method, dict) or method.get(TYPE) not in kinds_of(L3D):
        raise SettingError("No run of L3D is stored with these subnetworks, so their divergence is not known.")
    return from_settings(method, base=L3D)


# --- top samples and selectivity ------------------------------------------------------------------------------------------
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


# --- evaluation -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SubnetworkEvaluation:
    """How well subnetworks reconstruct held-out gradients: shares of squared norms that are left, 0 the best."""

    samples: int
    """Held-out ones."""
    batch_error: float
    """With the largest coefficients of all samples kept, as in training."""
    fixed_error: float
    """With the threshold that was learned."""
    bound: float | None
    """What no dictionary of as many rows can beat, the truncated SVD of these very gradients; None: it was not asked for."""
    active: list[float]
    """How often each subnetwork is active."""
    dead: int
    """Those that never are."""


def evaluate_subnetworks(
    model: Any,
    decomposition: SubnetworkDecomposition,
    tokens: Shaped[Tensor, "rows ..."],
    *,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
    rows_at_once: int = 32,
    bound: bool = True,
    seed: int = 0,
) -> SubnetworkEvaluation:
    """Reconstruction of held-out gradients, by the divergence, references and positions of the run that made the subnetworks.

    Args:
        tokens: Rows that it was not trained on.
        attention_mask: 1 where a position counts.
        rows_at_once: Rows in one pass, about; references come from the same pass.
        bound: Work out the truncated SVD as well; its time grows with the square of samples.
        seed: Of positions and references.

    Raises:
        SettingError: No run of L3D is stored with it.
        DataError: There are no rows.
        TargetMismatchError, DeviceError, ShapeError: As `patched`.
    """
    check_rows(tokens, attention_mask)
    if not len(tokens):
        raise DataError("There are no rows to evaluate on.")
    rows_at_once, seed = fit(rows_at_once, Count, "rows_at_once"), fit(seed, Seed, "seed")
    adapter, method = checked_adapter(model, decomposition, tokens, attention_mask), method_of(decomposition)
    generator = torch.Generator(device=adapter.device).manual_seed(seed)
    groups: list[Gradients] = []
    with torch.no_grad(), frozen(adapter):
        for rows in even_parts(len(tokens), rows_at_once):
            batch = Batch(tokens, attention_mask).rows(rows).to(adapter.device)
            run = GradientPass(adapter, list(decomposition.decoder), *batch)
            places = run.places(method.positions, generator)
            groups += all_gradients(run, places, method.reference, method.divergence, generator)
        by_batch = reconstruction(decomposition, groups, method.active, method.backend)
        fixed = reconstruction(decomposition, groups, None, method.backend)
        active = by_batch.mask.float().mean(0)
        return SubnetworkEvaluation(
            samples=len(by_batch.mask),
            batch_error=by_batch.loss.item(),
            fixed_error=fixed.loss.item(),
            bound=truncated_svd_error(groups, decomposition) if bound else None,
            active=active.tolist(),
            dead=int((active == 0).sum()),
        )


def even_parts(n: int, most: int) -> list[slice]:
    """Parts of n rows, of an even number each but for the last; no row is left by itself."""
    size = max(2, most - most % 2)
    starts = list(range(0, n, size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [slice(first, end) for first, end in zip(starts, [*starts[1:], n], strict=True)]


def truncated_svd_error(groups: Sequence[Gradients], decomposition: SubnetworkDecomposition) -> float:
    """Share of the gradients' squares outside their K leading singular directions, from inner products of all pairs."""
    gram = torch.zeros((), dtype=torch.float64)
    for name, part in decomposition.decoder.items():
        gradients: list[Any] = [group[name] for group in groups]
        pairwise = pairwise_gains if isinstance(gradients[0], GainGradient) else _pairwise
        gram = gram + pairwise(gradients, part.bias is not None)
    values = torch.linalg.eigvalsh(gram).clamp(min=0.0).flip(0)
    return (values[decomposition.n_subnetworks :].sum() / values.sum().clamp(min=1e-30)).item()


def _pairwise(gradients: list[SampleGradient], bias: bool) -> Float[Tensor, "n n"]:
    """Inner products of all pairs of gradients at one site, by whichever form takes fewer operations."""
    x, g = (torch.cat([getattr(a, side) for a in gradients]) for side in "xg")
    (pos, d_out), d_in = g.shape[1:], x.shape[-1]
    formed = x.is_floating_point() and d_in * d_out < pos * pos * (d_in + d_out)
    found = (_pairwise_formed if formed else _pairwise_factored)(x, g)
    if bias:
        whole = g.double().sum(1)
        found = found + (whole @ whole.T).cpu()
    return found


def _pairwise_formed(x: Float[Tensor, "n pos d_in"], g: Float[Tensor, "n pos d_out"]) -> Float[Tensor, "n n"]:
    """From the gradients themselves, some columns of all of them at a time."""
    found = torch.zeros(len(g), len(g), dtype=torch.float64)
    for columns in torch.arange(g.shape[-1]).split(max(1, CHUNK // (len(g) * x.shape[-1]))):
        dense = (x.double().transpose(1, 2) @ g[..., columns].double()).flatten(1)
        found += (dense @ dense.T).cpu()
    return found


def _pairwise_factored(x: Shaped[Tensor, "n pos ..."], g: Float[Tensor, "n pos d_out"]) -> Float[Tensor, "n n"]:
    """From what was read and the gradients of what was written: one sample's products with all later ones at a time."""
    found = torch.zeros(len(g), len(g), dtype=torch.float64)
    for n in range(len(g)):
        if x.is_floating_point():
            reads = torch.einsum("td,msd->mts", x[n].double(), x[n:].double())
        else:
            reads = (x[n][None, :, None] == x[n:, None, :]).double()
        found[n, n:] = (reads * torch.einsum("to,mso->mts", g[n].double(), g[n:].double())).sum((1, 2)).cpu()
    return found + found.triu(1).T
