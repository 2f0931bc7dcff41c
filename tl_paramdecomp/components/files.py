"""Decompositions on disk: tensors as safetensors, everything else as JSON; written whole or not at all.

A folder holds `components.safetensors` and `decomposition.json`. Format 2, which `save_parts` writes:

- The JSON holds the sha256 of the tensors' file, and as its last entry `checksum`, the sha256 of its own bytes before that
  entry. No other bytes are accepted, so that a change of any byte of the two files is noticed.
- New tensors come first, beside the old ones, under a name with their digest; then the JSON is replaced, which is the
  moment when the folder holds the new decomposition; then the tensors take the place of the old ones. Everything is on the
  disk before the next of these steps, so that whenever a save ends the folder holds the old decomposition or the new one.

Format 1 is the same without `checksum`; it is read, not written.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from tl_paramdecomp.errors import DecompositionFileError, DeviceError

FORMAT = 2
TENSORS, METADATA = "components.safetensors", "decomposition.json"
BESIDE = "components-{}.safetensors"
"""Name, by their digest, of tensors that the JSON describes already and that are not in their place yet."""
HEX = "[0-9a-f]"
SCRATCH = ".saving-"
LARGEST = 1 << 25
"""Bytes of JSON that are written or read at most: 32 MiB, tens of thousands of sites."""
LONGEST_EMPTY = 1 << 20
"""Length of a tensor without numbers, at most; without a byte behind it, a header can name any."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEAL = ',\n "checksum": "'
"""What comes before the checksum, at the end of the JSON."""


def save_parts(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write a decomposition's tensors and JSON values into a folder; what it held before stays until all is written.

    Raises:
        DecompositionFileError: The path is a file, a folder of other things, or cannot be written; a tensor holds NaN or
            infinity; a value is nothing that JSON has.
    """
    try:
        _refuse_other_things(folder)
        make_folder(folder)
        left = [*folder.glob(BESIDE.format(HEX * 64)), *folder.glob(f"{SCRATCH}*")]
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
        try:
            write_tensors(scratch / TENSORS, check_numbers(tensors))
            with (scratch / TENSORS).open("rb") as file:
                digest = _digest(file)
            write_text(scratch / METADATA, _as_text({"format": FORMAT, **metadata, "sha256": digest}))
            beside = folder / BESIDE.format(digest)
            for source, target in (
                (scratch / TENSORS, beside),
                (scratch / METADATA, folder / METADATA),
                (beside, folder / TENSORS),
            ):
                os.replace(source, target)
                sync_folder(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for path in left:  # by saves that were killed
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    except DecompositionFileError:
        raise
    except (OSError, TypeError, ValueError, RecursionError, NotImplementedError) as error:
        raise DecompositionFileError(f"Could not save into {folder}: {error}") from error
    return folder


def load_parts(folder: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON values that were given to `save_parts`.

    Raises:
        DecompositionFileError: Something is missing, broken, foreign or newer than this version knows.
        DeviceError: There is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise DeviceError(f"Cannot load onto {device}: {error}") from error
    found = _stamp(folder)
    metadata = read_metadata(folder)
    try:
        tensors = _described_tensors(folder, metadata.get("sha256"))
    except DecompositionFileError:
        if _stamp(folder) != found:  # saved anew in the meantime
            return load_parts(folder, device)
        raise
    values = {key: value for key, value in metadata.items() if key not in ("format", "sha256")}
    # a copy, since what is read is the file itself as long as nobody writes to it
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, values


def read_metadata(folder: Path) -> dict[str, Any]:
    """The JSON half of a saved decomposition, without its checksum.

    Raises:
        DecompositionFileError: It is missing, broken, foreign or newer than this version knows.
    """
    path = folder / METADATA
    try:
        found = "" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        is_saved = path.is_file()
    except OSError as error:
        raise DecompositionFileError(f"{folder} cannot be opened ({error}).") from error
    if found:
        raise DecompositionFileError(f"{folder} {found}; give the folder that Decomposition.save wrote.")
    if not is_saved:
        raise DecompositionFileError(f"{folder} holds no {METADATA}; it is not a saved decomposition.")
    text = read_text(path, LARGEST)
    metadata = parse_json(path, text)
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is not int or version not in (1, FORMAT):
        raise DecompositionFileError(
            f"{path} is of format {version!r}; this version reads formats 1 and {FORMAT}. Install the version that wrote it."
        )
    checksum = metadata.pop("checksum", None)
    whole = checksum is None if version == 1 else text == _sealed(text.rpartition(SEAL)[0])
    if not whole:
        raise DecompositionFileError(
            f"{path} is not as it was written: its own checksum does not fit. It is damaged or was edited; copy it again from "
            "where it was saved."
        )
    return metadata


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a regular file, line ends as they are.

    Raises:
        DecompositionFileError: It is missing, no regular file, too large, or not UTF-8.
    """
    _check_regular(path)
    try:
        if largest is not None and path.stat().st_size > largest:
            raise ValueError(f"it has {path.stat().st_size} bytes; at most {largest} are read")
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise DecompositionFileError(f"{path} cannot be read ({error}).") from error


def parse_json(path: Path, text: str, finite: bool = True) -> Any:
    """JSON from a file's text, where no name stands twice in an object.

    Args:
        path: The file, for messages.
        text: What it holds.
        finite: Refuse NaN, infinities and numbers too large for a float.

    Raises:
        DecompositionFileError: It is none.
    """
    try:
        number = _finite if finite else None
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise DecompositionFileError(f"{path} cannot be read as JSON ({error}).") from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A safetensors file as a dict.

    Raises:
        DecompositionFileError: It is missing, or something else.
    """
    _check_regular(path)
    try:
        found = safetensors.torch.load_file(str(path), device=str(device))
        for name, tensor in found.items():
            if tensor.numel() == 0 and max(tensor.shape) > LONGEST_EMPTY:
                raise ValueError(f"{name} is empty and of shape {list(tensor.shape)}")
        return found
    except Exception as error:
        raise DecompositionFileError(f"{path} is not a readable safetensors file ({error}).") from error


def check_numbers(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors themselves, which must be of finite numbers of a dtype that can be computed with.

    Raises:
        ValueError: They are not.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}, and only {', '.join(map(str, DTYPES))} are known")
        if not bool(tensor.detach().cpu().isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; no decomposition is made of those")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and see them on the disk before returning."""
    path.touch()
    mode = path.stat().st_mode  # that of any file; safetensors makes another that only its owner can read
    safetensors.torch.save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, str(path))
    path.chmod(mode)
    _sync(path)


