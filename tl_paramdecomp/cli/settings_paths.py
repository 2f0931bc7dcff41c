"""Trees of settings: read from YAML and JSON, changed at a path, laid over a preset.

1. A file is a tree of mappings, lists and plain values, of limited size and depth. YAML 1.1 takes `1e-3` for text; here it is a
   number, and a date is text.
2. A path names a place in the tree: keys with dots between them, quoted where they hold a dot (`method.n_components."*.W_in"`);
   in a list an index, or the name of a loss.
3. Laying changes over a preset keeps what they do not mention. Over a list, a list takes its place, a mapping changes items by
   name, and null leaves one out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tl_paramdecomp.components.disk import distinct, parse_json, read_text
from tl_paramdecomp.errors import DecompositionFileError, SettingError
from tl_paramdecomp.settings import TYPE, Kind, from_settings, joined, kinds_of, shown, unknown

SUFFIXES = (".yaml", ".yml", ".json")  # of files that hold settings
LARGEST, VALUES, DEEPEST, DIGITS = 1 << 22, 20_000, 50, 100
"""Bytes of a file; its values, those behind an alias counted each time; mappings and lists inside each other; characters of a
number."""
BEYOND = f"more than {VALUES} values, or {DEEPEST} lists and mappings inside each other"
NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
"""Numbers with an exponent, also those without a point or a sign that YAML 1.1 leaves out."""
SEGMENT = re.compile(r'"([^"]*)"|\'([^\']*)\'|([^."\']+)')  # a key of a path, quoted or not
TAG = "tag:yaml.org,2002:"
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Scalars(yaml.SafeLoader):
    """Reads plain scalars."""


class Dumper(yaml.SafeDumper):
    """Writes so that `read_tree` reads the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # everything is written out where it stands


for _class in (Scalars, Dumper):
    _class.add_implicit_resolver(f"{TAG}float", NUMBER, list("-+.0123456789"))


