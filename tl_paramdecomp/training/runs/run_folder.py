"""A run's directory: what lies where, who may write, the log, the checkpoints and the result.

run.json            settings, versions, fingerprints of the target's weights
metrics.jsonl       a line for every logged step
checkpoints/        step-00001000/ ..., best.json
decomposition/      the result, once there is one
.lock               held while a process writes here

The directory itself may be a link. Nothing inside is followed, written over or deleted that a run did not write.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tl_paramdecomp.components.disk import failure, read_json, replace_text
from tl_paramdecomp.components.files import refuse_other_things
from tl_paramdecomp.errors import DecompositionFileError, SettingError
from tl_paramdecomp.methods.from_factors import versions
from tl_paramdecomp.training.callbacks import JsonLines
from tl_paramdecomp.training.runs.checkpoint import Checkpoint, Checkpoints
from tl_paramdecomp.training.runs.lock import RunLock

SETTINGS, LOG, CHECKPOINTS, RESULT, LOCK = "run.json", "metrics.jsonl", "checkpoints", "decomposition", ".lock"


class RunFolder:
    """A run's directory, while this process alone writes to it.

    Args:
        path: The directory.
        settings: What the run depends on, as JSON-able values; only a checkpoint of the same is gone on with.
        keep_checkpoints: How many of the newest checkpoints stay.
        keep_best: A logged figure; the checkpoint where it is lowest stays too.
        writes: Whether this process writes there; of several, one does, and the others only read.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        keep_checkpoints: int = 2,
        keep_best: str | None = None,
        writes: bool = True,
    ) -> None:
        self.path, self.writes = path, writes
        self.settings = json.loads(json.dumps(settings))
        self.log = JsonLines(path / LOG)
        self.checkpoints = Checkpoints(path / CHECKPOINTS, keep_checkpoints, keep_best)

    @contextlib.contextmanager
    def opened(self) -> Iterator["RunFolder"]:
        """Hold the directory.

        Raises:
            RunInUseError: Another process has it.
            DecompositionFileError: It cannot be made or written to, or holds another's files, or links, where the run's belong.
        """
        if not self.writes:
            yield self
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DecompositionFileError(
                f"The run's folder {self.path} cannot be made ({error}); choose another run_dir."
            ) from error
        with RunLock(self.path / LOCK):
            self._check_places()
            yield self

    def _check_places(self) -> None:
        """Refuse before the first step what would be refused after the last."""
        for name in (CHECKPOINTS, RESULT):
            path = self.path / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                found = "a link" if path.is_symlink() else "no folder"
                raise DecompositionFileError(
                    f"{path} is {found}, and the run keeps files there; move it away, or choose another run_dir (which may "
                    "itself be a link)."
                )
        refuse_other_things(self.path / RESULT)
        if os.path.lexists(self.path / SETTINGS):
            read_json(self.path / SETTINGS, "settings", "versions", "target")
        self.log.check()
        self.checkpoints.check()

    def begin(self, resume: Literal["auto"] | bool) -> Checkpoint | None:
        """The checkpoint to go on from, the log cut to its step; None where the run begins anew.

        Raises:
            SettingError: The newest checkpoint is of other settings, or `resume` is True and there is none.
            DecompositionFileError: There are checkpoints, and every one is broken; or the folder cannot be written to.
        """
        found = self.checkpoints.newest() if resume else None
        if found is None:
            if resume is True:
                raise SettingError(
                    f"resume=True, but {self.path} holds no checkpoint; use resume='auto' to begin anew."
                )
            try:
                if self.writes:
                    self.checkpoints.set_aside()
            except OSError as error:
                raise DecompositionFileError(f"{self.path} cannot be written to ({error}).") from error
        else:
            known = found.values.get("settings", {})
            differing = [key for key, value in self.settings.items() if known.get(key) != value]
            if differing:
                raise SettingError(
                    f"{self.path} holds a checkpoint of a run with other {', '.join(differing)}; choose another run_dir, or "
                    "pass resume=False to begin anew there."
                )
        if self.writes:
            if found is not None:
                self.checkpoints.clear()
            self.log.cut(0 if found is None else found.step)
        return found

    def describe(self, decomposition: Any, **others: Any) -> None:
        """Write `run.json`: the settings, what else is known of the run, versions, and what target it is of."""
        known = {
            "settings": self.settings,
            **others,
            "versions": versions(),
            "target": {name: asdict(found) for name, found in decomposition.fingerprints.items()},
        }
        replace_text(self.path / SETTINGS, json.dumps(known, indent=1), alone=True)

    # --- the result -------------------------------------------------------------------------------------------------
    def save_result(self, decomposition: Any) -> Path:
        """Write the decomposition, whole or not at all; one of before stays until it is complete.

        Raises:
            DecompositionFileError: It cannot be written.
            DiskSpaceError: There is no room.
        """
        try:
            return decomposition.save(self.path / RESULT)
        except DecompositionFileError as error:
            raise failure(
                f"Could not write the result into {self.path}",
                error,
                f"{self.checkpoints.told_last()} Free some space or mend the folder, and the same call writes it.",
            ) from error
