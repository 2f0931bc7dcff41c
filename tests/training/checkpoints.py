"""Checkpoints as their files have them, read and written without the library."""

import hashlib
import json


def newest(run_dir):
    """Folder of the newest checkpoint."""
    return steps(run_dir)[max(steps(run_dir))]


def steps(run_dir):
    """Folders of the checkpoints by step."""
    return {int(p.name.removeprefix("step-")): p for p in (run_dir / "checkpoints").glob("step-*")}


def metadata(folder):
    """What `checkpoint.json` says."""
    return json.loads((folder / "checkpoint.json").read_text())


def seal(folder):
    """Bring the checksums up to what the files are now."""
    values = metadata(folder)
    del values["checksum"]
    values["files"] = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "checkpoint.json"
    }
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps({**values, "checksum": checksum}))
