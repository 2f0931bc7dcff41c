"""Component activations patched: set to values of one's own, another prompt's, their mean, or made to read and write
elsewhere.

Masks say how much of each component takes part; patches say what its activation is. Patching all component activations of a
site and its delta component from another prompt is activation patching of the site's output.

At one site y' = y + sum_c (a_c U'_c - h_c U_c) + (D' - D) over the components that an edit names, with D = x (W - V U) what the
delta component writes: h_c = x V_c is what the model has, a_c what the edits make of x V'_c, V'_c and U'_c the vectors it reads
and writes meanwhile. Nothing else is computed, so that what no edit names stays the model's own, the bias included.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components, read, write
from tl_paramdecomp.components.indices import ComponentsLike, Head, checked_head, component_indices
from tl_paramdecomp.components.masked_output import corrected
from tl_paramdecomp.components.masks import SiteChange, SiteChanges, real_values
from tl_paramdecomp.components.positions import Positions, PositionsLike, at_columns, parse_positions
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    DtypeError,
    NoMatchingSiteError,
    SettingError,
    ShapeError,
)
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.settings import Seed, fit
from tl_paramdecomp.sites import SiteCall, WeightSite

SHARED_ROWS = ("pos_embed.W_pos",)
"""Sites that hosts look up once for all rows, so that no row differs from another."""
Number: TypeAlias = float | int
Value: TypeAlias = Tensor | Number
ActsLike = Tensor | Mapping[str, Tensor]
"""Activations [..., C] of a site, or of several sites by name as `component_acts` gives them."""


# --- one site ---------------------------------------------------------------------------------------------------------
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
            if len(live) < 2 and self.site.name not in SHARED_ROWS:
                raise DataError(
                    f"Activations of {self.site.name} are resampled from other rows of the batch, and this batch has one row. "
                    "Run several prompts at once, or give another prompt's values with from_acts(...)."
                )
            new = live[derangement(len(live), edit.value).to(live.device)]
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


# --- patches of a decomposition ---------------------------------------------------------------------------------------
class ActPatches(SiteChanges[SiteEdits]):
    """What is done to component activations, as an immutable value: every method returns a new one.

    At one site reads are redirected first, then activations are changed in the order given, then writes are redirected.
    Positions are those of `Masks`: columns of the row as handed to the model, negative ones from the end of the prompt.
    A value without a position axis also holds for tokens that are decoded later; one with a position axis covers exactly
    the prompt, and leaves decoded tokens to the model.
    """

    _nothing = SiteEdits
    _done = "patched"

    # --- values -------------------------------------------------------------------------------------------------------
    def set(
        self, site: str, components: ComponentsLike, value: Value, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Put values in.

        Args:
            site: Name or alias of the site.
            components: One index, several (n), a slice, or a boolean tensor [C].
            value: A number, or a tensor that broadcasts to [batch, pos, n]. Gradients reach it.
            positions: Columns of the row: int, list, slice, boolean mask [pos] or [batch, pos]; None: everywhere.
            head: Only what this head writes (W_Q by query head, W_K and W_V by key/value head), or reads (W_O, where the
                heads' parts sum to the activation).

        Raises:
            NoMatchingSiteError, ComponentIndexError, HeadIndexError: No such site, component or head.
            ShapeError, DtypeError: A value that does not broadcast, or is no real number.
            SettingError: The value of a W_O component is set as a whole and for one of its heads.
            PositionIndexError, ShapeError: From the forward pass, where positions or values do not fit its rows.
        """
        return self._edited(site, components, "set", value, positions, head)

    def zero(
        self, site: str, components: ComponentsLike, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Ablate components: their activations are 0. Arguments and errors as in `set`."""
        return self.set(site, components, 0.0, positions, head)

    def scale(
        self, site: str, components: ComponentsLike, factor: Value, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Multiply activations: 0 ablates, 1 leaves, 2 doubles. Arguments and errors as in `set`."""
        return self._edited(site, components, "scale", factor, positions, head)

    def from_acts(
        self, site: str, components: ComponentsLike, acts: ActsLike, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Put in another prompt's activations, position by position (activation patching, one component at a time).

        Args:
            acts: What `component_acts` gives: [batch, pos, C] of a prompt with as many tokens, for one row or for each.
                For one head of W_O: [batch, pos, head, C], from `decomposition[site].head_acts(x)`.

        Raises:
            NoMatchingSiteError: The activations are not of this site.
            ShapeError: They do not end in C; or, from the forward pass, are of a prompt of another length.
            As `set`, whose other arguments these are.
        """
        return self._edited(site, components, "set", _acts_of(*self._at(site, components), acts, head), positions, head)

    def mean(
        self, site: str, components: ComponentsLike, means: ActsLike, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Put in mean activations [C] or [pos, C] of `activation_means`. Arguments and errors as in `from_acts`."""
        return self.from_acts(site, components, means, positions, head)

    def resample(
        self, site: str, components: ComponentsLike, seed: int = 0, positions: PositionsLike = None, head: Head = None
    ) -> "ActPatches":
        """Put in what another row of the batch has at the same position, in the very pass.

        The seed and the number of rows alone say which row: sites of one seed are resampled from the same row.

        Raises:
            DataError: From a forward pass over a single row.
            As `set`, whose other arguments these are.
        """
        return self._edited(site, components, "resample", fit(seed, Seed, "seed"), positions, head)

    # --- directions ---------------------------------------------------------------------------------------------------
    def read(
        self, site: str, component: SupportsIndex, vector: Float[Tensor, " d_in"], positions: PositionsLike = None
    ) -> "ActPatches":
        """Let a component read along another vector: its activation is x . vector (for an embedding: the token's entry).

        Raises:
            ShapeError: The vector is not [d_in].
            NoMatchingSiteError, ComponentIndexError, DtypeError, PositionIndexError: As in `set`.
        """
        return self._redirected(site, component, vector, "reads", positions)

    def write(
        self, site: str, component: SupportsIndex, vector: Float[Tensor, " d_out"], positions: PositionsLike = None
    ) -> "ActPatches":
        """Let a component write along another vector than U_c.

        Raises:
            ShapeError: The vector is not [d_out].
            NoMatchingSiteError, ComponentIndexError, DtypeError, PositionIndexError: As in `set`.
        """
        return self._redirected(site, component, vector, "writes", positions)

    def delta(self, site: str, value: ActsLike | Number, positions: PositionsLike = None) -> "ActPatches":
        """Change what the delta component W - V U writes.

        Args:
            value: A number multiplies it (0 removes it); a tensor that broadcasts to [batch, pos, d_out], or what
                `delta_writes` gives for another prompt, is put in its place.

        Raises:
            ShapeError: The tensor does not end in d_out.
            NoMatchingSiteError, DtypeError, PositionIndexError: As in `from_acts`.
        """
        old = self._of(site)
        name = old.site.name
        value = _of_site(value, name, "delta writes")
        if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[-1] != old.site.d_out):
            raise ShapeError(
                f"What the delta component of {name} writes is [..., d_out={old.site.d_out}]; given {list(value.shape)}."
            )
        kind = "set" if isinstance(value, Tensor) else "scale"
        edit = ActEdit(kind, _values(value, name, old.site.d_out), positions=parse_positions(positions))
        return self._with({name: replace(old, delta=(*old.delta, edit))})

    def _at(self, site: str, components: ComponentsLike) -> tuple[SiteEdits, list[int]]:
        old = self._of(site)
        return old, component_indices(components, old.n_components, old.site.name)

    def _redirected(
        self, site: str, component: SupportsIndex, vector: Any, verb: str, positions: PositionsLike
    ) -> "ActPatches":
        old, at = self._at(site, component)
        name, width = old.site.name, old.site.d_in if verb == "reads" else old.site.d_out
        if len(at) != 1:
            raise ComponentIndexError(f"One component of {name} {verb} along one vector; given {len(at)} components.")
        if not isinstance(vector, Tensor) or vector.is_complex():
            raise DtypeError(f"What a component of {name} {verb} is a tensor [{width}]; given {type(vector).__name__}.")
        if vector.shape != (width,):
            raise ShapeError(f"What a component of {name} {verb} is a vector [{width}]; given {list(vector.shape)}.")
        redirect = Redirect(at[0], vector.clone(), parse_positions(positions))
        return self._with({name: replace(old, **{verb: (*getattr(old, verb), redirect)})})

    def _edited(
        self, site: str, components: ComponentsLike, kind: Any, value: Any, positions: PositionsLike, head: Head
    ) -> "ActPatches":
        old, at = self._at(site, components)
        value = value if kind == "resample" else _values(value, old.site.name, len(at))
        edit = ActEdit(kind, value, tuple(at), parse_positions(positions), checked_head(old.site, head))
        new = replace(old, edits=(*old.edits, edit))
        for each in new.edits if old.site.head_side == "in" else ():
            both = new.by_head & set(each.components)
            if each.head is None and each.kind == "set" and both:  # what the other heads' parts are is not said
                raise SettingError(
                    f"Component {min(both)} of {old.site.name} is set as a whole and for one head; heads share its "
                    "activation as a sum, so that the other heads' parts would be unknown. Set every head, or the whole."
                )
        return self._with({old.site.name: new})


def act_patches(decomposition: Decomposition) -> ActPatches:
    """Patches of nothing: the model itself."""
    return ActPatches(decomposition.sites, decomposition.n_components)


def patched_acts(model: Any, decomposition: Decomposition, patches: ActPatches) -> AbstractContextManager[Any]:
    """Within this context, which gives the model, it runs with its component activations patched, however it is called.

    `run_with_cache`, `run_with_hooks`, `generate` and nnsight traces work inside, as in `patched`. Contexts nest, with
    `patched` too: patches of one site combine while they are about different components and leave the delta component.

    Args:
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        patches: From `act_patches(decomposition)`.

    Raises:
        NoMatchingSiteError: The patches belong to another decomposition.
        TargetMismatchError, DeviceError, PatchConflictError, SiteNotFiredError: As `patched`.
    """
    return patched(model, decomposition, patches)


# --- checks ----------------------------------------------------------------------------------------------------------
def _values(value: Any, name: str, n: int) -> Tensor:
    """A tensor that broadcasts to [batch, pos, n]; errors as of `real_values`, and gradients still flow."""
    given = real_values(value, f"Values for {name}", n)
    if isinstance(given, Tensor) and given.is_floating_point():
        return given
    return torch.as_tensor(given, dtype=torch.float64)


def _acts_of(old: SiteEdits, at: list[int], acts: Any, head: Head) -> Tensor:
    """A site's activations [..., n] of some components among those given; of one head where W_O's are divided."""
    site, n = old.site, old.n_components
    acts = _of_site(acts, site.name, "activations")
    if not isinstance(acts, Tensor):
        raise DtypeError(f"Activations of {site.name} must be a tensor [..., C]; given {type(acts).__name__}.")
    chosen = checked_head(site, head)
    by_head = chosen is not None and site.head_side == "in"
    if acts.ndim <= by_head or acts.shape[-1] != n or (by_head and acts.shape[-2] != site.n_heads):
        split = f"heads={site.n_heads}, " if by_head else ""
        hint = ", which decomposition[site].head_acts(x) gives" if split else ""
        raise ShapeError(f"Activations of {site.name} are [..., {split}C={n}]{hint}; given {list(acts.shape)}.")
    return (acts[..., chosen, :] if by_head else acts)[..., at]


def _of_site(values: Any, name: str, what: str) -> Any:
    """Those of one site, where there are those of several."""
    if isinstance(values, Mapping) and name not in values:
        raise NoMatchingSiteError(f"There are no {what} of {name} among those of {', '.join(values)}.")
    return values[name] if isinstance(values, Mapping) else values
