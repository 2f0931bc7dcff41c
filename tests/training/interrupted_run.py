"""A run to be interrupted, in a process of its own: says where it is on standard output, and how it ended.

    python -m tests.training.interrupted_run FOLDER WHERE

WHERE is `step` or `long` (the sixth step takes one second, or 20), `save` (so does a checkpoint), or `thread` (the loop runs in
a thread that is not the main one).
"""

import signal
import sys
import threading
import time
from pathlib import Path

import torch

from tests.training import runs
from tl_paramdecomp.training.runs import checkpoint as room

STEPS, EVERY = 12, 10


def linger(seconds):
    print("within", flush=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


def rows(where):
    def make(step):
        if where != "save" and step == 5:
            linger({"step": 1.0, "long": 20.0, "thread": 20.0}.get(where, 0.0))
        return runs.drawn_rows(step)

    return make


def save_slowly(path, tensors, write=room.write_tensors):
    linger(20.0)
    write(path, tensors)


def main(folder, where):
    torch.set_num_threads(1)
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    if where == "save":
        room.write_tensors = save_slowly
    runs.DRAWS_IN_PYTHON = False  # the test goes on where Python's random numbers are drawn by a type checker as well
    settings = {"data": rows(where), "steps": STEPS, "checkpoint_every": EVERY}
    try:
        if where == "thread":
            thread = threading.Thread(target=lambda: runs.start("SPD", folder, **settings))
            thread.start()
            thread.join()
        else:
            runs.start("SPD", folder, **settings)
        print("returned", flush=True)
    except BaseException as error:
        restored = all(signal.getsignal(which) == handler for which, handler in before.items())
        print(type(error).__name__, "handlers restored" if restored else "handlers lost", flush=True)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
