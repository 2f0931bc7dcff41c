"""Component activations patched: set to values of one's own, another prompt's, their mean, or made to read and write
elsewhere.

Masks say how much of each component takes part; patches say what its activation is. Patching all component activations of a
site and its delta component from another prompt is activation patching of the site's output.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike, checked_head, component_indices
from tl_paramdecomp.components.masks import SiteChanges, real_values
from tl_paramdecomp.components.positions import PositionsLike, parse_positions
from tl_paramdecomp.errors import ComponentIndexError, DtypeError, NoMatchingSiteError, SettingError, ShapeError
from tl_paramdecomp.patching.act_edits import ActEdit, Redirect, SiteEdits
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.settings import Seed, fit

Number = float | int
ActsLike = Tensor | Mapping[str, Tensor]
"""Activations [..., C] of a site, or of several sites by name as `component_acts` gives them."""


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
        return self._edited(site, components, "set", value, positions, head)

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
        return self._edited(site, components, "scale", factor, positions, head)

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
        return self._edited(site, components, "set", _acts_of(*self._at(site, components), acts, head), positions, head)

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
        self,
        site: str,
        component: SupportsIndex,
        vector: Any,
        verb: Literal["reads", "writes"],
        positions: PositionsLike,
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
        self,
        site: str,
        components: ComponentsLike,
        kind: Literal["set", "scale", "resample"],
        value: Any,
        positions: PositionsLike,
        head: SupportsIndex | None,
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


def _acts_of(old: SiteEdits, at: list[int], acts: Any, head: SupportsIndex | None) -> Tensor:
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
