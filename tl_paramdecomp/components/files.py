"""A JSON file with tensors beside it as safetensors, written whole or not at all; decompositions are kept so, in a folder.

A decomposition's folder holds `components.safetensors` and `decomposition.json`. Format 2, which `Saved.save` writes:

- The JSON holds the sha256 of the tensors' file, and as its last entry `checksum`, the sha256 of its own bytes before that
  entry. No other bytes are accepted, so that a change of any byte of the two files is noticed.
- New tensors come first, beside the old ones, under a name with their digest; then the JSON is replaced, which is the
  moment when the folder holds the new decomposition; then the tensors take the place of the old ones. Everything is on the
  disk before the next of these steps, so that whenever a save ends the folder holds the old decomposition or the new one.

Format 1 is the same without `checksum`; it is read, not written.
"""

import glob
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tl_paramdecomp.components import disk
from tl_paramdecomp.components.disk import LARGEST, write_tensors
from tl_paramdecomp.errors import DecompositionFileError, DeviceError, SettingError
from tl_paramdecomp.settings import as_declared
from tl_paramdecomp.sites import Fingerprint, NormSite, WeightSite

Made = TypeVar("Made", bound="Saved")
Site = TypeVar("Site", bound=WeightSite | NormSite)

FORMAT = 2
TENSORS, METADATA = "components.safetensors", "decomposition.json"
COMPONENTS = "components"
"""What a decomposition is made of whose file does not say."""
HEX = "[0-9a-f]"
OWN = rf"components(-{HEX}{{64}})?\.safetensors|decomposition\.json|\.saving-.*|\.tmp.*"
"""Names of what a save writes into its folder; safetensors begins its own with `.tmp`."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEAL = ',\n "checksum": "'
"""What comes before the checksum, at the end of the JSON."""


# --- a JSON file and its tensors ----------------------------------------------------------------------------------------
class Pair(NamedTuple):
    """A JSON file that holds the sha256 of a safetensors file in the same folder."""

    json: Path
    tensors: Path

    def beside(self, digest: str) -> Path:
        """Where tensors of this digest are until they are put in their place."""
        return self.tensors.with_name(f"{self.tensors.stem}-{digest}.safetensors")

    def left_beside(self) -> list[Path]:
        """Tensors that killed saves left beside; their name is their digest."""
        found = self.tensors.parent.glob(f"{glob.escape(self.tensors.stem)}-{HEX * 64}.safetensors")
        return [path for path in found if not path.is_symlink() and path.is_file() and _digest(path) == path.stem[-64:]]


def write_pair(pair: Pair, tensors: Mapping[str, Tensor], text_with: Callable[[str, int], str]) -> None:
    """Put a pair in place of the one before, which stays until all is written; nothing is left beside where it fails.

    The folder is there already. The JSON's text is made of the digest and size of the tensors' file.
    """
    for path in pair:
        disk.check_replaceable(path)
    folder, left, left_folders = pair.json.parent, pair.left_beside(), disk.left_scratch(pair.json.parent)
    with disk.scratch(folder) as new:
        made = Pair(new / pair.json.name, new / pair.tensors.name)
        write_tensors(made.tensors, tensors)
        digest = _digest(made.tensors)
        disk.write_text(made.json, text_with(digest, made.tensors.stat().st_size))
        beside, described = pair.beside(digest), False
        try:
            os.replace(made.tensors, beside)
            disk.sync_folder(folder)
            os.replace(made.json, pair.json)
            described = True
            disk.sync_folder(folder)
            os.replace(beside, pair.tensors)
            disk.sync_folder(folder)
        except OSError:
            if not described and beside not in left:
                beside.unlink(missing_ok=True)
            raise
    for path in left:
        path.unlink(missing_ok=True)
    disk.remove_own(left_folders, "|".join((re.escape(pair.json.name), re.escape(pair.tensors.name), r"\.tmp.*")))


def read_pair(pair: Pair, read: Callable[[], "Described"]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values, by `read` of the JSON, and tensors, mapped from the file; read anew where a save came in between. Raises
    DecompositionFileError where they are missing, broken, or not of each other."""
    found = _stamp(pair.json)
    described = read()
    try:
        return described.values, _described_tensors(pair, described)
    except DecompositionFileError:
        if _stamp(pair.json) != found:  # saved anew in the meantime
            return read_pair(pair, read)
        raise


class Described(NamedTuple):
    """What a pair's JSON says."""

    values: dict[str, Any]
    digest: Any
    """The sha256 of the tensors' file."""
    size: Any = None
    """Its bytes; None where the JSON does not say."""


def sealed(body: str) -> str:
    """An object's text that lacks its end, ended by its checksum."""
    return f'{body}{SEAL}{hashlib.sha256(body.encode("utf-8")).hexdigest()}"\n}}'


