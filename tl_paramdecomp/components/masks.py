"""Masks: which components of each site take part, where, and how much of the delta component.

A `Masks` is an immutable value. It holds, per site, component masks m (1 keeps a component, 0 removes it) and a delta
mask d, either as tensors that broadcast over [batch, pos, C] and [batch, pos], or as constants with a short list of
edits (ablate, keep, scale) that are worked out for the columns a forward pass computes. A site that nothing was said
about is the model itself and costs nothing.

Positions are columns of the token row as it was handed to the model, padding included, counted through the key/value
cache while decoding. Negative ones count from the end of the prompt and never reach decoded tokens.
"""

import contextlib
import functools
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, NamedTuple, SupportsFloat, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.indices import ComponentsLike, Head, checked_head, component_indices
from tl_paramdecomp.components.masked_output import ResolvedMask, masked_output
from tl_paramdecomp.components.positions import Positions, PositionsLike, at_columns, parse_positions
from tl_paramdecomp.errors import DtypeError, MaskNotConstantError, SettingError, ShapeError
from tl_paramdecomp.sites import SiteCall, Span, WeightSite, resolve_name


@dataclass(frozen=True, eq=False)
class SiteChange(ABC):
    """What is done to the components of one site."""

    site: WeightSite
    n_components: int

    @property
    def is_identity(self) -> bool:
        """Whether this is the model itself, by construction and not by the values of a tensor."""
        return self.keeps_delta and not self.touched

    @property
    @abstractmethod
    def by_position(self) -> bool:
        """Whether positions matter: something names some, or a tensor has a position axis."""

    @property
    @abstractmethod
    def touched(self) -> frozenset[int]:
        """Components that may write something else than in the model."""

    @property
    @abstractmethod
    def keeps_delta(self) -> bool:
        """Whether the delta component stays whole, so that only components are subtracted or added."""

    @abstractmethod
    def output(self, components: Components, call: SiteCall) -> Float[Tensor, "*rows d_out"]:
        """What the site writes instead of y.

        Raises:
            ShapeError, PositionIndexError, DataError: Values, positions or a batch that do not fit this pass.
        """


Change = TypeVar("Change", bound=SiteChange)


class SiteChanges(Generic[Change]):
    """What is done to the components of every site of a decomposition, as an immutable value."""

    _nothing: ClassVar[Any]
    """What is done to a site that nothing was said about, of the site and its number of components."""
    _done: ClassVar[str] = "changed"

    def __init__(self, sites: Mapping[str, WeightSite], n_components: Mapping[str, int]) -> None:
        self._sites, self._n_components = dict(sites), dict(n_components)
        self._changed: dict[str, Change] = {}

    def changed(self) -> dict[str, Change]:
        """What is done to each site that is not the model itself."""
        return {name: made for name in self._sites if (made := self._changed.get(name)) and not made.is_identity}

    def _of(self, site: str) -> Change:
        name = resolve_name(self._sites, site)
        found: Any = self._changed.get(name)
        return found or self._nothing(self._sites[name], self._n_components[name])

    def _with(self, changes: Mapping[str, Change]) -> Any:
        new = type(self)(self._sites, self._n_components)
        new._changed = {**self._changed, **changes}
        return new

    def __repr__(self) -> str:
        changed = self.changed()
        listed = ", ".join(changed) or "none"
        return f"{type(self).__name__}({len(self._sites)} sites, {len(changed)} {self._done}: {listed})"


@dataclass(frozen=True, eq=False)
class Edit:
    """Multiply some components' masks by a factor at some positions, and perhaps set the delta mask there."""

    factors: Float[Tensor, " C"]
    """One factor for each component of the site."""
    delta: float | None
    positions: Positions | None
    head: int | None


