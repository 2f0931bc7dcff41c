"""The options of a run, checked before anything is touched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.methods.random_streams import RandomScope
from tl_paramdecomp.settings import Count, Positive, Seed, Settings, Whole

OnNonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class RunConfig(Settings):
    """Options of `decompose` by the same names, which explains them: `decompose(model, sites, method, data, **vars(config))`.

    Raises:
        SettingError: A value makes no sense.
    """

    steps: Whole | None = None
    """Optimiser steps."""
    batch_size: Whole = 16
    """Rows per step, of all processes together."""
    seed: Seed = 0
    """Start, order of the rows and masks."""
    run_dir: str | Path | None = None
    """Where the run keeps its files; None: nowhere."""
    resume: Literal["auto"] | bool = "auto"
    """Go on from a checkpoint in `run_dir`; auto: where there is one."""
    log_every: Count = 10
    """Steps between lines of the log."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""
    keep_best: str | None = None
    """A logged figure; the checkpoint where it is lowest stays too."""
    on_nonfinite: OnNonfinite = "stop"
    """What a step does that is not finite: `stop` the run, or be left out (`skip`)."""
    max_skips: Whole = 10
    """Steps in a row that may be left out."""
    max_seconds: Positive | None = None
    """The run saves and returns after the first step that ends later than this."""
    accumulate: Count = 1
    """Micro-batches of each process."""
    random_numbers: RandomScope = "per_rank"
    """`global`: the run is the same, to rounding, on any number of processes and micro-batches."""
    shard: bool = False
    """Keep components in shards, one on each process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume is True and self.run_dir is None:
            raise SettingError("resume=True, but without run_dir there is no checkpoint; give the run_dir of the run.")

    def steps_of(self, method: Method[Any], data: Any) -> int:
        """Steps to take: none where there is nothing to train, however many are given; SettingError or DataError where the
        method trains, and steps or data are missing."""
        name, hint = type(method).__name__, method.without_steps
        if not method.trains:
            return 0
        if self.steps is None:
            raise SettingError(f"{name} needs steps, a number from 0 on; given None.{hint}")
        if self.steps and data is None:
            raise DataError(f"{name} needs data to train on: token rows, batches or a dataset.{hint}")
        return self.steps
