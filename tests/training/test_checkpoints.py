"""Checkpoints: what is in them, which ones stay, which one is gone on with, and what a disk that fails leaves."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tl_paramdecomp.components.disk import read_tensors
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.sources import BatchSource
from tl_paramdecomp.errors import DecompositionFileError, DiskSpaceError, DivergedError, SettingError
from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.parallel import ALONE, Window
from tl_paramdecomp.training import checkpoint as room
from tl_paramdecomp.training.callbacks import STOP
from tl_paramdecomp.training.checkpoint import Checkpoints, read_checkpoint, size_of
from tl_paramdecomp.training.state import random_tensors, set_random

from . import runs
from .checkpoints import metadata, newest, seal, steps
from .runs import METHODS, lines, start
from .test_fit import same, tiny_gpt2


@pytest.fixture(autouse=True)
def type_checked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "DRAWS_IN_PYTHON", False)
        yield


def stopped(name, folder, at, **changes):
    """A run that a callback ends after some steps."""
    return start(name, folder, callbacks=[lambda info: STOP if info.step == at else None], **changes)


# --- going on ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_bit_for_bit(tmp_path, name):
    """Whose data draws from global random numbers; others are drawn in between."""
    whole = start(name, tmp_path / "whole")
    part = stopped(name, tmp_path / "cut", 4)
    assert part.info["stopped_after"] == 4 and not same(part, whole)
    assert "stopped_after" not in whole.info
    rest = start(name, tmp_path / "cut")
    assert same(rest, whole) and lines(tmp_path / "cut") == lines(tmp_path / "whole")
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "cut")
    for file in ("optimiser", "memory", "random"):
        ours, theirs = (read_tensors(folder / f"{file}.safetensors") for folder in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("python")), file


@pytest.mark.parametrize("source", ["masks.0.", "torch", "numpy", "numpy.gauss"])
def test_every_source_of_random_numbers_matters(tmp_path, source):
    """Without what was saved of it, the rest of the run is another."""
    whole = start("SPD", tmp_path / "whole")
    stopped("SPD", tmp_path / "cut", 3)
    path = newest(tmp_path / "cut") / "random.safetensors"
    tensors = read_tensors(path)
    if source.endswith("gauss"):  # half of a pair is left over, or not
        tensors[source] = tensors[source] + 1.0
        tensors["numpy"][-1] = 1
    elif source == "masks.0.":
        tensors[source] = torch.Generator().manual_seed(99).get_state()
    elif source == "torch":
        tensors[source] = torch.Generator().manual_seed(98).get_state()
    else:
        tensors[source][1:100] += 1
    room.write_tensors(path, tensors)
    seal(path.parent)
    assert not same(start("SPD", tmp_path / "cut"), whole)


def test_what_was_drawn_globally_is_drawn_again(tmp_path):
    """The global sources stand after a resumed run where they stand after one that never stopped."""
    start("SPD", tmp_path / "whole")
    wanted = torch.rand(3), np.random.rand(3), np.random.randn(3)
    stopped("SPD", tmp_path / "cut", 5)
    start("SPD", tmp_path / "cut")
    found = torch.rand(3), np.random.rand(3), np.random.randn(3)
    assert torch.equal(found[0], wanted[0]) and (found[1] == wanted[1]).all() and (found[2] == wanted[2]).all()


@pytest.mark.parametrize("odd", [False, True])
def test_random_numbers_as_tensors_and_back(odd):
    """Of all five sources, with half of a normal pair left over or not."""
    numbers = RandomNumbers(3)

    def draw():
        found = [random.random() for _ in range(3)], [random.gauss(0, 1) for _ in range(2 + odd)]
        drawn = numbers.of_microbatch(0, Window(0, 9, 9))
        ours = np.random.rand(700).tolist(), np.random.randn(2 + odd).tolist()
        return *found, *ours, torch.rand(9).tolist(), drawn.uniform([9], torch.zeros(1)).tolist()

    draw()
    before = random_tensors(numbers, ALONE)
    wanted = draw()
    draw()
    set_random(before, numbers, ALONE, 0)
    assert draw() == wanted


class Counted(BatchSource):
    """Rows that depend on how often they were asked for, which their state says."""

    def __init__(self):
        self.asked, self.restored = 0, []

    def batch(self, step):
        self.asked += 1
        return Batch(torch.randint(0, 31, (4, 8), generator=torch.Generator().manual_seed(self.asked)), None)

    def state(self):
        return {"asked": self.asked}

    def restore(self, state):
        self.restored.append(dict(state))
        self.asked = state["asked"]


@pytest.mark.parametrize("name", ["SPD", "targeted"])
def test_data_is_put_where_it_stood(tmp_path, monkeypatch, name):
    """Each stream gets its own state back, before the first batch is asked for."""
    made = []

    def sources(data, *args, **kwargs):
        made.append(Counted())
        return made[-1]

    monkeypatch.setattr("tl_paramdecomp.training.fit.batch_source", sources)
    whole = start(name, tmp_path / "whole")
    stopped(name, tmp_path / "cut", 5)
    values = metadata(newest(tmp_path / "cut"))
    assert values["data"] == {"asked": 5} and values["background"] == ({"asked": 5} if name == "targeted" else None)
    made.clear()
    assert same(start(name, tmp_path / "cut"), whole)
    assert [source.restored for source in made] == [
        [{"asked": 5}],
        [],
        *([[{"asked": 5}]] if name == "targeted" else []),
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_nothing_is_mapped_from_files_that_will_be_deleted(tmp_path):
    stopped("VPD", tmp_path, 4)
    maps = []
    start("VPD", tmp_path, callbacks=[lambda info: maps.append(Path("/proc/self/maps").read_text())])
    assert len(maps) == 4 and not any("/checkpoints/" in text for text in maps)


# --- which stay -------------------------------------------------------------------------------------------------------
def test_the_last_and_the_best_are_kept(tmp_path):
    values = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 1.5}

    def judge(info):
        if info.step in values:
            info.figures["held_out"] = values[info.step]

    settings = {"steps": 10, "checkpoint_every": 2, "callbacks": [judge]}
    start("SPD", tmp_path / "two", keep_best="held_out", **settings)
    assert sorted(steps(tmp_path / "two")) == [4, 8, 10]
    best = json.loads((tmp_path / "two" / "checkpoints" / "best.json").read_text())
    assert best == {"step": 4, "figure": "held_out", "value": 1.0}
    assert lines(tmp_path / "two")[3]["held_out"] == 1.0
    start("SPD", tmp_path / "one", keep_checkpoints=1, **settings)
    assert sorted(steps(tmp_path / "one")) == [10]
    start("SPD", tmp_path / "all", keep_checkpoints=9, **settings)
    assert sorted(steps(tmp_path / "all")) == [2, 4, 6, 8, 10]
    for folder in steps(tmp_path / "all").values():
        read_checkpoint(folder)


def test_the_best_is_known_after_the_run_goes_on(tmp_path):
    """By a figure of the log itself, also where checkpoints fall between logged steps."""
    settings = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 30}
    start("SPD", tmp_path / "logged", **settings)
    loss = {line["step"]: line["loss"] for line in lines(tmp_path / "logged")}
    changes = {"steps": 12, "checkpoint_every": 2, "keep_best": "loss", "log_every": 5, "keep_checkpoints": 1}
    start("SPD", tmp_path / "cut", callbacks=[lambda info: STOP], **changes)
    start("SPD", tmp_path / "cut", **changes)
    best = min((step for step in loss if step % 2 == 0), key=loss.__getitem__)
    known = json.loads((tmp_path / "cut" / "checkpoints" / "best.json").read_text())
    assert (known["step"], known["value"]) == (best, loss[best])
    assert sorted(steps(tmp_path / "cut")) == sorted({best, 12})


def test_an_unknown_figure_is_refused(tmp_path):
    with pytest.raises(SettingError, match="keep_best='los' is no logged figure; there are loss, "):
        start("SPD", tmp_path, keep_best="los")


@pytest.mark.parametrize("changes", [
    {"keep_checkpoints": 0}, {"log_every": 0}, {"checkpoint_every": 0}, {"max_skips": -1}, {"max_seconds": 0},
    {"max_seconds": float("nan")},
], ids=str)  # fmt: skip
def test_bad_arguments(tmp_path, changes):
    with pytest.raises(SettingError):
        start("SPD", tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


# --- broken ones ------------------------------------------------------------------------------------------------------
def damage(folder, how):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if how == "gone":
        (folder / "checkpoint.json").unlink()
    elif how == "empty":
        (folder / "checkpoint.json").write_text("")
    elif how == "format":
        values = metadata(folder) | {"format": 2}
        (folder / "checkpoint.json").write_text(json.dumps(values))
        seal(folder)
    elif how == "json":
        path = folder / "checkpoint.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    elif how == "list":
        (folder / "checkpoint.json").write_text("[1, 2]")
    elif how == "short":
        os.truncate(folder / "optimiser.safetensors", 100)
    elif how == "file":
        (folder / "decomposition" / "components.safetensors").unlink()
    else:
        path = files[int(how)]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["gone", "empty", "format", "json", "list", "short", "file", *map(str, range(6))])
def test_a_broken_newest_checkpoint_is_passed_over(tmp_path, capsys, how):
    """The six numbers: one bit of each file in turn."""
    stopped("VPD", tmp_path / "cut", 7)
    assert sorted(steps(tmp_path / "cut")) == [6, 7]
    assert sum(p.is_file() for p in newest(tmp_path / "cut").rglob("*")) == 6
    damage(newest(tmp_path / "cut"), how)
    capsys.readouterr()
    found = Checkpoints(tmp_path / "cut" / "checkpoints").newest()
    assert found is not None and found.step == 6
    err = capsys.readouterr().err
    assert "step-00000007 is broken" in err and "of step 6" in err and err.startswith("Warning:")


def test_from_the_checkpoint_before_the_run_is_the_same(tmp_path):
    whole = start("VPD", tmp_path / "whole")
    stopped("VPD", tmp_path / "cut", 7)
    damage(newest(tmp_path / "cut"), "short")
    assert same(start("VPD", tmp_path / "cut", checkpoint_every=2), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert sorted(steps(tmp_path / "cut")) == [6, 8]


def test_where_all_are_broken_it_says_what_to_do(tmp_path):
    stopped("SPD", tmp_path, 7)
    for folder in steps(tmp_path).values():
        damage(folder, "short")
    for resume in ("auto", True):
        with pytest.raises(DecompositionFileError, match=r"None of the 2 checkpoints.*resume=False"):
            start("SPD", tmp_path, resume=resume)
    made = start("SPD", tmp_path, resume=False)
    assert same(made, start("SPD")) and sorted(steps(tmp_path)) == [6, 8]


def test_beginning_anew_forgets_the_checkpoints_of_before(tmp_path):
    """They are deleted once there is a new one, and are not gone on with where there is none."""
    start("SPD", tmp_path, steps=9)
    with pytest.raises(ZeroDivisionError):
        start("SPD", tmp_path, steps=9, seed=1, resume=False, callbacks=[lambda info: 1 // 0])
    assert steps(tmp_path) == {} and len(list((tmp_path / "checkpoints").glob(".discarded-*"))) == 2
    stopped("SPD", tmp_path, 4, steps=9, seed=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_of_another_kind_of_device_is_refused(tmp_path):
    stopped("SPD", tmp_path, 4)
    folder = newest(tmp_path)
    (folder / "checkpoint.json").write_text(json.dumps(metadata(folder) | {"device": "cuda"}))
    seal(folder)
    with pytest.raises(SettingError, match="run on cuda, and this one is on cpu"):
        start("SPD", tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    stopped("SPD", tmp_path, 4)
    path = newest(tmp_path) / "random.safetensors"
    tensors = read_tensors(path)
    del tensors["masks.0."]
    room.write_tensors(path, tensors)
    seal(path.parent)
    with pytest.raises(DecompositionFileError, match="does not fit this run"):
        start("SPD", tmp_path)


# --- disks that fail --------------------------------------------------------------------------------------------------
def test_room_on_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    stopped("SPD", tmp_path, 3)
    before = {p: p.read_bytes() for p in newest(tmp_path).rglob("*") if p.is_file()}
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 20_000))
    with pytest.raises(
        DiskSpaceError, match=r"of step 6 takes 0\.\d MB.* 0\.0 MB free\. The last good .* of step 3, stays"
    ):
        start("SPD", tmp_path)
    assert {p: p.read_bytes() for p in newest(tmp_path).rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    assert same(start("SPD", tmp_path), start("SPD"))


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_a_checkpoint_is_told_beforehand(tmp_path, monkeypatch, name):
    told = []
    monkeypatch.setattr(room, "size_of", lambda state: told.append(size_of(state)) or told[-1])
    start(name, tmp_path, keep_checkpoints=1)
    written = sum(p.stat().st_size for p in newest(tmp_path).rglob("*") if p.is_file())
    assert written <= told[-1] <= written + room.SLACK


@pytest.mark.parametrize("where", ["fsync", "tensors", "rename", "mkdir"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")], ids=str)
def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch, where, error):
    stopped("SPD", tmp_path, 3)

    def fail(*args, **kwargs):
        raise error

    place = {
        "fsync": (room.os, "fsync"), "tensors": (room, "write_tensors"), "rename": (room.os, "rename"),
        "mkdir": (room.Path, "mkdir"),
    }[where]  # fmt: skip

    def begin_to_fail(info):
        if info.step == 6:
            monkeypatch.setattr(*place, fail)

    with pytest.raises(
        DecompositionFileError, match=r"checkpoint of step 6 .*The last good checkpoint, of step 3, stays"
    ):
        start("SPD", tmp_path, callbacks=[begin_to_fail])
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]
    assert same(start("SPD", tmp_path), start("SPD"))


def with_quota(code, folder):
    """Run code where no file may be larger than 20 kB; its last line says what was raised."""
    command = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n{code}"
    return subprocess.run([sys.executable, "-c", command, str(folder)], capture_output=True, text=True)


def test_a_real_quota(tmp_path):
    """The tensors of a checkpoint do not fit in; the log and the run's settings do."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    stopped("SPD", tmp_path, 3)
    code = (
        "import sys; from pathlib import Path; from tests.training.runs import start\n"
        "from tl_paramdecomp.errors import DecompositionFileError\n"
        "try: start('SPD', Path(sys.argv[1]))\n"
        "except DecompositionFileError as error: print(error)"
    )
    shown = with_quota(code, tmp_path)
    assert "File too large" in shown.stdout and "of step 3, stays" in shown.stdout, shown.stderr
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003"]
    assert same(start("SPD", tmp_path), start("SPD"))


