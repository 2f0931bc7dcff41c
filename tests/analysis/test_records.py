"""Records on disk: the very same values or a named error, whatever happens to the files; and what was there before stays."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis import records
from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.errors import DecompositionFileError, DiskSpaceError, TLParamDecompError

from ..support import hostile
from ..support.hostile import refusal, watched
from ..support.saved_folders import sealed_lines
from ..support.small_disks import file_size_limit, full_disk
from .small_records import RECORDS, same

pytestmark = pytest.mark.timeout(120)  # a pipe that is waited for never ends
FORMAT_1 = Path(__file__).parent / "format_1"
BY_RECORD = pytest.mark.parametrize("what", list(RECORDS))
WITH_ARRAYS = pytest.mark.parametrize("what", ["attribution", "sweep"])


def task() -> Task:
    return Task.from_tokens("t", [[1, 2, 3], [4, 5]], [[1], [2, 3]], [[2], [4]], [[1, 2, 4], [4, 6]], groups=("x", "y"))


def same_task(one: Task, other: Task) -> bool:
    rows = [(a, b) for a, b in ((one.clean, other.clean), (one.corrupt, other.corrupt))]
    return all(torch.equal(a, b) for a, b in rows if a is not None and b is not None) and (
        (one.name, one.answers, one.wrong, one.groups) == (other.name, other.answers, other.wrong, other.groups)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- as they were ------------------------------------------------------------------------------------------------------
@BY_RECORD
def test_a_record_comes_back_bit_for_bit(tmp_path: Path, what: str) -> None:
    made = RECORDS[what]
    path = made.save(tmp_path / "v1.5.json")
    assert path == tmp_path / "v1.5.json" and same(type(made).load(path), made)
    expected = {"v1.5.json", "v1.5.safetensors"} if made.arrays else {"v1.5.json"}
    assert set(contents(tmp_path)) == expected
    assert str(type(made).load(path)) == str(made)
    for line in path.read_text().splitlines()[1:-1]:
        json.loads("{" + line.rstrip(",") + "}")  # a field a line
    digest = hashlib.sha256(path.read_bytes().rpartition(b',\n "checksum"')[0]).hexdigest()
    assert json.loads(path.read_text())["checksum"] == digest


@BY_RECORD
def test_records_of_version_0_1_0_are_read(what: str) -> None:
    """They have no checksum, and arrays as lists."""
    assert "checksum" not in json.loads((FORMAT_1 / f"{what}.json").read_text())
    if what == "sweep":  # whose effects had another sign
        with pytest.raises(DecompositionFileError, match="sweep again"):
            tlpd.Sweep.load(FORMAT_1 / "sweep.json")
        return
    assert same(type(RECORDS[what]).load(FORMAT_1 / f"{what}.json"), RECORDS[what])
    assert same_task(load_task(FORMAT_1 / "task.jsonl"), task())


def test_arrays_take_no_more_room_than_their_numbers(tmp_path: Path) -> None:
    values = {"a": torch.randn(2, 50, 300)}
    made = tlpd.Attribution(
        "ablation", "m", "removal", list(range(50)), True, [0.5, 0.5], None, None, None, False, False, values,
        {"a": torch.zeros(2, 50)}, {}, {},
    )  # fmt: skip
    made.save(tmp_path / "a.json")
    sizes = {name: len(content) for name, content in contents(tmp_path).items()}
    assert sizes["a.json"] < 2000 and sizes["a.safetensors"] < 4 * (2 * 50 * 300 + 2 * 50) + 1000
    assert torch.equal(tlpd.Attribution.load(tmp_path / "a.json").values["a"], values["a"])


def test_arrays_that_share_memory_are_kept(tmp_path: Path) -> None:
    made = RECORDS["attribution"]
    shared = torch.ones(1, 2, 3)
    made = tlpd.Attribution(**{**made.__dict__, "values": {"a": shared, "b": shared.flip(2)[..., ::2]},
                               "delta": {"a": shared[..., 0], "b": shared[..., 1]}})  # fmt: skip
    assert same(tlpd.Attribution.load(made.save(tmp_path / "a.json")), made)


# --- damage ------------------------------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_task_is_read_as_something_else(tmp_path: Path) -> None:
    task().save(tmp_path / "t.jsonl")
    check_flips(tmp_path, lambda: same_task(load_task(tmp_path / "t.jsonl"), task()))


def check_flips(folder: Path, is_same: Callable[[], bool]) -> None:
    drawn, refused = random.Random(0), 0
    for name, content in contents(folder).items():
        places = range(len(content)) if len(content) < 400 else sorted(drawn.sample(range(len(content)), 400))
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << drawn.randrange(8)
            (folder / name).write_bytes(flipped)
            try:
                assert is_same(), (name, place)
            except TLParamDecompError:
                refused += 1
        (folder / name).write_bytes(content)
    assert is_same() and refused > 100


@BY_RECORD
def test_fields_that_are_missing_unknown_or_of_another_type(tmp_path: Path, what: str) -> None:
    path = RECORDS[what].save(tmp_path / "saved.json")
    values, arrays = json.loads(path.read_text()), RECORDS[what].arrays
    for key in values:
        for wrong in (None, "x", 5, [5], [[[]]], {"x": [5]}, True):
            forged = hostile.replaced(values, (key,), wrong)
            path.write_bytes(sealed_lines(forged))
            with watched():
                try:
                    loaded = type(RECORDS[what]).load(path)
                except DecompositionFileError:
                    continue
            check_as_forged(loaded, forged, tmp_path)
        if key != "checksum":
            path.write_bytes(sealed_lines(hostile.without(values, (key,))))
            refusal(type(RECORDS[what]).load, path)
    path.write_bytes(sealed_lines(values | {"colour": "blue"}))
    refusal(type(RECORDS[what]).load, path)
    for other in ([values], {}, None, 5, "x"):
        path.write_text(json.dumps(other))
        refusal(type(RECORDS[what]).load, path)
    assert not arrays or (tmp_path / "saved.safetensors").exists()


def check_as_forged(loaded: Record, forged: dict[str, Any], folder: Path) -> None:
    """Saved again, it is the same file."""
    again = json.loads(loaded.save(folder / "again.json").read_text())
    assert str(again | {"checksum": ""}) == str(forged | {"checksum": ""})


@BY_RECORD
def test_what_lacks_a_key_is_refused_when_it_is_read(tmp_path: Path, what: str) -> None:
    """Also where its checksum fits, and in files of version 0.1.0; what is read can be printed."""
    made = RECORDS[what]
    values = json.loads(made.save(tmp_path / "r.json").read_text())
    old = json.loads((FORMAT_1 / f"{what}.json").read_text())
    refused = 0
    for forge, known in ((sealed_lines, values), (lambda v: json.dumps(v).encode(), old)):
        for place in hostile.places(known):
            if isinstance(place[-1], int) or place[-1] == "checksum":
                continue
            (tmp_path / "r.json").write_bytes(forge(hostile.without(known, place)))
            try:
                str(type(made).load(tmp_path / "r.json"))
            except DecompositionFileError:
                refused += 1
    assert refused >= 2 * len(made.__dict__)


def test_rows_that_lack_a_key_are_not_written(tmp_path: Path) -> None:
    made = RECORDS["evaluation"]
    short = tlpd.Evaluation(**{**made.__dict__, "masks": [{"masks": "zero", "delta": "absent", "site": "all"}]})
    with pytest.raises(DecompositionFileError, match="could not be read again.*masks of Evaluation.*MaskRow"):
        short.save(tmp_path / "r.json")
    assert contents(tmp_path) == {} and list(tmp_path.iterdir()) == []


@BY_RECORD
def test_what_is_no_record_is_refused_at_once(tmp_path: Path, what: str) -> None:
    load = type(RECORDS[what]).load
    path = RECORDS[what].save(tmp_path / "r.json")
    text = path.read_text()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "deep").write_bytes(b"[" * 50_000)
    (tmp_path / "deep field").write_text(text.replace('"checksum"', f'"x": {"[" * 50_000}{"]" * 50_000}, "checksum"'))
    (tmp_path / "twice").write_text(text.replace("{", '{"format": 2, ', 1))
    (tmp_path / "overflow").write_text('{"seconds": 1e999}')
    (tmp_path / "newer").write_bytes(sealed_lines(json.loads(text) | {"format": 3}))
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for name in (
        "pipe",
        "loop",
        "zero",
        "deep",
        "deep field",
        "twice",
        "overflow",
        "newer",
        "huge",
        ".",
        "nowhere",
        "\0",
    ):
        refusal(load, tmp_path / name)
    assert "of format 3" in str(refusal(load, tmp_path / "newer"))
    other = "lens" if what != "lens" else "heads"
    assert f"a record of '{RECORDS[what].what}'" in str(refusal(type(RECORDS[other]).load, path))


@WITH_ARRAYS
def test_arrays_that_are_missing_or_of_another_record(tmp_path: Path, what: str) -> None:
    path, load = RECORDS[what].save(tmp_path / "r.json"), type(RECORDS[what]).load
    arrays = tmp_path / "r.safetensors"
    content = arrays.read_bytes()
    for made in ("missing", "pipe", "folder", "others", "huge"):
        arrays.unlink()
        if made == "pipe":
            os.mkfifo(arrays)
        elif made == "folder":
            arrays.mkdir()
        elif made == "others":
            safetensors.torch.save_file({"effects:a": torch.ones(2)}, arrays)
        elif made == "huge":
            with arrays.open("wb") as file:
                file.truncate(1 << 40)
        refusal(load, path)
        arrays.rmdir() if made == "folder" else None
        arrays.write_bytes(content) if made in ("missing", "folder") else (arrays.unlink(), arrays.write_bytes(content))
    assert same(load(path), RECORDS[what])
    values = json.loads(path.read_text())
    for forged in ({"a": [1.0]}, [], ["a", "a"], ["../a"], None):
        path.write_bytes(sealed_lines(values | {RECORDS[what].arrays[0]: forged}))
        refusal(load, path)


def test_a_file_larger_than_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = RECORDS["evaluation"].save(tmp_path / "r.json").read_bytes()
    monkeypatch.setattr(records, "LARGEST", 100)
    with pytest.raises(DecompositionFileError, match="no more than 100 are read"):
        RECORDS["evaluation"].save(tmp_path / "r.json")
    assert contents(tmp_path) == {"r.json": old}
    assert "at most 100" in str(refusal(tlpd.Evaluation.load, tmp_path / "r.json"))


# --- what lies there ---------------------------------------------------------------------------------------------------
@WITH_ARRAYS
def test_a_file_of_anothers_is_not_written_over(tmp_path: Path, what: str) -> None:
    """The user names one file; the other may be somebody's."""
    (tmp_path / "r.safetensors").write_bytes(b"mine")
    for before in (None, "not JSON", "{}", json.dumps({"tensors": {}})):
        if before is not None:
            (tmp_path / "r.json").write_text(before)
        with pytest.raises(DecompositionFileError, match=r"r\.safetensors is where the arrays belong"):
            RECORDS[what].save(tmp_path / "r.json")
        assert contents(tmp_path) == {"r.safetensors": b"mine"} | (
            {} if before is None else {"r.json": before.encode()}
        )


