"""Dataclasses from JSON values: every field of the type that it is declared with, none missing, none unknown.

JSON has lists for tuples and objects for dataclasses; all else must be what the annotation says. A truth value is no number.
`Annotated[type, form]` is a value that the code knows as `type`, and that has the `form`. The keys of a TypedDict must be
there; others may be.
"""

import dataclasses
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

Made = TypeVar("Made")
LONGEST = 400
"""Letters of a reason."""


def from_plain(kind: type[Made], values: Any) -> Made:
    """A dataclass from the JSON object that its `asdict` gives.

    Raises:
        TypeError: It is no object, or a field is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r:.80} is no {kind.__name__}")
    hints, fields = get_type_hints(kind, include_extras=True), {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not values.keys() <= fields:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(values.keys() - fields))}")
    made = {}
    for name, value in values.items():
        try:
            made[name] = as_declared(value, hints[name])
        except TypeError as error:
            raise TypeError(f"{name} of {kind.__name__}: {error}") from error
    return kind(**made)


def as_declared(value: Any, hint: Any) -> Any:
    """A JSON value as what an annotation says it is.

    Raises:
        TypeError: It is something else.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return as_declared(value, part)
            except TypeError:
                continue
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif origin in (list, tuple) and isinstance(value, list):
        if origin is list or parts[-1] is Ellipsis:
            return origin(as_declared(item, parts[0]) for item in value)
        if len(value) == len(parts):
            return tuple(map(as_declared, value, parts))
    elif origin is dict and isinstance(value, dict):
        return {key: as_declared(item, parts[1]) for key, item in value.items()}
    elif origin is Annotated:
        return as_declared(value, parts[-1])
    elif is_typeddict(hint) and isinstance(value, dict):
        return _row(value, hint)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    elif hint is Any or (value is None and hint in (None, NoneType)) or (isinstance(hint, type) and _is(value, hint)):
        return value
    raise TypeError(f"{value!r:.80} is no {getattr(hint, '__name__', hint)}")


def _row(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A dict with at least the keys of a TypedDict; others may be there."""
    hints = get_type_hints(kind, include_extras=True)
    missing = kind.__required_keys__ - values.keys()
    if missing:
        raise TypeError(f"{kind.__name__} without {', '.join(sorted(missing))}")
    made = {}
    for name, value in values.items():
        try:
            made[name] = as_declared(value, hints[name]) if name in hints else value
        except TypeError as error:
            raise TypeError(f"{name} of {kind.__name__}: {error}") from error
    return made


def in_short(error: Exception) -> str:
    """What went wrong, in a line; torch may name every tensor, and a dataclass every field."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
