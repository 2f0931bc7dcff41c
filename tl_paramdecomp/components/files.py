"""Decompositions on disk: tensors as safetensors, everything else as JSON; written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tl_paramdecomp.errors import DecompositionFileError, DeviceError

FORMAT = 1
TENSORS, METADATA = "components.safetensors", "decomposition.json"


def save_parts(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write a decomposition's tensors and JSON values into a folder; what it held before stays until all is written.

    Raises:
        DecompositionFileError: The path is a file, a folder of other things, or cannot be written.
    """
    if folder.is_file():
        raise DecompositionFileError(f"{folder} is a file; give a folder to save a decomposition in.")
    if (folder / METADATA).exists():
        read_metadata(folder)  # refuses a file of that name that is not a decomposition's
    elif (folder / TENSORS).exists():
        raise DecompositionFileError(
            f"{folder} holds a {TENSORS} without its {METADATA}; save into a folder of its own."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            write_tensors(Path(scratch) / TENSORS, tensors)
            digest = _digest(Path(scratch) / TENSORS)
            write_text(Path(scratch) / METADATA, json.dumps({"format": FORMAT, **metadata, "sha256": digest}, indent=1))
            for name in (TENSORS, METADATA):
                os.replace(Path(scratch) / name, folder / name)
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise DecompositionFileError(f"Could not save into {folder}: {error}") from error
    return folder


def load_parts(folder: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and JSON values that `save_parts` wrote.

    Raises:
        DecompositionFileError: Something is missing, broken, foreign or newer than this version knows.
        DeviceError: There is no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise DeviceError(f"Cannot load onto {device}: {error}") from error
    metadata, tensors = read_metadata(folder), read_tensors(folder / TENSORS, device)
    if metadata.get("sha256") != _digest(folder / TENSORS):
        raise DecompositionFileError(
            f"{folder / TENSORS} is not the file that {METADATA} describes: a save was interrupted, or one of the two "
            "was replaced. Copy both again from where they were saved."
        )
    return tensors, metadata


def read_metadata(folder: Path) -> dict[str, Any]:
    """The JSON half of a saved decomposition."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DecompositionFileError(f"{folder} {found}; give the folder that Decomposition.save wrote.")
    path = folder / METADATA
    if not path.is_file():
        raise DecompositionFileError(f"{folder} holds no {METADATA}; it is not a saved decomposition.")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DecompositionFileError(f"{path} cannot be read as JSON ({error}).") from error
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if version != FORMAT:
        raise DecompositionFileError(
            f"{path} is of format {version!r}; this version reads format {FORMAT}. Install the version that wrote it."
        )
    return metadata


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A safetensors file as a dict."""
    if not path.is_file():
        raise DecompositionFileError(f"There is no file {path}.")
    try:
        return safetensors.torch.load_file(str(path), device=str(device))
    except Exception as error:
        raise DecompositionFileError(f"{path} is not a readable safetensors file ({error}).") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and see them on the disk before returning."""
    safetensors.torch.save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, str(path))
    _sync(path)


def write_text(path: Path, text: str) -> None:
    """Write text and see it on the disk before returning."""
    path.write_text(text, encoding="utf-8")
    _sync(path)


def replace_text(path: Path, text: str) -> None:
    """Write text, whole or not at all, and see it on the disk before returning.

    Raises:
        DecompositionFileError: The folder is not there, or cannot be written to.
    """
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        raise DecompositionFileError(f"Could not write {path}: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
