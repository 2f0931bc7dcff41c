"""Values from files, held to the types that dataclasses declare.

1. A value is fitted to a type: a float for a number, a tuple for a list, an object for a mapping of its fields.
2. What is unknown, missing or of another type is refused with its full path, what was expected and the nearest known name.
3. Numbers are what they are for: 1000.0 is a whole number, 1 also a float; yes and no are no numbers.
"""

import collections.abc
import difflib
import functools
import inspect
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tl_paramdecomp.errors import SettingError

TYPE = "type"
"""Key of a mapping that names the class whose fields the others are."""
SHOWN = 80
"""Characters of a refused value that a message shows."""
PLAIN: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}
"""Plain types in words."""

Classes = Mapping[str, type]
"""Classes by the names that `type` may give them."""


def fit(value: Any, kind: Any, path: str, classes: Classes) -> Any:
    """A value as the type wants it.

    Args:
        value: Plain, as YAML and JSON have them, or what it becomes already.
        kind: A type, as annotations write it.
        path: Where the value stands, for messages.
        classes: What `type` may name.

    Raises:
        SettingError: It does not fit, or something in it does not.
    """
    if kind is Any:
        return value
    member = next((m for m in _members(kind) if _looks_like(value, m, classes)), None)
    if member is None:
        raise SettingError(
            f"{path}: expected {described(kind, classes)}; given {shown(value)}.{_near_choice(value, kind)}"
        )
    if value is None or member is Any or get_origin(member) is Literal:
        return value
    origin = get_origin(member)
    if _is_settings(member):
        return value if isinstance(value, member) else build(member, value, path, classes)
    if origin in (collections.abc.Mapping, dict):
        return _fit_mapping(value, get_args(member), path, classes)
    if origin in (tuple, list, collections.abc.Sequence):
        return _fit_list(value, member, path, classes)
    return member(value)


def build(cls: type, values: Mapping[str, Any], path: str, classes: Classes) -> Any:
    """An object of a dataclass, or of the class that `type` names, from its fields; what is left out is at its default.

    Args:
        cls: The class, or the base of those that `type` may name here.
        values: Its fields, perhaps with `type`.
        path: Where they stand, for messages.
        classes: What `type` may name.

    Raises:
        SettingError: A field is unknown, missing or of another type, or the class refuses them.
    """
    given = dict(values)
    name = given.pop(TYPE, None)
    if name is not None:
        cls = _class_named(name, cls, path, classes)
    hints = hints_of(cls)
    for key in given:
        if key not in hints:
            raise unknown(key, hints, path, f"a setting of {cls.__name__}" if cls.__name__ in classes else "a setting")
    for field in fields(cls):
        if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise SettingError(f"{joined(path, field.name)} is missing: {described(hints[field.name], classes)}.")
    fitted = {key: fit(value, hints[key], joined(path, key), classes) for key, value in given.items()}
    try:
        return cls(**fitted)
    except SettingError as error:
        raise SettingError(f"{path}: {error}" if path else str(error)) from error


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, by name."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def unknown(key: Any, known: Iterable[str], path: str, what: str) -> SettingError:
    """The error for a name that is not known, with the nearest that are."""
    names = list(known)
    near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else f"Known are {', '.join(names)}."
    return SettingError(f"{joined(path, key)} is not {what}. {hint}")


def joined(path: str, key: Any) -> str:
    """The path of what stands under a key or at an index."""
    text = f'"{key}"' if "." in str(key) else str(key)
    return f"{path}.{text}" if path else text


def shown(value: Any) -> str:
    """A refused value, as a message shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads yes, no, on and off so; quote them for text)"
    text = f"the text {value!r}" if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def described(kind: Any, classes: Classes) -> str:
    """A type in words."""
    members = _members(kind)
    choices = [repr(choice) for m in members if get_origin(m) is Literal for choice in get_args(m)]
    words = [_described_member(m, classes) for m in members if get_origin(m) is not Literal]
    if choices:
        words.insert(0, f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0])
    return " or ".join(words)


def _described_member(kind: Any, classes: Classes) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin in (collections.abc.Mapping, dict):
        return f"a mapping of names to {described(inner[1], classes)}" if inner and inner[1] is not Any else "a mapping"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)} ({described(inner[0], classes)} each)"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"a list ({described(inner[0], classes)} each)" if inner[0] is not Any else "a list"
    if inspect.isabstract(kind):
        return f"a mapping whose type is one of {', '.join(_kinds_of(kind, classes))}"
    return f"a mapping of settings ({', '.join(hints_of(kind))})"


def _members(kind: Any) -> tuple[Any, ...]:
    """Types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _looks_like(value: Any, kind: Any, classes: Classes) -> bool:
    """Whether a value is of a type as far as can be seen from outside; what is in it is fitted afterwards."""
    origin = get_origin(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        return _is_number(value, kind)
    if kind in (str, Path):
        return isinstance(value, str) or (kind is Path and isinstance(value, Path))
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and TYPE not in value
    if origin in (tuple, list, collections.abc.Sequence):
        return isinstance(value, list | tuple)
    if _is_settings(kind):
        return isinstance(value, (kind, Mapping))
    return isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind is float or float(value).is_integer()


def _is_settings(kind: Any) -> bool:
    """Whether values of this type are written as their fields."""
    return isinstance(kind, type) and (is_dataclass(kind) or inspect.isabstract(kind))


def _fit_mapping(value: Mapping[Any, Any], inner: tuple[Any, ...], path: str, classes: Classes) -> dict[str, Any]:
    for key in value:
        if not isinstance(key, str):
            raise SettingError(f"{path}: names must be text; given {shown(key)}.")
    of = inner[1] if inner else Any
    return {key: fit(item, of, joined(path, key), classes) for key, item in value.items()}


def _fit_list(value: Iterable[Any], kind: Any, path: str, classes: Classes) -> tuple[Any, ...]:
    items, inner = list(value), get_args(kind)
    if get_origin(kind) is tuple and inner[-1] is not Ellipsis:
        if len(items) != len(inner):
            raise SettingError(f"{path}: expected {described(kind, classes)}; given {len(items)} of them.")
        kinds = inner
    else:
        kinds = inner[:1] * len(items)
    return tuple(fit(item, k, joined(path, i), classes) for i, (item, k) in enumerate(zip(items, kinds, strict=True)))


def _class_named(name: Any, base: type, path: str, classes: Classes) -> type:
    kinds = _kinds_of(base, classes)
    if name in kinds:
        return classes[name]
    if name in classes:
        raise SettingError(f"{joined(path, TYPE)}: {name} is of another kind; here it is one of {', '.join(kinds)}.")
    near = difflib.get_close_matches(str(name), kinds, n=3, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else f"Known are {', '.join(kinds)}."
    raise SettingError(f"{joined(path, TYPE)}: there is no {name!r}. {hint}")


def _kinds_of(base: type, classes: Classes) -> list[str]:
    return [name for name, cls in classes.items() if issubclass(cls, base)]


def _near_choice(value: Any, kind: Any) -> str:
    """The nearest of a type's choices, as a sentence."""
    choices = [c for m in _members(kind) if get_origin(m) is Literal for c in get_args(m) if isinstance(c, str)]
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f" Nearest: {near[0]!r}." if near else ""
