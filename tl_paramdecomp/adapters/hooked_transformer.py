"""Adapter for TransformerLens' HookedTransformer (2.16 to 3.9).

HookedTransformer applies its weights by einsum inside `attn` and `mlp`, so inputs are read where those modules are
called and outputs where their hook points stand. W_O and W_out are intercepted at the module's own result: the famous
`hook_attn_out` and `hook_mlp_out` stand after a post-norm where a model has one.
"""

import contextlib
from collections.abc import Callable, Hashable
from importlib.metadata import version
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_paramdecomp.adapters.base import Output, RowMask, Rows
from tl_paramdecomp.adapters.boundary import shadowed_method
from tl_paramdecomp.adapters.computed import is_computed, peeked
from tl_paramdecomp.adapters.interception import Interception
from tl_paramdecomp.adapters.lens import GENERATE, HookRoute, LensAdapter, no_hook_point
from tl_paramdecomp.adapters.limits import starts_later
from tl_paramdecomp.adapters.passes import refuse_wrapped, watch_generate
from tl_paramdecomp.adapters.wiring import Layout, Tap, Wiring, find_module
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import WeightSite

FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "ungroup_grouped_query_attention")


class HookedTransformerAdapter(LensAdapter):
    """Hooks a HookedTransformer's own weights."""

    host = "hooked_transformer"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        refuse_wrapped(model)
        cfg = model.cfg
        if getattr(cfg, "load_in_4bit", False):
            raise UnsupportedModelError("This HookedTransformer holds 4-bit weights; load it unquantised.")
        x = y = Tap("embed")
        if hasattr(model.embed, "ln"):
            x, y = Tap("embed", "input"), Tap("embed.ln", "input")
        self._add("embed", "W_E", None, x, y, kind="embedding")
        if cfg.positional_embedding_type in ("standard", "shortformer"):
            x, y = Tap("pos_embed", "input", position_rows), Tap("pos_embed", "output")
            self._add("pos_embed", "W_pos", None, x, y, kind="embedding")
        for i, block in enumerate(model.blocks):
            self._add_attention(block, f"blocks.{i}.attn")
            if not cfg.attn_only:
                self._add_mlp(block, f"blocks.{i}.mlp")
        self._add("unembed", "W_U", "b_U", Tap("unembed"), Tap("unembed"))
        self.refuse_repeated()
        alibi = cfg.positional_embedding_type == "alibi"  # which is computed for longer rows
        self.context_length = None if alibi else cfg.n_ctx
        self.settle(known=True)

    @property
    def vocabulary_size(self) -> int | None:
        return self.model.embed.W_E.shape[0]

    def _add(
        self,
        owner: str,
        weight: str,
        bias: str | None,
        x: Tap,
        y: Tap,
        layout: Layout = "in_out",
        kind: Literal["linear", "embedding"] = "linear",
    ) -> None:
        n, *shape = (1, 1, *peeked(find_module(self.root, owner), weight).shape)[-3:]
        heads = {}
        if layout == "heads_in_out":
            shape, heads = [shape[0], n * shape[1]], {"n_heads": n, "head_side": "out"}
        elif layout == "heads_out_in":
            shape, heads = [n * shape[0], shape[1]], {"n_heads": n, "head_side": "in"}
        name = f"{owner}.{weight.lstrip('_')}"
        site = WeightSite(name, shape[0], shape[1], kind, has_bias=bias is not None, **heads)
        self.add(Wiring(site, owner, x, y, weight, bias, layout))

    def _add_attention(self, block: Any, path: str) -> None:
        grouped = _holds(block.attn, "_W_K")
        for role, argument in (("Q", "query_input"), ("K", "key_input"), ("V", "value_input")):
            stored = "_" if grouped and role != "Q" else ""
            if stored and getattr(self.model.cfg, "ungroup_grouped_query_attention", False):
                self.refused[f"{path}.W_{role}"] = (
                    "key/value heads are repeated for every query head; call set_ungroup_grouped_query_attention(False)"
                )
                continue
            x = Tap(path, "input", lambda args, kwargs, name=argument: kwargs[name])
            y = Tap(f"{path}.hook_{role.lower()}", "output")
            self._add(path, f"{stored}W_{role}", f"{stored}b_{role}", x, y, "heads_in_out")
        self._add(path, "W_O", "b_O", Tap(f"{path}.hook_z", "output"), Tap(path, "output"), "heads_out_in")

    def _add_mlp(self, block: Any, path: str) -> None:
        if not _holds(block.mlp, "W_in"):
            reason = f"{type(block.mlp).__name__} routes tokens among experts"
            self.refused |= dict.fromkeys((f"{path}.W_in", f"{path}.W_out"), reason)
            return
        gated, x = _holds(block.mlp, "W_gate"), Tap(path, "input")
        linear = "hook_pre"
        if gated:  # a gated MLP adds b_in after gating, so it is not the bias of x W_in
            self._add(path, "W_gate", None, x, Tap(f"{path}.hook_pre", "output"))
            linear = "hook_pre_linear"
        self._add(path, "W_in", None if gated else "b_in", x, Tap(f"{path}.{linear}", "output"))
        self._add(path, "W_out", "b_out", Tap(f"{path}.hook_post", "output"), Tap(path, "output"))

    # --- state of the host --------------------------------------------------------------------------------------------
    @property
    def processing(self) -> str | None:
        folded = self.model.cfg.normalization_type in ("LNPre", "RMSPre")
        return "LayerNorm folded into the weights" if folded else None

    def flags(self) -> tuple[Hashable, ...]:
        """Flags under which other tensors pass the hook points, and whether norms hold gains."""
        return (*(bool(getattr(self.model.cfg, flag, False)) for flag in FLAGS), self.model.cfg.normalization_type)

    # --- running ------------------------------------------------------------------------------------------------------
    def watch(self, stack: contextlib.ExitStack, interception: Interception) -> None:
        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """Its own `generate` calls `forward` without `__call__`."""
            cache = kwargs.get("past_kv_cache")
            interception.begin(0 if cache is None else int(cache[0].past_keys.shape[1]), None)
            try:
                out = original(*args, **kwargs)
            finally:
                interception.tracker.end()
            if kwargs.get("start_at_layer") is None and kwargs.get("stop_at_layer") is None:
                interception.check_fired()
            return out

        stack.enter_context(shadowed_method(self.model, "forward", around))
        watch_generate(stack, self.model, interception.tracker, GENERATE)

    def run(self, tokens: Rows, attention_mask: RowMask = None) -> Output:
        if attention_mask is None:
            return self.model(tokens)
        side = "left" if starts_later(attention_mask) else "right"
        return self.model(tokens, attention_mask=attention_mask, padding_side=side)

    # --- hook points --------------------------------------------------------------------------------------------------
    def hook_registries(self) -> list[dict[str, Any]]:
        return [self.model.mod_dict, self.model.hook_dict]

    def hook_route(self, name: str) -> HookRoute:
        if name in ("embed.W_E", "pos_embed.W_pos"):
            raise no_hook_point(name, "HookedTransformer has no hook point at an embedding's input")
        if name == "unembed.W_U":
            if not hasattr(self.model.unembed, "hook_out"):
                raise no_hook_point(name, "this version of HookedTransformer has no hook point at the logits")
            return HookRoute("unembed.hook_in", "unembed.hook_out")
        block_path, part, role = name.rsplit(".", 2)
        block, cfg = self.model.blocks[int(block_path.split(".")[1])], self.model.cfg
        post_norm = getattr(cfg, "original_architecture", None) in ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
        if role in ("W_O", "W_out"):
            if hasattr(block, "ln1_post") or post_norm:
                raise no_hook_point(name, "this model normalises the product before its hook point")
            return HookRoute(self.wirings[name].x.path, f"{block_path}.hook_{part}_out")
        if cfg.positional_embedding_type == "shortformer" and name.endswith(("W_Q", "W_K")):
            raise no_hook_point(name, "shortformer adds positions after the last hook point")
        if cfg.use_split_qkv_input or cfg.use_attn_in:
            raise no_hook_point(name, "the heads' inputs are split (use_split_qkv_input or use_attn_in)")
        y_hook, which = self.wirings[name].y.path, "ln1" if part == "attn" else "ln2"
        norm = getattr(block, which)
        if isinstance(norm, nn.Identity) or post_norm:
            mid = part == "mlp" and not cfg.parallel_attn_mlp
            return HookRoute(f"{block_path}.hook_resid_{'mid' if mid else 'pre'}", y_hook)
        return HookRoute(f"{block_path}.{which}.hook_normalized", y_hook, _affine(norm))


def position_rows(args: tuple, kwargs: dict) -> Int[Tensor, "batch pos"]:
    """Rows of W_pos that PosEmbed looks up; -1 where it writes zeros, at padding."""
    named = dict(zip(("tokens", "past_kv_pos_offset", "attention_mask"), args, strict=False)) | kwargs
    tokens, offset, mask = named["tokens"], named.get("past_kv_pos_offset", 0), named.get("attention_mask")
    if mask is None:
        return torch.arange(offset, offset + tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    rows = (mask.cumsum(dim=1) - 1).clamp(min=0).masked_fill(~mask.bool(), -1)
    return rows[:, offset : offset + tokens.shape[-1]]


def _holds(module: nn.Module, name: str) -> bool:
    return name in module._parameters or is_computed(module, name)


def _affine(norm: Any) -> Callable[[Tensor], Tensor]:
    """From `hook_normalized` to the norm's output: LayerNorm of TransformerLens 2 has its gain already applied there."""
    weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if weight is None or (bias is not None and int(version("transformer-lens").split(".")[0]) < 3):
        return lambda tensor: tensor
    return lambda tensor: tensor * weight if bias is None else tensor * weight + bias