def check_seal(path: Path, text: str) -> None:
    """Raise DecompositionFileError unless every byte of a file is as `sealed` made it."""
    if text != sealed(text.rpartition(SEAL)[0]):
        raise DecompositionFileError(
            f"{path} is not as it was written: its own checksum does not fit. It is damaged or was edited; copy it again from "
            "where it was saved."
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one file of JSON from the next in its place."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns


def _described_tensors(pair: Pair, described: Described) -> dict[str, Tensor]:
    """The tensors of this digest, wherever a save has them at the moment."""
    digest = described.digest
    if not isinstance(digest, str) or not re.fullmatch(HEX + "{64}", digest):
        raise DecompositionFileError(f"{pair.json} holds no sha256 of its tensors; it is damaged.")
    errors = []
    # while it is looked for, the file may move from the second place to the first
    for path in (pair.tensors, pair.beside(digest), pair.tensors):
        try:
            return _tensors_of(path, described, pair.json.name)
        except DecompositionFileError as error:
            errors.append(error)
    raise errors[0]


def _tensors_of(path: Path, described: Described, described_by: str) -> dict[str, Tensor]:
    with disk.reading(path, "cannot be used"), os.fdopen(disk.open_regular(path, follow=True), "rb") as file:
        found = os.fstat(file.fileno())
        same = described.size in (None, found.st_size)
        tensors = disk.read_tensors(path) if same else {}
        same = same and disk.digest_of(file) == described.digest and os.path.samestat(found, path.stat())
    if not same:
        raise DecompositionFileError(
            f"{path} is not the file that {described_by} describes: it is damaged, or one of the two was replaced. Copy both "
            "again from where they were saved."
        )
    return tensors


def _digest(path: Path) -> str:
    with os.fdopen(disk.open_regular(path), "rb") as file:
        return disk.digest_of(file)


# --- a decomposition's folder -------------------------------------------------------------------------------------------
class Saved(nn.Module):
    """What every method makes of a model's weights: it knows where it came from, is saved and loaded, and holds no model."""

    holds: ClassVar[str]
    """What it is made of, in words; `kind` in its file, where components say nothing."""
    says: ClassVar[tuple[set[str], set[str]]]
    """What its file says beside sites, fingerprints and info: what it must, and what it may."""
    sites: Any
    """The sites by name, in execution order."""
    info: dict[str, Any]
    """Where it came from: host, method, versions; anything JSON can hold."""
    fingerprints: dict[str, Fingerprint]
    """Of the weights it belongs to, by site."""

    @property
    def gives_importances(self) -> bool:
        """Whether every token has importances of its components."""
        return False

    def device_of(self, site: str) -> torch.device:
        """Where what belongs to a site is."""
        return next(self.parameters()).device

    def sharded_parts(self) -> list[nn.Module]:
        """Modules whose parameters may be kept in shards, each brought together where it is read; or SettingError."""
        raise SettingError(f"shard=True is for components; {self.holds} (L3D) are held by every process. Leave it out.")

    @abstractmethod
    def _as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its tensors, and what JSON holds beside sites, fingerprints and info."""

    @classmethod
    @abstractmethod
    def _assembled(cls: type[Made], tensors: dict[str, Tensor], values: dict[str, Any], **origin: Any) -> Made:
        """Of what `_as_saved` gave, `sites`, `norms`, `fingerprints` and `info`; anything may be wrong, and raise anything."""

    def save(self, folder: str | Path) -> Path:
        """Write `components.safetensors` and `decomposition.json` into a folder; whenever that ends, the folder holds what
        it held before or what is saved now.

        Raises:
            DecompositionFileError: The folder cannot be written, or holds something else; a number is NaN or infinite, or
                `info` is nothing that JSON has.
        """
        folder, (tensors, values) = Path(folder), self._as_saved()
        values = {
            "format": FORMAT,
            **({} if self.holds == COMPONENTS else {"kind": self.holds}),
            "sites": [asdict(site) for site in self.sites.values()],
            **values,
            "fingerprints": {name: asdict(found) for name, found in self.fingerprints.items()},
            "info": self.info,
        }
        with disk.writing(f"Could not save into {folder}"):
            refuse_other_things(folder)
            check_numbers(tensors)
            with disk.made_folder(folder):
                pair = Pair(folder / METADATA, folder / TENSORS)
                write_pair(pair, tensors, lambda digest, _: _as_text({**values, "sha256": digest}))
        return folder

    @classmethod
    def load(cls: type[Made], folder: str | Path, device: torch.device | str = "cpu") -> Made:
        """Read what `save` wrote.

        Raises:
            DecompositionFileError: The folder or a file is missing, broken, foreign or of a newer format.
            DeviceError: There is no such device.
        """
        folder = Path(folder)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise DeviceError(f"Cannot load onto {device}: {error}") from error

        def read() -> Described:
            values = read_metadata(folder)
            return Described(values, values.get("sha256"))

        values, mapped = read_pair(Pair(folder / METADATA, folder / TENSORS), read)
        with disk.reading(folder / TENSORS, "cannot be used"):
            check_numbers(mapped)
        # a copy, since what is read is the file itself as long as nobody writes to it
        tensors = {name: tensor.to(device, copy=True) for name, tensor in mapped.items()}
        found = values.get("kind") or COMPONENTS
        if found != cls.holds:
            opener = "Decomposition" if found == COMPONENTS else "SubnetworkDecomposition"
            raise DecompositionFileError(f"{folder} holds {found}, not {cls.holds}; open it with {opener}.load.")
        try:
            must, may = cls.says
            must = must | {"format", "sha256", "sites", "fingerprints", "info"}
            for wrong, what in ((must - values.keys(), "lacks"), (values.keys() - must - may, "also has")):
                if wrong:
                    raise KeyError(f"the JSON {what} {', '.join(sorted(wrong))}")
            sites, norms = _named_sites(WeightSite, values["sites"]), _named_sites(NormSite, values.get("norms", []))
            fingerprints = _fingerprints_of([*sites, *norms], values["fingerprints"])
            info = as_declared(values["info"], dict[str, Any])
            return cls._assembled(tensors, values, sites=sites, norms=norms, fingerprints=fingerprints, info=info)
        except Exception as error:  # a damaged file may go wrong anywhere
            raise DecompositionFileError(
                f"{folder} holds {found} whose files do not agree with each other ({disk.in_short(error)}); it is damaged or "
                "was edited. Copy it again from where it was saved."
            ) from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """The JSON half of a saved decomposition, without its checksum; DecompositionFileError where it is missing, broken,
    foreign or newer than this version knows."""
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
    text = disk.read_text(path, LARGEST)
    metadata = disk.parse_json(path, text)
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is not int or version not in (1, FORMAT):
        raise DecompositionFileError(
            f"{path} is of format {version!r}; this version reads formats 1 and {FORMAT}. Install the version that wrote it."
        )
    if version != 1 or metadata.get("checksum") is not None:
        check_seal(path, text)
    metadata.pop("checksum", None)
    return metadata


def refuse_other_things(folder: Path) -> None:
    """Raise DecompositionFileError where nothing may be saved: a file, or a folder with other files of these names."""
    if folder.is_file():
        raise DecompositionFileError(f"{folder} is a file; give a folder to save a decomposition in.")
    if os.path.lexists(folder / METADATA):
        read_metadata(folder)  # refuses a file of that name that is not a decomposition's
    elif os.path.lexists(folder / TENSORS):
        raise DecompositionFileError(
            f"{folder} holds a {TENSORS} without its {METADATA}; save into a folder of its own."
        )


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless these are finite numbers of a dtype that can be computed with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is of {tensor.dtype}, and only {', '.join(map(str, DTYPES))} are known")
        if not bool(tensor.detach().cpu().isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; no decomposition is made of those")


def _as_text(values: Mapping[str, Any]) -> str:
    """The JSON of a folder, with its checksum."""
    text = sealed(json.dumps(values, indent=1, allow_nan=False).removesuffix("\n}"))
    if len(text) > LARGEST:
        raise ValueError(f"{METADATA} would have {len(text)} bytes, and no more than {LARGEST} are read again")
    json.loads(text, object_pairs_hook=disk.distinct)  # {1: 0, "1": 0} gives JSON that would be refused
    return text


def _named_sites(kind: type[Site], saved: Any) -> dict[str, Site]:
    """Sites or norms by name; TypeError or ValueError where they are none that a model can have."""
    found: dict[str, Site] = {}
    sites: list[Site] = as_declared(saved, list[kind])
    for site in sites:
        if site.name in found:
            raise ValueError(f"{site.name} is there twice")
        widths = (site.d_in, site.d_out) if isinstance(site, WeightSite) else (site.width,)
        if min(widths) < 1:
            raise ValueError(f"{site.name} is {list(widths)} wide")
        if isinstance(site, WeightSite):
            heads, side = site.n_heads, site.head_side
            width = site.d_in if side == "in" else site.d_out
            if (heads is None) != (side is None) or (heads is not None and (heads < 1 or width % heads)):
                raise ValueError(f"{site.name} divides {width} dimensions among {heads} heads on side {side}")
        found[site.name] = site
    return found


def _fingerprints_of(names: Collection[str], saved: Any) -> dict[str, Fingerprint]:
    """A fingerprint for each of these sites and norms; TypeError or ValueError where they are none, or of others."""
    found = as_declared(saved, dict[str, Fingerprint])
    if found.keys() != set(names):
        raise ValueError(f"there are fingerprints of {', '.join(found)}, and the sites are {', '.join(names)}")
    for name, values in found.items():
        dtype = getattr(torch, values.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name} was of {values.dtype!r}, which is no floating-point dtype")
    return found
