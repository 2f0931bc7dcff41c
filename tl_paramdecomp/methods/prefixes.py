"""What the target gives before the first decomposed block, remembered row by row, where the same rows come again.

Every row passes alone, whether it is remembered or not: what it gives depends neither on the rows beside it nor on what there
was room for, so that a run that is resumed, which remembers nothing, is the same to the bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter


class Prefixes:
    """Remembers the residual stream before a block, of as many rows as have room.

    Args:
        room: Bytes of streams that are remembered at most.
    """

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self._rows: dict[bytes, Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def before(
        self,
        adapter: ModelAdapter,
        block: int,
        tokens: Shaped[Tensor, "batch ..."],
        attention_mask: Int[Tensor, "batch pos"] | None,
    ) -> Any:
        """What the block before one of the adapter's returned for these rows, as `adapter.resumed` takes it; None where that
        cannot be told apart by rows."""
        rows = (
            tokens.unbind() if attention_mask is None else [torch.stack(pair) for pair in zip(tokens, attention_mask)]
        )
        keys = [
            bytes(f"{block} {row.dtype} {tuple(row.shape)} ", "ascii") + row.cpu().numpy().tobytes() for row in rows
        ]
        found = {}
        for i, key in enumerate(keys):
            if key in found:
                continue
            if key not in self._rows:
                mask = None if attention_mask is None else attention_mask[i : i + 1]
                output = adapter.stream_before(block, tokens[i : i + 1], mask)
                tensors = tensors_of(output)
                if tensors is None or any(t.ndim == 0 or len(t) != 1 for t in tensors):
                    return None
                found[key] = output
                size = sum(t.nbytes for t in tensors)
                if self.used + size <= self.room:
                    self._rows[key] = output
                    self.used += size
            else:
                found[key] = self._rows[key]
        return _joined([found[key] for key in keys])


def tensors_of(output: Any) -> list[Tensor] | None:
    """The tensors in what a block returned; None where it holds what cannot be looked through."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple | list):
        parts = [tensors_of(part) for part in output]
        return None if None in parts else [tensor for part in parts for tensor in part or ()]
    return None if isinstance(output, Mapping) else []


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of single rows as one of all of them."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*map(_joined, zip(*outputs, strict=True)))
    if isinstance(first, tuple | list):
        return type(first)(map(_joined, zip(*outputs, strict=True)))
    return first
