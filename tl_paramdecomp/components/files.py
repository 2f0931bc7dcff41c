"""Decompositions on disk: tensors as safetensors, everything else as JSON; written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import DecompositionFileError, DeviceError
from tl_paramdecomp.sites import Fingerprint, WeightSite

if TYPE_CHECKING:
    from tl_paramdecomp.components.decomposition import Decomposition

FORMAT = 1
TENSORS, METADATA = "components.safetensors", "decomposition.json"


def save(folder: Path, decomposition: "Decomposition") -> Path:
    """Write a decomposition into a folder; what the folder held before stays until all is written.

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
    importance = decomposition.importance
    metadata = {
        "format": FORMAT,
        "sites": [asdict(site) for site in decomposition.sites.values()],
        "fingerprints": {name: asdict(f) for name, f in decomposition.fingerprints.items()},
        "importance": None if importance is None else importance.settings(),
        "info": decomposition.info,
    }
    tensors = {f"{name}.{letter}": getattr(c, letter) for name, c in decomposition.items() for letter in ("V", "U")}
    if importance is not None:
        tensors |= {f"importance:{key}": value for key, value in importance.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            write_tensors(Path(scratch) / TENSORS, tensors)
            metadata["sha256"] = _digest(Path(scratch) / TENSORS)
            write_text(Path(scratch) / METADATA, json.dumps(metadata, indent=1))
            for name in (TENSORS, METADATA):
                os.replace(Path(scratch) / name, folder / name)
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise DecompositionFileError(f"Could not save into {folder}: {error}") from error
    return folder


def load(cls: Any, folder: Path, device: torch.device | str) -> Any:
    """Read a decomposition from a folder.

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
    try:
        sites = {s["name"]: WeightSite(**{**s, "aliases": tuple(s["aliases"])}) for s in metadata["sites"]}
        fingerprints = {name: _fingerprint(f) for name, f in metadata["fingerprints"].items()}
        factors = {name: (tensors[f"{name}.V"], tensors[f"{name}.U"]) for name in sites}
        settings = metadata["importance"]
        importance = None if settings is None else ImportanceConfig(**settings)
        made = cls(factors, sites, fingerprints, importance, metadata["info"])
        if importance is not None:
            prefix = "importance:"
            made.importance.load_state_dict(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DecompositionFileError(
            f"{folder} holds a decomposition whose files do not agree with each other ({type(error).__name__}: "
            f"{error}); it is damaged or was edited. Copy it again from where it was saved."
        ) from error
    return made


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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fingerprint(values: Mapping[str, Any]) -> Fingerprint:
    lists = {f.name for f in fields(Fingerprint)} & {"shape", "projections", "means"}
    plain: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in values.items()}
    return Fingerprint(**plain)
