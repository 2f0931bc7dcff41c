"""Component activations patched: set to values of one's own, another prompt's, their mean, or made to read and write
elsewhere.

Masks say how much of each component takes part; patches say what its activation is. Patching all component activations of a
site and its delta component from another prompt is activation patching of the site's output.
"""

import functools
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters.boundary import entered_once
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike, checked_head, component_indices
from tl_paramdecomp.components.masks import finite_number
from tl_paramdecomp.components.positions import PositionsLike, parse_positions
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DtypeError,
    NoMatchingSiteError,
    SettingError,
    ShapeError,
)
from tl_paramdecomp.patching.act_edits import ActEdit, Change, DeltaEdit, Given, Redirect, Resampled, Scaled, SiteEdits
from tl_paramdecomp.patching.claims import Claim, claimed
from tl_paramdecomp.patching.hooks import intercepted
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteFn, WeightSite, resolve_name

Number = float | int
ActsLike = Tensor | Mapping[str, Tensor]
"""Activations [..., C] of a site, or of several sites by name as `component_acts` gives them."""


class ActPatches:
    """What is done to component activations, as an immutable value: every method returns a new one.

    At one site reads are redirected first, then activations are changed in the order given, then writes are redirected.
    Positions are those of `Masks`: columns of the row as handed to the model, negative ones from the end of the prompt.
    A value without a position axis also holds for tokens that are decoded later; one with a position axis covers exactly
    the prompt, and leaves decoded tokens to the model.
    """

    def __init__(self, sites: Mapping[str, WeightSite], n_components: Mapping[str, int]) -> None:
        self._sites = dict(sites)
        self._n_components = dict(n_components)
        self._changed: dict[str, SiteEdits] = {}

    # --- values -------------------------------------------------------------------------------------------------------
    def set(
        self,
        site: str,
        components: ComponentsLike,
        value: Tensor | Number,
        positions: PositionsLike = None,
        head: SupportsIndex | None = None,
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
        old = self._site(site)
        at = tuple(component_indices(components, old.n_components, old.site.name))
        return self._edited(old, at, Given(_values(value, old.site.name, len(at))), positions, head)

    def zero(
        self, site: str, components: ComponentsLike, positions: PositionsLike = None, head: SupportsIndex | None = None
    ) -> "ActPatches":
        """Ablate components: their activations are 0. Arguments and errors as in `set`."""
        return self.set(site, components, 0.0, positions, head)

    def scale(
        self,
        site: str,
        components: ComponentsLike,
        factor: Tensor | Number,
        positions: PositionsLike = None,
        head: SupportsIndex | None = None,
    ) -> "ActPatches":
        """Multiply activations: 0 ablates, 1 leaves, 2 doubles. Arguments and errors as in `set`."""
        old = self._site(site)
        at = tuple(component_indices(components, old.n_components, old.site.name))
        return self._edited(old, at, Scaled(_values(factor, old.site.name, len(at))), positions, head)

    def from_acts(
        self,
        site: str,
        components: ComponentsLike,
        acts: ActsLike,
        positions: PositionsLike = None,
        head: SupportsIndex | None = None,
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
        old = self._site(site)
        at = tuple(component_indices(components, old.n_components, old.site.name))
        found, name = acts, old.site.name
        if isinstance(acts, Mapping):
            if name not in acts:
                raise NoMatchingSiteError(f"There are no activations of {name} among those of {', '.join(acts)}.")
            found = acts[name]
        if not isinstance(found, Tensor):
            raise DtypeError(f"Activations of {name} must be a tensor [..., C]; given {type(found).__name__}.")
        chosen, split = checked_head(old.site, head), ""
        if chosen is not None and old.site.head_side == "in":
            split = f"heads={old.site.n_heads}, "
            if found.ndim < 2 or found.shape[-2] != old.site.n_heads:
                raise _wrong_acts(name, split, old.n_components, found)
        if found.ndim == 0 or found.shape[-1] != old.n_components:
            raise _wrong_acts(name, split, old.n_components, found)
        found = found[..., chosen, :] if split else found
        value = _values(found[..., list(at)], name, len(at))
        return self._edited(old, at, Given(value), positions, chosen)

    def mean(
        self,
        site: str,
        components: ComponentsLike,
        means: ActsLike,
        positions: PositionsLike = None,
        head: SupportsIndex | None = None,
    ) -> "ActPatches":
        """Put in mean activations [C] or [pos, C] of `activation_means`. Arguments and errors as in `from_acts`."""
        return self.from_acts(site, components, means, positions, head)

    def resample(
        self,
        site: str,
        components: ComponentsLike,
        seed: int = 0,
        positions: PositionsLike = None,
        head: SupportsIndex | None = None,
    ) -> "ActPatches":
        """Put in what another row of the batch has at the same position, in the very pass.

        The seed and the number of rows alone say which row: sites of one seed are resampled from the same row.

        Raises:
            DataError: From a forward pass over a single row.
            As `set`, whose other arguments these are.
        """
        old = self._site(site)
        at = tuple(component_indices(components, old.n_components, old.site.name))
        return self._edited(old, at, Resampled(seed), positions, head)

    # --- directions ---------------------------------------------------------------------------------------------------
    def read(
        self, site: str, component: SupportsIndex, vector: Float[Tensor, " d_in"], positions: PositionsLike = None
    ) -> "ActPatches":
        """Let a component read along another vector: its activation is x . vector (for an embedding: the token's entry).

        Raises:
            ShapeError: The vector is not [d_in].
            NoMatchingSiteError, ComponentIndexError, DtypeError, PositionIndexError: As in `set`.
        """
        old = self._site(site)
        redirect = _redirect(old, component, vector, old.site.d_in, "reads", positions)
        return self._with(replace(old, reads=(*old.reads, redirect)))

    def write(
        self, site: str, component: SupportsIndex, vector: Float[Tensor, " d_out"], positions: PositionsLike = None
    ) -> "ActPatches":
        """Let a component write along another vector than U_c.

        Raises:
            ShapeError: The vector is not [d_out].
            NoMatchingSiteError, ComponentIndexError, DtypeError, PositionIndexError: As in `set`.
        """
        old = self._site(site)
        redirect = _redirect(old, component, vector, old.site.d_out, "writes", positions)
        return self._with(replace(old, writes=(*old.writes, redirect)))

    def delta(self, site: str, value: ActsLike | Number, positions: PositionsLike = None) -> "ActPatches":
        """Change what the delta component W - V U writes.

        Args:
            value: A number multiplies it (0 removes it); a tensor that broadcasts to [batch, pos, d_out], or what
                `delta_writes` gives for another prompt, is put in its place.

        Raises:
            ShapeError: The tensor does not end in d_out.
            NoMatchingSiteError, DtypeError, PositionIndexError: As in `from_acts`.
        """
        old, name = self._site(site), self._site(site).site.name
        if isinstance(value, Mapping):
            if name not in value:
                raise NoMatchingSiteError(f"There are no delta writes of {name} among those of {', '.join(value)}.")
            value = value[name]
        if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[-1] != old.site.d_out):
            raise ShapeError(
                f"What the delta component of {name} writes is [..., d_out={old.site.d_out}]; given {list(value.shape)}."
            )
        kind = Given if isinstance(value, Tensor) else Scaled
        made = kind(_values(value, name, old.site.d_out))
        return self._with(replace(old, delta=(*old.delta, DeltaEdit(made, parse_positions(positions)))))

    # --- reading ------------------------------------------------------------------------------------------------------
    def changed(self) -> dict[str, SiteEdits]:
        """What is done to each site that is not the model itself."""
        return {name: made for name in self._sites if (made := self._changed.get(name)) and not made.is_identity}

    def __repr__(self) -> str:
        changed = self.changed()
        return f"ActPatches({len(self._sites)} sites, {len(changed)} patched: {', '.join(changed) or 'none'})"

    def _site(self, site: str) -> SiteEdits:
        name = resolve_name(self._sites, site)
        return self._changed.get(name) or SiteEdits(self._sites[name], self._n_components[name])

    def _with(self, made: SiteEdits) -> "ActPatches":
        new = ActPatches(self._sites, self._n_components)
        new._changed = self._changed | {made.site.name: made}
        return new

    def _edited(
        self,
        old: SiteEdits,
        components: tuple[int, ...],
        change: Change,
        positions: PositionsLike,
        head: SupportsIndex | None,
    ) -> "ActPatches":
        edit = ActEdit(components, change, parse_positions(positions), checked_head(old.site, head))
        new = replace(old, edits=(*old.edits, edit))
        _refuse_part_and_whole(new)
        return self._with(new)


def act_patches(decomposition: Decomposition) -> ActPatches:
    """Patches of nothing: the model itself."""
    return ActPatches(decomposition.sites, decomposition.n_components)


@entered_once
def patched_acts(model: Any, decomposition: Decomposition, patches: ActPatches) -> Iterator[Any]:
    """Within this context the model runs with its component activations patched, however it is called.

    `run_with_cache`, `run_with_hooks`, `generate` and nnsight traces work inside, as in `patched`. Contexts nest, with
    `patched` too: patches of one site combine while they are about different components and leave the delta component.

    Args:
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        patches: From `act_patches(decomposition)`.

    Yields:
        The model.

    Raises:
        NoMatchingSiteError: The patches belong to another decomposition.
        TargetMismatchError, DeviceError, PatchConflictError, SiteNotFiredError: As `patched`.
    """
    adapter = checked_adapter(model, decomposition)
    changed = site_edits(decomposition, patches)
    with (
        claimed(adapter.core, edit_claims(decomposition, changed)),
        intercepted(adapter, edit_fns(decomposition, changed)),
    ):
        yield model


def site_edits(decomposition: Decomposition, patches: ActPatches) -> dict[str, SiteEdits]:
    """The patches that change something, of sites that the decomposition has with as many components.

    Raises:
        NoMatchingSiteError: They belong to another decomposition.
    """
    changed = patches.changed()
    for name, made in changed.items():
        if name not in decomposition or decomposition[name].n_components != made.n_components:
            raise NoMatchingSiteError(
                f"The patches speak of {made.n_components} components of {name}, which this decomposition does not have; "
                "make them with act_patches(decomposition)."
            )
    return changed


def edit_claims(decomposition: Decomposition, changed: Mapping[str, SiteEdits]) -> dict[str, Claim]:
    """What running under these patches does to each site."""
    return {
        name: Claim(decomposition[name], additive=not made.delta, only=made.touched) for name, made in changed.items()
    }


def edit_fns(decomposition: Decomposition, changed: Mapping[str, SiteEdits]) -> dict[str, SiteFn]:
    """The functions that an adapter runs at the sites."""
    return {name: functools.partial(made.output, decomposition[name]) for name, made in changed.items()}


# --- checks ----------------------------------------------------------------------------------------------------------
def _values(value: Any, name: str, n: int) -> Tensor:
    """A copy that the caller's later in-place changes do not reach; gradients still flow.

    Raises:
        DtypeError, ShapeError: It is no tensor or number, or does not broadcast to [batch, pos, n].
        SettingError: It is a number that is not finite.
    """
    if isinstance(value, numbers.Real):
        value = finite_number(value, "Values", name)
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float | int) else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"Values for {name} must be tensors or numbers; given {type(value).__name__}.") from error
    if tensor.is_complex():
        raise DtypeError(f"Values for {name} must be real numbers, not {tensor.dtype}.")
    if tensor.ndim > 3 or (tensor.ndim > 0 and tensor.shape[-1] not in (1, n)):
        raise ShapeError(f"Values for {name} must broadcast to [batch, pos, {n}]; given {list(tensor.shape)}.")
    return tensor.clone() if tensor.is_floating_point() else tensor.to(torch.float64)


