"""Adversarial masks: the worst choice of what unimportant components do.

Sources s in [0, 1] fill the masks m = g + (1 - g) s and the delta mask d = s of a last channel, and are moved to raise the
divergence. Fresh ones are found anew at every step by projected gradient ascent (PGD); persistent ones survive from step to
step and are moved a little each time, so that a strong adversary costs little more than one pass. Sources shared by all rows
and positions find systematic faults; an adversary of every position's own would punish interference that no
decomposition avoids. From the successors of "Stochastic Parameter Decomposition" and VPD ("Interpreting Language Model
Parameters", 2026).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.loss import Loss, LossBatch
from tl_paramdecomp.methods.reconstruction import DeltaUse, Replaced, routed, subset_routes
from tl_paramdecomp.methods.step import LossStep, SiteMasks
from tl_paramdecomp.parallel import Place, Window
from tl_paramdecomp.settings import Count, NotNegative, Positive, Share, Whole

SourceScope = Literal["single_source", "broadcast_across_batch", "repeat_across_batch", "per_batch_per_position"]
"""What shares a source: everything [C+1]; all rows, each position its own [pos, C+1]; every n-th row [n, pos, C+1]; nothing
[batch, pos, C+1]."""
OWN: SourceScope = "per_batch_per_position"
"""The scope in which rows share nothing."""
SCOPES = ("single_source", "broadcast_across_batch", "repeat_across_batch", OWN)

Sources = Mapping[str, Float[Tensor, "*scope C_and_delta"]]
"""One source per component of each site, and a last one for its delta component."""

Routes = dict[str, Bool[Tensor, "..."]]


# --- fresh at every step ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AdversarialReconstruction(Loss):
    """Divergence under adversarial masks found anew at every step; they are constants to components and importances."""

    coefficient: NotNegative = 1.0
    steps: Count = 1
    """Steps of ascent."""
    step_size: Positive = 1.0
    """Of a sign step; steps times size should be about 1 to 2."""
    sites: Replaced = "all"
    """Masked at once: all, one at a time (`layerwise`), or at each position a random subset."""
    scope: SourceScope = "single_source"
    """What shares one source of masks: everything, all rows at a position, every n-th row, or nothing."""
    start: Literal["random", "ones", "zeros"] = "random"
    """`ones` is the target itself unless `delta` is absent: the gradient there is 0, and the adversary stays."""
    delta: DeltaUse = "masked"
    """Whether the adversary also rules the delta component, or it is absent or kept."""
    name: str = "adversarial"

    def prepare(self, batch: LossBatch) -> "list[_Adversary] | None":
        """Sources that rows share, moved by the gradients of all of them; None where each row has its own."""
        return None if self.scope == OWN else list(self._found(batch))

    def parts(self, step: LossStep, shared: "list[_Adversary] | None") -> Iterator[Tensor]:
        """One part, or one for each site where they are masked one at a time."""
        n = len(step.importances) if self.sites == "layerwise" else 1
        for adversary in self._found(LossBatch.of(step)) if shared is None else shared:
            masks = source_masks(step, adversary.sources, adversary.routes.get(step.place), self.delta)
            yield step.divergence.of(step.run_masked(masks)) / n

    def _found(self, batch: LossBatch) -> "Iterator[_Adversary]":
        for names in [(name,) for name in batch.sites] if self.sites == "layerwise" else [batch.sites]:
            adversary = _Adversary(self, names)
            for _ in range(self.steps):
                gradients = batch.total(adversary.gradients)
                adversary.sources = {n: ascended(s, gradients[n], self.step_size) for n, s in adversary.sources.items()}
            yield adversary


@dataclass
class _Adversary:
    """Sources of some sites, and where each microbatch is routed past them; drawn when a microbatch is first seen."""

    loss: AdversarialReconstruction
    names: Sequence[str]
    sources: Sources = field(default_factory=dict)
    routes: dict[Place, Routes] = field(default_factory=dict)

    def gradients(self, step: LossStep) -> dict[str, Tensor]:
        if self.loss.sites == "subset" and step.place not in self.routes:
            self.routes[step.place] = subset_routes(step)
        self.sources = self.sources or start_sources(step, self.names, self.loss.scope, self.loss.start)
        routes, delta = self.routes.get(step.place), self.loss.delta
        return _gradients(step, self.sources, lambda leaves: source_masks(step, leaves, routes, delta, detached=True))


def worst_sources(step: LossStep, sources: Sources, steps: int, step_size: float) -> Sources:
    """Sources that raise the divergence of a whole batch, from a start by `steps` sign steps."""
    for _ in range(steps):
        gradients = _gradients(step, sources, lambda leaves: source_masks(step, leaves, detached=True))
        sources = {name: ascended(s, gradients[name], step_size) for name, s in sources.items()}
    return sources


def ascended(source: Float[Tensor, "..."], gradient: Float[Tensor, "..."], step_size: float) -> Float[Tensor, "..."]:
    """A source in [0, 1] after one step uphill by the signs of its gradient: projected gradient ascent."""
    return (source + step_size * gradient.sign()).clamp_(0.0, 1.0)


def start_sources(
    step: LossStep,
    names: Sequence[str] | None = None,
    scope: SourceScope = "single_source",
    start: Literal["random", "ones", "zeros"] = "random",
    repeats: int = 1,
) -> dict[str, Tensor]:
    """Sources to begin from, for some sites or all."""
    sources = {}
    for name in step.importances if names is None else names:
        g = step.importances[name].lower
        shape = (*_scope_shape(scope, g.shape[:-1], repeats), g.shape[-1] + 1)
        if start == "random":
            sources[name] = step.random.uniform(shape, g, rows=0 if scope == OWN else None)
        else:
            sources[name] = g.new_full(shape, 1.0 if start == "ones" else 0.0)
    return sources


def source_masks(
    step: LossStep,
    sources: Sources,
    routes: Routes | None = None,
    delta: DeltaUse = "masked",
    detached: bool = False,
) -> SiteMasks:
    """The masks m = g + (1 - g) s and d that sources stand for; `detached`: importances are constants."""
    masks = {}
    for name, s in sources.items():
        g = step.importances[name].lower
        away = 1.0 - s
        a = away[..., -1] if delta == "masked" else float(delta == "absent")
        masks[name] = InterpolatedMask(g.detach() if detached else g, away[..., :-1], a)
    return masks if routes is None else routed(masks, routes)


def _gradients(
    step: LossStep, sources: Sources, masks: Callable[[dict[str, Tensor]], SiteMasks]
) -> dict[str, Float[Tensor, "..."]]:
    """Gradient with respect to sources of what a microbatch adds to the batch's divergence, everything else constant."""
    with torch.enable_grad():
        leaves = {name: s.detach().requires_grad_(True) for name, s in sources.items()}
        loss = step.place.weight * step.scale * step.divergence.of(step.run_masked(masks(leaves)))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)  # a pooler's
    return {name: g / step.scale for name, g in zip(leaves, found, strict=True)}


