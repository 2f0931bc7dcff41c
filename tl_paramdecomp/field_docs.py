"""What `help` says of the package's dataclasses: their docstrings, and below them the text under each field in the source."""

import dataclasses
import functools
import inspect
import re
import sys
from typing import Any

CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
FIELD = re.compile(r'^    (\w+): .*\n(?:    [ )\]}].*\n)*    """((?:.|\n)*?)"""', re.MULTILINE)
"""A name, its type and value in however many lines, and a docstring."""


def show_fields(*things: Any) -> None:
    """Add to each class that is a dataclass what is said of its public fields, those of its bases first."""
    for cls in things:
        if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or "Attributes:" in (cls.__doc__ or ""):
            continue
        texts = {}
        for base in reversed(cls.__mro__):
            texts |= _texts(base.__module__).get(base.__name__, {})
        fields = [f.name for f in dataclasses.fields(cls) if f.name in texts and not f.name.startswith("_")]
        lines = [f"{name}: {' '.join(texts[name].split())}" for name in fields]
        cls.__doc__ = "\n    ".join([f"{inspect.cleandoc(cls.__doc__ or '')}\n\nAttributes:", *lines])


@functools.cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """By class and field; nothing where there is no source."""
    try:
        _, *parts = CLASS.split(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {name: dict(FIELD.findall(body)) for name, body in zip(parts[::2], parts[1::2])}
