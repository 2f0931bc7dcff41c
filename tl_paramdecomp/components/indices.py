"""Components of a site, in every form users write them."""

from collections.abc import Iterable
from typing import Any, SupportsIndex, TypeAlias

from tl_paramdecomp.errors import ComponentIndexError

ComponentsLike: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | slice
"""An index, several (a list, a tensor, an array), a slice, or a boolean mask [C]."""


def component_indices(components: Any, n_components: int, name: str) -> list[int]:
    """Indices of components, however given; negative ones count from the end.

    Raises:
        ComponentIndexError: One is out of range, or a boolean mask has another length.
    """
    has = f"{name} has components 0 to {n_components - 1}"
    if isinstance(components, slice):
        chosen = list(range(n_components))[components]
        if not chosen and components.start is not None and components.start >= n_components:
            raise ComponentIndexError(f"{has}; given {components}, which begins after the last.")
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
    if any(isinstance(entry, bool) or not hasattr(entry, "__index__") for entry in entries):
        return None
    return [int(entry) for entry in entries]
