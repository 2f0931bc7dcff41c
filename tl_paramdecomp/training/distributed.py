"""More than one process: `torchrun` starts them, each holds the target and a part of every batch.

By default every process holds all components, and gradients are averaged by `DistributedDataParallel` (`Replicas`). Components
that outgrow a device are kept in shards by torch's FSDP2 (`shard`): training brings a site's parameters together where it reads
them, and takes gradients apart again. What rows of a batch must know of each other, the methods ask for themselves.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tl_paramdecomp.components.files import Saved
from tl_paramdecomp.errors import PeerLostError, SettingError
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
    """Turns what torch says of a process that died, or did not answer in time, into PeerLostError."""
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


def shard(decomposition: Saved, processes: ProcessGroup, device: torch.device) -> None:
    """Keep a decomposition's parameters in shards, one of each on every process; SettingError where it cannot be kept so:
    subnetworks, tied sites, sites on several devices, or one process alone."""
    parts = decomposition.sharded_parts()
    if len({p.device for p in decomposition.parameters()}) > 1:
        raise SettingError(
            "shard=True needs every process to hold its target on one device; this one is spread over several."
        )
    if processes.world == 1:
        raise SettingError("shard=True needs several processes: start the run with torchrun, or leave it out.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    for part in parts:
        fully_shard(part, mesh=mesh)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one that processes keep in shards."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be kept in shards, brought together; every process must ask for it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def like(kept: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape, as the parameter is kept; others as they are."""
    if not is_shard(kept) or tensor.shape != kept.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(kept, DTensor)
    return distribute_tensor(tensor.to(kept.device), kept.device_mesh, kept.placements)


@torch.no_grad()
def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a module whose parameters may be kept in shards; RuntimeError where they are not those of it."""
    kept = module.state_dict()
    if not any(is_shard(t) for t in kept.values()):
        module.load_state_dict(tensors)
        return
    if kept.keys() != tensors.keys() or any(kept[name].shape != t.shape for name, t in tensors.items()):
        raise RuntimeError("the tensors are those of another decomposition")
    for name, tensor in tensors.items():
        kept[name].copy_(like(kept[name], tensor))


def brought_together(decomposition: Any) -> Any:
    """A decomposition whose parameters may be kept in shards, whole, on the CPU; itself where they are not."""
    kept = decomposition.state_dict()
    if not any(is_shard(t) for t in kept.values()):
        return decomposition
    return decomposition.with_tensors({name: whole(t).cpu() for name, t in kept.items()})


@torch.no_grad()
def clip(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients of a known total norm down to at most a limit, in place."""
    if not any(is_shard(p) for p in parameters):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            own_part(p.grad).mul_(factor)
