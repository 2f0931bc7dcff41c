"""Damaged and foreign checkpoints: refused by name or fallen back from, never gone on with in silence; nothing is run."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tl_paramdecomp.errors import DecompositionFileError, TLParamDecompError
from tl_paramdecomp.training.callbacks import STOP
from tl_paramdecomp.training.checkpoint import Checkpoint, read_checkpoint, restore
from tl_paramdecomp.training.state import TrainingState

from ..support import hostile
from ..support.hostile import watched
from .checkpoints import metadata, seal, state_of, steps, stopped_run
from .checkpoints import vpd_run as run
from .test_fit import same

pytestmark = pytest.mark.timeout(300)  # a pipe that is waited for never ends
NAMES = [
    "checkpoint.json", "decomposition/components.safetensors", "decomposition/decomposition.json",
    "memory.safetensors", "optimiser.safetensors", "random.safetensors",
]  # fmt: skip
BY_FILE = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stopped_run(folder, lambda info: STOP if info.step == 4 else None)
    assert set(steps(folder)) == {2, 4}
    assert sorted(p.relative_to(steps(folder)[4]).as_posix() for p in steps(folder)[4].rglob("*.*")) == NAMES
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run gives that is never stopped."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(autouse=True)
def random_numbers_as_before() -> Iterator[None]:
    """Going on from a checkpoint sets the global sources of random numbers."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def read_anew(checkpoint: Path) -> Checkpoint:
    with watched():
        return read_checkpoint(checkpoint)


# --- damage -----------------------------------------------------------------------------------------------------------


def attempt(newest: Path, state: TrainingState) -> TLParamDecompError | None:
    """The error of reading a checkpoint and going on from it, if any; it is one of the package's."""
    with watched():
        try:
            restore(read_checkpoint(newest), state)
        except TLParamDecompError as error:
            return error
    return None


# --- what a run does --------------------------------------------------------------------------------------------------
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no checkpoint.json": lambda newest: (newest / "checkpoint.json").unlink(),
    "half of the optimiser": lambda newest: os.truncate(newest / "optimiser.safetensors", 500),
    "a pipe": lambda newest: ((newest / NAMES[3]).unlink(), os.mkfifo(newest / NAMES[3])),
    "a pickle": lambda newest: (newest / NAMES[0]).write_bytes(hostile.foreign(newest / "sentinel")["pickle"]),
    "deep json": lambda newest: (newest / NAMES[0]).write_bytes(b"[" * 200_000),
    "an empty folder": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
    "a decomposition of another step": lambda newest: shutil.copytree(
        newest.parent / "step-00000002" / "decomposition", newest / "decomposition", dirs_exist_ok=True
    ),
    "another name": lambda newest: newest.rename(newest.with_name("step-00000005")),
    "names that are no steps": lambda newest: [
        shutil.copytree(newest, newest.with_name(f"step-{name}"))
        for name in ("²", "٤", "", "-8", "1e3", "8 ", "99999999999999999999999999")
    ] and shutil.rmtree(newest),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_run_falls_back_and_says_so(
    folder: Path, whole: Any, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And gives bit for bit what the run gives that was never stopped."""
    DAMAGE[damage](steps(folder)[4])
    capsys.readouterr()
    assert same(run(folder), whole)
    said = capsys.readouterr().err
    assert "is broken" in said and "step 2" in said
    for other in folder.glob("checkpoints/step-*"):
        if not re.fullmatch("step-[0-9]{8}", other.name):
            shutil.rmtree(other)
    assert set(steps(folder)) == {4, 6} and not list(folder.rglob("sentinel"))
    for checkpoint in steps(folder).values():
        read_anew(checkpoint)


@BY_FILE
def test_where_all_are_damaged_the_run_refuses_and_touches_nothing(folder: Path, name: str) -> None:
    for checkpoint in steps(folder).values():
        os.truncate(checkpoint / name, 20)
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(DecompositionFileError, match="None of the 2 checkpoints.*resume=False"):
        run(folder)
    assert before == {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    run(folder, resume=False)


# --- checkpoints that fit their checksums -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["format", "step", "device", "on_host", "data", "files", "guards", "warned"])
def test_a_wrong_type_in_every_field(folder: Path, key: str) -> None:
    newest = steps(folder)[4]
    values = metadata(newest)
    shutil.rmtree(steps(folder)[2])
    for new in (None, True, "x", 4.5, [5], {"x": 5}):
        if type(new) is type(values[key]) and key in ("data", "guards", "files"):
            continue
        (newest / "checkpoint.json").write_text(json.dumps(forged(newest, values, key, new)))
        with pytest.raises(TLParamDecompError):
            run(folder)


def forged(checkpoint: Path, values: dict[str, Any], key: str, new: Any) -> dict[str, Any]:
    """With a checksum that fits; unlike `seal`, it leaves the list of files as it is."""
    import hashlib

    changed = {k: v for k, v in (values | {key: new}).items() if k != "checksum"}
    return changed | {"checksum": hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()}


@pytest.mark.parametrize("name", ["python.gauss", "numpy", "python"])
def test_sizes_without_numbers_are_refused(folder: Path, name: str) -> None:
    """A header can name any size that has a 0 in it."""
    newest = steps(folder)[4]
    tensors = safetensors.torch.load_file(newest / "random.safetensors")
    tensors[name] = torch.empty(2**31, 0, dtype=tensors[name].dtype)
    safetensors.torch.save_file(tensors, newest / "random.safetensors")
    seal(newest)
    assert isinstance(attempt(newest, state_of()), DecompositionFileError)
