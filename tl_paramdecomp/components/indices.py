"""Components and heads of a site, in every form users write them."""

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex, TypeAlias

from tl_paramdecomp.errors import ComponentIndexError, HeadIndexError
from tl_paramdecomp.sites import WeightSite

ComponentsLike: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | slice
"""An index, several (a list, a tensor, an array), a slice, or a boolean mask [C]."""
Head: TypeAlias = SupportsIndex | None
"""A head of a site, or None for all."""


def component_indices(components: Any, n_components: int, name: str) -> list[int]:
    """Indices of components, however given; negative ones count from the end. ComponentIndexError where they are none."""
    has = f"{name} has components 0 to {n_components - 1}"
    if isinstance(components, slice):
        plain = plain_slice(components)
        if plain is None or plain.step == 0:
            raise ComponentIndexError(f"{has}; a slice of them is made of whole numbers, its step not 0: {components}.")
        chosen = list(range(n_components))[plain]
        start, stop = (0 if end is None else end for end in (plain.start, plain.stop))
        if not chosen and (start >= n_components or stop < -n_components):
            raise ComponentIndexError(f"{has}; given {components}, which lies outside of them.")
        return chosen
    given = plain_indices(components)
    if given is None:
        raise ComponentIndexError(
            f"{has}; expected an index, several, a slice or a boolean mask, given {components!r}."
        )
    if given and isinstance(given[0], bool):
        if len(given) != n_components:
            raise ComponentIndexError(
                f"A boolean mask of components of {name} needs shape [{n_components}]; given {len(given)} entries."
            )
        return [c for c, chosen in enumerate(given) if chosen]
    for c in given:
        if not -n_components <= c < n_components:
            raise ComponentIndexError(f"{has} (or -{n_components} to -1, counted from the end); given {c}.")
    return [c % n_components for c in given]


def plain_indices(given: Any) -> list[int] | list[bool] | None:
    """An index, or a list, tensor or array of them, as Python ints (or all booleans); None where it is neither."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(listed, bool | str | bytes):
        return None
    entries = list(listed) if isinstance(listed, Iterable) else [listed]
    entries = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in entries]
    if all(isinstance(entry, bool) for entry in entries):
        return entries
    indices = [_plain_index(entry) for entry in entries]
    return None if None in indices else indices  # type: ignore[return-value]


def plain_slice(given: slice) -> slice | None:
    """A slice of Python ints, whatever whole numbers it was written with; None where one of them is none."""
    parts = (given.start, given.stop, given.step)
    plain = [None if part is None else _plain_index(part) for part in parts]
    return None if any((a is None) != (b is None) for a, b in zip(parts, plain)) else slice(*plain)


def checked_head(site: WeightSite, head: Head) -> int | None:
    """A head of a site as a Python int, or None for all; HeadIndexError where the site has no such head."""
    if head is None:
        return None
    if site.n_heads is None:
        raise HeadIndexError(f"{site.name} does not divide into heads; head= is for W_Q, W_K, W_V and W_O.")
    plain = _plain_index(head)
    if plain is None or not 0 <= plain < site.n_heads:
        kind = "key/value" if site.name.endswith(("W_K", "W_V")) else "query"
        raise HeadIndexError(f"{site.name} has {kind} heads 0 to {site.n_heads - 1}; given {head!r}.")
    return plain


def _plain_index(given: Any) -> int | None:
    given = given.tolist() if hasattr(given, "tolist") else given
    try:
        return None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        return None
