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
from hypothesis import given
from hypothesis import strategies as st

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import DecompositionFileError, TLParamDecompError
from tl_paramdecomp.training.callbacks import STOP
from tl_paramdecomp.training.runs.checkpoint import Checkpoint, read_checkpoint, restore
from tl_paramdecomp.training.state import TrainingState, start_state

from ..support import hostile
from ..support.hostile import few_and_many, refusal, searching, watched
from ..support.saved_folders import join_safetensors, split_safetensors
from .checkpoints import metadata, seal, steps
from .test_fit import fit, same, tiny_gpt2

pytestmark = pytest.mark.timeout(300)  # a pipe that is waited for never ends
METHOD = tlpd.VPD(n_components=4, importance=ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1))
NAMES = [
    "checkpoint.json", "decomposition/components.safetensors", "decomposition/decomposition.json",
    "memory.safetensors", "optimiser.safetensors", "random.safetensors",
]  # fmt: skip
BY_FILE = pytest.mark.parametrize("name", NAMES)


def run(folder: Path, **changes: Any) -> Any:
    settings = {"method": METHOD, "steps": 6, "checkpoint_every": 2, "sites": "blocks.0.mlp.W_in", "run_dir": folder}
    return fit(tiny_gpt2(), **(settings | changes))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(folder, log_every=1, callbacks=[lambda info: STOP if info.step == 4 else None])
    assert set(steps(folder)) == {2, 4}
    assert sorted(p.relative_to(steps(folder)[4]).as_posix() for p in steps(folder)[4].rglob("*.*")) == NAMES
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run gives that is never stopped."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def state() -> TrainingState:
    """Of the same run, elsewhere."""
    states: list[TrainingState] = []

    def kept(*arguments: Any, **named: Any) -> TrainingState:
        states.append(start_state(*arguments, **named))
        return states[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_paramdecomp.training.loop.start_state", kept)
        run(Path("nowhere"), steps=1, run_dir=None)
    return states[0]


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
@few_and_many(120, 3000)
@BY_FILE
def test_no_edited_checkpoint_is_read(folder: Path, name: str, examples: int) -> None:
    newest = steps(folder)[4]
    content, known = (newest / name).read_bytes(), read_anew(newest)

    @searching(examples)
    @given(hostile.edits(content))
    def search(edited: bytes) -> None:
        (newest / name).write_bytes(edited)
        try:
            found = read_anew(newest)
        except DecompositionFileError:
            return
        assert name == "checkpoint.json" and found == known  # the same JSON in other words

    search()


@BY_FILE
def test_flipped_bits(folder: Path, name: str) -> None:
    newest = steps(folder)[4]
    content = (newest / name).read_bytes()
    for i in range(0, len(content), max(1, len(content) // 150)):
        (newest / name).write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        refusal(read_checkpoint, newest)


@BY_FILE
def test_files_of_two_checkpoints_do_not_mix(folder: Path, name: str) -> None:
    newest, before = steps(folder)[4], steps(folder)[2]
    (newest / name).write_bytes((before / name).read_bytes())
    refusal(read_checkpoint, newest)


@BY_FILE
@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "zero", "itself"])
def test_what_is_no_file(folder: Path, name: str, what: str) -> None:
    path = steps(folder)[4] / name
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "missing":
        path.symlink_to({"zero": "/dev/zero", "itself": path.name}[what])
    refusal(read_checkpoint, steps(folder)[4])


@BY_FILE
@pytest.mark.parametrize("what", list(hostile.foreign(Path())))
def test_foreign_files_are_refused_and_never_run(
    folder: Path, name: str, what: str, tmp_path: Path, state: TrainingState
) -> None:
    newest, content = steps(folder)[4], hostile.foreign(tmp_path / "sentinel")[what]
    (newest / name).write_bytes(content)
    refusal(read_checkpoint, newest)
    if name != "checkpoint.json":
        seal(newest)  # it says that these are its files
        if what != "no tensors" or name not in ("memory.safetensors", "optimiser.safetensors"):  # there may be none
            assert isinstance(attempt(newest, state), DecompositionFileError)
    assert not (tmp_path / "sentinel").exists()


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
def forge(checkpoint: Path, values: dict[str, Any]) -> None:
    (checkpoint / "checkpoint.json").write_text(json.dumps(values | {"checksum": ""}))
    seal(checkpoint)


@few_and_many(200, 4000)
def test_values_of_all_sorts(folder: Path, state: TrainingState, examples: int) -> None:
    newest = steps(folder)[4]
    values = metadata(newest)
    paths = [p for p in hostile.places(values) if p[0] not in ("checksum", "files") and p[:1] != ("settings",)]

    @searching(examples)
    @given(st.sampled_from(paths), hostile.JSON, st.booleans())
    def search(path: tuple[Any, ...], new: Any, remove: bool) -> None:
        forge(newest, hostile.without(values, path) if remove else hostile.replaced(values, path, new))
        attempt(newest, state)

    search()
    forge(newest, values)
    assert attempt(newest, state) is None and state.done == 4


@pytest.mark.parametrize("key", ["format", "step", "device", "on_host", "data", "files", "guards", "warned"])
def test_a_wrong_type_in_every_field(folder: Path, state: TrainingState, key: str) -> None:
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


SIZES = st.integers(-2, 200) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.5, None, "4", []])


@pytest.mark.parametrize("name", ["python.gauss", "numpy", "python"])
def test_sizes_without_numbers_are_refused(folder: Path, state: TrainingState, name: str) -> None:
    """A header can name any size that has a 0 in it."""
    newest = steps(folder)[4]
    tensors = safetensors.torch.load_file(newest / "random.safetensors")
    tensors[name] = torch.empty(2**31, 0, dtype=tensors[name].dtype)
    safetensors.torch.save_file(tensors, newest / "random.safetensors")
    seal(newest)
    assert isinstance(attempt(newest, state), DecompositionFileError)


@few_and_many(60, 2000)
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("safetensors")])
def test_tensors_of_all_sorts(folder: Path, state: TrainingState, name: str, examples: int) -> None:
    newest = steps(folder)[4]
    header, data = split_safetensors((newest / name).read_bytes())
    names = [key for key in header if key != "__metadata__"]
    entry = st.fixed_dictionaries(
        {}, optional={"dtype": st.sampled_from(["F32", "F64", "I64", "U8", "BF16", "BOOL", "C64", "F8_E4M3", "X", 4]),
                      "shape": st.lists(SIZES, max_size=3), "data_offsets": st.lists(SIZES, max_size=3)},
    )  # fmt: skip

    @searching(examples)
    @given(st.data())
    def search(drawn: st.DataObject) -> None:
        forged_header = json.loads(json.dumps(header))
        how = drawn.draw(st.sampled_from(["change", "remove", "rename", "exchange", "bytes"]))
        one, other = drawn.draw(st.sampled_from(names)), drawn.draw(st.sampled_from(names))
        content = data
        if how == "change":
            forged_header[one] |= drawn.draw(entry)
        elif how == "remove":
            del forged_header[one]
        elif how == "rename":
            forged_header[drawn.draw(hostile.TEXTS)] = forged_header.pop(one)
        elif how == "exchange":
            forged_header[one], forged_header[other] = forged_header[other], forged_header[one]
        else:
            content = drawn.draw(hostile.edits(data))
        (newest / name).write_bytes(join_safetensors(forged_header, content))
        seal(newest)
        attempt(newest, state)

    search()