def test_a_small_disk_that_is_full(tmp_path, monkeypatch):
    """A real one where this process may mount it; that there is no room is not known beforehand."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        monkeypatch.setattr(room, "size_of", lambda state: 0)
        stopped("SPD", disk / "run", 3)
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 50_000))
        with pytest.raises(DecompositionFileError, match=r"(?i)no space left.*of step 3, stays"):
            start("SPD", disk / "run")
        assert read_checkpoint(newest(disk / "run")).step == 3
        monkeypatch.undo()
        with pytest.raises(DiskSpaceError):
            start("SPD", disk / "run")
        (disk / "other").unlink()
        assert same(start("SPD", disk / "run"), start("SPD"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_system_that_cannot_be_written_to(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        stopped("SPD", disk / "run", 3)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert read_checkpoint(newest(disk / "run")).step == 3
        for folder in (disk / "run", disk / "new"):
            with pytest.raises(DecompositionFileError, match="Read-only file system.*choose another run_dir"):
                start("SPD", folder)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_without_the_right_to_write():
    """In a process without any rights, as root may write everywhere; all that it imports is imported before."""
    code = (
        "import os, sys; from pathlib import Path; from tests.training.runs import start\n"
        "from tl_paramdecomp.errors import DecompositionFileError\n"
        "start('SPD', Path(sys.argv[1]) / 'run', steps=3)\n"
        "for path in (Path(sys.argv[1]), Path(sys.argv[1]) / 'run'): path.chmod(0o555)\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "for name in ('run', 'new'):\n"
        "    try: start('SPD', Path(sys.argv[1]) / name, steps=3)\n"
        "    except DecompositionFileError as error: print(error)"
    )
    folder = tempfile.mkdtemp()
    try:
        shown = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    finally:
        for path in (folder, f"{folder}/run"):
            os.chmod(path, 0o755)
        shutil.rmtree(folder)
    assert shown.stdout.count("Permission denied") == 2, shown.stdout + shown.stderr
    assert shown.stdout.count("choose another run_dir") == 2


def test_what_is_not_finite_is_not_saved(tmp_path):
    """Spoiled by a callback right before a checkpoint is due."""

    def spoil(info):
        if info.step == 6:
            with torch.no_grad():
                info.decomposition["blocks.0.mlp.W_out"].U[2, 3] = float("inf")

    with pytest.raises(DivergedError, match=r"After step 6, blocks\.0\.mlp\.W_out\.U is not finite.*of step 3, stays"):
        start("SPD", tmp_path, callbacks=[spoil])
    assert sorted(steps(tmp_path)) == [3]
    assert same(start("SPD", tmp_path), start("SPD"))


def test_optimiser_and_memory_are_looked_at_too(tmp_path):
    from tl_paramdecomp.training.guards import FiniteGuard
    from tl_paramdecomp.training.state import SavedState

    model, states = tiny_gpt2(), []
    seen = room.size_of
    try:
        room.size_of = lambda state: states.append(state) or seen(state)
        start("VPD", tmp_path, model=model, steps=3)
    finally:
        room.size_of = seen
    state: SavedState = states[0]
    FiniteGuard().check(state, "")
    key = f"{len(state.parameters[0])}.exp_avg_sq"
    for tensor, words in (
        (state.optimiser[key], "optimiser's exp_avg_sq of importance.network"),
        (state.memory["persistent_adversarial/blocks.0.mlp.W_in/mean"], "remembers as persistent_adversarial/blocks.0"),
    ):
        kept = tensor.clone()
        tensor.view(-1)[-1] = float("nan")
        with pytest.raises(DivergedError, match=words):
            FiniteGuard().check(state, "")
        tensor.copy_(kept)
