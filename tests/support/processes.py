"""Processes of their own for tests. They are forked from one that has imported what they need, without a type checker, and they
say over a pipe where they are: a test waits for what it hears, and no result depends on how long that takes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HANGS = 300.0
"""Seconds after which a process counts as one that never speaks or ends. It guards the tests; none passes by it."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "tests.training.interrupted_run", "tests.training.ranked_run", "tests.training.two_ranks",
    "transformers.models.gpt2.modeling_gpt2",
])  # fmt: skip


class EndedError(Exception):
    """A process ended without a word."""


def hear(pipe: Connection) -> Any:
    """What the process at the other end says next.

    Raises:
        EndedError: It has ended, and there is no more.
    """
    assert pipe.poll(HANGS), f"nothing was heard within {HANGS:.0f} s"
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        raise EndedError from None


class Child:
    """A function of a module that is called in a process of its own, with a pipe to this one as its first argument.

    Args:
        errors: Gets what it writes to standard error.
        work: The function.
        arguments: Its others.
        environment: Added to the variables there are.
    """

    def __init__(
        self, errors: Path, work: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None
    ):
        self.errors = errors
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_call, args=(errors, environment or {}, work, theirs, *arguments))
        self.process.start()
        theirs.close()

    def send_signal(self, which: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, which)

    def wait(self, seconds: float = HANGS) -> int:
        """Its exit code, once it has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it had not ended after {seconds:.0f} s"
        return self.process.exitcode

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()


def _call(
    errors: Path, environment: dict[str, str], work: Callable[..., None], pipe: Connection, *arguments: Any
) -> None:
    file = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(pipe, *arguments)


@contextmanager
def ranks(folder: Path, processes: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[Child]]:
    """Processes that find each other as those of `torchrun` do, in a store that is kept here; none outlives the context."""
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    children: list[Child] = []
    try:
        for i in range(processes):
            own = {"RANK": str(i), "LOCAL_RANK": str(i)}
            children.append(Child(folder / f"rank-{i}.txt", work, *arguments, environment=shared | own))
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.pipe.close()


def all_well(children: list[Child]) -> None:
    """Wait until all have ended well. Where one did not, the others are not waited for: they may wait for what it owes them."""
    going: dict[Any, Child] = {child.process.sentinel: child for child in children}
    while going:
        ended = wait(list(going), HANGS)
        assert ended, f"{len(going)} of {len(children)} processes had not ended after {HANGS:.0f} s"
        for sentinel in ended:
            child = going.pop(sentinel)
            assert child.wait() == 0, child.errors.read_text()[-3000:]
