"""Adapter for TransformerLens' TransformerBridge (3.x and 4.x).

A bridge keeps the transformers module of every linear map as `original_component` and calls it between `hook_in` and
`hook_out`; that call is where a site is intercepted, so that x is what the user's hooks left of it and `hook_out` shows
the patched output. In compatibility mode a gated MLP multiplies processed weights itself; there the hook points serve.
"""

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_paramdecomp.adapters.base import make_interception
from tl_paramdecomp.adapters.interception import torch_call_hook
from tl_paramdecomp.adapters.lens import HookRoute, LensAdapter
from tl_paramdecomp.adapters.probe import probe
from tl_paramdecomp.adapters.torch_module import watch_forward, watch_generate
from tl_paramdecomp.adapters.transformers_names import linear_kind, module_wiring, with_heads
from tl_paramdecomp.adapters.wiring import Tap, Wiring
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import SiteFn, WeightSite

PARTS = {
    "attn.W_Q": "attn.q", "attn.W_K": "attn.k", "attn.W_V": "attn.v", "attn.W_O": "attn.o",
    "mlp.W_gate": "mlp.gate", "mlp.W_in": "mlp.in", "mlp.W_out": "mlp.out",
}  # fmt: skip
"""Role in a block -> the bridge's name for it, in the order of a forward pass."""

KNOWN_ARCHITECTURES = {
    "GPT2LMHeadModel", "GPTNeoForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
}  # fmt: skip
"""Architectures whose wiring the tests hold exact; others are probed when first seen."""

SPLITTING_FLAGS = ("use_split_qkv_input", "use_attn_in")


