"""Records on disk: one JSON file with a checksum, and arrays as safetensors in a file of the same name beside it.

The JSON is an object with `format`, `record` (what it is of), the record's fields, each on a line of its own, and last the
`checksum` of all bytes before it. Where there are arrays, `tensors` holds the sha256 and size of `NAME.safetensors`; the two
files are written as `files.write_pair` writes a decomposition's. Version 0.1.0 wrote the fields alone: no `format`, no
checksum, arrays as lists; such files are read, not written.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_paramdecomp.components.disk import distinct, parse_json, read_text, replace_text
from tl_paramdecomp.components.files import Described, Pair, check_seal, read_pair, sealed, write_pair
from tl_paramdecomp.errors import DecompositionFileError

FORMAT = 2
LARGEST = 1 << 27
"""Bytes of JSON that are written or read at most: 128 MiB."""
HEADER = ("format", "record", "tensors", "checksum")


Check = Callable[[dict[str, Any], Mapping[str, Tensor] | None], None]


def save(path: Path, what: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, check: Check) -> None:
    """Write a record of fields that JSON can hold (dataclasses among them become objects) and arrays; what was there before
    stays until all is written.

    With `tensors=None` it never has any, and there is no second file. `check` is called with what will be read again, before
    anything is put in place.

    Raises:
        DecompositionFileError: What is there is no regular file, or the arrays' file belongs to something else.
        OSError, ValueError, TypeError: It cannot be written.
    """

    def text_with(digest: str | None = None, size: int | None = None) -> str:
        about = {} if digest is None else {"tensors": {"sha256": digest, "bytes": size}}
        text = _as_text(path, {"format": FORMAT, "record": what, **values, **about})
        # {1: 0, "1": 0} gives JSON that would be refused
        check(_fields(json.loads(text, object_pairs_hook=distinct)), tensors)
        return text

    if tensors is None:
        replace_text(path, text_with())
        return
    pair = _pair(path)
    _refuse_other_arrays(pair)
    write_pair(pair, tensors, text_with)


def load(path: Path, what: str, has_arrays: bool) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """A record's fields and arrays; None for the arrays where there is no second file.

    Raises:
        DecompositionFileError: Something is missing, damaged, too large, a record of something else, or newer than this
            version knows.
    """
    values, owned = _read(path, what), None
    if has_arrays and "format" in values:

        def read() -> Described:
            again = _read(path, what)
            described = again.get("tensors")
            if not isinstance(described, dict) or type(described.get("bytes")) is not int:
                raise DecompositionFileError(f"{path} does not say what arrays it has; it is damaged.")
            return Described(again, described.get("sha256"), described["bytes"])

        values, tensors = read_pair(_pair(path), read)
        # copies: what is read is the file itself as long as nobody writes to it
        owned = {name: tensor.clone() for name, tensor in tensors.items()}
    return _fields(values), owned


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in HEADER} if "format" in values else values


def _read(path: Path, what: str) -> dict[str, Any]:
    """Fields and header, the checksum compared."""
    text = read_text(path, LARGEST)
    values = parse_json(path, text, finite=False)
    if not isinstance(values, dict):
        raise DecompositionFileError(f"{path} holds no {what} but {values!r:.40}; write one with save().")
    if "format" not in values:
        return values
    if type(values["format"]) is not int or values["format"] != FORMAT:
        raise DecompositionFileError(
            f"{path} is of format {values['format']!r:.40}; this version reads records of format {FORMAT} and those of 0.1.0. "
            "Install the version that wrote it."
        )
    check_seal(path, text)
    if values.get("record") != what:
        raise DecompositionFileError(
            f"{path} holds no {what} but a record of {values.get('record')!r:.40}; open it with the class that wrote it."
        )
    return values


def _pair(path: Path) -> Pair:
    return Pair(path, path.with_name(f"{path.name.removesuffix('.json')}.safetensors"))


def _refuse_other_arrays(pair: Pair) -> None:
    """The user named one file; the other must not be somebody's."""
    if not os.path.lexists(pair.tensors):
        return
    try:
        text = read_text(pair.json, LARGEST, follow=False)
        found = parse_json(pair.json, text, finite=False)
        check_seal(pair.json, text)
        is_ours = isinstance(found.get("tensors"), dict)
    except (DecompositionFileError, AttributeError):
        is_ours = False
    if not is_ours:
        raise DecompositionFileError(
            f"{pair.tensors} is where the arrays belong, and {pair.json.name} does not say that they are its own; choose "
            "another name, or move that file away."
        )


def _as_text(path: Path, values: Mapping[str, Any]) -> str:
    """An object with a line for each field, and its checksum."""

    def dumped(value: Any) -> str:
        return json.dumps(value, default=_plain, separators=(", ", ": "))

    lines = [f" {json.dumps(key)}: {dumped(value)}" for key, value in values.items()]
    text = sealed("{\n" + ",\n".join(lines))
    if len(text) > LARGEST:
        raise ValueError(
            f"{path.name} would have {len(text)} bytes, and no more than {LARGEST} are read again; keep less"
        )
    return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"{value!r:.80} is nothing that JSON has")
