"""Adversarial masks: the worst choice of what unimportant components do.

Sources s in [0, 1] fill the masks m = g + (1 - g) s and the delta mask d = s of a last channel, and are moved to raise the
divergence. Fresh ones are found anew at every step by projected gradient ascent (PGD); persistent ones survive from step to
step and are moved a little each time, so that a strong adversary costs little more than one pass. Sources shared by all rows
and positions find systematic faults; an adversary of every position's own would punish interference that no
decomposition avoids. From the successors of "Stochastic Parameter Decomposition" and VPD ("Interpreting Language Model
Parameters", 2026).
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.base import Loss, LossStep, SiteMasks
from tl_paramdecomp.methods.pieces import Request, Total, Work, run_alone
from tl_paramdecomp.methods.reconstruction import DeltaUse, Replaced, check_masks, routed, subset_routes
from tl_paramdecomp.parallel import Window

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

    coefficient: float = 1.0
    steps: int = 1
    """Steps of ascent."""
    step_size: float = 1.0
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

    def __post_init__(self) -> None:
        check_masks(self.sites, delta=self.delta)
        _check_scope(self.scope)
        if self.steps < 1 or self.step_size <= 0:
            raise SettingError(
                f"The adversary needs steps >= 1 and a positive step size; given {self.steps} and {self.step_size}."
            )
        if self.start not in ("random", "ones", "zeros"):
            raise SettingError(f"The adversary starts from 'random', 'ones' or 'zeros'; given {self.start!r}.")

    def parts(self, step: LossStep) -> Work:
        """One part, or one for each site where they are masked one at a time."""
        groups = [(name,) for name in step.importances] if self.sites == "layerwise" else [tuple(step.importances)]
        for names in groups:
            routes = subset_routes(step) if self.sites == "subset" else None
            start = start_sources(step, names, self.scope, self.start)
            sources = yield from _climbed(step, start, self.steps, self.step_size, routes, self.delta, self.scope)
            masks = source_masks(step, sources, routes, self.delta)
            yield step.divergence.of(step.run_masked(masks)) / len(groups)


def worst_sources(
    step: LossStep,
    sources: Sources,
    steps: int,
    step_size: float,
    routes: Routes | None = None,
    delta: DeltaUse = "masked",
) -> Sources:
    """Sources that raise the divergence of a whole batch, from a start by `steps` sign steps."""
    return run_alone(_climbed(step, sources, steps, step_size, routes, delta))


def _climbed(
    step: LossStep,
    sources: Sources,
    steps: int,
    step_size: float,
    routes: Routes | None = None,
    delta: DeltaUse = "masked",
    scope: SourceScope = "single_source",
) -> Generator[Request, Any, Sources]:
    """The same for a piece of a batch: what rows share moves by the gradient of all of them."""
    for _ in range(steps):
        gradients = _gradients(step, sources, routes, delta)
        if scope != OWN:
            gradients = yield Total(gradients)
        sources = {name: (s + step_size * gradients[name].sign()).clamp_(0.0, 1.0) for name, s in sources.items()}
    return sources


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


def _gradients(step: LossStep, sources: Sources, routes: Routes | None, delta: DeltaUse) -> dict[str, Tensor]:
    """Gradient with respect to sources of what the piece adds to the batch's divergence, everything else constant."""
    leaves = {name: s.detach().requires_grad_(True) for name, s in sources.items()}
    with torch.enable_grad():
        loss = step.divergence.of(step.run_masked(source_masks(step, leaves, routes, delta, detached=True)))
    return _scaled_gradients(step, loss, leaves)


def _scaled_gradients(
    step: LossStep, loss: Float[Tensor, ""], leaves: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "..."]]:
    """Gradients of what a piece's loss adds to the batch's."""
    with torch.enable_grad():
        scaled = step.place.weight * step.scale * loss
    found = torch.autograd.grad(scaled, list(leaves.values()), allow_unused=True, materialize_grads=True)  # a pooler's
    return {name: g if step.scale == 1.0 else g / step.scale for name, g in zip(leaves, found, strict=True)}


