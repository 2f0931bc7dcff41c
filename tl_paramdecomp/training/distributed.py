"""More than one process: `torchrun` starts them, each holds the target and a part of every batch.

By default every process holds all components, and gradients are averaged by `DistributedDataParallel` (`Replicas`). Components
that outgrow a device are kept in shards by FSDP2 (`shards`). The engines are torch's own; what rows of a batch must know of
each other, the methods add up themselves (`parallel`).
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tl_paramdecomp.errors import PeerLostError
from tl_paramdecomp.methods.method import LossReport, Method, TrainingStep
from tl_paramdecomp.parallel import ALONE, ProcessGroup

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for another that is alive but does not answer."""
LOST = ("connection", "gloo", "nccl", "timed out", "timeout", "socket", "broken pipe", "peer")
"""What messages about a process that no longer answers speak of."""


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[ProcessGroup]:
    """The processes of this run: those of the process group where there is one, those `torchrun` started, or this one alone.

    A process group that is made here is ended here, unless an error ends the run.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield ALONE
        return
    mine = not dist.is_initialized()
    if mine:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    messages = None if dist.get_backend() == "gloo" else device
    yield ProcessGroup(dist.group.WORLD, messages) if dist.get_world_size() > 1 else ALONE
    if mine:  # after an error it ends with the process: others may wait for what this one no longer sends
        gc.collect()  # a DDP module that outlives its group can block when it is freed at last
        dist.destroy_process_group()


def leads() -> bool:
    """Whether this process writes and talks: the first of those that `torchrun` started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device(name: str) -> str:
    """A device as a process of its own should take it: of several GPUs, each process on a machine has one."""
    return f"{name}:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


@contextlib.contextmanager
def answering(processes: ProcessGroup, where: Callable[[], str]) -> Iterator[None]:
    """Turns what torch says of a process that is gone into an error that names it as such.

    Raises:
        PeerLostError: Another process died, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        if processes.world == 1 or not (isinstance(error, dist.DistError) or any(word in told for word in LOST)):
            raise
        raise PeerLostError(
            f"Process {processes.rank} of {processes.world} does not hear from another one {where()} The other died or "
            "stopped; see what it printed. Start the run again to go on from its last checkpoint. "
            f"({str(error).splitlines()[0]})"
        ) from error


class Replicas:
    """Every process holds all components; their gradients are averaged after each step.

    A step takes the gradients of its terms one by one, and they gather in the parameters; the module's output then touches
    every parameter once, so that DDP sends each bucket of gradients once.
    """

    def __init__(self, method: Method[Any], decomposition: Any, processes: ProcessGroup) -> None:
        self._learner = _Learner(method, decomposition)
        self._wrapped = DistributedDataParallel(self._learner, process_group=processes.group)

    def gradients(self, step: TrainingStep) -> LossReport:
        """The method's gradients, averaged over processes."""
        self._wrapped(step).backward()
        assert self._learner.report is not None
        return self._learner.report


class _Learner(nn.Module):
    """What DDP wraps: the target's forward passes run inside; its parameters are those of the decomposition alone."""

    def __init__(self, method: Method[Any], decomposition: nn.Module) -> None:
        super().__init__()
        self.method, self.decomposition = method, decomposition
        self.report: LossReport | None = None

    def forward(self, step: TrainingStep) -> Tensor:
        self.report = self.method.gradients(step)
        return _Touch.apply(*(p for p in self.decomposition.parameters() if p.requires_grad))


class _Touch(torch.autograd.Function):
    """A scalar whose gradient with respect to every parameter is 0."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(p.new_zeros(()).expand(p.shape) for p in ctx.saved_tensors)
