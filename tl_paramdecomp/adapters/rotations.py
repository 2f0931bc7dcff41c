"""How a host's attention turns queries and keys before their inner product: rotary embeddings as it applies them.

Nothing is taken from the name of a family. The cosines and sines are the host's own: what its attention modules are handed
(transformers), its buffers (GPT-J), or its own rotation (HookedTransformer). Which of a head's coordinates are paired, halves
(Llama, GPT-NeoX) or neighbours (GPT-J), is left open: the candidates are tried on the model's own scores. What is known to
make scores something else than scaled inner products is refused by name.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.errors import UnsupportedModelError

Rotation = Callable[[Float[Tensor, "batch pos *terms d_head"]], Float[Tensor, "batch pos *terms d_head"]]

QK_NORMS = frozenset(
    {
        "q_norm",
        "k_norm",
        "q_layernorm",
        "k_layernorm",
        "query_norm",
        "key_norm",
        "q_ln",
        "k_ln",
        "qk_norm",
        "query_layernorm",
    }
)
"""Names of modules that normalise queries or keys inside an attention."""
SOFT_CAPS = ("attn_logit_softcapping", "attn_scores_soft_cap")


def refuse_unknown_scores(root: nn.Module, block: nn.Module) -> None:
    """Refuse attention whose scores are known not to be scaled inner products of queries and keys.

    Raises:
        UnsupportedModelError: Queries and keys are normalised, scores are capped, or biased by distance.
    """
    config: Any = getattr(getattr(root, "original_model", root), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    configs = [c for c in (getattr(root, "cfg", None), text) if c is not None]
    norms = sorted({p.rpartition(".")[2] for p, _ in block.named_modules()} & QK_NORMS)
    normed = norms or [name for name in ("use_qk_norm", "qk_layernorm") for c in configs if getattr(c, name, False)]
    if normed:
        raise _refused(f"it normalises queries and keys after their weights (qk-norm: {', '.join(normed)})")
    for name in SOFT_CAPS:
        for c in configs:
            if (getattr(c, name, None) or 0) > 0:
                raise _refused(f"it caps scores by a tanh (soft-capping: {name}={getattr(c, name)})")
    for c in configs:
        kind = getattr(c, "positional_embedding_type", None)
        nested = getattr(getattr(c, "attn_config", None), "alibi", False)
        if kind == "alibi" or getattr(c, "alibi", False) or nested or getattr(c, "model_type", "") == "bloom":
            raise _refused("it adds a bias that falls with distance to its scores (ALiBi)")
        if kind == "relative_positional_bias":
            raise _refused("it adds a learned bias by distance to its scores (relative positional bias)")


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The attention scores of this model are no sum over pairs of query and key components: {why}. Read components' "
        "writes with component_acts or per_head instead."
    )


@contextlib.contextmanager
def seen_angles(block: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that fills with the (cosines, sines) [batch, pos, n] that the modules of a block are handed."""
    seen: list[tuple[Tensor, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for module in block.modules():
            handle = module.register_forward_pre_hook(functools.partial(_keep_angles, seen), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def _keep_angles(seen: list[tuple[Tensor, Tensor]], module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = kwargs.get("position_embeddings")
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        seen.append((given[0].detach(), given[1].detach()))


def rotations(
    block: nn.Module, angles: Iterable[tuple[Tensor, Tensor]], length: int, d_head: int
) -> dict[str, Rotation]:
    """Ways in which a block may turn its queries and keys, by name; `none` is always among them.

    Args:
        block: The host's block.
        angles: What `seen_angles` kept.
        length: Positions of the rows.
        d_head: Width of a head.
    """
    found: dict[str, Rotation] = {"none": lambda x: x}
    for module in block.modules():
        if hasattr(module, "rotary_cos") and hasattr(module, "apply_rotary"):
            found["the host's own rotation"] = functools.partial(_of_hooked_transformer, module)
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor) and table.ndim == 2 and length <= len(table):
            sines, cosines = table[:length].chunk(2, -1)
            found["neighbours, angles of the attention's buffer"] = functools.partial(_neighbours, cosines, sines)
    for cosines, sines in angles:
        n = cosines.shape[-1]
        if cosines.shape[-2] != length or n > d_head or n % 2:
            continue
        found["halves"] = functools.partial(_halves, cosines, sines)
        found["neighbours"] = functools.partial(_neighbours, cosines[..., : n // 2], sines[..., : n // 2])
        found["neighbours, angles repeated"] = functools.partial(_neighbours, cosines[..., ::2], sines[..., ::2])
        if 2 * n <= d_head:
            found["neighbours, one angle each"] = functools.partial(_neighbours, cosines, sines)
        break
    return found


def _of_hooked_transformer(attention: Any, x: Float[Tensor, "batch pos *terms d_head"]) -> Tensor:
    return attention.apply_rotary(x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)).view_as(x)


def _aligned(angles: Tensor, x: Tensor) -> Tensor:
    """[pos, n] or [batch, pos, n] with axes of one for the terms."""
    angles = angles.to(x.device, x.dtype)
    angles = angles if angles.ndim == 3 else angles.unsqueeze(0)
    return angles.view(*angles.shape[:2], *(1,) * (x.ndim - 3), angles.shape[-1])


def _halves(cosines: Tensor, sines: Tensor, x: Float[Tensor, "batch pos *terms d_head"]) -> Tensor:
    cos, sin, n = _aligned(cosines, x), _aligned(sines, x), cosines.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def _neighbours(cosines: Tensor, sines: Tensor, x: Float[Tensor, "batch pos *terms d_head"]) -> Tensor:
    cos, sin, n = _aligned(cosines, x), _aligned(sines, x), 2 * cosines.shape[-1]
    even, odd, rest = x[..., 0:n:2], x[..., 1:n:2], x[..., n:]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([turned, rest], -1)
