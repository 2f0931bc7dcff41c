"""Trees of settings: read from YAML and JSON, changed at a path, laid over a preset.

1. A file is a tree of mappings, lists and plain values. YAML 1.1 takes `1e-3` for text; here it is a number.
2. A path names a place in the tree: keys with dots between them, quoted where they hold a dot (`method.n_components."*.W_in"`);
   in a list an index, or the name of a loss.
3. Laying changes over a preset keeps what they do not mention. Over a list, a list takes its place, a mapping changes items by
   name, and null leaves one out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.field_types import TYPE, joined, shown, unknown
from tl_paramdecomp.methods.settings import TABLE, from_settings

SUFFIXES = (".yaml", ".yml", ".json")
"""Of files that hold settings."""
NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
"""Numbers with an exponent, also those without a point or a sign that YAML 1.1 leaves out."""
SEGMENT = re.compile(r'"([^"]*)"|\'([^\']*)\'|([^."\']+)')
"""A key of a path, quoted or not."""


class Loader(yaml.SafeLoader):
    """Plain values only; `1e-3` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping without repeated keys."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [self.construct_object(key, deep=True) for key, _ in pairs if key.tag != "tag:yaml.org,2002:merge"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes so that `Loader` reads the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        """Everything is written out where it stands."""
        return True


for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def read_tree(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds.

    Raises:
        SettingError: It cannot be read, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SettingError(f"{path} cannot be read as {_format(path)}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SettingError(f"{path} must hold a mapping of settings, such as 'model: gpt2'; it holds {shown(found)}.")
    return found


def write_tree(tree: Mapping[str, Any]) -> str:
    """A tree as YAML that `read_tree` reads back as it was, keys in their order."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def parse_change(text: str) -> tuple[tuple[str, ...], Any]:
    """The path and the value of `key=value`; the value is read as YAML.

    Raises:
        SettingError: It has no such form.
    """
    path, equals, value = text.partition("=")
    segments = split_path(path.strip())
    if not equals or not segments:
        raise SettingError(f"--set {text!r} must be KEY=VALUE, such as --set method.lr=1e-3.")
    try:
        return segments, yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise SettingError(f"--set {text!r}: the value is no YAML: {' '.join(str(error).split())}") from error


def split_path(path: str) -> tuple[str, ...]:
    """The keys of a path; () where it is none."""
    segments, at = [], 0
    while at < len(path):
        match = SEGMENT.match(path, at)
        if match is None:
            return ()
        segments.append(next(group for group in match.groups() if group is not None))
        at = match.end()
        if at < len(path) and (path[at] != "." or at + 1 == len(path)):
            return ()
        at += 1
    return tuple(segments)


def put(tree: Any, path: Sequence[str], value: Any, above: str = "") -> Any:
    """The tree with another value at a path; null takes an item out of a list.

    Raises:
        SettingError: A list on the way has no such item, or a plain value stands where there should be more.
    """
    if not path:
        return value
    here = joined(above, path[0])
    if tree is None:
        tree = {}
    if isinstance(tree, list):
        return _put_item(tree, path, value, above)
    if not isinstance(tree, Mapping):
        raise SettingError(f"{here}: {above} is {shown(tree)}, which holds no {path[0]!r}.")
    return {**tree, path[0]: put(tree.get(path[0]), path[1:], value, here)}


def merge(base: Any, changes: Any, path: str = "") -> Any:
    """A tree with changes laid over it.

    Raises:
        SettingError: A change by name is of no item of its list.
    """
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(base, list):
        for key, change in changes.items():
            base = put(base, (str(key),), merge(_item(base, str(key), path), change, joined(path, key)), path)
        return base
    if not isinstance(base, Mapping) or changes.get(TYPE, base.get(TYPE)) != base.get(TYPE):
        return changes
    laid = {key: merge(base.get(key), change, joined(path, key)) for key, change in changes.items()}
    return {**base, **laid}


def _put_item(items: list[Any], path: Sequence[str], value: Any, above: str) -> list[Any]:
    index = _index(items, path[0], above)
    if len(path) == 1 and value is None:
        return [*items[:index], *items[index + 1 :]]
    return [*items[:index], put(items[index], path[1:], value, joined(above, path[0])), *items[index + 1 :]]


def _item(items: list[Any], key: str, path: str) -> Any:
    return items[_index(items, key, path)]


def _index(items: list[Any], key: str, path: str) -> int:
    """Which item of a list an index or a name means."""
    if key.isdecimal():
        if int(key) >= len(items):
            raise SettingError(f"{joined(path, key)}: there are {len(items)} items, 0 to {len(items) - 1}.")
        return int(key)
    names = [_names(item) for item in items]
    found = [i for i, some in enumerate(names) if key in some]
    if len(found) > 1:
        told = ", ".join(names[i][0] for i in found)
        raise SettingError(f"{joined(path, key)} could be {told}; say which by that name or by index.")
    if not found:
        raise unknown(key, [name for some in names for name in some[:1]], path, "in the list")
    return found[0]


def _names(item: Any) -> list[str]:
    """What an item can be called: its own name, and its type's."""
    if not isinstance(item, Mapping):
        return [str(item)]
    kind = item.get(TYPE)
    try:
        own = getattr(from_settings(item), "name", None) if kind in TABLE else None
    except SettingError:
        own = item.get("name")
    return [str(name) for name in dict.fromkeys((own, kind)) if name is not None] or [str(item)]


def _format(path: Path) -> str:
    return "JSON" if path.suffix == ".json" else "YAML"