def write_text(path: Path, text: str) -> None:
    """Write text, line ends as they are, and see it on the disk before returning."""
    path.write_bytes(text.encode("utf-8"))
    _sync(path)


def replace_text(path: Path, text: str, alone: bool = False) -> None:
    """Write text, whole or not at all, and see it on the disk before returning.

    Args:
        path: The file, there or not.
        text: All of it.
        alone: No other process writes this file: what a killed process left beside it, the next call takes away.

    Raises:
        DecompositionFileError: The folder is not there, or cannot be written to.
    """
    scratch = path.with_name(f".{path.name}-{'new' if alone else os.getpid()}")
    try:
        try:
            write_text(scratch, text)
            os.replace(scratch, path)
            sync_folder(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise DecompositionFileError(f"Could not write {path}: {error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and see them on the disk before returning."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """See what was made, renamed or removed in a folder on the disk before returning; Windows has no such call."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells one file of JSON from the next in its place."""
    try:
        found = (folder / METADATA).stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns


def _described_tensors(folder: Path, digest: Any) -> dict[str, Tensor]:
    """The tensors of this digest, wherever a save has them at the moment."""
    if not isinstance(digest, str) or not re.fullmatch(HEX + "{64}", digest):
        raise DecompositionFileError(f"{folder / METADATA} holds no sha256 of its tensors; it is damaged.")
    errors = []
    # while it is looked for, the file may move from the second place to the first
    for name in (TENSORS, BESIDE.format(digest), TENSORS):
        try:
            return _tensors_of(folder / name, digest)
        except DecompositionFileError as error:
            errors.append(error)
    raise errors[0]


def _tensors_of(path: Path, digest: str) -> dict[str, Tensor]:
    _check_regular(path)
    try:
        with path.open("rb") as file:
            tensors = read_tensors(path)
            same = _digest(file) == digest and os.path.samestat(os.fstat(file.fileno()), path.stat())
        check_numbers(tensors)
    except DecompositionFileError:
        raise
    except (OSError, ValueError) as error:
        raise DecompositionFileError(f"{path} cannot be used: {error}.") from error
    if not same:
        raise DecompositionFileError(
            f"{path} is not the file that {METADATA} describes: it is damaged, or one of the two was replaced. Copy both "
            "again from where they were saved."
        )
    return tensors


def _check_regular(path: Path) -> None:
    """Refuse what is no file, such as a pipe that would be waited for."""
    try:
        regular = path.is_file()
    except OSError as error:
        raise DecompositionFileError(f"{path} cannot be opened ({error}).") from error
    if not regular:
        raise DecompositionFileError(f"There is no file {path}.")


def _refuse_other_things(folder: Path) -> None:
    if folder.is_file():
        raise DecompositionFileError(f"{folder} is a file; give a folder to save a decomposition in.")
    if (folder / METADATA).exists():
        read_metadata(folder)  # refuses a file of that name that is not a decomposition's
    elif (folder / TENSORS).exists():
        raise DecompositionFileError(
            f"{folder} holds a {TENSORS} without its {METADATA}; save into a folder of its own."
        )


def _as_text(values: Mapping[str, Any]) -> str:
    """The JSON of a folder, with its checksum."""
    text = _sealed(json.dumps(values, indent=1, allow_nan=False).removesuffix("\n}"))
    if len(text) > LARGEST:
        raise ValueError(f"{METADATA} would have {len(text)} bytes, and no more than {LARGEST} are read again")
    json.loads(text, object_pairs_hook=_distinct)  # {1: 0, "1": 0} gives JSON that would be refused
    return text


def _sealed(body: str) -> str:
    """An object's text that lacks its end, ended by its checksum."""
    return f'{body}{SEAL}{hashlib.sha256(body.encode("utf-8")).hexdigest()}"\n}}'


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _finite(number: str) -> float:
    found = float(number)
    if found - found != 0:
        raise ValueError(f"{number} is no finite number")
    return found


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while piece := file.read(1 << 20):
        found.update(piece)
    return found.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