# --- persistent -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PersistentAdversarialReconstruction(Loss):
    """Divergence under adversarial masks that survive from step to step, moved by Adam or by sign.

    Per step: `ascents` moves by themselves, then the loss, whose own gradient moves the sources once more.
    """

    coefficient: NotNegative = 1.0
    scope: SourceScope = "per_batch_per_position"
    """As in `AdversarialReconstruction`."""
    repeats: Count = 1
    """n of the scope `repeat_across_batch`; must divide the batch."""
    sites: Literal["all", "subset"] = "all"
    """Masked at once: all, or at each position a random subset."""
    ascents: Whole = 2
    """Steps of ascent before each step of the components."""
    optimiser: Literal["adam", "sign"] = "adam"
    """How it ascends."""
    lr: Positive = 0.01
    """Learning rate of the ascent."""
    betas: tuple[Share, Share] = (0.5, 0.99)
    """Of its moments."""
    ramp: Share = 0.025
    """Share of the run over which the adversary's learning rate rises."""
    parametrisation: Literal["clamp", "sigmoid"] = "clamp"
    """Sources are clamped to [0, 1] after each move, or are sigmoids of free numbers."""
    delta: DeltaUse = "masked"
    """Whether the adversary also rules the delta component, or it is absent or kept."""
    name: str = "persistent_adversarial"

    def prepare(self, batch: LossBatch) -> "_Moves":
        """Moves by themselves of the sources that rows share."""
        before = int(batch.memory.get(self._key("", "moves"), 0))
        fresh = any(self._key(site, "source") not in batch.memory for site in batch.sites)
        shared = _Moves(before, before + self.ascents, fresh)
        for i in range(self.ascents if self.scope != OWN else 0):
            gradients = batch.total(lambda step: self._gradients(step, self._stored(step, shared)))
            self._ascend(batch, None, gradients, before + i + 1)
        return shared

    def parts(self, step: LossStep, shared: "_Moves") -> Iterator[Tensor]:
        """One part; its gradient moves the sources: those that each row has for itself at once, others at the end."""
        own, local, stored = self.scope == OWN, step.place.local, self._stored(step, shared)
        for i in range(self.ascents if own else 0):
            self._ascend(step, local, self._gradients(step, stored), shared.before + i + 1)
        leaves = {site: s.detach().requires_grad_(True) for site, s in stored.items()}
        routes = subset_routes(step) if self.sites == "subset" else None
        masks = source_masks(step, self._sources(step, leaves), routes, self.delta)
        yield step.divergence.of(step.run_masked(masks))
        if not self.coefficient or any(leaf.grad is None for leaf in leaves.values()):
            return
        scale = self.coefficient * step.place.n_processes * step.scale
        gradients = {site: leaf.grad / scale for site, leaf in leaves.items() if leaf.grad is not None}
        shared.after = shared.before + self.ascents + 1
        if own:
            self._ascend(step, local, gradients, shared.after)
        else:
            shared.last = {site: shared.last[site] + g if shared.last else g for site, g in gradients.items()}

    def finish(self, batch: LossBatch, shared: "_Moves") -> None:
        """The last move of sources that rows share."""
        if shared.last:
            self._ascend(batch, None, batch.processes.total(shared.last), shared.after)
        batch.memory[self._key("", "moves")] = torch.tensor(shared.after)

    def goes_over_rows(self, key: str) -> bool:
        return self.scope == OWN and key.startswith(f"{self.name}/") and not key.endswith("/moves")

    def _key(self, site: str, what: str) -> str:
        return f"{self.name}/{site}/{what}"

    def _stored(self, step: LossStep, shared: "_Moves") -> dict[str, Tensor]:
        """What is remembered of the sources, random at first; where rows have their own, a view of this microbatch's."""
        local = step.place.local if self.scope == OWN else None
        if shared.fresh and local not in shared.begun:
            shared.begun.add(local)
            for site, fresh in start_sources(step, None, self.scope, "random", self.repeats).items():
                start = torch.logit(fresh, 1e-3) if self.parametrisation == "sigmoid" else fresh
                rows = start.shape[:1] if local is None else (local.of,)
                for what in ("source", "mean", "square"):
                    if self._key(site, what) not in step.memory:
                        step.memory[self._key(site, what)] = start.new_zeros((*rows, *start.shape[1:]))
                _of_rows(step.memory[self._key(site, "source")], local).copy_(start)
        return {site: _of_rows(step.memory[self._key(site, "source")], local) for site in step.importances}

    def _sources(self, step: LossStep, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sources in [0, 1] at a microbatch's rows."""
        found = {site: s.sigmoid() if self.parametrisation == "sigmoid" else s for site, s in stored.items()}
        return {site: _at_rows(s, self.scope, step.rows_of(site)) for site, s in found.items()}

    def _gradients(self, step: LossStep, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _gradients(
            step, stored, lambda s: source_masks(step, self._sources(step, s), None, self.delta, detached=True)
        )

    def _ascend(
        self, of: LossStep | LossBatch, local: Window | None, gradients: Mapping[str, Tensor], moves: int
    ) -> None:
        """Move stored sources uphill, in place; where rows have their own, those of a microbatch."""
        lr = self.lr * (min(1.0, of.progress / self.ramp) if self.ramp else 1.0)
        for site, move in gradients.items():
            source, mean, square = (
                _of_rows(of.memory[self._key(site, what)], local) for what in ("source", "mean", "square")
            )
            if self.optimiser == "sign":
                move = move.sign()
            else:
                mean.lerp_(move, 1.0 - self.betas[0])
                square.mul_(self.betas[1]).addcmul_(move, move, value=1.0 - self.betas[1])
                denominator = (square / (1.0 - self.betas[1] ** moves)).sqrt_().add_(1e-8)
                move = (mean / (1.0 - self.betas[0] ** moves)).div_(denominator)
            source.add_(move, alpha=lr)
            if self.parametrisation == "clamp":
                source.clamp_(0.0, 1.0)


@dataclass
class _Moves:
    """What becomes of persistent sources in one step."""

    before: int
    """Moves before the step."""
    after: int
    fresh: bool
    """Whether there were none."""
    begun: set[Window | None] = field(default_factory=set)
    """Rows whose sources have begun since; None: what rows share."""
    last: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the loss itself with respect to what rows share, added up over microbatches."""


def _of_rows(source: Float[Tensor, "..."], local: Window | None) -> Float[Tensor, "..."]:
    """Rows of a microbatch, among those of its process; a view."""
    return source if local is None else source.narrow(0, local.first, local.rows)


def _scope_shape(scope: SourceScope, rows: Sequence[int], repeats: int) -> tuple[int, ...]:
    if scope == "repeat_across_batch" and rows[0] % repeats:
        raise SettingError(f"repeats={repeats} does not divide the batch of {rows[0]} rows; choose another.")
    shapes: dict[str, tuple[int, ...]] = {
        "single_source": (),
        "broadcast_across_batch": tuple(rows[1:]),
        "repeat_across_batch": (repeats, *rows[1:]),
        OWN: tuple(rows),
    }
    return shapes[scope]


def _at_rows(source: Tensor, scope: SourceScope, rows: Sequence[int]) -> Tensor:
    """Sources [*scope, C+1] as they broadcast to the rows of a batch, which may be shorter than the first one.

    Raises:
        DataError: The batch is larger than that which the sources were made for.
    """
    if scope == "single_source":
        return source
    wanted = rows[1:] if scope == "broadcast_across_batch" else rows
    if scope == "repeat_across_batch":
        if rows[0] % len(source):
            raise DataError(f"The batch has {rows[0]} rows, which {len(source)} persistent sources do not divide.")
        source = source.repeat(math.ceil(rows[0] / len(source)), *[1] * (source.ndim - 1))
    if any(have < want for have, want in zip(source.shape, wanted)):
        raise DataError(
            f"Persistent sources were made for rows {list(source.shape[:-1])}, but this batch has {list(wanted)}; let the "
            "first batch be the largest, pad rows to one length, or use the scope 'single_source'."
        )
    return source[tuple(slice(0, n) for n in wanted)]
