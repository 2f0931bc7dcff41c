"""What a process holds: resident memory, the tensors that are made and let go, and what the machine has left."""

import contextlib
import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Trace(NamedTuple):
    """Which tensors were made and let go in a stretch of work, in order."""

    sizes: list[int]
    """Bytes of each that was made."""
    events: list[int]
    """The number of one that was made, or ~ the number of one that was let go."""

    def peak(self, weigh: Callable[[int], float] = float) -> float:
        """The most that was there at once, of tensors that weigh what is given for their bytes."""
        weights = [weigh(size) for size in self.sizes]
        live = most = 0.0
        for event in self.events:
            live += weights[event] if event >= 0 else -weights[~event]
            most = max(most, live)
        return most


class Traced(TorchDispatchMode):
    """Within it, tensors that operations make on a device are noted in `trace`, and when they go.

    What CUDA's backward passes make is not seen: they run in threads of their own.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.trace = device, Trace([], [])
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        number = len(self.trace.sizes)
        self._seen.add(storage)
        self.trace.sizes.append(storage.nbytes())
        self.trace.events.append(number)
        weakref.finalize(storage, self.trace.events.append, ~number)


def continued(few: Trace, more: Trace, rows: tuple[int, int], wanted: int) -> Trace:
    """The trace of a training step of `wanted` rows, from those of steps of two other numbers of rows.

    A step does the same whatever its number of rows, and the size of each tensor is affine in it. Where the two steps did not
    do the same, all tensors of the larger are scaled so that the peak is affine.
    """
    share = (wanted - rows[0]) / (rows[1] - rows[0])
    if few.events == more.events:
        return Trace([round(a + share * (b - a)) for a, b in zip(few.sizes, more.sizes, strict=True)], more.events)
    a, b = few.peak(), more.peak()
    factor = (a + share * (b - a)) / max(b, 1.0)
    return Trace([round(factor * size) for size in more.sizes], more.events)


class Peak:
    """The most memory that a device has held since it was made: resident memory of this process for the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR.exists():
            with contextlib.suppress(OSError):
                CLEAR.write_text("5", encoding="ascii")

    def bytes(self) -> int:
        """So many bytes; what was held before counts where the system keeps no peak that can be reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()


def held(device: torch.device) -> int:
    """Bytes in use now: allocated on a CUDA device, resident memory of this process for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """The most resident memory that this process has had, since `Peak` was last made where that can be told."""
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def give_back() -> None:
    """Let the C library return what it keeps of memory that was freed, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [n for n in (_meminfo(), _cgroup_left()) if n is not None]
    return min(found) if found else None


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, those that share memory counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None


def _meminfo() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_left() -> int | None:
    """What a container's limit leaves."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    return None
