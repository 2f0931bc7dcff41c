"""Settings: values held to the types they are declared with, and objects as JSON and YAML and back, by pydantic.

1. Aliases such as `Count` and `Positive` say what a number may be; `fit` holds one value to a type.
2. `Settings` are frozen dataclasses that hold every field to its type when they are made, whoever makes them.
3. `Kind` are those that files tell by their `type`: methods and losses, also a user's own.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import core_schema

from tl_paramdecomp.errors import SettingError

Made = TypeVar("Made")
TYPE = "type"
"""Key of a mapping that names the class whose fields the others are."""
OMIT_DEFAULT = {"omit_default": True}
"""Metadata of a field that came later: files do not mention it where it is at its default, and are as they were before."""
SHOWN, NAME = 80, 100
"""Characters of a refused value that a message shows; characters of a name that others are compared with."""
STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "none_required": "null",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "string_too_short": "text of at least {min_length} character",
    "too_long": "a list of {max_length}",
    "literal_error": "{expected}",
    "is_instance_of": "{class}",
}
"""What pydantic's errors say, as the end of "expected ..."."""


# --- numbers ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Within:
    """Bounds of a number, with the words that a message has for them; no bounds hold NaN."""

    words: str
    holds: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        inner = handler(source)
        if inner["type"] == "float":
            inner = core_schema.float_schema(strict=True, allow_inf_nan=True)
        return core_schema.no_info_after_validator_function(self._check, inner)

    def _check(self, value: Any) -> Any:
        if not self.holds(value):
            raise _RefusalError(f" must be {self.words}; given {shown(value)}.")
        return value


def _seed(value: Any) -> int:
    """Seeds are the whole numbers of 64 bits that have a successor: the second stream of rows takes the next one."""
    if isinstance(value, bool) or not isinstance(value, int) or not -LONG <= value < LONG - 1:
        raise _RefusalError(f" is a whole number of 64 bits; given {shown(value)}.")
    return value


LONG = 1 << 63
Whole = Annotated[int, Within("a whole number from 0 on", lambda n: 0 <= n < 10**SHOWN)]
Count = Annotated[int, Within("at least 1", lambda n: 1 <= n < 10**SHOWN)]
Seed = Annotated[int, PlainValidator(_seed)]
NotNegative = Annotated[float, Within("a finite number from 0 on", lambda x: 0.0 <= x < math.inf)]
Positive = Annotated[float, Within("positive and finite", lambda x: 0.0 < x < math.inf)]
Share = Annotated[float, Within("from 0 to 1", lambda x: 0.0 <= x <= 1.0)]
PositiveShare = Annotated[float, Within("above 0 and at most 1", lambda x: 0.0 < x <= 1.0)]


def fit(value: Any, kind: Any, place: str = "") -> Any:
    """A value as a type wants it: lists become tuples, 1000.0 a whole number, mappings of settings objects.

    Args:
        value: Plain, as YAML and JSON have it, or what it becomes already.
        kind: A type, as annotations write it; in classes of settings, tuples rather than lists.
        place: Where the value stands, for messages.

    Raises:
        SettingError: It does not fit, or something in it does not.
    """
    plain = _plain(value)
    try:
        return _adapter(kind).validate_python((plain,))[0]
    except ValidationError as error:
        refusal = _refusal(error, plain, place)
        raise SettingError(refusal.said) from refusal


@functools.cache
def _adapter(kind: Any) -> Any:
    # in a tuple, as pydantic takes no configuration beside a dataclass
    return TypeAdapter(tuple[kind], config=STRICT)  # type: ignore[valid-type]


def _plain(value: Any) -> Any:
    """Tuples for lists, Python's numbers for numpy's, and whole numbers where they are."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


# --- objects ----------------------------------------------------------------------------------------------------------
class Settings:
    """Base of frozen dataclasses whose fields are held to their types. A subclass's own `__post_init__` calls this one's.

    Raises:
        SettingError: A field does not fit its type.
    """

    def __post_init__(self) -> None:
        for name, kind in hints_of(type(self)).items():
            object.__setattr__(self, name, fit(getattr(self, name), kind, name))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(functools.partial(_taken, cls))


class Kind(Settings):
    """Settings that may be of several classes: files tell them apart by `type`, the class's name. Subclasses made outside the
    package count as well."""


def kinds_of(base: type[Made]) -> dict[str, type[Made]]:
    """Classes of a kind by name; where two have the same, the package's own, or the one made last."""
    found: dict[str, type[Made]] = {} if inspect.isabstract(base) or base is Kind else {base.__name__: base}
    for cls in (cls for child in base.__subclasses__() for cls in kinds_of(child).values()):
        if not _is_own(found.get(cls.__name__)) or _is_own(cls):
            found[cls.__name__] = cls
    return found


