"""What a process holds: resident memory, live tensors operation by operation, and what the machine has left."""

import contextlib
import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of tensors that were made within it and are still there, after every operation.

    A training step does the same operations whatever its number of rows, and what is live after each of them is affine in
    that number: two traces say what any other step will hold (`continued`).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.trace = device, 0, [0]
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self._seen:
                    self._note(storage)
        self.trace.append(self.live)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def continued(few: Sequence[int], more: Sequence[int], rows: tuple[int, int], wanted: int) -> int:
    """The most bytes that are live in a step of `wanted` rows, from the traces of steps of two other numbers of rows.

    Where the two steps did not do the same operations, their largest values are continued instead.
    """
    share = (wanted - rows[0]) / (rows[1] - rows[0])
    if len(few) != len(more):
        few, more = [max(few)], [max(more)]
    return max(round(a + share * (b - a)) for a, b in zip(few, more, strict=True))


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
