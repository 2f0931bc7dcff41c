"""What is done to the component activations of one site, worked out for the columns of one forward pass.

    y' = y + sum_c (a_c U'_c - h_c U_c) + (D' - D)        D = x (W - V U), what the delta component writes

over the components that an edit names: h_c = x V_c is what the model has, a_c what the edits make of x V'_c, V'_c and U'_c
the vectors it reads and writes meanwhile. Nothing else is computed, so that what no edit names stays the model's own, the
bias included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.components.factors import Components, read, write
from tl_paramdecomp.components.masked_output import corrected
from tl_paramdecomp.components.positions import Positions, unknown_end
from tl_paramdecomp.errors import DataError, ShapeError
from tl_paramdecomp.sites import SiteCall, Span, WeightSite

SHARED_ROWS = ("pos_embed.W_pos",)
"""Sites that hosts look up once for all rows, so that no row differs from another."""


@dataclass(frozen=True, eq=False)
class Given:
    """Put values in."""

    value: Tensor
    """It broadcasts to [batch, pos, n]; with a position axis it covers the prompt."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """Multiply what is there."""

    value: Tensor
    """It broadcasts as that of `Given`."""


@dataclass(frozen=True)
class Resampled:
    """Put in what another row of the batch has at the same position."""

    seed: int


Change: TypeAlias = Given | Scaled | Resampled


@dataclass(frozen=True, eq=False)
class ActEdit:
    """One change of some components' activations."""

    components: tuple[int, ...]
    change: Change
    positions: Positions | None = None
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Redirect:
    """Another vector for one component to read or write."""

    component: int
    vector: Float[Tensor, " width"]
    positions: Positions | None = None


@dataclass(frozen=True, eq=False)
class DeltaEdit:
    """One change of what the delta component writes."""

    change: Given | Scaled
    positions: Positions | None = None


@dataclass(frozen=True, eq=False)
class SiteEdits:
    """All that is done to one site: reads first, then activations in the order given, then writes."""

    site: WeightSite
    n_components: int
    edits: tuple[ActEdit, ...] = ()
    reads: tuple[Redirect, ...] = ()
    writes: tuple[Redirect, ...] = ()
    delta: tuple[DeltaEdit, ...] = ()

    @property
    def touched(self) -> frozenset[int]:
        """Components that something is done to."""
        named = {c for edit in self.edits for c in edit.components}
        return frozenset(named | {redirect.component for redirect in (*self.reads, *self.writes)})

    @property
    def by_head(self) -> frozenset[int]:
        """Components of which a single head is edited."""
        return frozenset(c for edit in self.edits if edit.head is not None for c in edit.components)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is done here."""
        return not (self.touched or self.delta)

    @property
    def by_position(self) -> bool:
        """Whether positions matter: something names some, or a tensor has a position axis."""
        changes = [edit.change for edit in (*self.edits, *self.delta)]
        rows = any(not isinstance(c, Resampled) and c.value.ndim > 1 and c.value.shape[-2] > 1 for c in changes)
        return rows or any(e.positions is not None for e in (*self.edits, *self.reads, *self.writes, *self.delta))

    # --- running ------------------------------------------------------------------------------------------------------
    def output(self, components: Components, call: SiteCall) -> Float[Tensor, "*rows d_out"]:
        """What the site writes instead of y.

        Raises:
            ShapeError, PositionIndexError, DataError: Values, positions or a batch that do not fit this pass.
        """
        groups = ((False, sorted(self.touched - self.by_head)), (True, sorted(self.by_head)))
        changes = [_Group(self, components, call, chosen, by_head).written() for by_head, chosen in groups if chosen]
        if self.delta:
            changes.append(self._delta_change(components, call))
        return corrected(components, call.y, call.bias, 1.0, *changes)

    def _delta_change(self, components: Components, call: SiteCall) -> Tensor:
        """D' - D."""
        y = call.y.to(torch.promote_types(call.y.dtype, components.V.dtype))
        own = y if call.bias is None else y - call.bias.to(y.dtype)
        own = own - (components.acts(call.x) @ components.U).to(y.dtype)
        new = own
        for edit in self.delta:
            value, there = _placed(edit.change.value, call.y.shape[:-1], call.span, self.site.name, own)
            where = _both(there, _columns(edit.positions, call, self.site.name, own.device))
            changed = new * value if isinstance(edit.change, Scaled) else value
            new = changed if where is None else torch.where(where.unsqueeze(-1), changed, new)
        return new - own


