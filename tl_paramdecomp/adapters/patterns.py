"""Attention patterns of every layer, as they stand in a forward pass: softmax(q k^T / sqrt(d_head) + mask).

1. Find where each layer's pattern passes: TransformerLens' `hook_pattern`, or what the attention module of a transformers
   model returns beside its output.
2. While the context lasts, let transformers compute attention eagerly: fused kernels never hold a pattern.
3. Keep what passes, graph and all, after every other hook there; a new pass begins anew.
4. Try it out once on a few tokens, and refuse where something else than softmaxed rows comes out, or other logits.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters.shortcuts import PROBE_SHAPE, Runner, probe_tokens

Patterns = dict[int, Float[Tensor, "batch head query key"]]
"""By layer."""

EAGER = "eager"
ATTENTION = "_attn_implementation"
"""Attribute of transformers configurations and models that names the kernel."""
SMALL = 1e-2
"""Share of the largest logit by which fused and eager attention may differ, whatever the dtype."""


@contextlib.contextmanager
def collected_patterns(root: nn.Module, first: nn.Module, taps: Mapping[int, nn.Module]) -> Iterator[Patterns]:
    """A dictionary that holds the patterns of the last pass.

    Args:
        root: The host's module tree.
        first: Its first block, which every pass calls; users have several ways to call what is around it.
        taps: By layer, the module whose output is the pattern, or holds it.
    """
    kept: Patterns = {}
    hooks: list[tuple[nn.Module, int]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(root))
        for layer, module in taps.items():
            if _takes_output_attentions(module):
                stack.callback(module.register_forward_pre_hook(_ask_for_pattern, with_kwargs=True).remove)
            handle = module.register_forward_hook(functools.partial(_keep, kept, layer))
            hooks.append((module, handle.id))
            stack.callback(handle.remove)
        stack.callback(first.register_forward_pre_hook(functools.partial(_begin, kept, hooks)).remove)
        yield kept


def _begin(kept: Patterns, hooks: list[tuple[nn.Module, int]], module: nn.Module, args: tuple) -> None:
    """A pass begins: forget the last one, and move behind the hooks that others have put up meanwhile."""
    kept.clear()
    for tapped, hook_id in hooks:
        there: Any = tapped._forward_hooks  # torch keeps an OrderedDict and declares a dict
        there.move_to_end(hook_id)


def _keep(kept: Patterns, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    pattern = next((part for part in reversed(parts) if isinstance(part, Tensor) and part.ndim == 4), None)
    if pattern is not None:
        kept[layer] = pattern


def _takes_output_attentions(module: nn.Module) -> bool:
    """Whether an attention module must be asked for its pattern, as those of older transformers must."""
    return "output_attentions" in inspect.signature(type(module).forward).parameters


def _ask_for_pattern(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, kwargs | {"output_attentions": True}


@contextlib.contextmanager
def eager_attention(root: nn.Module) -> Iterator[None]:
    """Let every transformers module of a tree compute attention step by step, and as before afterwards."""
    stored = f"{ATTENTION}_internal"  # behind a property, whose setter would reach into sub-configurations
    holders = {id(held): held for module in root.modules() for held in (module, getattr(module, "config", None))}
    attributes = [getattr(held, "__dict__", {}) for held in holders.values()]
    slots = [(slot, name) for slot in attributes for name in (stored, ATTENTION) if name in slot]
    before = [slot[name] for slot, name in slots]
    try:
        for slot, name in slots:
            slot[name] = EAGER
        yield
    finally:
        for (slot, name), value in zip(slots, before):
            slot[name] = value


def why_no_patterns(adapter: Runner, taps: Mapping[int, nn.Module]) -> str:
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