@dataclass(frozen=True, eq=False)
class SiteMask(SiteChange):
    """The mask of one site."""

    m: Tensor | float = 1.0
    """Given component masks: a number, [C], [pos, C] or [batch, pos, C]."""
    d: Tensor | float = 1.0
    """Given delta masks: a number, [pos] or [batch, pos]."""
    edits: tuple[Edit, ...] = ()
    _cache: dict = field(default_factory=dict, repr=False)

    @property
    def is_identity(self) -> bool:
        return all(isinstance(given, float) and given == 1.0 for given in (self.m, self.d)) and not self.edits

    @property
    def is_constant(self) -> bool:
        """Whether the same mask holds for every row and position."""
        m_varies = isinstance(self.m, Tensor) and self.m[..., 0].numel() > 1
        d_varies = isinstance(self.d, Tensor) and self.d.numel() > 1
        return not (m_varies or d_varies or self.by_position)

    @property
    def by_position(self) -> bool:
        m_rows = isinstance(self.m, Tensor) and self.m.ndim >= 2 and self.m.shape[-2] > 1
        d_rows = isinstance(self.d, Tensor) and self.d.ndim >= 1 and self.d.shape[-1] > 1
        return m_rows or d_rows or any(edit.positions is not None for edit in self.edits)

    @property
    def touched(self) -> frozenset[int]:
        if isinstance(self.m, Tensor) or self.m != 1.0:
            return frozenset(range(self.n_components))
        return frozenset(c for edit in self.edits for c in (edit.factors != 1.0).nonzero().flatten().tolist())

    @property
    def keeps_delta(self) -> bool:
        return isinstance(self.d, float) and self.d == 1.0 and all(edit.delta in (None, 1.0) for edit in self.edits)

    def output(self, components: Components, call: SiteCall) -> Tensor:
        device, dtype = components.V.device, components.V.dtype
        resolved = self.resolve(call.y.shape[:-1], call.span, device, dtype)
        return masked_output(components, resolved, call.x, call.y, call.bias)

    def constant(self, device: torch.device, dtype: torch.dtype) -> ResolvedMask:
        """m [C] and d of a mask that is the same everywhere; else MaskNotConstantError."""
        if not self.is_constant:
            raise MaskNotConstantError(
                f"The mask of {self.site.name} differs over batch or position, which no single weight can do; "
                "use tl_paramdecomp.patched(...), or name components without positions."
            )
        return self.resolve((1, 1), Span(), device, dtype)

    def resolve(self, rows: Sequence[int], span: Span, device: torch.device, dtype: torch.dtype) -> ResolvedMask:
        """Masks for the columns `span` of one forward pass, of rows [batch, pos], or [batch] where there is no position.

        Raises:
            ShapeError, PositionIndexError: A given tensor does not broadcast to the rows, or an edit names none of them.
        """
        plain_m = not isinstance(self.m, Tensor) or (self.m.ndim == 1 and not self.m.requires_grad)
        constant = plain_m and not self.by_position and not isinstance(self.d, Tensor)
        key = (device, dtype, torch.is_inference_mode_enabled())  # autograd refuses what inference mode made
        if constant and key in self._cache:
            return self._cache[key]
        m, d = self._given(rows, span, device, dtype)
        by_head = any(edit.head is not None for edit in self.edits)
        if by_head:
            m = m.unsqueeze(-2).expand(*m.shape[:-1], self.site.n_heads or 1, m.shape[-1])
        for edit in self.edits:
            m, d = self._edited(edit, m, d, by_head, rows, span)
        resolved = ResolvedMask(m, d, by_head)
        if constant:
            if not by_head and not m.requires_grad and isinstance(d, float):
                changed = resolved.weight.nonzero().flatten()
                few = 4 * len(changed) <= self.n_components  # then skipping the others saves work
                resolved = resolved._replace(only=changed if few else None)
            self._cache[key] = resolved
        return resolved

    def _given(
        self, rows: Sequence[int], span: Span, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | float]:
        """The given values at the columns of one pass; tokens decoded after the prompt they cover get 1 and 1."""
        m, d = (given.to(device, dtype) if isinstance(given, Tensor) else given for given in (self.m, self.d))
        m = m if isinstance(m, Tensor) else torch.full((self.n_components,), m, dtype=dtype, device=device)
        m, there = at_columns(m, m.ndim - 2, rows, span, self.site.name, "component mask of")
        if isinstance(d, Tensor):
            d, of_delta = at_columns(d, d.ndim - 1, rows, span, self.site.name, "delta mask of")
            there = of_delta if there is None else there
        if there is not None:
            one = torch.ones((), dtype=dtype, device=device)
            m = torch.where(there.unsqueeze(-1), m, one)
            d = torch.where(there, torch.as_tensor(d, dtype=dtype, device=device), one)
        return m, d

    def _edited(
        self, edit: Edit, m: Tensor, d: Tensor | float, by_head: bool, rows: Sequence[int], span: Span
    ) -> tuple[Tensor, Tensor | float]:
        factors = edit.factors.to(m.device, m.dtype)
        if edit.head is not None:
            head = torch.arange(m.shape[-2], device=m.device).unsqueeze(-1) == edit.head
            factors = torch.where(head, factors, torch.ones_like(factors))
        if edit.positions is None:
            return m * factors, d if edit.delta is None else edit.delta
        there = edit.positions.columns(rows, span, self.site.name).to(m.device)
        m = torch.where(there[..., None, None] if by_head else there[..., None], m * factors, m)
        if edit.delta is not None:
            d = torch.where(there, torch.as_tensor(edit.delta, dtype=m.dtype), torch.as_tensor(d, dtype=m.dtype))
        return m, d


