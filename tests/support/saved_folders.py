"""Saved decompositions by hand: what the formats say, written out anew, so that tests can forge files that fit together."""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TENSORS, METADATA = "components.safetensors", "decomposition.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, also of those within it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A folder of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def values_of(folder: Path) -> dict[str, Any]:
    """The JSON of a saved decomposition."""
    return json.loads((folder / METADATA).read_bytes())


def sealed(values: Mapping[str, Any]) -> bytes:
    """JSON values as format 2 has them: one space of indent, and at the end the sha256 of what stands before it."""
    body = json.dumps({key: value for key, value in values.items() if key != "checksum"}, indent=1)[:-2]
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return (body + ',\n "checksum": "' + checksum + '"\n}').encode()


def forge(folder: Path, values: Mapping[str, Any], tensors: bytes | None = None) -> Path:
    """Write values, and perhaps other tensors, with digests that fit."""
    if tensors is not None:
        (folder / TENSORS).write_bytes(tensors)
        values = {**values, "sha256": hashlib.sha256(tensors).hexdigest()}
    (folder / METADATA).write_bytes(sealed(values))
    return folder


def forge_format_1(folder: Path, values: Mapping[str, Any]) -> Path:
    """Write values as format 1 had them: no checksum."""
    plain = {key: value for key, value in values.items() if key != "checksum"}
    (folder / METADATA).write_text(json.dumps({**plain, "format": 1}, indent=1), encoding="utf-8")
    return folder


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    """The reverse; the header may be anything that JSON holds."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors_in(content: bytes) -> dict[str, np.ndarray]:
    """Float32 tensors of a safetensors file, read by hand."""
    header, data = split_safetensors(content)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[begin:end], "<f4").reshape(entry["shape"])
    return found


def sealed_lines(values: Mapping[str, Any]) -> bytes:
    """JSON values as records have them: a line for each field, and at the end the sha256 of what stands before it."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items() if key != "checksum"]
    body = "{\n" + ",\n".join(lines)
    return (body + ',\n "checksum": "' + hashlib.sha256(body.encode()).hexdigest() + '"\n}').encode()
