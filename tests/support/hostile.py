"""Files that are not what they should be, and a watch over what reading them does."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_paramdecomp.errors import DecompositionFileError, TLParamDecompError

SECONDS = 1.0
"""Of the processor's time: no refusal takes as much, whatever the file says and whatever else the machine does."""
MEMORY = 200 << 20
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
    """The error with which a file is refused."""
    found = tried(load, path)
    assert isinstance(found, DecompositionFileError), f"not refused, but {found!r:.300}"
    return found


def tried(load: Callable[[Path], Any], path: Path) -> Any:
    """What a file holds, or the error with which it is refused, which is ours and comes of no allocation that failed."""
    try:
        with watched():
            return load(path)
    except TLParamDecompError as refused:
        error: BaseException | None = refused
        while error is not None:
            assert not isinstance(error, MemoryError) and "allocate" not in str(error), error
            error = error.__cause__ or error.__context__
        assert len(str(refused)) < 1000 + 3 * len(str(path))
        return refused


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


# --- drawn by chance --------------------------------------------------------------------------------------------------
TEXTS = (
    "", "..", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "\0", "\n", "ключ", "\ud800", "__class__", "%s", "{0}", "NaN",
    "1e-3", "null", "x" * 5000,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400, 1.5, 1e308, -0.0, 5e-324,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
DTYPES = (
    "F32",
    "F64",
    "F16",
    "BF16",
    "I32",
    "U8",
    "I64",
    "BOOL",
    "C64",
    "F8_E4M3",
    "F4",
    "F128",
    "",
    "float32",
    4,
    None,
)
SIZES = (*range(-2, 33), 200, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, None, "4", [])


class Chance(random.Random):
    """What is drawn anew from a seed: values, and files with something wrong."""

    def text(self) -> str:
        """Text of all sorts."""
        if self.random() < 0.6:
            return self.choice(TEXTS)
        return "".join(
            chr(self.choice((self.randrange(128), self.randrange(0x3000)))) for _ in range(self.randrange(12))
        )

    def value(self, depth: int = 2) -> Any:
        """Anything that Python's JSON writes, NaN included."""
        kind = self.randrange(8 if depth else 5)
        if kind < 2:
            return self.choice((None, True, False, self.randrange(-300, 300), self.uniform(-3.0, 3.0)))
        if kind < 5:
            return self.choice(NUMBERS) if kind < 4 else self.text()
        inner = [self.value(depth - 1) for _ in range(self.randrange(4))]
        return inner if kind < 7 else {self.text(): each for each in inner}

    def forged(self, values: Any, keep: Callable[[tuple[Any, ...]], bool] = lambda path: True) -> Any:
        """JSON values with something replaced, left out, added or doubled, at a place that may be changed."""
        path = self.choice([path for path in places(values) if keep(path)])
        there, how = at(values, path), self.randrange(8)
        if how < 2:
            return without(values, path)
        if how == 2 and isinstance(there, dict):
            return replaced(values, path, {**there, self.text(): self.value()})
        if how == 3 and isinstance(there, list):
            return replaced(values, path, [*there, *there[:1]])
        return replaced(values, path, self.value())

    def header(self, header: dict[str, Any]) -> Any:
        """A safetensors header with something changed."""
        made = json.loads(json.dumps(header))
        names = [name for name in made if name != "__metadata__"]
        one, other = self.choice(names), self.choice(names)
        entry: dict[str, Any] = {"dtype": self.choice(DTYPES)}
        entry["shape"] = self.choices(SIZES, k=self.randrange(4))
        entry["data_offsets"] = self.choices(SIZES, k=self.choice((2, 2, 2, 1, 3)))
        entry = {key: value for key, value in entry.items() if self.random() < 0.5}
        how = self.choice(("change", "change", "new", "remove", "rename", "exchange", "overlap", "metadata", "any"))
        if how == "change":
            made[one] |= entry
        elif how == "new":
            made[self.text()] = {**made[one], **entry}
        elif how == "remove":
            del made[one]
        elif how == "rename":
            made[self.text()] = made.pop(one)
        elif how == "exchange":
            made[one], made[other] = made[other], made[one]
        elif how == "overlap":
            made[one]["data_offsets"] = made[other]["data_offsets"]
        elif how == "metadata":
            made["__metadata__"] = self.value()
        else:
            made = self.value()
        return made

    def edited(self, content: bytes) -> bytes:
        """A file with something cut, overwritten, inserted, repeated, moved or turned round; never the file itself."""
        at, end = sorted(self.randint(0, len(content)) for _ in range(2))
        piece, new = content[at:end], self.randbytes(self.randint(1, 16))
        rest, other = content[:at] + content[end:], self.randint(0, len(content))
        even = len(piece) // 2 * 2
        turned = bytearray(piece)
        turned[0:even:2], turned[1:even:2] = piece[1:even:2], piece[0:even:2]
        flipped = bytes(byte ^ (1 << self.randrange(8)) for byte in piece[:1])
        made = self.choice((
            rest, piece, content[:at] + new + content[at + len(new) :], content[:at] + new + content[at:],
            content[:end] + piece + content[end:], rest[:other] + piece + rest[other:],
            content[:at] + bytes(turned) + content[end:], content[:at] + bytes(len(piece)) + content[end:],
            content[:at] + flipped + content[at + 1 :],
        ))  # fmt: skip
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
