"""Places without room: a real file system that is full, and a limit on the size of files."""

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

Place = tuple[Path, Callable[[], AbstractContextManager[None]]]
"""A folder, and a context within which there is no room in it."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """A file system of its own, where this process may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(folder: Path, size: str = "1m", left: int = 0) -> Iterator[Place]:
    """A file system that can be filled up to the last bytes by a file `filler`."""

    @contextlib.contextmanager
    def filled() -> Iterator[None]:
        with (disk / "filler").open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            os.truncate(file.fileno(), max(0, file.tell() - left))
        try:
            yield
        finally:
            (disk / "filler").unlink()

    with small_disk(folder, size) as disk:
        yield disk, filled


@contextlib.contextmanager
def file_size_limit(folder: Path, size: int) -> Iterator[Place]:
    """A folder, and within `filled` no file may be larger than so many bytes, in this whole process."""

    @contextlib.contextmanager
    def filled() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield folder, filled
