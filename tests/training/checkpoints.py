"""Checkpoints as their files have them, read and written without the library; and a run that leaves some behind."""

import hashlib
import json

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.training.state import start_state

from .test_fit import fit, tiny_gpt2

METHOD = tlpd.VPD(n_components=4, importance=ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1))


def vpd_run(folder, **changes):
    """Six steps of VPD at one site, with a checkpoint at every other one."""
    settings = {"method": METHOD, "steps": 6, "checkpoint_every": 2, "sites": "blocks.0.mlp.W_in", "run_dir": folder}
    return fit(tiny_gpt2(), **(settings | changes))


def stopped_run(folder, stop):
    """The run with a callback that stops it."""
    return vpd_run(folder, log_every=1, callbacks=[stop])


def state_of():
    """The state of the same run, elsewhere."""
    states = []

    def kept(*arguments, **named):
        states.append(start_state(*arguments, **named))
        return states[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_paramdecomp.training.loop.start_state", kept)
        vpd_run(None, steps=1)
    return states[0]


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
