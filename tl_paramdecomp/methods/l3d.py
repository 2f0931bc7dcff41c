"""Local Loss Landscape Decomposition (Chrisman, Bushnaq and Sharkey 2025, arXiv 2504.00194).

1. Each sample's divergence from a reference output, another sample's say, has a gradient g_n over the chosen weights.
2. Encoder subnetworks give coefficients a_nk = <g_n, E_k>; those of largest size in the batch are kept.
3. Decoder subnetworks reconstruct: g_n ~ sum_k a_nk D_k. The loss is sum_n |g_n - ...|^2 / sum_n |g_n|^2.
4. Subnetworks are of low rank at each weight; after every step the decoder's are brought to norm 1.

Everything is worked out from what sites read and the gradients of what they write (`components.subnetworks`):

    |g_n - sum_k m_nk a_nk D_k|^2 = |g_n|^2 - 2 sum_k m_nk a_nk <g_n, D_k> + (m a)_n M (m a)_n,   M_kl = <D_k, D_l>

What is decomposed is the local loss landscape, not the weights: subnetworks do not sum to W.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.subnetworks import (
    Backend,
    GainGradient,
    Gradients,
    SampleGradient,
    SubnetworkDecomposition,
    random_subnetworks,
)
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.from_factors import origin_of
from tl_paramdecomp.methods.method import LossReport, Method, ParameterGroup, Progress, TrainingStep
from tl_paramdecomp.methods.random_streams import RandomStreams
from tl_paramdecomp.methods.sample_gradients import Positions, Reference, SampleDivergence, batch_gradients
from tl_paramdecomp.methods.starts import by_site
from tl_paramdecomp.methods.step import KL_NEEDS
from tl_paramdecomp.parallel import ALONE, ProcessGroup
from tl_paramdecomp.settings import OMIT_DEFAULT, Count, Positive, PositiveShare, Share, Whole, Within
from tl_paramdecomp.sites import NormSite, WeightSite, select_norms

Norm = Literal["l2", "paper_code"]
COUNTS, SEEN = "l3d/active", "l3d/seen"
"""In a run's memory: how often each subnetwork was active since the last revival, and the steps of the run."""


