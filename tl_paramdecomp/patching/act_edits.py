"""What is done to the component activations of one site, worked out for the columns of one forward pass.

    y' = y + sum_c (a_c U'_c - h_c U_c) + (D' - D)        D = x (W - V U), what the delta component writes

over the components that an edit names: h_c = x V_c is what the model has, a_c what the edits make of x V'_c, V'_c and U'_c
the vectors it reads and writes meanwhile. Nothing else is computed, so that what no edit names stays the model's own, the
bias included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.components.factors import Components, read, write
from tl_paramdecomp.components.masked_output import corrected
from tl_paramdecomp.components.masks import SiteChange
from tl_paramdecomp.components.positions import Positions, at_columns
from tl_paramdecomp.errors import DataError
from tl_paramdecomp.sites import SiteCall, WeightSite

SHARED_ROWS = ("pos_embed.W_pos",)
"""Sites that hosts look up once for all rows, so that no row differs from another."""


class ActEdit(NamedTuple):
    """One change of some components' activations, or of what the delta component writes."""

    kind: Literal["set", "scale", "resample"]
    value: Any
    """What is put in or multiplied by: it broadcasts to [batch, pos, n], and with a position axis covers the prompt; to
    resample, the seed."""
    components: tuple[int, ...] = ()
    positions: Positions | None = None
    head: int | None = None


class Redirect(NamedTuple):
    """Another vector for one component to read or write."""

    component: int
    vector: Float[Tensor, " width"]
    positions: Positions | None = None


@dataclass(frozen=True, eq=False)
class SiteEdits(SiteChange):
    """All that is done to one site: reads first, then activations in the order given, then writes."""

    edits: tuple[ActEdit, ...] = ()
    reads: tuple[Redirect, ...] = ()
    writes: tuple[Redirect, ...] = ()
    delta: tuple[ActEdit, ...] = ()

    @property
    def touched(self) -> frozenset[int]:
        named = {c for edit in self.edits for c in edit.components}
        return frozenset(named | {redirect.component for redirect in (*self.reads, *self.writes)})

    @property
    def by_head(self) -> frozenset[int]:
        """Components of which a single head is edited."""
        return frozenset(c for edit in self.edits if edit.head is not None for c in edit.components)

    @property
    def keeps_delta(self) -> bool:
        return not self.delta

    @property
    def is_identity(self) -> bool:
        return not (self.touched or self.delta)

    @property
    def by_position(self) -> bool:
        values = [edit.value for edit in (*self.edits, *self.delta)]
        rows = any(isinstance(value, Tensor) and value.ndim > 1 and value.shape[-2] > 1 for value in values)
        return rows or any(e.positions is not None for e in (*self.edits, *self.reads, *self.writes, *self.delta))

    # --- running ------------------------------------------------------------------------------------------------------
    def output(self, components: Components, call: SiteCall) -> Float[Tensor, "*rows d_out"]:
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
            value, there = _at_columns(edit.value, call, self.site, own)
            changed = new * value if edit.kind == "scale" else value
            new = torch.where(_columns(edit.positions, there, call, self.site).to(own.device)[..., None], changed, new)
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
            other = read(self.site, self.call.x, redirect.vector.to(self.V).unsqueeze(-1), by_head)
            live = torch.where(self._where(redirect.positions, [self.place[redirect.component]]), other, live)
        acts = live
        for edit in self.made.edits:
            at = [self.place[c] for c in edit.components if c in self.place]
            if at:
                acts = self._edited(edit, acts, live, at)
        written = write(self.site, acts - h, self.U, by_head)
        taken: dict[int, Tensor] = {}
        for redirect in reversed([r for r in self.made.writes if r.component in self.place]):  # the last one holds
            i = self.place[redirect.component]
            columns = _columns(redirect.positions, None, self.call, self.site).to(acts.device)
            left = columns & ~taken[i] if i in taken else columns
            taken[i] = columns | taken[i] if i in taken else columns
            a = acts[..., i : i + 1] * self._over(left).to(acts)
            written = written + write(self.site, a, (redirect.vector.to(self.U) - self.U[i]).unsqueeze(0), by_head)
        return written

    def _edited(self, edit: ActEdit, acts: Tensor, live: Tensor, at: list[int]) -> Tensor:
        there = None
        if edit.kind == "resample":
            new = live[_other_rows(len(live), edit.value, self.site.name).to(live.device)]
        else:
            value, there = _at_columns(self._of_chosen(edit.components, edit.value, at), self.call, self.site, acts)
            value = value.unsqueeze(-2) if self.by_head else value
            new = acts * value if edit.kind == "scale" else value
        return torch.where(self._where(edit.positions, at, there, edit.head), new, acts)

    def _of_chosen(self, components: Sequence[int], value: Tensor, at: list[int]) -> Tensor:
        """An edit's values with one entry for each component of the group, in its order, or one for all."""
        if value.ndim == 0 or value.shape[-1] == 1:
            return value.reshape(*value.shape[:-1], 1)
        mine = [i for i, c in enumerate(components) if c in self.place]
        full = value.new_zeros((*value.shape[:-1], len(self.chosen)))
        return full.index_copy(-1, torch.tensor(at, device=value.device), value[..., mine])

    def _where(
        self, positions: Positions | None, at: list[int], there: Tensor | None = None, head: int | None = None
    ) -> Bool[Tensor, "..."]:
        where = torch.zeros(len(self.chosen), dtype=torch.bool, device=self.V.device)
        where[at] = True
        if head is not None:
            where = where & (torch.arange(self.site.n_heads or 1, device=where.device) == head).unsqueeze(-1)
        return where & self._over(_columns(positions, there, self.call, self.site).to(where.device))

    def _over(self, columns: Tensor) -> Tensor:
        """Rows' values over the axes of activations."""
        return columns[..., None, None] if self.by_head else columns[..., None]


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
    positions: Positions | None, there: Tensor | None, call: SiteCall, site: WeightSite
) -> Bool[Tensor, "..."]:
    """Which of a pass's columns are meant, of those that are there."""
    if positions is None:
        return torch.ones((), dtype=torch.bool) if there is None else there
    named = positions.columns(call.y.shape[:-1], call.span, site.name)
    return named if there is None else named.to(there.device) & there


def _at_columns(value: Any, call: SiteCall, site: WeightSite, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Given values at the columns of one pass, and which of the columns they cover."""
    value = value.to(like.device, like.dtype)
    return at_columns(value, value.ndim - 2, call.y.shape[:-1], call.span, site.name, "values given for")