def to_settings(value: Any, complete: bool = False) -> Any:
    """Settings as JSON-able values; those of a `Kind` become {"type": name, field: value, ...}.

    Args:
        value: The object, or a list or mapping of some.
        complete: Mention every field, also those that files leave out where they are at their defaults.

    Raises:
        SettingError: A class has the name of one of the package's, so that a file would mean that one.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)
                if complete or not f.metadata.get("omit_default") or getattr(value, f.name) != f.default}  # fmt: skip
        return {**_type_of(value), **{name: to_settings(item, complete) for name, item in told.items()}}
    if isinstance(value, Mapping):
        return {key: to_settings(item, complete) for key, item in value.items()}
    return [to_settings(item, complete) for item in value] if isinstance(value, list | tuple) else value


def _type_of(value: Any) -> dict[str, str]:
    if not isinstance(value, Kind):
        return {}
    cls = type(value)
    if not _is_own(cls) and _is_own(kinds_of(Kind).get(cls.__name__)):
        raise SettingError(
            f"{cls.__qualname__} has the name of a class of tl_paramdecomp, which files would mean; rename it."
        )
    return {TYPE: cls.__name__}


def _is_own(cls: type | None) -> bool:
    return cls is not None and cls.__module__.split(".")[0] == __package__


def from_settings(values: Any, place: str = "", base: type[Made] = Kind) -> Made:
    """The object that `to_settings` wrote down; fields that are left out are at their defaults.

    Args:
        values: What it wrote.
        place: Where it stands in a larger file, for messages.
        base: What it is; `type` may name any subclass.

    Raises:
        SettingError: A type or a field is unknown or missing, or does not fit; the message names the nearest known one.
    """
    try:
        return _taken(base, values)
    except _RefusalError as refusal:
        raise SettingError(refusal.below(place).said) from refusal


def _taken(base: type[Made], value: Any) -> Made:
    if isinstance(value, base):
        return value
    if not isinstance(value, Mapping):
        kinds = kinds_of(base)
        what = f"whose type is one of {', '.join(kinds)}" if base not in kinds.values() else "of settings"
        raise _RefusalError(f": expected a mapping {what}; given {shown(value)}.")
    given, cls = dict(value), base
    if TYPE in given or (base not in kinds_of(base).values() and issubclass(base, Kind)):
        cls = _class_named(given.pop(TYPE, None), base)
    hints = hints_of(cls)
    for key in given:
        if key not in hints:
            what = f"a setting of {cls.__name__}" if issubclass(cls, Kind) else "a setting"
            raise _RefusalError(_unknown(key, hints, what), joined("", key))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init and field.name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise _RefusalError(f" is missing; expected {_expected(hints[field.name])}.", field.name)
    try:
        return cls(**{key: fit(item, hints[key], str(key)) for key, item in given.items()})
    except SettingError as error:
        why = error.__cause__
        raise why.below("") if isinstance(why, _RefusalError) else _RefusalError(f": {error}") from error


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Types of the fields that a dataclass is made from, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]


def _class_named(name: Any, base: type) -> Any:
    kinds = kinds_of(base)
    if isinstance(name, str) and name in kinds:
        return kinds[name]
    if isinstance(name, str) and name in kinds_of(Kind):
        raise _RefusalError(f": {name} is of another kind; here it is one of {', '.join(kinds)}.", TYPE)
    raise _RefusalError(f": there is no {name!r:.{SHOWN}}. {_nearest(name, kinds)}", TYPE)


# --- records ----------------------------------------------------------------------------------------------------------
def from_plain(kind: type[Made], values: Any) -> Made:
    """A dataclass from the JSON object that its `asdict` gives: every field of its type, to the letter, none unknown.

    Raises:
        TypeError: It is no object, or a field is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r:.80} is no {kind.__name__}")
    hints = get_type_hints(kind, include_extras=not issubclass(kind, Settings))
    unknown = values.keys() - {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**_items(values, hints, kind.__name__))


