"""Processes that share a batch: which rows each has, and sums over all of them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tl_paramdecomp.errors import DataError


class Window(NamedTuple):
    """Which rows of a batch a microbatch holds."""

    first: int
    rows: int
    of: int
    """Rows of the whole batch."""


class Place(NamedTuple):
    """Where a microbatch stands in its batch."""

    window: Window = Window(0, 1, 1)
    weight: float = 1.0
    """Share of its positions that count among those of the whole batch: a mean over the batch is the sum of the
    microbatches' means, each times its weight."""
    n_processes: int = 1
    """Among which gradients are averaged."""
    local: Window | None = None
    """Its rows among those of its own process; None where it is the whole batch."""

    @property
    def share(self) -> float:
        """Factor on a mean over the microbatch, so that gradients averaged over processes are those of the batch's mean."""
        return self.weight * self.n_processes

    @property
    def leads(self) -> bool:
        """Whether it is the first of its process, which does what is to be done once."""
        return self.local is None or self.local.first == 0


WHOLE = Place()


class ProcessGroup:
    """The processes that a batch is divided among; by itself, one. Messages are on `device`; None: anywhere."""

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device
        self.rank, self.world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def total(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over processes, in one message for each dtype and device."""
        if self.world == 1:
            return tensors
        found: dict[str, Tensor] = {}
        for dtype, device in {(t.dtype, t.device): None for t in tensors.values()}:
            some = {name: t for name, t in tensors.items() if (t.dtype, t.device) == (dtype, device)}
            flat = torch.cat([t.reshape(-1) for t in some.values()]).to(self.device)
            dist.all_reduce(flat, group=self.group)
            parts = flat.to(device).split([t.numel() for t in some.values()])
            found |= {name: part.view(t.shape) for (name, t), part in zip(some.items(), parts, strict=True)}
        return {name: found[name] for name in tensors}

    def every(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in their order; they may differ in their first dimension."""
        if self.world == 1:
            return [tensor]
        sizes = [0] * self.world
        sizes[self.rank] = len(tensor)
        sizes = self.total({"": torch.tensor(sizes)})[""].tolist()
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:])).to(self.device)
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        return [t[:size].to(tensor.device) for t, size in zip(found, sizes, strict=True)]

    def any_of(self, *flags: bool) -> list[bool]:
        """Each of some flags, whether it is set on any process."""
        if self.world == 1:
            return list(flags)
        return [bool(n) for n in self.total({"": torch.tensor([int(flag) for flag in flags])})[""].tolist()]

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.any_of(False)


ALONE = ProcessGroup()


def windows(rows: int, processes: ProcessGroup, accumulate: int, together: int = 1) -> list[Window]:
    """Rows of this process's microbatches, of a batch of so many rows, else DataError; those that belong together stay so."""
    parts = processes.world * accumulate
    if rows % (parts * together):
        among = f"{processes.world} processes x " * (processes.world > 1) + f"{accumulate} micro-batches"
        pairs = f", {together} rows together" if together > 1 else ""
        raise DataError(f"A batch of {rows} rows cannot be divided among {among}{pairs}; choose another batch_size.")
    each, first = rows // parts, processes.rank * accumulate
    return [Window(i * each, each, rows) for i in range(first, first + accumulate)]