# --- persistent -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PersistentAdversarialReconstruction(Loss):
    """Divergence under adversarial masks that survive from step to step, moved by Adam or by sign.

    Per step: `ascents` moves by themselves, then the loss, whose own gradient moves the sources once more.
    """

    coefficient: float = 1.0
    scope: SourceScope = "per_batch_per_position"
    """As in `AdversarialReconstruction`."""
    repeats: int = 1
    """n of the scope `repeat_across_batch`; must divide the batch."""
    sites: Literal["all", "subset"] = "all"
    """Masked at once: all, or at each position a random subset."""
    ascents: int = 2
    """Steps of ascent before each step of the components."""
    optimiser: Literal["adam", "sign"] = "adam"
    """How it ascends."""
    lr: float = 0.01
    """Learning rate of the ascent."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Of its moments."""
    ramp: float = 0.025
    """Share of the run over which the adversary's learning rate rises."""
    parametrisation: Literal["clamp", "sigmoid"] = "clamp"
    """Sources are clamped to [0, 1] after each move, or are sigmoids of free numbers."""
    delta: DeltaUse = "masked"
    """Whether the adversary also rules the delta component, or it is absent or kept."""
    name: str = "persistent_adversarial"

    def __post_init__(self) -> None:
        check_masks(self.sites, delta=self.delta)
        _check_scope(self.scope)
        if self.repeats < 1 or self.ascents < 0 or self.lr <= 0 or not 0.0 <= self.ramp <= 1.0:
            raise SettingError(
                "A persistent adversary needs repeats >= 1, ascents >= 0, a positive lr and a ramp in [0, 1]; given "
                f"{self.repeats}, {self.ascents}, {self.lr}, {self.ramp}."
            )
        if self.optimiser not in ("adam", "sign") or self.parametrisation not in ("clamp", "sigmoid"):
            raise SettingError(
                f"optimiser is 'adam' or 'sign', parametrisation 'clamp' or 'sigmoid'; given {self.optimiser!r} and "
                f"{self.parametrisation!r}."
            )

    def parts(self, step: LossStep) -> Work:
        """One part; after its gradient is taken the sources move."""
        kept, moves = self._remembered(step), self._moves(step)
        for i in range(self.ascents):
            leaves, sources = self._leaves(step, kept)
            with torch.enable_grad():
                loss = step.divergence.of(step.run_masked(source_masks(step, sources, None, self.delta, detached=True)))
            yield from self._ascend(step, kept, _scaled_gradients(step, loss, leaves), moves + i + 1)
        leaves, sources = self._leaves(step, kept)
        routes = subset_routes(step) if self.sites == "subset" else None
        yield step.divergence.of(step.run_masked(source_masks(step, sources, routes, self.delta)))
        if self.coefficient and all(leaf.grad is not None for leaf in leaves.values()):
            scale = self.coefficient * step.place.n_processes * step.scale
            gradients = {name: leaf.grad / scale for name, leaf in leaves.items() if leaf.grad is not None}
            yield from self._ascend(step, kept, gradients, moves + self.ascents + 1)

    def goes_over_rows(self, key: str) -> bool:
        return self.scope == OWN and key.startswith(f"{self.name}/") and not key.endswith("/moves")

    def _key(self, site: str, what: str) -> str:
        return f"{self.name}/{site}/{what}"

    def _remembered(self, step: LossStep) -> dict[str, Tensor]:
        """Sources as stored, [*scope, C+1]; made at the first step. Where rows have their own, those of this piece."""
        local = step.place.local if self.scope == OWN else None
        if any(self._key(site, "source") not in step.known for site in step.importances):
            self._begin(step, local)
        kept = {site: step.memory[self._key(site, "source")] for site in step.importances}
        return {site: _of_piece(source, local) for site, source in kept.items()}

    def _begin(self, step: LossStep, local: Window | None) -> None:
        for site, fresh in start_sources(step, None, self.scope, "random", self.repeats).items():
            start = torch.logit(fresh, 1e-3) if self.parametrisation == "sigmoid" else fresh
            if step.place.leads:
                rows = start.shape[:1] if local is None else (local.of,)
                for what in ("source", "mean", "square"):
                    step.memory[self._key(site, what)] = start.new_zeros((*rows, *start.shape[1:]))
            if step.place.leads or local is not None:
                _of_piece(step.memory[self._key(site, "source")], local).copy_(start)

    def _moves(self, step: LossStep) -> int:
        """Moves of the sources before this step."""
        return int(step.known.get(self._key("", "moves"), 0))

    def _leaves(self, step: LossStep, kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leaves for gradients, and the sources in [0, 1] that they stand for at this batch's rows."""
        leaves = {site: s.detach().requires_grad_(True) for site, s in kept.items()}
        sources = {}
        with torch.enable_grad():  # as a metric it is asked for without gradients, but its ascents need them
            for site, leaf in leaves.items():
                s = leaf.sigmoid() if self.parametrisation == "sigmoid" else leaf
                sources[site] = _at_rows(s, self.scope, step.rows_of(site))
        return leaves, sources

    def _ascend(
        self, step: LossStep, kept: Mapping[str, Tensor], gradients: Mapping[str, Tensor], moves: int
    ) -> Generator[Request, Any, None]:
        """Move the stored sources uphill, in place; what rows share by the gradient of all of them, and once."""
        if self.scope != OWN:
            gradients = yield Total(dict(gradients))
        if step.place.leads:
            step.memory[self._key("", "moves")] = torch.tensor(moves)
        elif self.scope != OWN:
            return
        lr = self.lr * (min(1.0, step.progress / self.ramp) if self.ramp else 1.0)
        local = step.place.local if self.scope == OWN else None
        for site, source in kept.items():
            move = gradients[site]
            if self.optimiser == "sign":
                move = move.sign()
            else:
                mean, square = (_of_piece(step.memory[self._key(site, what)], local) for what in ("mean", "square"))
                mean.lerp_(move, 1.0 - self.betas[0])
                square.mul_(self.betas[1]).addcmul_(move, move, value=1.0 - self.betas[1])
                denominator = (square / (1.0 - self.betas[1] ** moves)).sqrt_().add_(1e-8)
                move = (mean / (1.0 - self.betas[0] ** moves)).div_(denominator)
            source.add_(move, alpha=lr)
            if self.parametrisation == "clamp":
                source.clamp_(0.0, 1.0)


def _of_piece(source: Float[Tensor, "..."], local: Window | None) -> Float[Tensor, "..."]:
    """Rows of a piece, among those of its process; a view."""
    return source if local is None else source.narrow(0, local.first, local.rows)


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise SettingError(f"The scope of sources must be one of {', '.join(SCOPES)}; given {scope!r}.")


def _scope_shape(scope: SourceScope, rows: Sequence[int], repeats: int) -> tuple[int, ...]:
    if scope == "single_source":
        return ()
    if scope == "broadcast_across_batch":
        return tuple(rows[1:])
    if scope == "per_batch_per_position":
        return tuple(rows)
    if rows[0] % repeats:
        raise SettingError(f"repeats={repeats} does not divide the batch of {rows[0]} rows; choose another.")
    return (repeats, *rows[1:])


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