class TransformerBridgeAdapter(LensAdapter):
    """Hooks the modules a bridge wraps."""

    host = "transformer_bridge"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if not hasattr(model, "blocks"):
            raise UnsupportedModelError(
                f"This bridge of {getattr(model.cfg, 'architecture', type(model).__name__)} has no list of decoder blocks; "
                "only decoder-only language models are supported."
            )
        self._paths = {id(module): path for path, module in model.original_model.named_modules()}
        self._add_table("embed.W_E", "embed")
        self._add_table("pos_embed.W_pos", "pos_embed")
        for i, block in enumerate(model.blocks):
            self._add_block(block, i)
        self._add_unembedding()
        if not self.wirings:
            raise UnsupportedModelError("This bridge wraps no linear map that can be read.")
        if getattr(model.cfg, "architecture", None) not in KNOWN_ARCHITECTURES or self.processing:
            self._probe()

    def _component(self, path: str) -> Any:
        module: Any = self.model
        for part in path.split("."):
            module = module._modules.get(part) if part in getattr(module, "_modules", {}) else getattr(module, part, None)
            if module is None:
                return None
        return module

    def _add(self, wiring: Wiring, path: str, component: Any) -> None:
        hf_path = self._paths.get(id(component))
        aliases = (path, *((hf_path, f"{hf_path}.weight") if hf_path else ()))
        weight = getattr(component.original_component, "weight", None)
        if weight is not None and not weight.is_floating_point():
            self.refused[wiring.site.name] = f"its weight is stored as {weight.dtype}; load the model unquantised"
            return
        self.wirings[wiring.site.name] = replace(wiring, site=replace(wiring.site, aliases=aliases))

    def _add_table(self, name: str, path: str) -> None:
        component = self._component(path)
        original = getattr(component, "original_component", None)
        if isinstance(original, nn.Embedding):
            self._add(module_wiring(name, f"{path}.original_component", original), path, component)
        elif original is not None:
            self.refused[name] = f"{type(original).__name__} is not a plain embedding table"

    def _add_block(self, block: nn.Module, i: int) -> None:
        cfg = self.model.cfg
        for role, part in PARTS.items():
            name, path = f"blocks.{i}.{role}", f"blocks.{i}.{part}"
            component = self._component(path)
            original = getattr(component, "original_component", None)
            if original is None:
                continue
            if linear_kind(original) is None:
                self.refused[name] = f"{type(original).__name__} is not one linear map"
            elif role in ("attn.W_Q", "attn.W_K", "attn.W_V") and any(getattr(cfg, f, False) for f in SPLITTING_FLAGS):
                self.refused[name] = "the heads' inputs are split; call set_use_split_qkv_input(False) and set_use_attn_in(False)"
            elif role == "attn.W_O" and getattr(cfg, "use_attn_result", False):
                self.refused[name] = "the heads' results are computed one by one; call set_use_attn_result(False)"
            else:
                wiring = with_heads(module_wiring(name, f"{path}.original_component", original), role, cfg)
                self._add(self._processed(wiring, i) or wiring, path, component)

    def _processed(self, wiring: Wiring, i: int) -> Wiring | None:
        """Wiring of a gated MLP in compatibility mode, which multiplies its own processed weights."""
        mlp = self._component(f"blocks.{i}.mlp")
        role = wiring.site.name.rsplit(".", 1)[1]
        if role not in ("W_gate", "W_in", "W_out") or not getattr(mlp, "_use_processed_weights", False):
            return None
        if getattr(mlp, f"_processed_{role}", None) is None:
            return None
        path, part = f"blocks.{i}.mlp", {"W_gate": "gate", "W_in": "in", "W_out": "out"}[role]
        bias = f"_processed_{role.replace('W_', 'b_')}"
        x = Tap(f"{path}.out.hook_in", "output") if role == "W_out" else Tap(f"{path}.hook_in", "output")
        has_bias = getattr(mlp, bias, None) is not None
        return replace(wiring, owner=path, weight=f"_processed_{role}", bias=bias if has_bias else None, layout="out_in", x=x,
                       y=Tap(f"{path}.{part}.hook_out", "output"), site=replace(wiring.site, has_bias=has_bias))

    def _add_unembedding(self) -> None:
        component = self._component("unembed")
        original = getattr(component, "original_component", None)
        if original is None or linear_kind(original) is None:
            return
        wiring = module_wiring("unembed.W_U", "unembed.original_component", original)
        embedding = getattr(self._component("embed"), "original_component", None)
        if getattr(embedding, "weight", None) is original.weight:
            wiring = replace(wiring, site=replace(wiring.site, tied_to="embed.W_E"))
        self._add(wiring, "unembed", component)

    def _probe(self) -> None:
        tokens = torch.arange(3, device=self.device).unsqueeze(0)
        self.refused |= probe(self, lambda: self.model(tokens))
        self.wirings = {name: w for name, w in self.wirings.items() if name not in self.refused}
        if not self.wirings:
            name, reason = next(iter(self.refused.items()))
            raise UnsupportedModelError(
                f"No site of {getattr(self.model.cfg, 'architecture', 'this bridge')} is exact. {name}: {reason}"
            )

    # --- state of the host --------------------------------------------------------------------------------------------
    @property
    def processing(self) -> str | None:
        if getattr(self.model, "compatibility_mode", False):
            return "compatibility mode (weights may be folded and centred)"
        return None

    def signature(self) -> Hashable:
        """Flags under which a bridge takes other paths."""
        cfg = self.model.cfg
        flags = tuple(bool(getattr(cfg, f, False)) for f in (*SPLITTING_FLAGS, "use_attn_result", "use_hook_mlp_in"))
        return (*flags, bool(getattr(self.model, "compatibility_mode", False)), self._weights_processed())

    def _weights_processed(self) -> bool:
        first = self._component("blocks.0.mlp")
        return bool(getattr(first, "_use_processed_weights", False))

    # --- running ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def intercept(self, fns: Mapping[str, SiteFn]) -> Iterator[None]:
        interception = make_interception(self, fns)
        with contextlib.ExitStack() as stack:
            interception.install(stack, torch_call_hook)
            watch_forward(stack, self.model.original_model, interception)
            watch_generate(stack, self.model, interception, "generate", "generate_stream", "hf_generate")
            yield

    def forward(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos vocab"]:
        return self.model(tokens) if attention_mask is None else self.model(tokens, attention_mask=attention_mask)

    # --- hook points --------------------------------------------------------------------------------------------------
    def hook_registries(self) -> list[dict[str, Any]]:
        return [self.model._hook_registry]

    def hook_route(self, name: str) -> HookRoute:
        wiring = self.wirings[name]
        if wiring.y.point == "output":
            return HookRoute(wiring.x.path, wiring.y.path)
        path = wiring.owner.removesuffix(".original_component")
        return HookRoute(f"{path}.hook_in", f"{path}.hook_out")
