"""Files and folders that are on the disk when a function has returned, whole or as they were before."""

import os
from pathlib import Path

from tl_paramdecomp.components.files import write_text
from tl_paramdecomp.errors import DecompositionFileError


def replace_file(path: Path, text: str) -> None:
    """Put text where a file is or is to be; who is killed meanwhile leaves a file that the next call takes away.

    Raises:
        DecompositionFileError: The folder is not there, or cannot be written to.
    """
    new = path.with_name(f".{path.name}-new")
    try:
        write_text(new, text)
        os.replace(new, path)
        sync_folder(path.parent)
    except OSError as error:
        raise DecompositionFileError(f"Could not write {path}: {error}.") from error


def sync_folder(folder: Path) -> None:
    """See on the disk what a folder holds: names that were made, moved or deleted in it."""
    if os.name == "nt":  # where folders cannot be opened, and renames are synchronous
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