class Masks(SiteChanges[SiteMask], Mapping[str, Any]):
    """Masks of every site of a decomposition, as an immutable value.

    Every method returns a new value. Sites without an entry of their own are the model itself.
    """

    # Mapping compares by content, which tensors cannot do in one truth value
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    _nothing = SiteMask

    # --- making masks -------------------------------------------------------------------------------------------------
    def ablate(
        self, site: str, components: ComponentsLike, positions: PositionsLike = None, head: Head = None
    ) -> "Masks":
        """Subtract components.

        Args:
            site: Name or alias of the site.
            components: One index, several, a slice, or a boolean tensor [C].
            positions: Columns of the row: int, list, slice, boolean mask [pos] or [batch, pos]; None: everywhere.
            head: Only what this head reads (W_O) or writes (W_Q by query head, W_K and W_V by key/value head).

        Raises:
            NoMatchingSiteError, ComponentIndexError, HeadIndexError, PositionIndexError: No such site, component, head,
                or (from the forward pass) position.
        """
        return self.scale(site, components, 0.0, positions, head)

    def scale(
        self,
        site: str,
        components: ComponentsLike,
        factor: SupportsFloat,
        positions: PositionsLike = None,
        head: Head = None,
    ) -> "Masks":
        """Multiply components' masks by a factor: 0 ablates, 1 leaves, 2 doubles. Arguments and errors as in `ablate`.

        Raises:
            DtypeError, SettingError: The factor is no real number, or not finite.
        """
        number = finite_number(factor, f"Factors of {resolve_name(self._sites, site)}")
        return self._edited(site, components, (1.0, number), None, positions, head)

    def keep_only(
        self, site: str, components: ComponentsLike, delta: SupportsFloat = 0.0, positions: PositionsLike = None
    ) -> "Masks":
        """Remove all other components and set the delta mask; the bias always stays. Arguments and errors as in `scale`."""
        number = finite_number(delta, f"Delta masks of {resolve_name(self._sites, site)}")
        return self._edited(site, components, (0.0, 1.0), number, positions, None)

    def _edited(
        self,
        site: str,
        components: ComponentsLike,
        factors: tuple[float, float],
        delta: float | None,
        positions: PositionsLike,
        head: Head,
    ) -> "Masks":
        """With a factor for all other components and one for these."""
        old = self._of(site)
        each = torch.full((old.n_components,), factors[0], dtype=torch.float64)
        each[component_indices(components, old.n_components, old.site.name)] = factors[1]
        edit = Edit(each, delta, parse_positions(positions), checked_head(old.site, head))
        return self._with({old.site.name: replace(old, edits=(*old.edits, edit), _cache={})})

    def with_values(self, site: str, m: Tensor | SupportsFloat, delta: Tensor | SupportsFloat = 1.0) -> "Masks":
        """Replace a site's masks by given values.

        Args:
            site: Name or alias of the site.
            m: Component masks that broadcast to [batch, pos, C]. Gradients reach them.
            delta: Delta masks that broadcast to [batch, pos].

        A mask with a position axis covers exactly the prompt; tokens decoded after it are left to the model.

        Raises:
            ShapeError: m or delta does not end in C, has too many axes, or does not broadcast with the other.
            DtypeError: m or delta is complex, or no numbers at all.
            SettingError: m or delta is a number that is not finite.
        """
        old = self._of(site)
        name, C = old.site.name, old.n_components
        m = real_values(m, f"Component masks of {name}", C, letter="C=")
        delta = real_values(delta, f"Delta masks of {name}")
        if isinstance(m, Tensor):
            m = m.expand(1) if m.ndim == 0 else m
            of_m, of_delta = list(m.shape), list(delta.shape) if isinstance(delta, Tensor) else []
            if any(1 not in sizes and sizes[0] != sizes[1] for sizes in zip(of_m[-2::-1], of_delta[::-1])):
                raise ShapeError(
                    f"Component masks {of_m} and delta masks {of_delta} of {name} have no rows [batch, pos] in common."
                )
            m = m.expand(*of_m[:-1], C).contiguous()
        return self._with({name: SiteMask(old.site, C, m, delta)})

    def replaced(self, values: Mapping[str, tuple[Tensor, Tensor | float]]) -> "Masks":
        """Masks given site by site as (m, d) without copies or checks, for code that makes them itself."""
        made = {n: SiteMask(self._sites[n], self._n_components[n], m, d) for n, (m, d) in values.items()}
        return self._with(made)

    # --- reading ------------------------------------------------------------------------------------------------------
    def __getitem__(self, site: str) -> "MaskPair":
        """(m, d) of a site: tensors that broadcast to [batch, pos, C] and [batch, pos].

        Raises:
            MaskNotConstantError: Edits name positions, so that the values depend on the row; see `at`.
        """
        mask = self._of(site)
        if any(edit.positions is not None for edit in mask.edits):
            raise MaskNotConstantError(
                f"The mask of {mask.site.name} names positions; ask for its values in a row of a given length with "
                f"masks.at({mask.site.name!r}, length)."
            )
        m_rows = mask.m.shape[:-1] if isinstance(mask.m, Tensor) else ()
        rows = torch.broadcast_shapes(m_rows, mask.d.shape if isinstance(mask.d, Tensor) else ())
        return self._values(mask, rows or (1, 1))

    def at(self, site: str, length: int, batch: int = 1) -> "MaskPair":
        """(m, d) of a site for rows of a given length.

        Raises:
            SettingError: The length or the batch is not positive.
            PositionIndexError, ShapeError: Such rows have no such position, or given masks do not broadcast to them.
        """
        if length < 1 or batch < 1:
            raise SettingError(f"Rows have at least one position, and a batch one row; given {length} and {batch}.")
        return self._values(self._of(site), (batch, length))

    @staticmethod
    def _values(mask: SiteMask, rows: Sequence[int]) -> "MaskPair":
        given = [values for values in (mask.m, mask.d) if isinstance(values, Tensor)]
        dtypes = [values.dtype for values in given if values.is_floating_point()] or [torch.get_default_dtype()]
        dtype = functools.reduce(torch.promote_types, dtypes)
        device = given[0].device if given else torch.device("cpu")
        resolved = mask.resolve(rows, Span(), device, dtype)
        return MaskPair(resolved.m.clone(), torch.as_tensor(resolved.d, dtype=dtype, device=device).clone())

    def site_mask(self, site: str) -> SiteMask:
        """The mask of one site as it was built."""
        return self._of(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __contains__(self, site: object) -> bool:
        return any(site == known.name or site in known.aliases for known in self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)


class MaskPair(NamedTuple):
    """Values of one site's masks."""

    m: Tensor
    """Component masks that broadcast to [batch, pos, C]; [batch, pos, head, C] where an edit named a head."""
    d: Tensor
    """Delta masks that broadcast to [batch, pos]."""


def real_values(values: Any, what: str, *width: int, letter: str = "") -> Tensor | float:
    """A finite number, or a copy, which later changes in place do not reach, of a tensor that broadcasts to [batch, pos,
    *width]; else DtypeError, SettingError or ShapeError."""
    if isinstance(values, numbers.Real):
        return finite_number(values, what)
    try:
        tensor = torch.as_tensor(values, dtype=None if hasattr(values, "dtype") else torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DtypeError(f"{what} must be tensors or numbers; given {type(values).__name__}.") from error
    if tensor.is_complex():
        raise DtypeError(f"{what} must be real numbers or booleans, not {tensor.dtype}.")
    if not tensor.requires_grad and not bool(tensor.isfinite().all()):
        raise SettingError(f"{what} must be finite; the tensor has NaN or infinities.")
    if tensor.ndim > 2 + len(width) or (tensor.ndim and width and tensor.shape[-1] not in (1, *width)):
        rows = ", ".join(("batch", "pos", *(f"{letter}{n}" for n in width)))
        raise ShapeError(f"{what} must broadcast to [{rows}]; given {list(tensor.shape)}.")
    return tensor.clone()


def finite_number(value: Any, what: str) -> float:
    """A finite number as a Python float; DtypeError where it is none or its gradient would be lost, SettingError where it is
    not finite, also in float32."""
    if getattr(value, "requires_grad", False):
        raise DtypeError(
            f"{what} are constants here, and this tensor requires a gradient; with_values(...) lets gradients "
            "through, and value.item() gives the number."
        )
    plain, number = value, math.inf
    with contextlib.suppress(ValueError, RuntimeError, OverflowError):  # more than one entry; too large
        plain = value.item() if hasattr(value, "item") else value
        number = float(plain) if isinstance(plain, numbers.Real) else number
    if not isinstance(plain, numbers.Real):
        raise DtypeError(f"{what} must be one real number here; given {value!r}.")
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise SettingError(f"{what} must be finite, also in float32; given {number}.")
    return number
