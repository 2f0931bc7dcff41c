"""The arguments of a run, checked before anything is touched."""

from dataclasses import dataclass
from typing import Any

import torch

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.methods.random_streams import RandomScope
from tl_paramdecomp.training.guards import OnNonfinite


@dataclass(frozen=True)
class Plan:
    """What of a run may differ each time that it goes on.

    Raises:
        SettingError: A value makes no sense.
    """

    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_best: str | None = None
    on_nonfinite: OnNonfinite = "stop"
    max_skips: int = 10
    max_seconds: float | int | None = None
    accumulate: int = 1
    random_numbers: RandomScope = "per_rank"
    shard: bool = False

    def __post_init__(self) -> None:
        if min(self.log_every, self.checkpoint_every, self.keep_checkpoints) < 1 or self.max_skips < 0:
            raise SettingError(
                "log_every, checkpoint_every and keep_checkpoints must be at least 1, max_skips at least 0; given "
                f"{self.log_every}, {self.checkpoint_every}, {self.keep_checkpoints}, {self.max_skips}."
            )
        if self.accumulate < 1:
            raise SettingError(f"accumulate is a number of micro-batches, at least 1; given {self.accumulate}.")
        if self.random_numbers not in ("per_rank", "global"):
            raise SettingError(f"random_numbers is 'per_rank' or 'global'; given {self.random_numbers!r}.")
        if self.on_nonfinite not in ("stop", "skip"):
            raise SettingError(f"on_nonfinite is 'stop' or 'skip'; given {self.on_nonfinite!r}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise SettingError(f"max_seconds must be positive; given {self.max_seconds}.")


def steps_of(method: Method[Any], steps: int | None, data: Any) -> int:
    """Steps to take: none where there is nothing to train, however many are given.

    Raises:
        SettingError, DataError: The method trains, and steps or data are missing; or steps are no number of steps.
    """
    name, hint = type(method).__name__, method.without_steps
    if steps is None and not method.trains:
        return 0
    if steps is None or isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 0:
        raise SettingError(f"{name} needs steps, a number from 0 on; given {steps!r}.{hint if steps is None else ''}")
    if not method.trains:
        return 0
    if steps and data is None:
        raise DataError(f"{name} needs data to train on: token rows, batches or a dataset.{hint}")
    return steps.__index__()


def check_place(adapter: ModelAdapter, device: Any, run_dir: Any, resume: Any) -> None:
    """Refuse a device that is not the model's, and a way to resume that is none.

    Raises:
        SettingError: As said.
    """
    if device is not None and torch.device(device).type != adapter.device.type:
        raise SettingError(
            f"device={device!r}, but the model is on {adapter.device}; move the model there first, components follow it."
        )
    if resume not in ("auto", True, False):
        raise SettingError(f"resume must be 'auto', True or False; given {resume!r}.")
    if resume is True and run_dir is None:
        raise SettingError("resume=True, but without run_dir there is no checkpoint; give the run_dir of the run.")
