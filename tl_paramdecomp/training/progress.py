"""What a run shows while it goes on: progress bars where somebody looks, and single lines that are never left out."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def is_watched() -> bool:
    """Whether standard error is a terminal, or the cell of a notebook."""
    in_notebook = type(sys.stdout).__module__.startswith("ipykernel")
    return in_notebook or bool(getattr(sys.stderr, "isatty", lambda: False)())


class Shown:
    """The progress bars of a run.

    Args:
        progress: Whether there are any; None: where somebody looks.
    """

    def __init__(self, progress: bool | None) -> None:
        self.hidden = not (is_watched() if progress is None else progress)

    def phase(self, what: str, total: int) -> Iterable[int]:
        """Numbers 0 to total - 1 under a bar."""
        return tqdm(range(total), desc=what, disable=self.hidden, leave=False)

    def steps(self, total: int, first: int) -> "tqdm[Any]":
        """The bar of the steps; use it as a context."""
        return tqdm(
            total=total, initial=first, desc="decompose", disable=self.hidden, unit="step", mininterval=0.5
        )  # fmt: skip


def say(text: str) -> None:
    """One line on standard error, above the bars."""
    tqdm.write(text, file=sys.stderr)
