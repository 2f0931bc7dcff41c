"""A run to be interrupted, in a process of its own, which says over a pipe where it is, and how it ended.

It says "within" in the midst of what it is to be interrupted in, and goes on from there when it is told to ("went on"); "noted"
when a signal came and the run was not left; and at last what left it. WHERE is `step` (the sixth), `save` (of a checkpoint), or
`thread` (the sixth step, where the loop runs in a thread that is not the main one).

    python -m tests.training.interrupted_run FOLDER WHERE PIPE
"""

import itertools
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.training import runs
from tl_paramdecomp.training import checkpoint as room
from tl_paramdecomp.training import watch as clock
from tl_paramdecomp.training.watch import Interrupts

STEPS, EVERY = 12, 10


HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Python's own, which are not there where the tests run in a shell's background: there SIGINT is ignored."""


def watch(pipe, where):
    """Set the clock, have signals told of, and find a place to stop; the run's data."""
    ticks = itertools.count()
    clock.now = lambda: float(next(ticks))  # a second signal is no echo of the first, however soon it is seen

    def noted(self, number, frame, note=Interrupts._note):
        note(self, number, frame)
        pipe.send("noted")

    def linger():
        pipe.send("within")
        pipe.recv()
        pipe.send("went on")

    def save(path, tensors, write=room.write_tensors):
        linger()
        write(path, tensors)

    def rows(step):
        if where != "save" and step == 5:
            linger()
        return runs.drawn_rows(step)

    Interrupts._note = noted
    if where == "save":
        room.write_tensors = save
    return rows


def run(pipe, folder, where):
    for which, handler in HANDLERS.items():
        signal.signal(which, handler)
    runs.DRAWS_IN_PYTHON = False  # the test goes on where Python's random numbers are drawn by a type checker as well
    settings = {"data": watch(pipe, where), "steps": STEPS, "checkpoint_every": EVERY}
    try:
        if where == "thread":
            thread = threading.Thread(target=lambda: runs.start("SPD", folder, **settings))
            thread.start()
            thread.join()
        else:
            runs.start("SPD", folder, **settings)
        pipe.send("returned")
    except BaseException as error:
        restored = all(signal.getsignal(which) == handler for which, handler in HANDLERS.items())
        pipe.send(f"{type(error).__name__}, handlers {'restored' if restored else 'lost'}")
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Connection(int(sys.argv[3])), Path(sys.argv[1]), sys.argv[2])