@dataclass(frozen=True)
class L3D(Method[SubnetworkDecomposition]):
    """Hyperparameters of Local Loss Landscape Decomposition; the object is the method.

    `L3D.paper_code()` has the published code's variants of divergence, reference and norm, which its figures need.
    """

    n_subnetworks: Count = 100
    """How many."""
    rank: Count | Mapping[str, Count] = 1
    """r of every site; or by glob, the first match counting."""
    active: PositiveShare = 0.1
    """Share of the batch's coefficients that are kept."""
    biases: bool = True
    """Whether biases of the sites, and of the norms, take part."""
    gains: bool | str | Sequence[str] = field(default=False, metadata=OMIT_DEFAULT)
    """Which normalisation gains take part: none, all of the model's, or those that globs such as `blocks.0.ln*` match."""
    divergence: SampleDivergence = "kl"
    """What a sample's output is compared with its reference by; see `SampleDivergence`."""
    reference: Reference = "sample"
    """Which output a sample's is compared with; see `Reference`."""
    positions: Positions = "one"
    """Where divergences are taken: at a random position of each row (`one`), at all, the last, or a given one."""
    norm: Norm = "l2"
    """What "norm 1" means for a subnetwork; see `Subnetworks.normalise`."""
    lr: Positive = 1e-2
    """Learning rate."""
    decay: PositiveShare = 0.8
    """Factor on the learning rate at every tenth of the run."""
    warm_start: Share = 0.1
    """Share of the run in which all coefficients are kept."""
    revive_every: Whole = 0
    """Steps after which subnetworks that were never active begin anew, from badly reconstructed gradients; 0: never."""
    threshold_memory: Annotated[float, Within("at least 0 and below 1", lambda x: 0.0 <= x < 1.0)] = 0.99
    """How much of the learned threshold each step keeps."""
    backend: Backend = "auto"
    """How samples' gradients are taken; auto: the fastest that the model allows."""

    @classmethod
    def paper_code(cls, **changes: Any) -> "L3D":
        """The published code for toys: p (p - r) for the mean square, references that may be the sample itself, its own norm,
        and no warm start."""
        kinds = dict.fromkeys(("divergence", "reference", "norm"), "paper_code")
        return replace(L3D(**kinds, warm_start=0.0), **changes)  # type: ignore[arg-type]

    def with_components(self, n: int) -> "L3D":
        return replace(self, n_subnetworks=n)

    def ranks(self, sites: Mapping[str, WeightSite]) -> dict[str, int]:
        """r of each site, at most its smaller side; errors as `by_site`."""
        ranks = by_site(self.rank, sites, "rank") if isinstance(self.rank, Mapping) else dict.fromkeys(sites, self.rank)
        return {name: min(ranks[name], site.d_in, site.d_out) for name, site in sites.items()}

    def norms(self, adapter: ModelAdapter) -> dict[str, NormSite]:
        """Norms whose gains take part; NoMatchingSiteError where a glob of `gains` matches none, or the model has none
        (perhaps because LayerNorm was folded), UnsupportedSiteError where one matches only norms whose gains cannot be
        moved exactly."""
        if self.gains is False:
            return {}
        hint = ""
        if not adapter.norms.wirings and adapter.processing is not None:
            hint = f"This model was loaded with {adapter.processing}, which leaves none; load it unprocessed."
        pattern = "*" if self.gains is True else self.gains
        return select_norms(adapter.norms.sites, pattern, adapter.norms.refused, hint)

    @property
    def rows_together(self) -> int:
        return 2 if self.reference == "pairs" else 1

    # --- Method -----------------------------------------------------------------------------------------------------
    def check(self, adapter: ModelAdapter) -> None:
        if self.divergence == "kl":
            need_logits(adapter, KL_NEEDS, "use divergence='mse', of outputs as they are")

    def initialise(
        self,
        adapter: ModelAdapter,
        sites: Mapping[str, WeightSite],
        generator: torch.Generator,
        progress: Progress,
        batches: Callable[[int], Batch] | None = None,
    ) -> SubnetworkDecomposition:
        norms = self.norms(adapter)
        biases = {name for name in sites if adapter.bias(name) is not None}
        biases |= {name for name, norm in norms.items() if norm.has_bias}
        weight = adapter.weight(next(iter(sites)))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        biases = biases if self.biases else set()
        decoder = random_subnetworks(sites, self.ranks(sites), self.n_subnetworks, biases, dtype, generator, norms)
        fingerprints = {name: adapter.fingerprint(name) for name in (*sites, *norms)}
        made = SubnetworkDecomposition(
            copy.deepcopy(decoder), decoder, sites, fingerprints, info=origin_of(adapter), norms=norms
        )
        made.to(adapter.device)
        for side in (made.encoder, made.decoder):
            for name, part in side.items():
                part.to((adapter.gain(name) if name in norms else adapter.weight(name)).device)
        return made

    def parameter_groups(self, decomposition: SubnetworkDecomposition) -> list[ParameterGroup]:
        return [ParameterGroup("subnetworks", list(decomposition.parameters()), self.lr, None)]

    def learning_rate_factor(self, step: int, steps: int) -> float:
        return self.decay ** (10 * step // max(1, steps))

    def gradients(self, step: TrainingStep) -> LossReport:
        made: SubnetworkDecomposition = step.decomposition
        microbatches = step.microbatches(step.batch, self.rows_together)
        kinds = self.positions, self.reference, self.divergence
        groups = batch_gradients(step.adapter, list(made.decoder), microbatches, *kinds, step.processes)
        active = 1.0 if step.progress < self.warm_start else self.active
        found = reconstruction(made, groups, active, self.backend, step.processes)
        (step.processes.world * found.loss).backward()
        with torch.no_grad():
            if step.progress >= self.warm_start:
                kept = self.threshold_memory if made.threshold > 0 else 0.0
                made.threshold.lerp_(found.threshold, 1.0 - kept)
            sums = {"loss": found.loss.detach(), "active": found.mask.sum(0), "rows": torch.tensor(len(found.mask))}
            sums = step.processes.total(sums)
            self._count(step, found, sums["active"], microbatches[0].random(0))
        figures = {"l0": sums["active"].sum() / sums["rows"], "unused_in_batch": (sums["active"] == 0).float().sum()}
        return LossReport(sums["loss"], {"reconstruction": sums["loss"]}, lambda: figures)

    def after_step(self, step: TrainingStep) -> None:
        step.decomposition.decoder.normalise(self.norm)

    def _count(
        self, step: TrainingStep, found: "Reconstruction", active: Int[Tensor, " K"], random: RandomStreams
    ) -> None:
        """Note which subnetworks were active; those that never were begin anew when it is time."""
        if not self.revive_every:
            return
        device = found.mask.device
        counts = step.memory.setdefault(COUNTS, torch.zeros(found.mask.shape[1], dtype=torch.int64, device=device))
        seen = step.memory.setdefault(SEEN, torch.zeros((), dtype=torch.int64))
        counts += active
        seen += 1
        if int(seen) % self.revive_every == 0:
            revive(step.decomposition, found, counts == 0, random.shared.on(device), step.processes)
            counts.zero_()


class Reconstruction(NamedTuple):
    """How subnetworks reconstruct the gradients of N samples."""

    loss: Float[Tensor, ""]
    """Share of the gradients' squared norms that is not reconstructed."""
    coefficients: Float[Tensor, "n K"]
    mask: Bool[Tensor, "n K"]
    threshold: Float[Tensor, ""]
    """Smallest kept |coefficient|."""
    squared_norms: Float[Tensor, " n"]
    residuals: Float[Tensor, " n"]
    """Squared norms of what is left of each."""
    groups: list[Gradients]
    """The gradients, position by position of the loss."""


def reconstruction(
    made: SubnetworkDecomposition,
    groups: Sequence[Gradients],
    active: float | None,
    backend: Backend = "auto",
    processes: ProcessGroup = ALONE,
) -> Reconstruction:
    """Coefficients of samples, in any number of groups, and how well they reconstruct.

    `active` is the share of the coefficients to keep, the largest over the samples of all processes; None: those that reach the
    learned threshold. Losses of the processes add up to the batch's.
    """
    a = torch.cat([made.encoder.inner(group, backend) for group in groups])
    c = torch.cat([made.decoder.inner(group, backend) for group in groups])
    norms = torch.cat([made.decoder.squared_norm(group) for group in groups])
    size = a.detach().abs()
    all_sizes, all_norms = (torch.cat(processes.every(t)) for t in (size, norms.detach()))
    if active is None:
        threshold = made.threshold.to(size.dtype)
    else:
        flat = all_sizes.flatten()
        threshold = flat.kthvalue(flat.numel() - max(1, round(active * flat.numel())) + 1).values
    mask = (size >= threshold) & (size > 0)
    # in float64: differences of large numbers lose their digits in float32
    kept, gram, norms = (a * mask).double(), made.decoder.gram().double(), norms.double()
    residuals = norms - 2.0 * (kept * c.double()).sum(1) + ((kept @ gram) * kept).sum(1)
    loss = (residuals.sum() / all_norms.double().sum().clamp(min=1e-30)).to(a.dtype)
    return Reconstruction(loss, a.detach(), mask, threshold, norms, residuals.detach(), list(groups))


@torch.no_grad()
def revive(
    made: SubnetworkDecomposition,
    found: Reconstruction,
    dead: Bool[Tensor, " K"],
    generator: torch.Generator,
    processes: ProcessGroup = ALONE,
) -> None:
    """Let dead subnetworks begin anew, each as the best low-rank form of a sample's gradient, in both dictionaries.

    Samples are drawn in proportion to what is left of them, from those of all processes.
    """
    places = dead.nonzero().flatten()
    if not len(places):
        return
    residuals = processes.every(found.residuals)
    weights = torch.cat(residuals).clamp(min=0.0)
    if not weights.sum() > 0:
        return
    first = sum(len(t) for t in residuals[: processes.rank])
    drawn = torch.multinomial(weights.float(), len(places), replacement=True, generator=generator)
    samples = [(group, i) for group in found.groups for i in range(len(next(iter(group.values()))[1]))]
    parameters = [*made.decoder.parameters(), *made.encoder.parameters()]
    for parameter in parameters:
        parameter[places] = 0.0
    for k, n in zip(places.tolist(), (drawn - first).tolist(), strict=True):
        if 0 <= n < len(samples):  # else another process has that sample
            group, i = samples[n]
            for name, part in made.decoder.items():
                _begin_anew([part, made.encoder[name]], k, group[name], i)
    if processes.world > 1:
        for parameter in parameters:
            parameter[places] = processes.total({"": parameter[places]})[""]
    factors = torch.where(dead, 1.0 / made.decoder.norms().clamp(min=1e-30), 1.0)
    for side in (made.decoder, made.encoder):
        side.rescale(factors)


def _begin_anew(sides: Sequence[Any], k: int, gradient: SampleGradient | GainGradient, n: int) -> None:
    """Let subnetwork k at one site or norm be the best form of sample n's gradient there."""
    if isinstance(gradient, GainGradient):
        new = {"gain": gradient.gain[n], "bias": gradient.bias[n]}
    else:
        x, part = gradient.x[n], sides[0]
        if not x.is_floating_point():
            x = torch.nn.functional.one_hot(x, part.site.d_in).to(gradient.g.dtype)
        A, B = low_rank(x, gradient.g[n], part.rank)
        new = {"A": A, "B": B, "bias": gradient.g[n].sum(0)}
    for side in sides:
        for name, parameter in side.named_parameters():
            parameter[k] = new[name]


def low_rank(
    x: Float[Tensor, "pos d_in"], g: Float[Tensor, "pos d_out"], rank: int
) -> tuple[Float[Tensor, "d_in r"], Float[Tensor, "d_out r"]]:
    """The best rank-r form A B^T of sum_t x_t g_t^T, from QR factors of both sides; zeros beyond its own rank."""
    left, right = torch.linalg.qr(x.T), torch.linalg.qr(g.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T)
    n = min(rank, len(s))
    root = s[:n].sqrt()
    A, B = x.new_zeros(x.shape[1], rank), g.new_zeros(g.shape[1], rank)
    A[:, :n], B[:, :n] = (left.Q @ u[:, : len(s)])[:, :n] * root, (right.Q @ v[: len(s)].T)[:, :n] * root
    return A, B