# --- files ------------------------------------------------------------------------------------------------------------
def read_tree(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds; SettingError where it is larger or deeper than settings are, or no mapping."""
    is_json = path.suffix == ".json"
    try:
        text = read_text(path, LARGEST)
        found = within_limits(parse_json(path, text)) if is_json else parse_yaml(text)
    except DecompositionFileError as error:
        raise SettingError(str(error)) from error
    except (ValueError, yaml.YAMLError) as error:
        form = "JSON" if is_json else "YAML"
        raise SettingError(f"{path} cannot be read as {form}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SettingError(f"{path} must hold a mapping of settings, such as 'model: gpt2'; it holds {shown(found)}.")
    return found


def parse_yaml(text: str) -> Any:
    """Plain values from YAML, in one pass over its events; YAMLError or ValueError where it is none, or beyond the limits."""
    under_way: list[tuple[list[Any], str | None]] = [([], None)]
    """Collections that are not complete, and their anchors; the first is that of all documents."""
    anchors: dict[str | None, Any] = {}
    for count, event in enumerate(yaml.parse(text, PARSER)):
        items, anchor = under_way[-1]
        line = event.start_mark.line + 1
        if count > 2 * VALUES or len(under_way) > DEEPEST + 1:  # before the parser grows slow
            break
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) not in (None, "!", f"{TAG}str"):
            raise ValueError(f"line {line}: the tag {event.tag:.40}; settings are plain values")  # type: ignore[attr-defined]
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.pop(event.anchor, None)
            under_way.append(([], event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            under_way.pop()
            anchors[anchor] = _mapping(items, line) if isinstance(event, yaml.MappingEndEvent) else items
            under_way[-1][0].append(anchors[anchor])
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise ValueError(f"line {line}: *{event.anchor:.40} stands for nothing that is complete before it")
            items.append(anchors[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            anchors[event.anchor] = _scalar(event.value) if event.implicit[0] else event.value
            items.append(anchors[event.anchor])
    if len(under_way) > 1:
        raise ValueError(BEYOND)
    documents = under_way[0][0]
    if len(documents) > 1:
        raise ValueError(f"{len(documents)} documents, where settings are one")
    return within_limits(documents)[0] if documents else None


def _scalar(value: str) -> Any:
    """What text that is not quoted stands for; text where it is too long to be a number."""
    if len(value) > DIGITS or value[:1] not in RESOLVER.yaml_implicit_resolvers:
        return value
    tag = RESOLVER.resolve(yaml.ScalarNode, value, (True, False))
    if tag.removeprefix(TAG) not in ("null", "bool", "int", "float"):
        return value
    return yaml.SafeLoader.yaml_constructors[tag](RESOLVER, yaml.ScalarNode(tag, value))


RESOLVER = Scalars("")


def _mapping(items: list[Any], line: int) -> dict[Any, Any]:
    """A mapping from its keys and values by turns, those of `<<` below its own."""
    pairs = list(zip(items[::2], items[1::2], strict=True))
    if any(isinstance(key, list | dict) for key, _ in pairs):
        raise ValueError(f"line {line}: a list or a mapping is no key")
    below: dict[Any, Any] = {}
    for merged in (value for key, value in pairs if key == "<<"):
        for each in reversed(merged if isinstance(merged, list) else [merged]):
            if not isinstance(each, dict):
                raise ValueError(f"line {line}: << stands before {shown(each)}, which is no mapping")
            below |= each
    return {**below, **distinct([(key, value) for key, value in pairs if key != "<<"])}


def within_limits(value: Any) -> Any:
    """The value itself, of limited depth and size (else ValueError); what several aliases stand for counts each time."""
    layer, seen = [value], 0
    for _ in range(DEEPEST):
        outer = [item for item in layer if isinstance(item, dict | list)]
        seen += sum(map(len, outer))
        if seen > VALUES:
            break
        if not outer:
            return value
        layer = [inner for item in outer for inner in (item.values() if isinstance(item, dict) else item)]
    raise ValueError(BEYOND)


def write_tree(tree: Mapping[str, Any]) -> str:
    """A tree as YAML that `read_tree` reads back as it was, keys in their order."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


# --- paths ------------------------------------------------------------------------------------------------------------
def parse_change(text: str) -> tuple[tuple[str, ...], Any]:
    """The path and the value of `key=value`, which is read as YAML; SettingError where it has no such form."""
    path, equals, value = text.partition("=")
    segments = split_path(path.strip())
    if not equals or not segments:
        raise SettingError(f"--set {shown(text)} must be KEY=VALUE, such as --set method.lr=1e-3.")
    try:
        return segments, parse_yaml(value)
    except (ValueError, yaml.YAMLError) as error:
        raise SettingError(f"--set {text[:80]!r}: the value is no YAML: {' '.join(str(error).split())}") from error


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
    return tuple(segments) if len(segments) <= DEEPEST else ()


def put(tree: Any, path: Sequence[str], value: Any, above: str = "") -> Any:
    """The tree with another value at a path; null takes an item out of a list. SettingError where there is no such place."""
    if not path:
        return value
    key, here = path[0], joined(above, path[0])
    if isinstance(tree, list):
        index = _index(tree, key, above)
        changed = [] if len(path) == 1 and value is None else [put(tree[index], path[1:], value, here)]
        return [*tree[:index], *changed, *tree[index + 1 :]]
    if tree is not None and not isinstance(tree, Mapping):
        raise SettingError(f"{here}: {above} is {shown(tree)}, which holds no {key!r:.80}.")
    return {**(tree or {}), key: put((tree or {}).get(key), path[1:], value, here)}


def merge(base: Any, changes: Any, path: str = "") -> Any:
    """A tree with changes laid over it; SettingError where a change by name is of no item of its list."""
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(base, list):
        for key, change in changes.items():
            item = base[_index(base, str(key), path)]
            base = put(base, (str(key),), merge(item, change, joined(path, key)), path)
        return base
    if not isinstance(base, Mapping) or changes.get(TYPE, base.get(TYPE)) != base.get(TYPE):
        return changes
    return {**base, **{key: merge(base.get(key), change, joined(path, key)) for key, change in changes.items()}}


def _index(items: list[Any], key: str, path: str) -> int:
    """Which item of a list an index or a name means."""
    if key.isdecimal():
        if len(key) > DIGITS or int(key) >= len(items):
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
        own = getattr(from_settings(item), "name", None) if isinstance(kind, str) and kind in kinds_of(Kind) else None
    except SettingError:
        own = item.get("name")
    return [str(name) for name in dict.fromkeys((own, kind)) if name is not None] or [str(item)]
