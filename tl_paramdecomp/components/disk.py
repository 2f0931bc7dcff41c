"""Files on a disk: opened without following links or waiting, written whole or not at all, refused by name.

Everything that the package writes goes through here. A new file is written into a folder of its own beside, seen on the disk,
and put in place by one rename; where that fails, what was there before stays and nothing is left beside it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tl_paramdecomp.errors import DecompositionFileError, DiskSpaceError

LARGEST = 1 << 25
"""Bytes of JSON that are written or read at most, where nothing else is said: 32 MiB."""
LONGEST_EMPTY = 1 << 20
"""Length of a tensor without numbers, at most; without a byte behind it, a header can name any."""
SCRATCH = ".saving-"
"""What folders begin with that a file is written in before it is put in place."""
LONGEST_REASON = 400
"""Letters of a reason in a message."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a spent quota, and a limit on the size of one file."""
AT_ONCE = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
"""Opened so, a pipe is not waited for; Windows has some of these, and other systems the others."""


# --- errors -----------------------------------------------------------------------------------------------------------
def failure(what: str, error: Exception, advice: str = "") -> DecompositionFileError:
    """The named error of something that could not be written; `advice` says what is there still and what to do."""
    if isinstance(error, DiskSpaceError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        room = "Free some space, raise the quota or the limit on a file's size, or choose another disk."
        return DiskSpaceError(f"{what}: {error}. {advice or room}")
    return DecompositionFileError(f"{what}: {error}{f'. {advice}' if advice else ''}")


def in_short(error: Exception) -> str:
    """What went wrong, in a line; torch may name every tensor, and a dataclass every field."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise what could not be written as DiskSpaceError where there is no room, else as DecompositionFileError."""
    try:
        yield
    except DecompositionFileError:
        raise
    except (OSError, TypeError, ValueError, RecursionError, NotImplementedError) as error:
        raise failure(what, error) from error


@contextlib.contextmanager
def reading(path: Path | str, what: str = "cannot be read") -> Iterator[None]:
    """Raise what could not be read as DecompositionFileError; a damaged file may go wrong anywhere."""
    try:
        yield
    except FileNotFoundError as error:
        raise DecompositionFileError(f"There is no file {path}.") from error
    except DecompositionFileError:
        raise
    except Exception as error:
        raise DecompositionFileError(f"{path} {what} ({str(error)[:LONGEST_REASON]}).") from error


# --- reading ----------------------------------------------------------------------------------------------------------
def open_regular(path: Path, flags: int = os.O_RDONLY, follow: bool = False) -> int:
    """A handle of a regular file, else OSError or ValueError; it is a link only where `follow` allows it, and a pipe or device
    is not waited for."""
    flags |= AT_ONCE
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        if path.is_symlink():  # said in words; the flag closes the gap, where the system has it
            raise OSError(f"{path} is a link, which is not followed; put the file itself there, or take the link away")
    if path.is_dir():
        raise OSError(f"{path} is a folder")
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is no regular file")
    return handle


def read_bytes(path: Path, largest: int | None = None, follow: bool = True) -> bytes:
    """All of a regular file of at most `largest` bytes, else DecompositionFileError."""
    with reading(path), os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read() if largest is None else file.read(largest + 1)
        if largest is not None and len(content) > largest:
            raise ValueError(f"it has {os.fstat(file.fileno()).st_size} bytes; at most {largest} are read")
        return content


def read_text(path: Path, largest: int | None = None, follow: bool = True) -> str:
    """The text of such a file, line ends as they are; DecompositionFileError where it is not UTF-8."""
    content = read_bytes(path, largest, follow)
    with reading(path):
        return content.decode("utf-8")


def parse_json(path: Path | str, text: str, finite: bool = True) -> Any:
    """JSON where no name stands twice in an object, no number is too large for a float, and (`finite`) none is NaN or infinite,
    else DecompositionFileError."""
    constant = _finite if finite else None
    with reading(path, "cannot be read as JSON"):
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant, parse_float=_finite)


