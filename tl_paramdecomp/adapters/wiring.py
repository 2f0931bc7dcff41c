"""Where a weight site lives in a tree of torch modules: its parameter, its layout, and where x and y pass.

Every host is torch underneath, so one description serves them all; what differs is which modules a host names.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tl_paramdecomp.adapters.computed import read_tensor
from tl_paramdecomp.adapters.convolution import Patches
from tl_paramdecomp.errors import UnsupportedSiteError
from tl_paramdecomp.sites import WeightSite

Layout = Literal["in_out", "out_in", "heads_in_out", "heads_out_in", "kernel"]
"""How the host stores W: `in_out` [d_in, d_out] (Conv1D, TransformerLens MLPs, embeddings), `out_in` [d_out, d_in]
(nn.Linear), `heads_in_out` [head, d_model, d_head] (TransformerLens W_Q, W_K, W_V), `heads_out_in` [head, d_head, d_model]
(its W_O), `kernel` [d_out, channels, *kernel] (convolutions)."""
Columns = tuple[int, ...] | slice | None
"""Output columns of a fused weight (such as c_attn) that belong to one site; None: all."""
READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Number types of weights that are their own values; 8-bit and smaller ones need scales that only their host knows."""


@dataclass(frozen=True)
class Tap:
    """A place in the module tree where a tensor passes."""

    path: str  # dotted path of the module
    point: Literal["call", "input", "output"] = "call"
    """`call`: x and y are that module's own first argument and result. `input`: what goes into it. `output`: what comes
    out of it, after every hook that others put there (as x) or before (as y)."""
    read: Callable[[tuple, dict], Tensor] | None = None
    """From the module's arguments to x, where x is not the first positional argument."""


@dataclass(frozen=True)
class Wiring:
    """How one site is read, written and intercepted in a tree of torch modules."""

    site: WeightSite
    owner: str  # dotted path of the module that holds the weight
    x: Tap
    y: Tap
    weight: str = "weight"  # attribute of the owner that holds it
    bias: str | None = "bias"  # attribute that holds the bias, or None where the host adds none inside this map
    layout: Layout = "out_in"
    columns: Columns = None
    scale: float = 1.0  # what the host multiplies the product by: Gemma's embedding is sqrt(d_model) times its table
    patches: Patches | None = None  # for a convolution: from its images to the patches that its matrix reads

    def stored_weight(self, matrix: Float[Tensor, "d_in d_out"], old: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The host's whole tensor with this site's part replaced, in the host's layout and dtype."""
        old = old.detach()
        matrix = matrix.to(old.dtype) if self.scale == 1.0 else (matrix / self.scale).to(old.dtype)
        if self.layout == "heads_in_out":
            heads, d_model, d_head = old.shape
            return matrix.reshape(d_model, heads, d_head).permute(1, 0, 2).contiguous()
        if self.layout == "heads_out_in":
            return matrix.reshape(old.shape)
        if self.layout == "kernel":
            return matrix.T.reshape(old.shape).contiguous()
        full = (old.T if self.layout == "out_in" else old).clone()
        put_columns(full, self.columns, matrix)
        return full.T.contiguous() if self.layout == "out_in" else full

    def stored_bias(self, bias: Float[Tensor, " d_out"], old: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The host's whole bias with this site's part replaced, in the host's shape and dtype."""
        flat = old.detach().reshape(-1).clone()
        put_columns(flat, self.columns, bias.to(old.dtype))
        return flat.view_as(old)

    def renamed(self, **fields: Any) -> "Wiring":
        """The same with other fields of its site."""
        return replace(self, site=replace(self.site, **fields))


def find_module(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; attributes that are not registered children are followed too."""
    module: Any = root
    for part in path.split(".") if path else ():
        module = module._modules[part] if part in module._modules else getattr(module, part)
    return module


def plain_path(path: str) -> str:
    """A module's path in transformers, without the wrappers that a bridge puts around the modules."""
    return ".".join(part for part in path.split(".") if part.strip("_") != "original_component")


def structure(root: nn.Module) -> Hashable:
    """What wirings are made from, numbers apart: modules and their types, parameters, shapes, and which of them are one."""
    found: list[Hashable] = []
    numbers: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        module = stack.pop()
        slots = module.__dict__
        parameters, children = slots["_parameters"], slots["_modules"]
        if id(module) in seen or not (parameters or children):
            continue
        seen.add(id(module))
        compiled = slots.get("_compiled_call_impl") is not None
        found += (id(module), type(module), compiled, *children, *map(type, children.values()))
        for name, tensor in parameters.items():
            found += (name, tensor if tensor is None else numbers.setdefault(id(tensor), len(numbers)))
            if tensor is not None and not is_lazy(tensor):
                found += (tensor.shape, tensor.dtype)
        stack += [child for child in children.values() if child is not None]
    return tuple(found)


# --- reading and writing ----------------------------------------------------------------------------------------------
def read_parameter(root: nn.Module, wiring: Wiring) -> Tensor:
    """The host's own tensor that holds the site's weight; computed anew where the host computes it from others.

    UnsupportedSiteError where it is on the meta device, quantised, or computed and another one each time.
    """
    name = wiring.site.name
    tensor = read_tensor(find_module(root, wiring.owner), wiring.weight, name)
    if tensor.is_meta:
        raise UnsupportedSiteError(
            f"The weight of {name} is on the meta device and holds no numbers; load the model's weights first."
        )
    if tensor.dtype not in READABLE:
        raise UnsupportedSiteError(
            f"The weight of {name} is stored as {tensor.dtype}: quantised weights cannot be decomposed; "
            "load the model in float32, bfloat16 or float16."
        )
    return tensor


def read_weight(root: nn.Module, wiring: Wiring) -> Float[Tensor, "d_in d_out"]:
    """W [d_in, d_out] of a site, attached to the host's parameter; a view where the layout allows one."""
    tensor = read_parameter(root, wiring)
    if wiring.layout == "heads_in_out":
        matrix = tensor.permute(1, 0, 2).reshape(tensor.shape[1], -1)
    elif wiring.layout == "heads_out_in":
        matrix = tensor.reshape(-1, tensor.shape[-1])
    elif wiring.layout == "kernel":
        matrix = tensor.flatten(1).T
    else:
        matrix = tensor.T if wiring.layout == "out_in" else tensor
    matrix = take_columns(matrix, wiring.columns)
    return matrix if wiring.scale == 1.0 else matrix * wiring.scale


def read_bias(root: nn.Module, wiring: Wiring) -> Float[Tensor, " d_out"] | None:
    """Bias [d_out] of a site, attached to the host's parameter, or None."""
    bias = read_tensor(find_module(root, wiring.owner), wiring.bias, wiring.site.name) if wiring.bias else None
    return None if bias is None else take_columns(bias.reshape(-1), wiring.columns)


def take_columns(tensor: Tensor, columns: Columns) -> Tensor:
    """The last-axis entries of a fused tensor that belong to one site; the tensor itself where it is not fused."""
    if isinstance(columns, slice):
        return tensor[..., columns]
    return tensor if columns is None else tensor.index_select(-1, _indices(columns, tensor.device))


def put_columns(tensor: Tensor, columns: Columns, part: Tensor) -> None:
    """Write one site's part into the last axis of a tensor, in place."""
    if columns is None or isinstance(columns, slice):
        tensor[..., columns or slice(None)] = part
    else:
        tensor.index_copy_(-1, _indices(columns, tensor.device), part)


@functools.lru_cache(maxsize=4096)
def _indices(columns: tuple[int, ...], device: torch.device) -> Int[Tensor, " columns"]:
    return torch.tensor(columns, device=device)
