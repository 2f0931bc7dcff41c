"""Batches in pieces: the rows of one process, and its micro-batches.

What one piece needs to know of the others (the gradient of what all rows share, how often a component fired in the whole
batch) it asks for by yielding a request; all pieces of a process run side by side up to the same request, the processes add
theirs, and each piece goes on with the answer. A batch that is whole is answered at once with what it asked about.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tl_paramdecomp.parallel import ALONE, ProcessGroup


@dataclass(frozen=True)
class Total:
    """Asks for the sums of tensors over all pieces of the batch."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Every:
    """Asks for the tensors of all pieces, one after the other in the order of the batch's rows; each [n, ...]."""

    tensors: dict[str, Tensor]


Request: TypeAlias = Total | Every
Work: TypeAlias = Generator[Tensor | Request, Any, Any]
"""One piece's work: yields terms, whose gradients are taken at once, and requests, whose answers it is sent."""


def run_together(
    pieces: Sequence[Work],
    processes: ProcessGroup = ALONE,
    on_term: Callable[[int, Tensor], None] | None = None,
    around: Callable[[int], AbstractContextManager[Any]] | None = None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Any]:
    """Run the pieces of a batch side by side; returns what each returns.

    Args:
        pieces: Their work, all asking for the same things in the same order.
        processes: The processes that hold the other pieces.
        on_term: Given a piece's number and each term it yields.
        around: Makes a context for a piece's number, entered from one request to the next.
        within: Makes a context for the work itself, without what `on_term` does.
    """
    results: list[Any] = [None] * len(pieces)
    answers: list[Any] = [None] * len(pieces)
    while True:
        requests: list[Request] = []
        for i, piece in enumerate(pieces):
            with nullcontext() if around is None else around(i):
                asked, results[i] = _advance(piece, answers[i], i, on_term, within)
            if asked is not None:
                requests.append(asked)
        if not requests:
            return results
        if len(requests) < len(pieces):
            raise RuntimeError("Pieces of one batch asked for different things; this is a fault of the loss.")
        answers = [_answer(requests, processes)] * len(pieces)


def run_alone(work: Work, on_term: Callable[[Tensor], None] | None = None) -> Any:
    """Run the work of a batch that is whole; returns what it returns."""
    return run_together([work], on_term=None if on_term is None else lambda _, term: on_term(term))[0]


def _advance(
    piece: Work,
    answer: Any,
    number: int,
    on_term: Callable[[int, Tensor], None] | None,
    within: Callable[[], AbstractContextManager[Any]],
) -> tuple[Request | None, Any]:
    """Run a piece to its next request, or to its end."""
    while True:
        try:
            with within():
                item = piece.send(answer)
        except StopIteration as done:
            return None, done.value
        if isinstance(item, Total | Every):
            return item, None
        if on_term is not None:
            on_term(number, item)
        del item
        answer = None


def _answer(requests: Sequence[Request], processes: ProcessGroup) -> dict[str, Tensor]:
    first = requests[0].tensors
    if len(requests) == processes.world == 1:
        return first
    if isinstance(requests[0], Total):
        sums = dict(first)
        for request in requests[1:]:
            sums = {name: value + request.tensors[name] for name, value in sums.items()}
        return processes.total(sums)
    own = {name: torch.cat([request.tensors[name] for request in requests]) for name in first}
    return {name: torch.cat(processes.every(t)) for name, t in own.items()}
