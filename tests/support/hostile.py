"""Files that are not what they should be, and a watch over what reading them does."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tl_paramdecomp.errors import DecompositionFileError

SECONDS = 5.0
"""Of the processor's time: no refusal takes as much, whatever the file says and whatever else the machine does."""
MEMORY = 1 << 30
"""Bytes of address space that reading a file of a few kilobytes may take on top of what there is."""
RUNS_CODE = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
)

_heard: list[list[tuple[str, Any]]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    for heard in _heard:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in RUNS_CODE or event.startswith(("socket.", "ctypes.")):
            heard.append((event, arguments))


sys.addaudithook(_hear)


@contextmanager
def watched() -> Iterator[None]:
    """Fails where the body runs code, writes a file, opens a socket, takes much work, or may take much memory (on Linux)."""
    heard: list[tuple[str, Any]] = []
    _heard.append(heard)
    began = time.process_time()
    try:
        with _limited(MEMORY):
            yield
    finally:
        _heard.remove(heard)
    assert not heard, heard
    assert time.process_time() - began < SECONDS


@contextmanager
def _limited(memory: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(load: Callable[[Path], Any], path: Path) -> DecompositionFileError:
    """The error with which a file is refused, which is ours, and comes of no allocation that failed."""
    with watched(), pytest.raises(DecompositionFileError) as caught:
        load(path)
    error: BaseException | None = caught.value
    while error is not None:
        assert not isinstance(error, MemoryError) and "allocate" not in str(error), error
        error = error.__cause__ or error.__context__
    assert len(str(caught.value)) < 1000 + 3 * len(str(path))
    return caught.value


# --- foreign files ----------------------------------------------------------------------------------------------------
class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.sentinel,)


def foreign(sentinel: Path) -> dict[str, bytes]:
    """Files of other kinds; those that run code when they are opened as what they are make the sentinel."""

    def written(write: Callable[[io.BytesIO], Any]) -> bytes:
        buffer = io.BytesIO()
        write(buffer)
        return buffer.getvalue()

    bomb = Bomb(sentinel)
    objects = np.array([bomb, None], dtype=object)
    return {
        "pickle": pickle.dumps({"blocks.0.V": bomb}),
        "pickle, protocol 0": pickle.dumps(bomb, protocol=0),
        "torch.save": written(lambda out: torch.save({"V": bomb}, out)),
        "torch.save of before": written(lambda out: torch.save(bomb, out, _use_new_zipfile_serialization=False)),
        "torch.save of tensors": written(lambda out: torch.save({"V": torch.ones(2)}, out)),
        "npz": written(lambda out: np.savez(out, V=objects)),
        "npy": written(lambda out: np.save(out, objects, allow_pickle=True)),
        "gguf": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\xff" * 64,
        "zip": written(lambda out: zipfile.ZipFile(out, "w").writestr("decomposition.json", "{}")),
        "gzip": gzip.compress(b'{"format": 2}'),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "text": b"These are the components of a model.\n",
        "python": b"__import__('os').mkdir('" + str(sentinel).encode() + b"')\n",
        "yaml": b"!!python/object/apply:os.mkdir ['" + str(sentinel).encode() + b"']\n",
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "utf-16": '{"format": 2}'.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + b'{"format": 1}',
        "empty": b"",
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "null": b"null",
        "number": b"2",
        "list": b"[2]",
        "another's json": json.dumps({"model_type": "gpt2", "format": "pt"}).encode(),
        "deep list": b"[" * 200_000,
        "deep object": b'{"format":' * 200_000,
        "huge number": b'{"format": ' + b"9" * 100_000 + b"}",
        "huge exponent": b'{"format": 2e999999999}',
        "endless header": struct.pack("<Q", (1 << 64) - 1) + b"{}",
        "large header": struct.pack("<Q", 1 << 40) + b"{}",
        "no header": struct.pack("<Q", 0),
        "header of a list": struct.pack("<Q", 2) + b"[]",
        "no tensors": struct.pack("<Q", 2) + b"{}",
    }


# --- hypothesis -------------------------------------------------------------------------------------------------------
def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a search with few examples always, and with many, other ones every time, among the slow tests."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    )


def searching(examples: int) -> settings:
    """How hypothesis searches: without time limits for single examples, and the same ones where they are few."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )


TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "\0",
        "\n",
        "ключ",
        "\ud800",
        "__class__",
        "%s",
        "{0}",
        "NaN",
    ]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, 1e308, -0.0, 5e-324])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
"""Anything that Python's JSON writes, NaN included."""


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with something cut, overwritten, inserted, repeated, exchanged or turned round; never the file itself."""
    at, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    other = draw(st.integers(0, len(content)))
    piece = content[at:end]
    kind = draw(st.sampled_from(["cut", "keep", "overwrite", "insert", "repeat", "move", "swap bytes", "zero", "flip"]))
    if kind == "cut":
        made = content[:at] + content[end:]
    elif kind == "keep":
        made = piece
    elif kind == "overwrite":
        new = draw(st.binary(min_size=1, max_size=16))
        made = content[:at] + new + content[at + len(new) :]
    elif kind == "insert":
        made = content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
    elif kind == "repeat":
        made = content[:end] + piece + content[end:]
    elif kind == "move":
        rest = content[:at] + content[end:]
        made = rest[:other] + piece + rest[other:]
    elif kind == "swap bytes":
        even = len(piece) - len(piece) % 2
        turned = bytearray(piece)
        turned[0:even:2], turned[1:even:2] = piece[1:even:2], piece[0:even:2]
        made = content[:at] + bytes(turned) + content[end:]
    elif kind == "zero":
        made = content[:at] + bytes(len(piece)) + content[end:]
    else:
        made = content[:at] + bytes(b ^ (1 << draw(st.integers(0, 7))) for b in piece[:1]) + content[at + 1 :]
    return made if made != content else content + b"\0"


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside JSON values, outermost first, that of the whole left out."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(values: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        values = values[key]
    return values


def replaced(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a path."""
    copy = json.loads(json.dumps(values))
    at(copy, path[:-1])[path[-1]] = new
    return copy


def without(values: Any, path: tuple[Any, ...]) -> Any:
    """A copy that lacks what is at a path."""
    copy = json.loads(json.dumps(values))
    del at(copy, path[:-1])[path[-1]]
    return copy