def read_json(path: Path, *keys: str, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object with these keys that the package wrote itself, in a file that is no link; else DecompositionFileError."""
    found = parse_json(path, read_text(path, largest, follow=False), finite=False)
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise DecompositionFileError(f"{path} holds no object with {' and '.join(keys) or 'names'}.")
    return found


def read_tensors(path: Path, device: torch.device | str = "cpu", follow: bool = True) -> dict[str, Tensor]:
    """A safetensors file as a dict, else DecompositionFileError."""
    with reading(path, "is not a readable safetensors file"):
        os.close(open_regular(path, follow=follow))
        found = safetensors.torch.load_file(str(path), device=str(device))
        for name, tensor in found.items():
            if tensor.numel() == 0 and max(tensor.shape) > LONGEST_EMPTY:
                raise ValueError(f"{name} is empty and of shape {list(tensor.shape)}")
        return found


def digest_of(file: BinaryIO) -> str:
    """The sha256 of what is left of a file."""
    found = hashlib.sha256()
    while piece := file.read(1 << 20):
        found.update(piece)
    return found.hexdigest()


def distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A JSON object whose names differ, else ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _finite(number: str) -> float:
    found = float(number)
    if found - found != 0:
        raise ValueError(f"{number} is no finite number")
    return found


# --- writing ----------------------------------------------------------------------------------------------------------
def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and see them on the disk before returning."""
    path.touch()
    mode = path.stat().st_mode  # that of any file; safetensors makes another that only its owner can read
    try:
        safetensors.torch.save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, str(path))
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    path.chmod(mode)
    _sync(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and see it on the disk before returning."""
    path.write_bytes(content)
    _sync(path)


def write_text(path: Path, text: str) -> None:
    """Write text, line ends as they are, and see it on the disk before returning."""
    write_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes, alone: bool = False) -> None:
    """Write a file, whole or not at all, and see it on the disk before returning; errors as of `writing`.

    Where no other process writes (`alone`), what a killed one left beside the file is taken away.
    """
    with writing(f"Could not write {path}"):
        check_replaceable(path)
        left = left_scratch(path.parent) if alone else []
        with scratch(path.parent) as folder:
            write_bytes(folder / path.name, content)
            os.replace(folder / path.name, path)
            sync_folder(path.parent)
        remove_own(left, re.escape(path.name))


def replace_text(path: Path, text: str, alone: bool = False) -> None:
    """`replace_bytes` with text, line ends as they are."""
    with writing(f"Could not write {path}"):
        replace_bytes(path, text.encode("utf-8"), alone)


def append_text(path: Path, text: str) -> None:
    """Add text to the end of a file that is no link, all of it or nothing; the file is made where there is none."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
        before, content = os.fstat(file.fileno()).st_size, memoryview(text.encode("utf-8"))
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def check_replaceable(path: Path) -> None:
    """Raise OSError unless there is a regular file of this name, or nothing."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
        found = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise OSError(f"there is {found} of that name, which is not written to; choose another name, or take it away")


# --- folders ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder inside another, for files before they are put in place; it goes, with what is in it."""
    made = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def left_scratch(folder: Path) -> list[Path]:
    """Scratch folders that are there, such as killed processes leave."""
    return [path for path in folder.glob(f"{SCRATCH}*") if path.is_dir() and not path.is_symlink()]


def remove_own(folders: Collection[Path], own: str) -> None:
    """Delete files and folders inside these whose whole name fits the pattern, and each that is then empty; other names, links
    and the folders they are in stay. What cannot be deleted does no harm, and nothing is raised."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if folder.is_symlink():
                continue
            for entry in list(os.scandir(folder)):
                if not re.fullmatch(own, entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    remove_own([Path(entry.path)], own)
                elif not entry.is_symlink():
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
            folder.rmdir()


def not_own(folder: Path, own: str) -> Path | None:
    """Something inside a folder that `remove_own` would leave; None where there is nothing."""
    for entry in list(os.scandir(folder)):
        fits = re.fullmatch(own, entry.name)
        if fits and entry.is_dir(follow_symlinks=False):
            inner = not_own(Path(entry.path), own)
            if inner is not None:
                return inner
        elif not fits or entry.is_symlink():
            return Path(entry.path)
    return None


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, seen on the disk; where the body fails, those that were made go again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def sync_folder(folder: Path) -> None:
    """See what was made, renamed or removed in a folder on the disk; Windows has no such call."""
    if os.name != "nt":
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
