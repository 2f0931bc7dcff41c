"""A run's folder in which something else lies: links, pipes, folders, other people's files; and a disk that is full.

Nothing is followed, waited for or removed that the run did not write; where the run cannot go on it says so by name.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp.components import disk
from tl_paramdecomp.errors import DecompositionFileError, DiskSpaceError
from tl_paramdecomp.training.callbacks import STOP, JsonLines, StepInfo
from tl_paramdecomp.training.run_folder import RunFolder

from ..support.small_disks import file_size_limit, full_disk
from .checkpoints import steps
from .test_fit import fit, same, tiny_gpt2

pytestmark = pytest.mark.timeout(60)  # a pipe that is waited for never ends
FILES = (".lock", "run.json", "metrics.jsonl", "checkpoints/best.json")
FOLDERS = ("checkpoints", "decomposition", "checkpoints/step-00000003")
SETTINGS: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "log_every": 1, "keep_best": "loss"}


def run(folder: Path, **changes: Any) -> Any:
    return fit(tiny_gpt2(), run_dir=folder, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 2."""
    folder = tmp_path_factory.mktemp("done") / "run"
    run(folder, callbacks=[lambda info: STOP if info.step == 2 else None])
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def everything(folder: Path) -> dict[str, Any]:
    """Files by what they hold; links, pipes and folders by what they are. The lock says who had it last."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "pipe" if path.is_fifo() else None
        found[path.relative_to(folder).as_posix()] = kind or path.read_bytes()
    return found


# --- links -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("resume", ["auto", False])
def test_a_link_is_not_followed(folder: Path, name: str, resume: Any, tmp_path: Path) -> None:
    """Neither one to a file, even of the right content, nor one that leads nowhere."""
    path, target = folder / name, tmp_path / "mine"
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(target)
    for written in (content, b"mine", None):
        target.write_bytes(written) if written is not None else target.unlink()
        before = everything(tmp_path)
        with pytest.raises(DecompositionFileError, match="is a link"):
            run(folder, resume=resume)
        after = everything(tmp_path)
        assert {k: v for k, v in after.items() if k != "run/.lock"} == {
            k: v for k, v in before.items() if k != "run/.lock"
        }
        assert (target.read_bytes() if written is not None else None) == written


@pytest.mark.parametrize("name", [f"{name}-new" for name in (".run.json", ".metrics.jsonl", "checkpoints/.best.json")])
def test_what_lies_beside_is_left_alone(folder: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    for make in (lambda p: p.symlink_to(tmp_path / "mine"), os.mkfifo, os.mkdir, lambda p: p.write_bytes(b"yours")):
        made = Path(shutil.copytree(folder, tmp_path / "copy"))
        make(made / name)
        before = everything(made)[name]
        run(made)
        assert everything(made)[name] == before and (tmp_path / "mine").read_bytes() == b"mine"
        shutil.rmtree(made)


@pytest.mark.parametrize("name", FOLDERS[:2])
def test_a_folder_that_is_a_link_is_not_followed(folder: Path, name: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    (folder / name).rename(target) if (folder / name).exists() else target.mkdir()
    (target / "notes.txt").write_text("mine")
    (folder / name).symlink_to(target)
    before = everything(target)
    for resume in ("auto", False):
        with pytest.raises(DecompositionFileError, match=f"{name} is a link"):
            run(folder, resume=resume)
        assert everything(target) == before


def test_a_checkpoint_that_is_a_link_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    (only,) = steps(folder).values()
    target = only.rename(tmp_path / only.name)
    only.symlink_to(target)
    before = everything(target)
    for resume, words in (("auto", "is a link"), (False, "nothing that a run wrote")):
        with pytest.raises(DecompositionFileError, match=words):
            run(folder, resume=resume)
    assert everything(target) == before and only.is_symlink()


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert same(run(tmp_path / "link"), run(tmp_path / "other"))
    assert (folder / "decomposition" / "decomposition.json").is_file()


# --- what is no file, or no file of ours -------------------------------------------------------------------------------
OTHERS: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: path.mkdir(),
    "full folder": lambda path: (path.mkdir(), (path / "notes.txt").write_text("mine")),
    "pipe": os.mkfifo,
    "deep": lambda path: path.write_bytes(b"[" * 50_000),
    "deep object": lambda path: path.write_bytes(b'{"step":' * 50_000),
    "text": lambda path: path.write_text("my notes\n"),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", list(OTHERS))
def test_what_is_no_file_of_the_run(folder: Path, name: str, what: str) -> None:
    """Refused before the first step, by name, and left as it is."""
    (folder / name).unlink()
    OTHERS[what](folder / name)
    before = None if what == "huge" else everything(folder)
    for resume in ("auto", False):
        with pytest.raises(DecompositionFileError, match=Path(name).name):
            run(folder, resume=resume, callbacks=[lambda info: 1 // 0])
    if before is not None:
        after = everything(folder)
        assert {**after, ".lock": before[".lock"]} == before if name != ".lock" else after == before


def test_a_deep_line_is_told_by_its_number(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n{"step": ' + "[" * 50_000 + "\n")
    with pytest.raises(DecompositionFileError, match=r"metrics\.jsonl, line 4 cannot be read"):
        run(folder)


def test_lines_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log(StepInfo(1, 9, {"loss": 0.5}, None))
    before = log.path.read_bytes()
    with file_size_limit(tmp_path, len(before) + 5) as (_, filled), filled():
        with pytest.raises(DiskSpaceError, match="Could not write to"):
            log(StepInfo(2, 9, {"loss": 0.5}, None))
    assert log.path.read_bytes() == before
    log(StepInfo(2, 9, {"loss": 0.5}, None))
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


# --- what others put there ---------------------------------------------------------------------------------------------
NOTES = (
    "notes.txt", "decomposition/notes.txt", "decomposition/plots/a.png", "decomposition/.saving-mine/a.txt",
    "decomposition/components-old.safetensors", "checkpoints/notes.txt", "checkpoints/step-3/notes.txt",
    "checkpoints/.discarded-mine/a.txt", ".decomposition-new/a.txt", ".decomposition-old/a.txt", ".saving-mine/a.txt",
)  # fmt: skip
REFUSED = (
    "checkpoints/step-00000002/notes.txt",
    "checkpoints/step-00000004/notes.txt",
    "checkpoints/.writing/notes.txt",
)


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")


def test_what_others_put_there_stays(folder: Path) -> None:
    """Whatever the same call does again."""
    for name in NOTES:
        put(folder, name)
    for changes in ({}, {}, {"resume": False, "keep_checkpoints": 1, "checkpoint_every": 1}):
        run(folder, **changes)
        assert {name: (folder / name).read_text() for name in NOTES} == dict.fromkeys(NOTES, "mine")
    assert set(steps(folder)) - {3} == {4}


@pytest.mark.parametrize("name", REFUSED)
def test_what_others_put_in_the_way_stays(folder: Path, name: str) -> None:
    """The call is refused where it would have to go; a checkpoint that is deleted leaves it behind."""
    put(folder, name)
    refused = 0
    for resume in (False, "auto"):
        try:
            run(folder, resume=resume, keep_checkpoints=1)
        except DecompositionFileError as error:
            refused += 1
            assert Path(name).parent.name in str(error)
        assert (folder / name).read_text() == "mine"
    assert refused >= 1 and list(folder.glob("checkpoints/.discarded-*/notes.txt")) == []


def test_a_decomposition_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    """A folder of that name with a file that is none of ours is refused before the first step."""
    (tmp_path / "decomposition").mkdir()
    for name in ("decomposition.json", "components.safetensors"):
        (tmp_path / "decomposition" / name).write_bytes(b"mine")
        with pytest.raises(DecompositionFileError, match="decomposition"):
            run(tmp_path, callbacks=[lambda info: 1 // 0])
        assert everything(tmp_path / "decomposition") == {name: b"mine"}
        (tmp_path / "decomposition" / name).unlink()


# --- no room -----------------------------------------------------------------------------------------------------------
def results(folder: Path) -> tuple[Any, Any]:
    """Two decompositions, of which the first is saved."""
    old, new = (tlpd.decompose(tiny_gpt2(), "blocks.0.mlp.*", tlpd.RandomBasis(training=None), seed=s) for s in (0, 1))
    RunFolder(folder, {}).save_result(old)
    return old, new


@pytest.mark.parametrize("limit", ["full disk", "file size"])
def test_the_last_save_without_room(tmp_path: Path, limit: str) -> None:
    """The named error, the result of before whole, and nothing beside it."""
    with full_disk(tmp_path / "disk") if limit == "full disk" else file_size_limit(tmp_path, 64) as (place, filled):
        old, new = results(place / "run")
        before = everything(place / "run")
        with filled(), pytest.raises(DiskSpaceError, match="Could not write the result into.*the same call writes it"):
            RunFolder(place / "run", {}).save_result(new)
        assert everything(place / "run") == before
        assert same(tlpd.Decomposition.load(place / "run" / "decomposition"), old)
        RunFolder(place / "run", {}).save_result(new)
        assert same(tlpd.Decomposition.load(place / "run" / "decomposition"), new)


def test_a_run_on_a_disk_that_is_full_at_its_end(tmp_path: Path) -> None:
    """The call says so by name, and goes on where there is room again."""
    with full_disk(tmp_path / "disk", "4m") as (place, filled):
        run(place / "run", steps=2)
        with filled(), pytest.raises(DiskSpaceError):
            run(place / "run", steps=2, resume=True)
        made = run(place / "run", steps=2)
        assert same(tlpd.Decomposition.load(place / "run" / "decomposition"), made)
        assert not [p for p in (place / "run").rglob("*") if p.name.startswith((disk.SCRATCH, ".writing", ".tmp"))]
