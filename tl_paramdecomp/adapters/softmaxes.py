"""Softmaxes of attention as they are taken, on every host: what goes in, and patterns held as constants.

Hosts compute attention in code of their own, but all of them call torch's softmax on scores [batch, head, query, key]. A torch
function mode sees those calls, in the order of a forward pass; fused kernels, which make none, are switched to eager attention.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_paramdecomp.adapters.patterns import eager_attention

SOFTMAXES = frozenset({torch.softmax, nn.functional.softmax, Tensor.softmax})


class Softmaxes(TorchFunctionMode):
    """Sees every softmax over [batch, head, query, key] while it is active."""

    def __init__(self, hold: bool) -> None:
        super().__init__()
        self.hold = hold
        self.scores: list[Float[Tensor, "batch head query key"]] = []
        """What went into each, masks added, in order."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in SOFTMAXES or out.ndim != 4:
            return out
        self.scores.append((args[0] if args else kwargs["input"]).detach())
        return out.detach() if self.hold else out


@contextlib.contextmanager
def attention_softmaxes(root: nn.Module, hold: bool = False) -> Iterator[Softmaxes]:
    """Within this context attention is computed eagerly and its softmaxes are seen.

    Args:
        root: The host's module tree.
        hold: Cut every pattern from the graph, so that no gradient reaches queries and keys.
    """
    with eager_attention(root), Softmaxes(hold) as seen:
        yield seen
