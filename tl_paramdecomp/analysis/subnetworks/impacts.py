"""What subnetworks do, and how well they reconstruct what they were not trained on.

The impact of subnetwork k on a sample is |<E_k, grad D>|, the mean over references ("Local Loss Landscape Decomposition", arXiv
2504.00194, section 3.2). With J the derivative of the outputs along E_k, which one forward pass in forward mode gives for all
positions at once, it is |c . J| with c the divergence's gradient at the output: no backward pass for each reference.

Impacts are sizes, without a sign. Where a subnetwork's effect has one (`output_derivative`), it is the output of the model
moved along it minus the output of the model, per unit: with the movement minus without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from tl_paramdecomp.methods.l3d import L3D, reconstruction
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients, output_gradient
from tl_paramdecomp.methods.step import KL_NEEDS
from tl_paramdecomp.patching.subnetworks import moved_part
from tl_paramdecomp.patching.target import checked_adapter, frozen
from tl_paramdecomp.settings import TYPE, Count, Seed, Whole, fit, from_settings, kinds_of
from tl_paramdecomp.settings import TYPE, Count, Seed, fit, from_settings, kinds_of
from tl_paramdecomp.sites import check_rows


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
