"""Checkpoints: everything a run needs to go on bit for bit, as safetensors and JSON, written whole or not at all.

1. A checkpoint is a folder `step-00001000` with the decomposition, the optimiser, what the method remembers, every source of
   random numbers, and `checkpoint.json`: the step, the settings, where the data stands, and the checksums of all files.
2. It is written into a scratch folder beside, seen on the disk, and renamed. Whatever goes wrong before leaves the one before.
3. The newest one whose checksums hold is gone on with. The last few are kept, and the best by a logged figure.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from tl_paramdecomp.adapters.fingerprint import differs
from tl_paramdecomp.components import disk
from tl_paramdecomp.components.disk import write_tensors
from tl_paramdecomp.components.files import OWN as OWN_OF_DECOMPOSITION
from tl_paramdecomp.errors import (
    DecompositionFileError,
    DiskSpaceError,
    SettingError,
    TargetMismatchError,
    TLParamDecompError,
)
from tl_paramdecomp.settings import as_declared
from tl_paramdecomp.training.distributed import load_whole
from tl_paramdecomp.training.state import SavedState, TrainingState, set_random
from tl_paramdecomp.training.watch import say

FORMAT = 1
METADATA, BEST, DECOMPOSITION = "checkpoint.json", "best.json", "decomposition"
OPTIMISER, MEMORY, RANDOM = "optimiser.safetensors", "memory.safetensors", "random.safetensors"
SCRATCH, ASIDE = ".writing", ".discarded-"
OWN = rf"checkpoint\.json|(optimiser|memory|random)\.safetensors|{DECOMPOSITION}|{OWN_OF_DECOMPOSITION}"
"""Names of what a checkpoint holds; nothing else is deleted."""
FIELDS = {
    "format": int, "step": int, "device": str, "on_host": list[str], "files": dict[str, str], "guards": dict[str, int],
    "warned": list[str], "settings": dict[str, Any], "data": dict[str, Any], "background": dict[str, Any] | None,
}  # fmt: skip
"""What `checkpoint.json` says, besides numbers of processes and pieces."""
UNFIT = (LookupError, ValueError, RuntimeError, TypeError, ArithmeticError, AttributeError)
"""What goes wrong where tensors are of another run, or none that a run leaves."""
SLACK = 1 << 16
"""Bytes of everything in a checkpoint that is no tensor, and more."""


class Best(TypedDict):
    """What `best.json` says."""

    step: int
    figure: str
    value: float


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums hold."""

    folder: Path
    step: int
    """Steps done."""
    values: dict[str, Any]
    """What `checkpoint.json` says: settings, data positions, the guards' counts."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and the one where the logged figure `best` is lowest."""

    def __init__(self, folder: Path, keep: int = 2, best: str | None = None) -> None:
        self.folder, self.keep, self.best = folder, keep, best
        self.last: Checkpoint | None = None
        """Known to be good: written, or gone on with, by this process."""
        self._broken: set[Path] = set()
        """Known to be broken; deleted once there is a newer good one."""

    # --- reading ------------------------------------------------------------------------------------------------------
    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold; None where there is no checkpoint at all; else DecompositionFileError."""
        reasons = []
        for folder in reversed(self._folders()):
            try:
                self.last = read_checkpoint(folder)
            except DecompositionFileError as error:
                reasons.append(str(error))
                self._broken.add(folder)
                continue
            for reason in reasons:
                say(f"Warning: {reason} Going on from the checkpoint before, of step {self.last.step}.")
            return self.last
        if reasons:
            raise DecompositionFileError(
                f"None of the {len(reasons)} checkpoints in {self.folder} can be gone on with. {reasons[0]} Copy one back from "
                "where it was saved, or pass resume=False to begin anew there."
            )
        return None

    def _folders(self) -> list[Path]:
        """Oldest first; a folder that holds only what others put there is none of them, and an empty one is."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch("step-[0-9]+", p.name) and p.is_dir()]
        own = {p: [re.fullmatch(OWN, name) for name in os.listdir(p)] for p in found if not p.is_symlink()}
        return sorted((p for p in found if not own.get(p) or any(own[p])), key=_step_of)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # --- writing ------------------------------------------------------------------------------------------------------
    def save(self, state: SavedState, values: Mapping[str, Any], figures: Mapping[str, float] | None = None) -> Path:
        """Write the state after its last step; every checkpoint before stays until this one is complete.

        `values` are what `checkpoint.json` says besides; `figures` of the step tell the best checkpoint, where they are known.
        DiskSpaceError or DecompositionFileError where it cannot be written.
        """
        scratch, final = self.folder / SCRATCH, self._place(state.done)
        with self._saving(state.done):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clear()
            free = shutil.disk_usage(self.folder).free
        if (needed := size_of(state)) > free:
            raise DiskSpaceError(
                f"The checkpoint of step {state.done} takes {_mega(needed)}, but the disk of {self.folder} has {_mega(free)} "
                f"free. {self.told_last()} Free some space, keep fewer checkpoints (keep_checkpoints={self.keep} now), or move "
                "the run's folder to another disk, and the same call goes on from there."
            )
        with self._saving(state.done):
            scratch.mkdir()
            written = self._write(scratch, state, values)
            if os.path.lexists(final):  # one of this step that is broken
                if others := _not_own(final):
                    raise OSError(f"{others} is nothing that a run wrote, and is in the way; move it away")
                _put_aside(final)
            os.rename(scratch, final)
            disk.sync_folder(self.folder)
        self.last = Checkpoint(final, state.done, written)
        self._broken.discard(final)
        self._note_best(state.done, figures)
        self._prune()
        return final

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Leave nothing half written, and say what there is to go on from."""
        try:
            yield
        except (OSError, TypeError, ValueError) as error:
            disk.remove_own([self.folder / SCRATCH], OWN)
            what = f"Could not write the checkpoint of step {step} into {self.folder}"
            advice = f"{self.told_last()} Free some space or mend the folder, and the same call goes on from there."
            raise disk.failure(what, error, advice) from error

    def _write(self, scratch: Path, state: SavedState, values: Mapping[str, Any]) -> dict[str, Any]:
        state.decomposition.save(scratch / DECOMPOSITION)
        for name, tensors in ((OPTIMISER, state.optimiser), (MEMORY, state.memory), (RANDOM, state.random)):
            write_tensors(scratch / name, tensors)
        written = {
            "format": FORMAT,
            "step": state.done,
            "device": state.device.type,
            "on_host": [key for key, tensor in state.memory.items() if tensor.device.type == "cpu"],
            **state.places,
            **state.division,
            **values,
            "files": {p.relative_to(scratch).as_posix(): _digest(p) for p in sorted(scratch.rglob("*")) if p.is_file()},
        }
        written = json.loads(json.dumps(written))
        disk.write_text(scratch / METADATA, json.dumps({**written, "checksum": _checksum(written)}, indent=1))
        for folder in (*(p for p in scratch.rglob("*") if p.is_dir()), scratch):
            disk.sync_folder(folder)
        return written

    def told_last(self) -> str:
        """A sentence on what is there to go on from."""
        if self.last is None:
            return "There is no checkpoint."
        return f"The last good checkpoint, of step {self.last.step}, stays in {self.last.folder}."

    # --- what stays ---------------------------------------------------------------------------------------------------
    def set_aside(self) -> None:
        """A run begins anew here: checkpoints of another are forgotten, and deleted once this one has one.

        DecompositionFileError or OSError where one is a link, holds files that no run wrote, or cannot be moved.
        """
        folders = self._folders()
        for folder in folders:
            if others := _not_own(folder):
                raise DecompositionFileError(
                    f"A run that begins anew deletes the checkpoints of before, and {others} is nothing that a run wrote; move "
                    "it away, or choose another run_dir."
                )
        for folder in folders:  # oldest first: cut short, the newest is still there to go on from
            _put_aside(folder)
        (self.folder / BEST).unlink(missing_ok=True)

    def known_best(self) -> dict[str, Any] | None:
        """What tells the best checkpoint, where both are there; DecompositionFileError where something else is."""
        path = self.folder / BEST
        if not os.path.lexists(path):
            return None
        try:
            known = as_declared(disk.read_json(path), Best)
        except (DecompositionFileError, TypeError) as error:
            raise DecompositionFileError(
                f"{path} does not tell which checkpoint is the best ({disk.in_short(error)}); move it away, and the best of "
                "before is forgotten."
            ) from error
        folder = self._place(known["step"])
        is_best = folder.is_dir() and folder not in self._broken and known["figure"] == self.best
        return known if is_best and math.isfinite(known["value"]) else None

    def _note_best(self, step: int, figures: Mapping[str, float] | None) -> None:
        value = None if figures is None or self.best is None else figures.get(self.best)
        if value is None or not math.isfinite(value):
            return
        known = self.known_best()
        if known is None or value < known["value"]:
            told = {"step": step, "figure": self.best, "value": value}
            disk.replace_text(self.folder / BEST, json.dumps(told), alone=True)

    def _prune(self) -> None:
        """Leave the newest that are good, and the best."""
        folders = self._folders()
        good = [folder for folder in folders if folder not in self._broken]
        best = self.known_best()
        kept = {*good[-self.keep :], None if best is None else self._place(best["step"])}
        with contextlib.suppress(OSError):  # what cannot be deleted does no harm
            for folder in folders:
                if folder not in kept and not folder.is_symlink():
                    _put_aside(folder)
            self.clear()

    def clear(self) -> None:
        """Delete what an interrupted save or deletion left; what was set aside only where there is a good checkpoint."""
        disk.remove_own([self.folder / SCRATCH], OWN)
        if self.last is not None:
            for folder in self.folder.glob(f"{ASIDE}step-*"):
                _delete(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, its files compared with their checksums; DecompositionFileError where something is missing, damaged, or of
    a newer format."""
    path = folder / METADATA
    try:
        for inner in (folder, folder / DECOMPOSITION):
            if inner.is_symlink():
                raise ValueError(f"{inner} is a link, which is not followed")
        values = disk.parse_json(path, disk.read_text(path, disk.LARGEST, follow=False), finite=False)
        claimed = values.pop("checksum")
        if claimed != _checksum(values):
            raise ValueError(f"{METADATA} is not as it was written")
        if values["format"] != FORMAT:
            raise ValueError(f"it is of format {values['format']}, this version reads format {FORMAT}")
        for field, kind in FIELDS.items():  # the checksum says that it is as it was written, not by whom
            as_declared(values[field], kind)
        for name, digest in values["files"].items():
            if _digest(folder / name) != digest:
                raise ValueError(f"{name} is not as it was written")
        if values["step"] != _step_of(folder):
            raise ValueError(f"it is of step {values['step']}")
        return Checkpoint(folder, values["step"], values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DecompositionFileError(f"The checkpoint {folder} is broken ({error}).") from error


def restore(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Put a checkpoint's state into that of a run before its first step. DecompositionFileError, TargetMismatchError,
    SettingError or DataError where it does not fit the run, or is of other weights, of a device of another kind, or of other
    data."""
    folder, values = checkpoint.folder, checkpoint.values
    if values["device"] != state.device.type:
        raise SettingError(
            f"{folder} is of a run on {values['device']}, and this one is on {state.device.type}, where random numbers are "
            f"others; move the model to {values['device']}, or pass resume=False to begin anew."
        )
    saved = type(state.decomposition).load(folder / DECOMPOSITION)
    for name, known in saved.fingerprints.items():
        found = state.decomposition.fingerprints.get(name)
        if found is not None and (difference := differs(known, found)):
            raise TargetMismatchError(
                f"The checkpoint {folder} is of a model with other weights ({name}: {difference}); choose another run_dir, or "
                "pass resume=False to begin anew there."
            )
    try:
        optimiser, memory, random = (  # copies, as the files will be deleted that they are mapped from
            {key: tensor.clone() for key, tensor in disk.read_tensors(folder / name, follow=False).items()}
            for name in (OPTIMISER, MEMORY, RANDOM)
        )
        load_whole(state.decomposition, saved.state_dict())
        state.load_optimiser_tensors(optimiser)
        state.memory = {key: t if key in values["on_host"] else t.to(state.device) for key, t in memory.items()}
        for key in [key for key in state.memory if state.processes.world > 1 and state.goes_over_rows(key)]:
            state.memory[key] = _own_rows(state.memory[key], state, folder)
        state.source.restore(values["data"])
        if state.background is not None:
            state.background.restore(values["background"] or {})
        as_before = all(values[key] == n for key, n in state.division.items())
        # last, as all that comes before may draw
        set_random(random, state.numbers, state.processes, checkpoint.step, as_before)
    except TLParamDecompError:
        raise
    except UNFIT as error:
        raise DecompositionFileError(
            f"The checkpoint {folder} does not fit this run ({disk.in_short(error)}); pass resume=False to begin anew."
        ) from error
    state.done = checkpoint.step


def size_of(state: SavedState) -> int:
    """Bytes that a checkpoint of this state takes, within a few thousand."""
    parts = (state.decomposition.state_dict(), state.optimiser, state.memory, state.random)
    return SLACK + sum(t.numel() * t.element_size() for tensors in parts for t in tensors.values())


def state_tensors(state: SavedState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of numbers that a checkpoint holds, with what it is called in messages."""
    names = {id(p): readable(name) for name, p in state.decomposition.named_parameters()}
    yield from ((readable(name), t) for name, t in state.decomposition.state_dict().items())
    parameters = [p for group in state.parameters for p in group]
    for key, tensor in state.optimiser.items():
        index, name = key.split(".", 1)
        yield f"the optimiser's {name} of {names.get(id(parameters[int(index)]), index)}", tensor
    yield from ((f"what the method remembers as {key}", tensor) for key, tensor in state.memory.items())


def readable(name: str) -> str:
    """A parameter's name with the site as its user knows it: `blocks.0.mlp.W_in.V`."""
    return name.removeprefix("_components.").replace("/", ".")


def _own_rows(tensor: Tensor, state: TrainingState, folder: Path) -> Tensor:
    """Of what has an entry for each row of the batch, those of this process."""
    rows, rest = divmod(len(tensor), state.processes.world)
    if rest:
        raise SettingError(
            f"{folder} remembers {len(tensor)} rows, which {state.processes.world} processes do not divide; go on with another "
            "number of processes."
        )
    return tensor[state.processes.rank * rows : (state.processes.rank + 1) * rows].clone()


def _not_own(folder: Path) -> Path | None:
    """Something in a checkpoint's place that no run wrote there."""
    return folder if folder.is_symlink() or not folder.is_dir() else disk.not_own(folder, OWN)


def _put_aside(folder: Path) -> None:
    """Rename a checkpoint, so that it stops being one at once."""
    aside = folder.parent / f"{ASIDE}{folder.name}"
    disk.remove_own([aside], OWN)
    os.rename(folder, aside)


def _delete(aside: Path) -> None:
    """Delete what was put aside; what others put into it goes back to where they put it, or stays."""
    disk.remove_own([aside], OWN)
    back = aside.with_name(aside.name.removeprefix(ASIDE))
    if aside.is_dir() and not aside.is_symlink() and not os.path.lexists(back):
        os.rename(aside, back)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with os.fdopen(disk.open_regular(path), "rb") as file:
        return disk.digest_of(file)


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