def as_declared(value: Any, hint: Any) -> Any:
    """A JSON value as what an annotation says it is: lists for tuples, objects for dataclasses; a truth value is no number.

    `Annotated[type, form]` is a value that the code knows as `type`, and that has the `form`. The keys of a TypedDict must be
    there; others may be.

    Raises:
        TypeError: It is something else.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            with contextlib.suppress(TypeError):
                return as_declared(value, part)
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is list or parts[-1] is Ellipsis:
            return origin(as_declared(item, parts[0]) for item in value)
        if len(value) == len(parts):
            return tuple(map(as_declared, value, parts))
    elif origin is dict and isinstance(value, dict):
        return {key: as_declared(item, parts[1]) for key, item in value.items()}
    elif origin is Annotated:
        return as_declared(value, parts[-1])
    elif is_typeddict(hint) and isinstance(value, dict):
        missing = hint.__required_keys__ - value.keys()
        if missing:
            raise TypeError(f"{hint.__name__} without {', '.join(sorted(missing))}")
        return _items(value, get_type_hints(hint, include_extras=True), hint.__name__)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value)
    elif hint is Any or (value is None and hint in (None, NoneType)) or (isinstance(hint, type) and _is(value, hint)):
        return value
    raise TypeError(f"{value!r:.80} is no {getattr(hint, '__name__', hint)}")


def _items(values: dict[str, Any], hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    made = {}
    for name, value in values.items():
        try:
            made[name] = as_declared(value, hints.get(name, Any))
        except TypeError as error:
            raise TypeError(f"{name} of {what}: {error}") from error
    return made


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


# --- messages ---------------------------------------------------------------------------------------------------------
class _RefusalError(ValueError):
    """Why a value is refused, and where below the value that is being looked at it stands."""

    def __init__(self, why: str, place: str = "") -> None:
        super().__init__(why)
        self.why, self.place = why, place

    @property
    def said(self) -> str:
        return f"{self.place}{self.why}" if self.place else self.why.removeprefix(": ").strip()

    def below(self, place: str) -> "_RefusalError":
        return _RefusalError(self.why, f"{place}.{self.place}" if place and self.place else place or self.place)


def _refusal(error: ValidationError, given: Any, place: str) -> _RefusalError:
    """Of what pydantic found, that which stands deepest: a union is as good as its best member."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for each in error.errors(include_url=False):
        at: list[Any] = []
        value: Any = given
        key: Any
        for key in each["loc"][1:]:  # also names members of unions
            if (isinstance(value, Mapping) and key in value) or (isinstance(value, tuple) and isinstance(key, int)):
                at.append(key)
                value = value[key] if isinstance(value, Mapping) or key < len(value) else None
        found.setdefault(tuple(at), []).append((each, value))
    deepest = max(found, key=len)
    here = functools.reduce(joined, deepest, place)
    for each, _ in found[deepest]:
        refusal = each.get("ctx", {}).get("error")
        if isinstance(refusal, Exception):
            return refusal.below(here) if isinstance(refusal, _RefusalError) else _RefusalError(f": {refusal}", here)
    each, value = found[deepest][0]
    if each["loc"][-1:] == ("[key]",):
        return _RefusalError(f": names must be text; given {shown(each['input'])}.", here)
    if each["type"] == "missing":
        return _RefusalError(" is missing.", here)
    words = [_words(each) for each, _ in found[deepest]]
    note = (
        " YAML reads yes, no, on and off so; quote them for text."
        if isinstance(value, bool) and "text" in words
        else ""
    )
    return _RefusalError(
        f": expected {' or '.join(dict.fromkeys(words))}; given {shown(value)}.{note}{_near(found[deepest])}", here
    )


def _words(error: Any) -> str:
    words = str(EXPECTED.get(error["type"], error["msg"])).format(**error.get("ctx", {})).replace("Sequence", "a list")
    return f"one of {words.replace(' or ', ', ')}" if error["type"] == "literal_error" and " or " in words else words


def _expected(kind: Any) -> str:
    """A type in words: what anything else is told."""
    try:
        _adapter(kind).validate_python((dataclasses,))
    except ValidationError as error:
        return _refusal(error, dataclasses, "").why.removeprefix(": expected ").split("; given")[0]
    return "anything"


def _near(found: list[Any]) -> str:
    """The nearest of the choices that text might have meant, as a sentence."""
    choices = [
        c for each, _ in found if each["type"] == "literal_error" for c in each["ctx"]["expected"].split("'")[1::2]
    ]
    value = found[0][1]
    near = difflib.get_close_matches(value[:NAME], choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f" Nearest: {near[0]!r}." if near else ""


def _nearest(key: Any, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(str(key)[:NAME], names, n=3, cutoff=0.5)
    return f"Nearest: {', '.join(near)}." if near else f"Known are {', '.join(names)}."


def _unknown(key: Any, known: Iterable[str], what: str) -> str:
    return f" is not {what}. {_nearest(key, known)}"


def unknown(key: Any, known: Iterable[str], place: str, what: str) -> SettingError:
    """The error for a name that is not known, with the nearest that are."""
    return SettingError(joined(place, key) + _unknown(key, known, what))


def joined(place: str, key: Any) -> str:
    """The place of what stands under a key or at an index."""
    text = f"{key!s:.{SHOWN}}"
    text = f'"{text}"' if "." in text else text
    return f"{place}.{text}" if place else text


def shown(value: Any) -> str:
    """A refused value, as a message shows it."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return f"a whole number of more than {SHOWN} digits"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = f"the text {value[: SHOWN + 1]!r}" if isinstance(value, str) else f"{value!r}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