@BY_RECORD
def test_links_pipes_and_folders_are_not_written_over(tmp_path: Path, what: str) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    for name in ("r.json", *(["r.safetensors"] if RECORDS[what].arrays else [])):
        for make in (lambda p: p.symlink_to("target"), lambda p: p.symlink_to("nowhere"), os.mkfifo, os.mkdir):
            make(tmp_path / name)
            with pytest.raises(DecompositionFileError):
                RECORDS[what].save(tmp_path / "r.json")
            assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "target"])
            assert (tmp_path / "target").read_bytes() == b"mine"
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


@WITH_ARRAYS
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = RECORDS[what]
    name = old.arrays[0]
    new = type(old)(**{**old.__dict__, "metric": "another", name: dict(reversed(getattr(old, name).items()))})
    for call in ("replace", "fsync", "mkdir"):
        real: Callable[..., Any] = getattr(os, call)
        found = []
        for n in range(20):
            calls: list[int] = []

            def failing(*given: Any, calls: list[int] = calls, n: int = n, real: Any = real, **more: Any) -> Any:
                calls.append(0)
                if len(calls) == n + 1:
                    raise OSError(28, "No space left on device")
                return real(*given, **more)

            folder = tmp_path / call / str(n)
            folder.mkdir(parents=True)
            path = old.save(folder / "r.json")
            with monkeypatch.context() as patch:
                patch.setattr(os, call, failing)
                try:
                    new.save(path)
                    done = len(calls) <= n
                except DiskSpaceError as error:
                    assert "No space left" in str(error) and "Free some space" in str(error)
                    done = False
            found.append("new" if same(type(old).load(path), new) else "old")
            assert found[-1] == "new" or same(type(old).load(path), old)
            if found[-1] == "old":
                assert set(contents(folder)) == {"r.json", "r.safetensors"}, "no litter"
            new.save(path)
            assert same(type(old).load(path), new) and set(contents(folder)) == {"r.json", "r.safetensors"}
            if done:
                break
        assert done and found[0] == "old" and found[-1] == "new"


# --- no room -----------------------------------------------------------------------------------------------------------
@BY_RECORD
@pytest.mark.parametrize("limit", ["full disk", "file size"])
def test_where_there_is_no_room(tmp_path: Path, what: str, limit: str) -> None:
    made = RECORDS[what]
    with full_disk(tmp_path / "disk") if limit == "full disk" else file_size_limit(tmp_path, 64) as (folder, filled):
        path = made.save(folder / "r.json")
        before = contents(folder)
        with filled():
            for name in ("r.json", "new.json"):
                with pytest.raises(DiskSpaceError, match="(?i)no space left|too large"):
                    made.save(folder / name)
        after = contents(folder)
        after.pop("filler", None)
        assert after == before and not list(folder.glob(".*"))
        made.save(path)
        assert same(type(made).load(path), made)
