"""Records and tasks from files that are not what they should be: as they were saved, or an error of the package."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.errors import DecompositionFileError, TLParamDecompError

from ..support import hostile
from ..support.hostile import few_and_many, refusal, searching, watched
from ..support.saved_folders import sealed_lines
from .small_records import RECORDS, same

pytestmark = pytest.mark.timeout(300)
BY_RECORD = pytest.mark.parametrize("what", list(RECORDS))


def task() -> Task:
    return Task.from_tokens("t", [[1, 2, 3], [4, 5]], [[1], [2, 3]], [[2], [4]], [[1, 2, 4], [4, 6]], groups=("x", "y"))


def saved(what: str, folder: Path) -> Path:
    return (task() if what == "task" else RECORDS[what]).save(folder / "saved.json")


def loader(what: str) -> Callable[[Path], Any]:
    return load_task if what == "task" else type(RECORDS[what]).load


@pytest.mark.parametrize("what", [*RECORDS, "task"])
@pytest.mark.parametrize("content", list(hostile.foreign(Path())))
def test_foreign_files(tmp_path: Path, what: str, content: str) -> None:
    (tmp_path / "file").write_bytes(hostile.foreign(tmp_path / "sentinel")[content])
    with watched(), pytest.raises(TLParamDecompError):
        loader(what)(tmp_path / "file")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("what", [*RECORDS, "task"])
def test_what_is_no_file(tmp_path: Path, what: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path, tmp_path / "nowhere", tmp_path / "\0"):
        refusal(loader(what), path)


@BY_RECORD
def test_fields_that_are_missing_unknown_or_of_another_type(tmp_path: Path, what: str) -> None:
    path = saved(what, tmp_path)
    values, arrays = json.loads(path.read_text()), RECORDS[what].arrays
    for key in values:
        for wrong in (None, "x", 5, [5], [[[]]], {"x": [5]}, True):
            forged = hostile.replaced(values, (key,), wrong)
            path.write_bytes(sealed_lines(forged))
            with watched():
                try:
                    loaded = loader(what)(path)
                except DecompositionFileError:
                    continue
            check_as_forged(loaded, forged, tmp_path)
        if key != "checksum":
            path.write_bytes(sealed_lines(hostile.without(values, (key,))))
            refusal(loader(what), path)
    path.write_bytes(sealed_lines(values | {"colour": "blue"}))
    refusal(loader(what), path)
    for other in ([values], {}, None, 5, "x"):
        path.write_text(json.dumps(other))
        refusal(loader(what), path)
    assert not arrays or (tmp_path / "saved.safetensors").exists()


def check_as_forged(loaded: Record, forged: dict[str, Any], folder: Path) -> None:
    """Saved again, it is the same file."""
    again = json.loads(loaded.save(folder / "again.json").read_text())
    assert str(again | {"checksum": ""}) == str(forged | {"checksum": ""})


@few_and_many(60, 3000)
@BY_RECORD
def test_no_value_is_dropped_or_bent(tmp_path: Path, what: str, examples: int) -> None:
    path = saved(what, tmp_path)
    values = json.loads(path.read_text())

    @searching(examples)
    @given(st.sampled_from(list(hostile.places(values))), hostile.JSON)
    def search(place: tuple[Any, ...], new: Any) -> None:
        forged = hostile.replaced(values, place, new)
        path.write_bytes(sealed_lines(forged))
        with watched():
            try:
                loaded = loader(what)(path)
            except DecompositionFileError:
                return
        check_as_forged(loaded, json.loads(path.read_text()), tmp_path)

    search()
    path.write_bytes(sealed_lines(values))
    assert same(loader(what)(path), RECORDS[what])


@few_and_many(150, 6000)
def test_tasks_are_refused_by_name(tmp_path: Path, examples: int) -> None:
    path = saved("task", tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()][:-1]

    @searching(examples)
    @given(st.sampled_from(list(hostile.places(lines))), hostile.JSON | st.lists(st.integers(0, 9), max_size=4))
    @example((0, "clean", 0), 2**63)
    def search(place: tuple[Any, ...], new: Any) -> None:
        path.write_text("\n".join(json.dumps(line) for line in hostile.replaced(lines, place, new)))
        with watched():
            try:
                loaded = load_task(path)
            except TLParamDecompError:
                return
        again = load_task(loaded.save(tmp_path / "again.jsonl"))
        assert torch.equal(again.clean, loaded.clean) and again.answers == loaded.answers

    search()


@few_and_many(60, 3000)
def test_edited_tasks(tmp_path: Path, examples: int) -> None:
    path = saved("task", tmp_path)
    content = path.read_bytes()

    @searching(examples)
    @given(hostile.edits(content))
    def search(edited: bytes) -> None:
        path.write_bytes(edited)
        with watched():
            with suppress(TLParamDecompError):
                load_task(path)

    search()