class _Group:
    """Some components of a site in one pass: [..., n], or [..., head, n] where single heads are edited."""

    def __init__(
        self, made: SiteEdits, components: Components, call: SiteCall, chosen: Sequence[int], by_head: bool
    ) -> None:
        self.made, self.site, self.call = made, components.site, call
        self.chosen, self.by_head = list(chosen), by_head
        self.place = {c: i for i, c in enumerate(self.chosen)}
        every = len(self.chosen) == components.n_components
        at = slice(None) if every else torch.tensor(self.chosen, device=components.V.device)
        self.V, self.U = components.V[:, at], components.U[at]

    def written(self) -> Tensor:
        """sum_c (a_c U'_c - h_c U_c) [..., d_out]."""
        by_head = self.by_head
        h = read(self.site, self.call.x, self.V, by_head)
        live = h
        for redirect in (r for r in self.made.reads if r.component in self.place):
            own = torch.zeros(len(self.chosen), dtype=torch.bool, device=h.device)
            own[self.place[redirect.component]] = True
            other = read(self.site, self.call.x, redirect.vector.to(self.V).unsqueeze(-1), by_head)
            live = torch.where(self._where(redirect.positions, own, None), other, live)
        acts = live
        for edit in self.made.edits:
            at = [self.place[c] for c in edit.components if c in self.place]
            if at:
                acts = self._edited(edit, acts, live, at)
        written = write(self.site, acts - h, self.U, by_head)
        for i, vector, columns in self._redirected():
            difference = (vector - self.U[i]).unsqueeze(0)
            a = acts[..., i : i + 1] if columns is None else acts[..., i : i + 1] * self._over(columns).to(acts)
            written = written + write(self.site, a, difference, by_head)
        return written

    # --- parts --------------------------------------------------------------------------------------------------------
    def _edited(self, edit: ActEdit, acts: Tensor, live: Tensor, at: list[int]) -> Tensor:
        rows, name = self.call.y.shape[:-1], self.site.name
        own = torch.zeros(len(self.chosen), dtype=torch.bool, device=acts.device)
        own[at] = True
        there = None
        if isinstance(edit.change, Resampled):
            new = live[_other_rows(len(live), edit.change.seed, name).to(live.device)]
        else:
            value, there = _placed(self._of_chosen(edit, at), rows, self.call.span, name, acts)
            value = value.unsqueeze(-2) if self.by_head else value
            new = acts * value if isinstance(edit.change, Scaled) else value
        return torch.where(self._where(edit.positions, own, there, edit.head), new, acts)

    def _of_chosen(self, edit: ActEdit, at: list[int]) -> Tensor:
        """An edit's values with one entry for each component of the group, in its order."""
        assert not isinstance(edit.change, Resampled)
        value = edit.change.value
        if value.ndim == 0 or value.shape[-1] == 1:
            return value.reshape(*value.shape[:-1], 1)
        mine = [i for i, c in enumerate(edit.components) if c in self.place]
        if len(mine) == len(edit.components) and at == list(range(len(self.chosen))):
            return value
        full = value.new_zeros((*value.shape[:-1], len(self.chosen)))
        return full.index_copy(-1, torch.tensor(at, device=value.device), value[..., mine])

    def _where(
        self, positions: Positions | None, own: Bool[Tensor, " n"], there: Tensor | None, head: int | None = None
    ) -> Bool[Tensor, "..."]:
        columns = _both(there, _columns(positions, self.call, self.site.name, own.device))
        where = own
        if head is not None:
            where = where & (torch.arange(self.site.n_heads or 1, device=own.device) == head).unsqueeze(-1)
        return where if columns is None else where & self._over(columns)

    def _over(self, columns: Tensor) -> Tensor:
        """Rows' values over the axes of activations."""
        return columns[..., None, None] if self.by_head else columns[..., None]

    def _redirected(self) -> list[tuple[int, Tensor, Tensor | None]]:
        """(component, vector, columns) of redirected writes; where several meet, the last one given holds."""
        found: list[tuple[int, Tensor, Tensor | None]] = []
        taken: dict[int, Tensor | None] = {}
        for redirect in reversed([r for r in self.made.writes if r.component in self.place]):
            i = self.place[redirect.component]
            if i in taken and taken[i] is None:
                continue
            columns = _columns(redirect.positions, self.call, self.site.name, self.U.device)
            before = taken.get(i)
            taken[i] = None if columns is None else columns if before is None else columns | before
            if before is not None:
                columns = ~before if columns is None else columns & ~before
            found.append((i, redirect.vector.to(self.U), columns))
        return found


def derangement(n: int, seed: int) -> Int[Tensor, " n"]:
    """For each of n rows another one, each taken once; the same for a seed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def _other_rows(n: int, seed: int, name: str) -> Int[Tensor, " n"]:
    if n < 2 and name not in SHARED_ROWS:
        raise DataError(
            f"Activations of {name} are resampled from other rows of the batch, and this batch has one row. Run several "
            "prompts at once, or give another prompt's values with from_acts(...)."
        )
    return derangement(n, seed)


def _columns(
    positions: Positions | None, call: SiteCall, name: str, device: torch.device
) -> Bool[Tensor, "*batch pos"] | None:
    return None if positions is None else positions.columns(call.y.shape[:-1], call.span, name).to(device)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _placed(
    value: Shaped[Tensor, "..."], rows: Sequence[int], span: Span, name: str, like: Tensor
) -> tuple[Tensor, Bool[Tensor, " pos"] | None]:
    """Given values at the columns of one pass, and which of the columns they cover; None: all.

    Raises:
        ShapeError: They do not broadcast to the rows, or cover another number of positions than the prompt has.
    """
    value = value.to(like.device, like.dtype)
    lead = value.shape[:-1]
    if len(lead) > len(rows) or (len(lead) == len(rows) == 2 and lead[0] != rows[0] and 1 not in (lead[0], rows[0])):
        raise ShapeError(
            f"The values given for {name} are {list(value.shape)}, but the site's output has rows {list(rows)}; give one "
            "row, or one for each (generation with beams or several return sequences multiplies the batch)."
        )
    if not lead or lead[-1] == 1:
        return value, None
    if not span.prompt_known:
        raise unknown_end(name)
    covered, start, end = lead[-1], span.start, span.start + rows[-1]
    prompt = end if span.prompt is None else span.prompt
    if covered != prompt:
        raise ShapeError(
            f"The values given for {name} cover {covered} positions, but the prompt has {prompt}. Activations of another "
            "prompt must be of one with as many tokens, aligned with this one."
        )
    inside = value.narrow(-2, min(start, covered), max(0, min(end, covered) - start))
    missing = rows[-1] - inside.shape[-2]
    if not missing:
        return inside, None
    padded = torch.cat([inside, inside.new_zeros((*lead[:-1], missing, value.shape[-1]))], -2)
    return padded, torch.arange(start, end, device=like.device) < covered
