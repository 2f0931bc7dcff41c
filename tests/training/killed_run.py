"""A run that is killed again and again, and one that is not, as JSON: whether they are the same, and what each kill left.

Every run is a process of its own, forked from this one, and kills itself. Half of the kills come somewhere in the training, by
how many functions were called; the others between two operations on files, or in the middle of writing one.

    python -m tests.training.killed_run METHOD KILLS SEED FOLDER
    python -m tests.training.killed_run METHOD everywhere FOLDER
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

import tl_paramdecomp as tlpd
from tests.training.runs import lines, start
from tests.training.test_fit import same, tiny_gpt2
from tl_paramdecomp.training import watch as clock
from tl_paramdecomp.training.checkpoint import Checkpoints

OPERATIONS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.truncate",
    "os.scandir",
    "os.chmod",
    "os.utime",
}
"""What Python tells its audit hooks of; `os.replace` is a rename there."""


def forked(work):
    """Process that does some work and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_operations(folder, note):
    """Call something right before each operation on files of a folder; where it writes tensors, with them and their path."""

    def about_to(event, args):
        if event in OPERATIONS and any(str(folder) in str(arg) for arg in args):
            note()

    def save(tensors, path):
        note(tensors, path)
        whole(tensors, path)

    whole, safetensors.torch.save_file = safetensors.torch.save_file, save
    sys.addaudithook(about_to)


def dying_at(n, folder):
    """Die right before the n-th operation on files of a folder, or within it where it writes tensors."""
    count = itertools.count(1)

    def note(tensors=None, path=None):
        if next(count) == n:
            if tensors is not None:
                data = safetensors.torch.save(tensors)
                Path(path).write_bytes(data[: len(data) // 2])
            die()

    at_operations(folder, note)


def noting_moments(folder, found):
    """Note before which operations the files are as they were before none, and where tensors are written; and how many are."""
    count, seen, looking = itertools.count(1), set(), []

    def note(tensors=None, path=None):
        if looking:
            return
        n = next(count)
        looking.append(n)
        files = sorted(p for p in folder.rglob("*") if p.name != ".lock")
        now = tuple((str(p), p.stat().st_mode, p.read_bytes() if p.is_file() else None) for p in files)
        looking.clear()
        if tensors is not None or now not in seen:
            found.append(n)
            seen.add(now)

    at_operations(folder, note)
    return lambda: [*found, next(count)]


def look(folder):
    """Step of the newest checkpoint, after everything that is there was opened."""
    found = Checkpoints(folder / "checkpoints").newest()
    places = [folder / "decomposition", *([] if found is None else [found.folder / "decomposition"])]
    for place in places:
        if place.exists():
            kind = json.loads((place / "decomposition.json").read_text()).get("kind")
            (tlpd.Decomposition if kind is None else tlpd.SubnetworkDecomposition).load(place)
    return -1 if found is None else found.step


class Calls:
    """A callback that counts what Python calls and returns from in training, and kills the process at a number of it.

    Args:
        last: The number, if any.
        told: A file that gets how many there were, at the end.
    """

    def __init__(self, last=None, told=None):
        self.count, self.last, self.told = 0, last, told

    def begin(self, run):
        sys.setprofile(self.note)

    def note(self, frame, event, arg):
        self.count += 1
        if self.count == self.last:
            die()

    def __call__(self, info):
        pass

    def end(self):
        sys.setprofile(None)
        if self.told:
            self.told.write_text(str(self.count))


def main(method, kills, seed, folder):
    """The whole comparison."""
    torch.set_num_threads(1)
    draw, model, folder = random.Random(seed), tiny_gpt2(), Path(folder)
    settings, counted = {"model": model, "steps": 2 * kills + 6}, Calls(told=folder / "calls")
    _, code = os.waitpid(forked(lambda: start(method, folder / "whole", callbacks=[counted], **settings)), 0)
    assert code == 0
    of_a_step, left, newest = int(counted.told.read_text()) // settings["steps"], [], -1

    def cut(aimed, chosen):
        if aimed:
            dying_at(1 + int(chosen * (150 if newest < settings["steps"] else 60)), folder)
            start(method, folder / "cut", **settings)
        else:
            start(method, folder / "cut", callbacks=[Calls(1 + int(10 * of_a_step * chosen))], **settings)

    for i in range(kills):
        chosen = draw.random()
        _, code = os.waitpid(forked(lambda aimed=i % 2 == 1, chosen=chosen: cut(aimed, chosen)), 0)
        newest = look(folder / "cut")
        left.append({"killed": os.WIFSIGNALED(code), "code": code, "step": newest})
    made = start(method, folder / "cut", **settings)
    whole = type(made).load(folder / "whole" / "decomposition")
    loaded = type(made).load(folder / "cut" / "decomposition")
    report = {
        "same": same(made, whole) and same(loaded, whole),
        "log": lines(folder / "cut") == lines(folder / "whole"),
        "kills": left,
        "left_over": sorted(p.name for p in (folder / "cut").rglob(".*") if p.name != ".lock"),
    }
    print(json.dumps(report))


def moments(method, folder, settings):
    """Numbers of the operations on files before which a kill leaves what none before it did, and one past the last."""

    def run():
        found = noting_moments(folder / "noted", [])
        start(method, folder / "noted", **settings)
        (folder / "moments").write_text(json.dumps(found()))

    assert os.waitpid(forked(run), 0)[1] == 0
    return json.loads((folder / "moments").read_text())


def everywhere(method, folder):
    """Runs of five steps killed at one after another of their operations on files; a list of what each left."""
    torch.set_num_threads(1)
    clock.now = lambda: 0.0  # the log of every run is the same
    model, folder, left = tiny_gpt2(), Path(folder), []
    settings = {"model": model, "steps": 5, "checkpoint_every": 2, "keep_checkpoints": 1, "keep_best": "loss"}
    whole = start(method, folder / "whole", **settings)
    for n in moments(method, folder, settings):
        place = folder / str(n)

        def cut(n=n, place=place):
            dying_at(n, place)
            start(method, place, **settings)

        _, code = os.waitpid(forked(cut), 0)
        step = look(place)
        _, again = os.waitpid(forked(lambda place=place: start(method, place, **settings)), 0)
        made = type(whole).load(place / "decomposition")
        over = sorted(p.name for p in place.rglob(".*") if p.name != ".lock")
        alike = again == 0 and same(made, whole) and lines(place) == lines(folder / "whole") and not over
        left.append({"at": n, "killed": os.WIFSIGNALED(code), "step": step, "same": alike})
        shutil.rmtree(place)
    print(json.dumps(left))


if __name__ == "__main__":
    if sys.argv[2] == "everywhere":
        everywhere(sys.argv[1], sys.argv[3])
    else:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
