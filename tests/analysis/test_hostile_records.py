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

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.reading.logit_lens import LensToken, LogitLens
from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.errors import DecompositionFileError, TLParamDecompError

from ..support import hostile
from ..support.hostile import few_and_many, refusal, searching, watched

pytestmark = pytest.mark.timeout(300)
ROW = {"masks": "rounded 0.1", "delta": "absent", "site": "all", "kl": 0.5}
RECORDS: dict[str, Record] = {
    "evaluation": tlpd.Evaluation(
        {"rows": 4}, 4, 32, {"model": 1.5, "zero": float("nan")}, [ROW], [{"steps": 20}], [{"l0": 3.0}],
        {"a": {"b": 1}}, {}, {"seed": 0}, 1.5, ["adversary"],
    ),
    "comparison": tlpd.Comparison(
        {"seeds": [0]}, {"SPD": {"type": "SPD"}}, 8, 64, [{"method": "SPD", "kl": None}], [], [{"alive": 3}], {"torch": "2"}
    ),
    "lens": LogitLens("embed.W_E", 3, "W_U", [LensToken(1, "a", 0.5)], [LensToken(2, "b", -0.5)]),
    "attribution": tlpd.Attribution(
        "ablation", "logit difference", "removal", [0, 1], True, [0.5], None, None, None, False, False,
        {"a": torch.ones(1, 2, 3)}, {"a": torch.zeros(1, 2)}, {}, {},
    ),
}  # fmt: skip
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
    values = json.loads(path.read_text())
    for key in values:
        for wrong in (None, "x", 5, [5], [[[]]], {"x": [5]}, True):
            forged = hostile.replaced(values, (key,), wrong)
            path.write_text(json.dumps(forged))
            with watched():
                try:
                    loaded = loader(what)(path)
                except DecompositionFileError:
                    continue
            again = json.loads(loaded.save(tmp_path / "again.json").read_text())
            assert again == forged or str(again) == str(forged)  # a NaN is not itself
        path.write_text(json.dumps(hostile.without(values, (key,))))
        refusal(loader(what), path)
    for forged in (values | {"colour": "blue"}, [values], {}, None, 5, "x"):
        path.write_text(json.dumps(forged))
        refusal(loader(what), path)


@few_and_many(60, 3000)
@BY_RECORD
def test_no_value_is_dropped_or_bent(tmp_path: Path, what: str, examples: int) -> None:
    path = saved(what, tmp_path)
    values = json.loads(path.read_text())

    @searching(examples)
    @given(st.sampled_from(list(hostile.places(values))), hostile.JSON)
    def search(place: tuple[Any, ...], new: Any) -> None:
        path.write_text(json.dumps(hostile.replaced(values, place, new)))
        with watched():
            try:
                loaded = loader(what)(path)
            except DecompositionFileError:
                return
        again = json.loads(loaded.save(tmp_path / "again.json").read_text())
        if what != "attribution":  # whose numbers are rounded to their dtype
            assert str(again) == str(json.loads(path.read_text()))

    search()


@few_and_many(150, 6000)
def test_tasks_are_refused_by_name(tmp_path: Path, examples: int) -> None:
    path = saved("task", tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]

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
