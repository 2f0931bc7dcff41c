"""Adapter for TransformerLens' HookedTransformer (2.16 to 3.9).

HookedTransformer applies its weights by einsum inside `attn` and `mlp`, so inputs are read where those modules are
called and outputs where their hook points stand. W_O and W_out are intercepted at the module's own result: the famous
`hook_attn_out` and `hook_mlp_out` stand after a post-norm where a model has one.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters.base import make_interception
from tl_paramdecomp.adapters.boundary import shadowed_method
from tl_paramdecomp.adapters.computed import is_computed, peeked, why_unknown
from tl_paramdecomp.adapters.interception import Interception, OnError, torch_call_hook
from tl_paramdecomp.adapters.lens import HookRoute, LensAdapter, no_hook_point, watch_generate
from tl_paramdecomp.adapters.padding import starts_later
from tl_paramdecomp.adapters.shared_parameters import repeated, with_ties
from tl_paramdecomp.adapters.torch_module import refuse_wrapped
from tl_paramdecomp.adapters.wiring import Tap, Wiring, find_module
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import SiteFn, WeightSite

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
        self._add_embeddings(model, cfg)
        for i, block in enumerate(model.blocks):
            self._add_attention(block, i, cfg)
            if not cfg.attn_only:
                self._add_mlp(block, i, cfg)
        self._add_unembedding(model, cfg)
        for name, reason in repeated(self.root, self.wirings, model.blocks).items():
            self.refused[name] = reason
            del self.wirings[name]
        self.wirings = with_ties(self.root, self.wirings)

    def _add(self, name: str, shape: tuple[int, int], **wiring: Any) -> None:
        site_fields = {k: wiring.pop(k) for k in ("kind", "n_heads", "head_side") if k in wiring}
        site = WeightSite(name, *shape, has_bias=wiring.get("bias") is not None, **site_fields)
        made = Wiring(site, **wiring)
        unknown = why_unknown(find_module(self.root, made.owner), made.weight)
        if unknown is None:
            self.wirings[name] = made
        else:
            self.refused[name] = unknown

    def _add_embeddings(self, model: Any, cfg: Any) -> None:
        post_norm = hasattr(model.embed, "ln")
        x, y = (Tap("embed", "input"), Tap("embed.ln", "input")) if post_norm else (Tap("embed"), Tap("embed"))
        self._add(
            "embed.W_E",
            tuple(peeked(model.embed, "W_E").shape),
            kind="embedding",
            owner="embed",
            weight="W_E",
            bias=None,
            layout="in_out",
            x=x,
            y=y,
        )
        if cfg.positional_embedding_type in ("standard", "shortformer"):
            self._add(
                "pos_embed.W_pos",
                tuple(peeked(model.pos_embed, "W_pos").shape),
                kind="embedding",
                owner="pos_embed",
                weight="W_pos",
                bias=None,
                layout="in_out",
                x=Tap("pos_embed", "input", position_rows),
                y=Tap("pos_embed", "output"),
            )

    def _add_attention(self, block: Any, i: int, cfg: Any) -> None:
        path = f"blocks.{i}.attn"
        grouped = _holds(block.attn, "_W_K")
        for role, heads in (("Q", cfg.n_heads), ("K", cfg.n_key_value_heads), ("V", cfg.n_key_value_heads)):
            heads = heads or cfg.n_heads
            if grouped and role != "Q" and getattr(cfg, "ungroup_grouped_query_attention", False):
                self.refused[f"{path}.W_{role}"] = (
                    "key/value heads are repeated for every query head; call set_ungroup_grouped_query_attention(False)"
                )
                continue
            stored = "_" if grouped and role != "Q" else ""
            argument = {"Q": "query_input", "K": "key_input", "V": "value_input"}[role]
            self._add(
                f"{path}.W_{role}",
                (cfg.d_model, heads * cfg.d_head),
                n_heads=heads,
                head_side="out",
                owner=path,
                weight=f"{stored}W_{role}",
                bias=f"{stored}b_{role}",
                layout="heads_in_out",
                x=Tap(path, "input", _keyword(argument)),
                y=Tap(f"{path}.hook_{role.lower()}", "output"),
            )
        self._add(
            f"{path}.W_O",
            (cfg.n_heads * cfg.d_head, cfg.d_model),
            n_heads=cfg.n_heads,
            head_side="in",
            owner=path,
            weight="W_O",
            bias="b_O",
            layout="heads_out_in",
            x=Tap(f"{path}.hook_z", "output"),
            y=Tap(path, "output"),
        )

    def _add_mlp(self, block: Any, i: int, cfg: Any) -> None:
        path = f"blocks.{i}.mlp"
        if not _holds(block.mlp, "W_in"):
            for role in ("W_in", "W_out"):
                self.refused[f"{path}.{role}"] = f"{type(block.mlp).__name__} routes tokens among experts"
            return
        gated = _holds(block.mlp, "W_gate")
        shape = tuple(peeked(block.mlp, "W_in").shape)
        x = Tap(path, "input")
        if gated:  # a gated MLP adds b_in after gating, so it is not the bias of x W_in
            self._add(
                f"{path}.W_gate",
                shape,
                owner=path,
                weight="W_gate",
                bias=None,
                layout="in_out",
                x=x,
                y=Tap(f"{path}.hook_pre", "output"),
            )
        self._add(
            f"{path}.W_in",
            shape,
            owner=path,
            weight="W_in",
            bias=None if gated else "b_in",
            layout="in_out",
            x=x,
            y=Tap(f"{path}.hook_pre_linear" if gated else f"{path}.hook_pre", "output"),
        )
        self._add(
            f"{path}.W_out",
            shape[::-1],
            owner=path,
            weight="W_out",
            bias="b_out",
            layout="in_out",
            x=Tap(f"{path}.hook_post", "output"),
            y=Tap(path, "output"),
        )

    def _add_unembedding(self, model: Any, cfg: Any) -> None:
        shape = tuple(peeked(model.unembed, "W_U").shape)
        self._add(
            "unembed.W_U",
            shape,
            owner="unembed",
            weight="W_U",
            bias="b_U",
            layout="in_out",
            x=Tap("unembed"),
            y=Tap("unembed"),
        )

    # --- state of the host --------------------------------------------------------------------------------------------
    @property
    def processing(self) -> str | None:
        kind = self.model.cfg.normalization_type
        return "LayerNorm folded into the weights" if kind in ("LNPre", "RMSPre") else None

    def flags(self) -> tuple[Hashable, ...]:
        """Flags under which other tensors pass the hook points, and whether norms hold gains."""
        return (*(bool(getattr(self.model.cfg, flag, False)) for flag in FLAGS), self.model.cfg.normalization_type)

    # --- running ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def intercept(self, fns: Mapping[str, SiteFn], on_error: OnError | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            interception = make_interception(self, fns, on_error, stack)
            interception.install(stack, torch_call_hook)
            stack.enter_context(shadowed_method(self.model, "forward", _watched_forward(interception)))
            watch_generate(stack, self.model, interception, "generate", "generate_stream")
            yield

    @property
    def vocabulary_size(self) -> int:
        return self.model.embed.W_E.shape[0]

    @property
    def context_length(self) -> int | None:
        cfg = self.model.cfg
        return None if cfg.positional_embedding_type == "alibi" else cfg.n_ctx  # ALiBi is computed for longer rows

    def run(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
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
        block = self.model.blocks[int(block_path.split(".")[1])]
        if role in ("W_O", "W_out"):
            if hasattr(block, "ln1_post") or _post_norm(self.model.cfg):
                raise no_hook_point(name, "this model normalises the product before its hook point")
            x = f"{block_path}.attn.hook_z" if role == "W_O" else f"{block_path}.mlp.hook_post"
            return HookRoute(x, f"{block_path}.hook_{part}_out")
        return self._normalised_route(name, block, block_path, part)

    def _normalised_route(self, name: str, block: nn.Module, block_path: str, part: str) -> HookRoute:
        cfg = self.model.cfg
        if cfg.positional_embedding_type == "shortformer" and name.endswith(("W_Q", "W_K")):
            raise no_hook_point(name, "shortformer adds positions after the last hook point")
        if cfg.use_split_qkv_input or cfg.use_attn_in:
            raise no_hook_point(name, "the heads' inputs are split (use_split_qkv_input or use_attn_in)")
        y_hook = self.wirings[name].y.path
        norm = block.ln1 if part == "attn" else block.ln2
        if isinstance(norm, nn.Identity) or _post_norm(cfg):
            mid = part == "mlp" and not cfg.parallel_attn_mlp
            return HookRoute(f"{block_path}.hook_resid_{'mid' if mid else 'pre'}", y_hook)
        x_hook = f"{block_path}.ln{1 if part == 'attn' else 2}.hook_normalized"
        return HookRoute(x_hook, y_hook, _affine(norm))


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


def _keyword(name: str) -> Callable[[tuple, dict], Tensor]:
    return lambda args, kwargs: kwargs[name]


def _post_norm(cfg: Any) -> bool:
    return getattr(cfg, "original_architecture", None) in ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


def _affine(norm: Any) -> Callable[[Tensor], Tensor]:
    """From `hook_normalized` to the norm's output: LayerNorm of TransformerLens 2 has its gain already applied there."""
    weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if weight is None or (bias is not None and int(version("transformer-lens").split(".")[0]) < 3):
        return lambda tensor: tensor
    if bias is None:
        return lambda tensor: tensor * weight
    return lambda tensor: tensor * weight + bias


def _watched_forward(interception: Interception) -> Callable[..., Any]:
    """Around HookedTransformer.forward, which its own `generate` calls without `__call__`."""

    def forward(original: Callable, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_kv_cache")
        start = 0 if cache is None else int(cache[0].past_keys.shape[1])
        partial = kwargs.get("start_at_layer") is not None or kwargs.get("stop_at_layer") is not None
        interception.begin(start, None)
        try:
            out = original(*args, **kwargs)
        finally:
            interception.tracker.end()
        if not partial:
            interception.check_fired()
        return out

    return forward
