"""Components that outgrow a device: each process keeps a shard of every parameter, by torch's FSDP2.

Training brings a site's parameters together where it reads them (`Components.forward`), and takes gradients apart again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.components.saved import Saved
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.parallel import ProcessGroup


def shard(decomposition: Saved, processes: ProcessGroup, device: torch.device) -> None:
    """Keep a decomposition's parameters in shards, one of each on every process.

    Raises:
        SettingError: It cannot be kept so: subnetworks, tied sites, sites on several devices, or one process alone.
    """
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
    """Put whole tensors into a module whose parameters may be kept in shards.

    Raises:
        RuntimeError: They are not those of the module.
    """
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
    tensors = {name: whole(t).cpu() for name, t in kept.items()}
    return decomposition.with_tensors(tensors)


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