def _redirect(
    old: SiteEdits, component: SupportsIndex, vector: Any, width: int, verb: str, positions: PositionsLike
) -> Redirect:
    at, name = component_indices(component, old.n_components, old.site.name), old.site.name
    if len(at) != 1:
        raise ComponentIndexError(f"One component of {name} {verb} along one vector; given {len(at)} components.")
    if not isinstance(vector, Tensor) or vector.is_complex():
        raise DtypeError(f"What a component of {name} {verb} is a tensor [{width}]; given {type(vector).__name__}.")
    if vector.shape != (width,):
        raise ShapeError(f"What a component of {name} {verb} is a vector [{width}]; given {list(vector.shape)}.")
    return Redirect(at[0], vector.clone(), parse_positions(positions))


def _refuse_part_and_whole(made: SiteEdits) -> None:
    """Refuse to set a sum that heads share, and one head's part of it: what the others' parts are is not said."""
    if made.site.head_side != "in":
        return
    for edit in made.edits:
        both = made.by_head & set(edit.components)
        if edit.head is None and isinstance(edit.change, Given) and both:
            raise SettingError(
                f"Component {min(both)} of {made.site.name} is set as a whole and for one head; heads share its activation "
                "as a sum, so that the other heads' parts would be unknown. Set every head, or the whole."
            )


def _wrong_acts(name: str, split: str, n: int, given: Tensor) -> ShapeError:
    hint = ", which decomposition[site].head_acts(x) gives" if split else ""
    return ShapeError(f"Activations of {name} are [..., {split}C={n}]{hint}; given {list(given.shape)}.")
