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
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tl_paramdecomp.components.disk import failure, open_regular, read_json, replace_text
from tl_paramdecomp.components.files import refuse_other_things
from tl_paramdecomp.errors import DecompositionFileError, RunInUseError, SettingError
from tl_paramdecomp.methods.from_factors import versions
from tl_paramdecomp.settings import from_settings, to_settings
from tl_paramdecomp.training.callbacks import JsonLines
from tl_paramdecomp.training.checkpoint import Checkpoint, Checkpoints

SETTINGS, LOG, CHECKPOINTS, RESULT, LOCK = "run.json", "metrics.jsonl", "checkpoints", "decomposition", ".lock"
LARGEST_LOCK, HELD = 1 << 12, b'{"pid": '
"""Bytes that a lock's file has at most, and how what is in it begins."""


class RunFolder:
    """A run's directory, while this process alone writes to it; only a checkpoint of the same `settings` is gone on with."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], keep_checkpoints: int = 2, keep_best: str | None = None,
        writes: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.writes = path, writes
        self.settings = json.loads(json.dumps(settings))
        self.log = JsonLines(path / LOG)
        self.checkpoints = Checkpoints(path / CHECKPOINTS, keep_checkpoints, keep_best)

    @contextlib.contextmanager
    def opened(self) -> Iterator["RunFolder"]:
        """Hold the directory; RunInUseError where another process has it, DecompositionFileError where it cannot be made or
        written to, or holds another's files, or links, where the run's belong."""
        with contextlib.ExitStack() as stack:
            if self.writes:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise DecompositionFileError(
                        f"The run's folder {self.path} cannot be made ({error}); choose another run_dir."
                    ) from error
                stack.enter_context(held(self.path / LOCK))
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
        self.log.content()
        self.checkpoints.known_best()

    def begin(self, resume: Literal["auto"] | bool) -> Checkpoint | None:
        """The checkpoint to go on from, the log cut to its step; None where the run begins anew.

        SettingError where the newest is of other settings, or `resume` is True and there is none; DecompositionFileError where
        every one is broken, or the folder cannot be written to.
        """
        found = self.checkpoints.newest() if resume else None
        if found is None and resume is True:
            raise SettingError(f"resume=True, but {self.path} holds no checkpoint; use resume='auto' to begin anew.")
        known = self.settings if found is None else _with_newer_fields(found.values["settings"])
        differing = [key for key, value in self.settings.items() if known.get(key) != value]
        if differing:
            raise SettingError(
                f"{self.path} holds a checkpoint of a run with other {', '.join(differing)}; choose another run_dir, or pass "
                "resume=False to begin anew there."
            )
        if self.writes:
            try:
                self.checkpoints.set_aside() if found is None else self.checkpoints.clear()
            except OSError as error:
                raise DecompositionFileError(f"{self.path} cannot be written to ({error}).") from error
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
        """Write the decomposition, whole or not at all; one of before stays until it is complete; DecompositionFileError or
        DiskSpaceError where it cannot be written."""
        try:
            return decomposition.save(self.path / RESULT)
        except DecompositionFileError as error:
            advice = f"{self.checkpoints.told_last()} Free some space or mend the folder, and the same call writes it."
            raise failure(f"Could not write the result into {self.path}", error, advice) from error


# --- the lock ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends; the file says who holds it, and stays.

    RunInUseError where another process holds it, or another call of this one; DecompositionFileError where the file cannot be
    made, is a link or no regular file, or is another's.
    """
    lock = FileLock(path, fallback_to_soft=False)
    try:
        with os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT), "rb") as file:
            content = file.read(LARGEST_LOCK + 1)
        # it will be emptied, and must be nobody else's; zeros are what a power cut may leave
        if len(content) > LARGEST_LOCK or not (content.strip(b"\0") == b"" or HELD.startswith(content[: len(HELD)])):
            raise OSError(f"{path} is no lock of a run, and holds something else; move it away")
    except OSError as error:
        raise DecompositionFileError(
            f"{path.parent} cannot be written to ({error}); choose another run_dir."
        ) from error
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunInUseError(
            f"{path.parent} is in use by {_holder(path)}; wait for it to end, stop it, or choose another run_dir."
        ) from None
    except OSError as error:
        warnings.warn(
            f"The file system of {path} has no locks ({error}); see that no two runs write there.", stacklevel=3
        )
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        _say_who(path, json.dumps(holder) + "\n")
        yield
    finally:
        _say_who(path, "")
        lock.release()


def _say_who(path: Path, holder: str) -> None:
    # a full disk is told of when something that matters is written; Windows locks the text as well
    with contextlib.suppress(OSError), os.fdopen(open_regular(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(holder.encode())


def _holder(path: Path) -> str:
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = read_json(path, "pid", "host", "since", largest=LARGEST_LOCK)
            return f"process {known['pid']} on {known['host']}, since {known['since']}"
        time.sleep(0.02)  # it has the lock and is about to say who it is
    return "another process"


def _with_newer_fields(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's settings as they would be written now: fields of the method that it did not know have their defaults."""
    try:
        return {**settings, "method": to_settings(from_settings(settings["method"]))}
    except (KeyError, SettingError):  # a user's own method, or one that is gone: compared as it stands
        return settings
