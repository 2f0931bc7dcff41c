"""A save that ends anywhere, by an error, a kill or a power cut, leaves the decomposition of before or the new one, whole."""

import itertools
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tl_paramdecomp import Decomposition, SubnetworkDecomposition
from tl_paramdecomp.components import disk, files
from tl_paramdecomp.errors import DecompositionFileError

from ..support.saved_folders import METADATA, TENSORS, contents, put

FORMAT_1 = Path(__file__).parent / "format_1"
LOADERS: dict[str, Callable[[Path], Any]] = {
    "components": Decomposition.load,
    "subnetworks": SubnetworkDecomposition.load,
}
CHANGES = ("os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "open")
"""What Python tells of before it is done; `os.replace` is a rename."""


class Killed(BaseException):
    """What a process that is killed does not survive."""


class Clock:
    """Kills at the n-th operation on the disk, and at all after it, since a dead process does not clean up either."""

    def __init__(self) -> None:
        self.left: float | None = None

    def tick(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    @contextmanager
    def armed(self, n: float) -> Iterator[None]:
        self.left = n
        try:
            yield
        finally:
            self.left = None


CLOCK = Clock()
sys.addaudithook(lambda event, _: CLOCK.tick() if event in CHANGES else None)


def _ticking(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        CLOCK.tick()
        return real(*arguments, **named)

    return call


def _half_written(tensors: dict[str, torch.Tensor], path: str) -> None:
    """Half of a tensors' file, then an operation, then the whole."""
    content = safetensors.torch.save(tensors)
    Path(path).write_bytes(content[: len(content) // 2])
    CLOCK.tick()
    Path(path).write_bytes(content)


def old_and_new(kind: str) -> tuple[Any, Any]:
    made = [LOADERS[kind](FORMAT_1 / kind) for _ in range(2)]
    made[1].info["method"] = "another"
    for parameter in made[1].parameters():
        parameter.data += 1
    return made[0], made[1]


def same(one: Any, other: Any) -> bool:
    states = one.state_dict(), other.state_dict()
    return (
        one.info == other.info
        and states[0].keys() == states[1].keys()
        and all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    )


def before_there_was_one(folder: Path, old: Any, kind: str) -> None:
    """Nothing."""


def of_format_1(folder: Path, old: Any, kind: str) -> None:
    put(folder, contents(FORMAT_1 / kind))


def whole(folder: Path, old: Any, kind: str) -> None:
    old.save(folder)


def left_by_a_kill(folder: Path, old: Any, kind: str) -> None:
    """The old one's tensors have not their place yet, and there is half of a file."""
    old_and_new(kind)[1].save(folder)
    other = contents(folder)
    old.save(folder)
    (digest,) = [v for k, v in files.read_metadata(folder).items() if k == "sha256"]
    (folder / TENSORS).rename(folder / f"components-{digest}.safetensors")
    (folder / TENSORS).write_bytes(other[TENSORS])
    put(folder / ".saving-abc", {TENSORS: other[TENSORS][:50]})


@pytest.mark.parametrize("before", [before_there_was_one, of_format_1, whole, left_by_a_kill])
@pytest.mark.parametrize("kind", list(LOADERS))
def test_killed_at_every_operation(
    tmp_path: Path, kind: str, before: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new(kind)
    monkeypatch.setattr(os, "fsync", _ticking(os.fsync))
    monkeypatch.setattr(safetensors.torch, "save_file", _half_written)
    load, found = LOADERS[kind], []
    for n in itertools.count():
        folder = tmp_path / str(n) / "deep" / "er"
        before(folder, old, kind)
        try:
            with CLOCK.armed(n):
                new.save(folder)
            finished = True
        except Killed:
            finished = False
        if before is before_there_was_one and not (folder / METADATA).exists():
            found.append("old")
            with pytest.raises(DecompositionFileError):
                load(folder)
        else:
            found.append("new" if same(load(folder), new) else "old")
            assert found[-1] == "new" or same(load(folder), old)
        new.save(folder)  # goes well afterwards, and cleans up
        assert same(load(folder), new) and sorted(p.name for p in folder.iterdir()) == [TENSORS, METADATA]
        if finished:
            break
    assert found == sorted(found, reverse=True) and found[-1] == "new"
    assert found.count("old") > 15 and found.count("new") > 5


def test_killed_while_the_same_is_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = old_and_new("components")
    monkeypatch.setattr(os, "fsync", _ticking(os.fsync))
    monkeypatch.setattr(safetensors.torch, "save_file", _half_written)
    for n in itertools.count():
        folder = old.save(tmp_path / str(n))
        try:
            with CLOCK.armed(n):
                old.save(folder)
            break
        except Killed:
            assert same(Decomposition.load(folder), old)
    assert n > 20


@pytest.mark.parametrize("kind", list(LOADERS))
def test_a_disk_that_fails_at_any_operation(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, so that what comes after it runs: the named error, and the old one or the new."""
    old, new = old_and_new(kind)
    for name in ("replace", "fsync", "open", "mkdir", "chmod"):
        real: Callable[..., Any] = getattr(os, name)
        for n in itertools.count():
            calls: list[int] = []

            def failing(*arguments: Any, calls: list[int] = calls, n: int = n, real: Any = real, **named: Any) -> Any:
                calls.append(0)
                if len(calls) == n + 1:
                    raise OSError(28, "No space left on device")
                return real(*arguments, **named)

            folder = old.save(tmp_path / name / str(n))
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    new.save(folder)
                    finished = len(calls) <= n
                except DecompositionFileError as error:
                    assert "No space left" in str(error)
                    finished = False
            loaded = LOADERS[kind](folder)
            assert same(loaded, old) or same(loaded, new)
            if finished:
                assert same(loaded, new)
                break
        assert n or name in ("mkdir", "chmod")


class Disk:
    """What is on a disk when the power goes: a file's content once it was synced, a name once its folder was.

    Renames since the last sync of the folder may have reached the disk or not, each by itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, contents(folder) if folder.exists() else {}
        self.log: list[tuple[str | None, str, bytes] | None] = []
        """Renames as the name that goes, the name that comes and what is sure to be in it; None for a sync of the folder."""
        self.synced: set[int] = set()

    def replace(self, source: Path, target: Path) -> None:
        is_sure = os.stat(source).st_ino in self.synced
        gone = Path(source).name if Path(source).parent == self.folder else None
        assert Path(target).parent == self.folder
        self.log.append((gone, Path(target).name, Path(source).read_bytes() * is_sure))
        os.rename(source, target)

    def fsync(self, handle: int) -> None:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            if os.path.samestat(found, os.stat(self.folder)):
                self.log.append(None)
        else:
            self.synced.add(found.st_ino)

    def outcomes(self) -> Iterator[dict[str, bytes]]:
        """Files of the folder after every cut."""
        for n in range(len(self.log) + 1):
            done = self.log[:n]
            sure = max((i for i, entry in enumerate(done) if entry is None), default=0)
            pending = [entry for entry in done[sure:] if entry is not None]
            for kept in itertools.product([False, True], repeat=len(pending)):
                files_now = dict(self.start)
                reached = [entry for entry in done[:sure] if entry is not None]
                for source, target, content in reached + list(itertools.compress(pending, kept)):
                    files_now = {**{k: v for k, v in files_now.items() if k != source}, target: content}
                yield files_now


@pytest.mark.parametrize("before", [before_there_was_one, of_format_1, whole])
@pytest.mark.parametrize("kind", list(LOADERS))
def test_the_power_goes(
    tmp_path: Path, kind: str, before: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new(kind)
    folder = tmp_path / "folder"
    before(folder, old, kind)
    disk = Disk(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", disk.replace)
        patch.setattr(os, "fsync", disk.fsync)
        new.save(folder)
    assert sum(entry is None for entry in disk.log) >= 3
    news = 0
    for i, outcome in enumerate(disk.outcomes()):
        cut = put(tmp_path / str(i), outcome)
        if METADATA not in outcome:
            assert before is before_there_was_one
            continue
        loaded = LOADERS[kind](cut)
        news += same(loaded, new)
        assert same(loaded, new) or same(loaded, old)
    assert 0 < news < i


def test_new_folders_are_on_the_disk_with_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", noted)
    folder = old_and_new("components")[0].save(tmp_path / "a" / "b" / "c")
    for path in (folder, folder.parent, folder.parent.parent, tmp_path, folder / TENSORS, folder / METADATA):
        assert path.stat().st_ino in synced, path
    disk.replace_text(tmp_path / "a" / "words.txt", "said")
    assert (tmp_path / "a" / "words.txt").stat().st_ino in synced


def test_both_files_are_open_to_whom_the_umask_lets(tmp_path: Path) -> None:
    folder = old_and_new("components")[0].save(tmp_path)
    before = os.umask(0)
    os.umask(before)
    disk.replace_text(tmp_path / "words.txt", "said")
    for name in (TENSORS, METADATA, "words.txt"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~before


def test_files_of_similar_names_stay(tmp_path: Path) -> None:
    names = ["components-old.safetensors", "components-0123.safetensors", "saving", "components-{}.safetensors"]
    put(tmp_path, dict.fromkeys(names, b"mine"))
    old, new = old_and_new("components")
    old.save(tmp_path)
    new.save(tmp_path)
    assert {name: contents(tmp_path)[name] for name in names} == dict.fromkeys(names, b"mine")


def test_reading_while_it_is_saved_again_and_again(tmp_path: Path) -> None:
    pair, done, errors = old_and_new("components"), threading.Event(), []
    pair[0].save(tmp_path)

    def write() -> None:
        for i in itertools.count():
            if done.is_set():
                return
            try:
                pair[i % 2].save(tmp_path)
            except BaseException as error:
                errors.append(error)
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = []
        while len(found) < 80 or len(set(found)) < 2:  # however seldom the other thread has its turn
            assert writer.is_alive(), errors
            loaded = Decomposition.load(tmp_path)
            found.append(tuple(same(loaded, made) for made in pair))
    finally:
        done.set()
        writer.join()
    assert not errors and set(found) == {(True, False), (False, True)}


KILLING = """
import os, random, signal, sys
from pathlib import Path
import torch
from tl_paramdecomp import Decomposition
made = [Decomposition.load(sys.argv[1]) for _ in range(2)]
made[1].info["method"] = "another"
for parameter in made[1].parameters():
    parameter.data += 1
folder = made[0].save(sys.argv[2])
calls = [0]
def at(number, then):
    def note(*_):
        calls[0] += 1
        if calls[0] == number:
            then()
    calls[0] = 0
    sys.setprofile(note)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
at(0, None)
for one in made:
    one.save(folder)
sys.setprofile(None)
found, of_both = [], calls[0]
for i in range(100):
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        at(random.Random(i).randint(1, 2 * of_both), die if i % 2 else lambda: os.write(told, b"x"))
        while True:
            for one in made:
                one.save(folder)
    os.close(told)
    os.read(heard, 1)  # what it says as it goes on, or that it is gone
    os.close(heard)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    loaded = Decomposition.load(folder)
    which = int(loaded.info["method"] == "another")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), made[which].parameters(), strict=True))
    found.append(which)
print(sum(found), len(found) - sum(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_are_killed_while_saving(tmp_path: Path) -> None:
    """At a number of calls: every other one kills itself, and the others are killed as they go on."""
    command = [sys.executable, "-c", KILLING, str(FORMAT_1 / "components"), str(tmp_path)]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert min(map(int, shown.stdout.split())) > 10
