"""What a host's attention does between its weights: patterns, the softmaxes they come from, and rotary embeddings.

Patterns pass at TransformerLens' `hook_pattern`, or are what the attention module of a transformers model returns beside its
output, once attention is computed eagerly: fused kernels never hold one. They are tried out on a few tokens, and refused where
something else than softmaxed rows comes out, or other logits.

Rotations are the host's own cosines and sines: what its attention modules are handed (transformers), its buffers (GPT-J), or
its own rotation (HookedTransformer); nothing is taken from a family's name. Which of a head's coordinates are paired, halves
(Llama, GPT-NeoX) or neighbours (GPT-J), is left open: the candidates are tried on the model's own scores.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_paramdecomp.adapters.shortcuts import PROBE_SHAPE, configurations, probe_tokens
from tl_paramdecomp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter

Patterns = dict[int, Float[Tensor, "batch head query key"]]  # by layer
Rotation = Callable[[Float[Tensor, "batch pos *terms d_head"]], Float[Tensor, "batch pos *terms d_head"]]

EAGER = "eager"
ATTENTION = "_attn_implementation"  # attribute of transformers configurations and models that names the kernel
SMALL = 1e-2  # share of the largest logit by which fused and eager attention may differ, whatever the dtype
SOFTMAXES = frozenset({torch.softmax, nn.functional.softmax, Tensor.softmax})
QK_NORMS = {
    "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "q_ln", "k_ln", "qk_norm", "query_layernorm",
}  # fmt: skip
"""Names of modules that normalise queries or keys inside an attention."""
SOFT_CAPS = ("attn_logit_softcapping", "attn_scores_soft_cap")


# --- patterns ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def collected_patterns(root: nn.Module, first: nn.Module, taps: Mapping[int, nn.Module]) -> Iterator[Patterns]:
    """A dictionary that holds the patterns of the last pass, graph and all, as they are after every other hook.

    `first` is the first block, which every pass calls; `taps`, by layer, the modules whose output is the pattern or holds it.
    """
    kept: Patterns = {}
    hooks: list[tuple[nn.Module, int]] = []

    def begin(module: nn.Module, args: tuple) -> None:
        """A pass begins: forget the last one, and move behind the hooks that others have put up meanwhile."""
        kept.clear()
        for tapped, hook_id in hooks:
            there: Any = tapped._forward_hooks  # torch keeps an OrderedDict and declares a dict
            there.move_to_end(hook_id)

    def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        for part in parts:
            if isinstance(part, Tensor) and part.ndim == 4:
                kept[layer] = part

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True}

    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(root))
        for layer, module in taps.items():
            if "output_attentions" in inspect.signature(type(module).forward).parameters:  # of older transformers
                stack.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
            handle = module.register_forward_hook(functools.partial(keep, layer))
            hooks.append((module, handle.id))
            stack.callback(handle.remove)
        stack.callback(first.register_forward_pre_hook(begin).remove)
        yield kept


@contextlib.contextmanager
def eager_attention(root: nn.Module) -> Iterator[None]:
    """Let every transformers module of a tree compute attention step by step, and as before afterwards."""
    stored = f"{ATTENTION}_internal"  # behind a property, whose setter would reach into sub-configurations
    holders = {id(held): held for module in root.modules() for held in (module, getattr(module, "config", None))}
    attributes = [getattr(held, "__dict__", {}) for held in holders.values()]
    before = [(slot, name, slot[name]) for slot in attributes for name in (stored, ATTENTION) if name in slot]
    try:
        for slot, name, _ in before:
            slot[name] = EAGER
        yield
    finally:
        for slot, name, value in before:
            slot[name] = value


def why_no_patterns(adapter: "ModelAdapter", taps: Mapping[int, nn.Module]) -> str:
    """What stands against collecting patterns on this host; empty where nothing does."""
    if not taps:
        return "it has no attention that is known to be one"
    tokens = probe_tokens(adapter)
    try:
        with torch.no_grad(), adapter.undisturbed():
            plain = adapter.forward(tokens)
            with collected_patterns(adapter.root, adapter.block_modules()[0], taps) as kept:
                logits = adapter.forward(tokens)
    except Exception as error:
        return f"a forward pass with eager attention fails ({type(error).__name__}: {str(error)[:120]})"
    if (logits - plain).abs().max() > SMALL * plain.abs().max():
        return "eager attention gives it other logits, as dropout does"
    return next((why for layer in taps if (why := _why_not(layer, kept.get(layer)))), "")


def _why_not(layer: int, pattern: Tensor | None) -> str:
    if pattern is None:
        return f"the attention of layer {layer} gives no pattern"
    rows, length = PROBE_SHAPE
    if (pattern.shape[0], *pattern.shape[2:]) != (rows, length, length):
        return f"what the attention of layer {layer} gives over {rows} x {length} tokens is {list(pattern.shape)}"
    sums = pattern.float().sum(-1)
    if bool((pattern < 0).any()) or bool(((sums - 1).abs() > SMALL).any()):
        return f"the rows of layer {layer}'s pattern do not sum to one (dropout, or attention sinks)"
    return ""


# --- softmaxes --------------------------------------------------------------------------------------------------------
class Softmaxes(TorchFunctionMode):
    """Sees every softmax over [batch, head, query, key] while it is active, in the order of a forward pass.

    Hosts compute attention in code of their own, but all of them call torch's softmax on scores.
    """

    def __init__(self, hold: bool) -> None:
        super().__init__()
        self.hold = hold
        self.scores: list[Float[Tensor, "batch head query key"]] = []  # what went into each, masks added

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
    """Within this context attention is eager and its softmaxes are seen; `hold` lets no gradient reach queries and keys."""
    with eager_attention(root), Softmaxes(hold) as seen:
        yield seen


# --- rotations --------------------------------------------------------------------------------------------------------
def refuse_unknown_scores(root: nn.Module, block: nn.Module) -> None:
    """Refuse attention whose scores are known not to be scaled inner products (UnsupportedModelError)."""
    configs = configurations(root)
    norms = sorted({path.rpartition(".")[2] for path, _ in block.named_modules()} & QK_NORMS)
    norms = norms or [name for name in ("use_qk_norm", "qk_layernorm") for c in configs if getattr(c, name, False)]
    caps = [f"{name}={cap}" for name in SOFT_CAPS for c in configs if (cap := getattr(c, name, None) or 0) > 0]
    kinds = [getattr(c, "positional_embedding_type", None) for c in configs]
    alibi = any(getattr(c, "alibi", False) or getattr(getattr(c, "attn_config", None), "alibi", False) for c in configs)
    alibi = alibi or "alibi" in kinds or any(getattr(c, "model_type", "") == "bloom" for c in configs)
    if norms:
        why = f"it normalises queries and keys after their weights (qk-norm: {', '.join(norms)})"
    elif caps:
        why = f"it caps scores by a tanh (soft-capping: {caps[0]})"
    elif alibi:
        why = "it adds a bias that falls with distance to its scores (ALiBi)"
    elif "relative_positional_bias" in kinds:
        why = "it adds a learned bias by distance to its scores (relative positional bias)"
    else:
        return
    raise UnsupportedModelError(
        f"The attention scores of this model are no sum over pairs of query and key components: {why}. Read components' "
        "writes with component_acts or per_head instead."
    )


@contextlib.contextmanager
def seen_angles(block: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list that fills with the (cosines, sines) [batch, pos, n] that the modules of a block are handed."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("position_embeddings")
        if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
            seen.append((given[0].detach(), given[1].detach()))

    with contextlib.ExitStack() as stack:
        for module in block.modules():
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield seen


def rotations(
    block: nn.Module, angles: Iterable[tuple[Tensor, Tensor]], length: int, d_head: int
) -> dict[str, Rotation]:
    """Ways in which a block may turn its queries and keys [batch, length, ..., d_head], by name; `none` is always among them.

    `angles` is what `seen_angles` kept.
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
