"""Adapter for TransformerLens' TransformerBridge (3.x and 4.x).

A bridge keeps the transformers module of every linear map as `original_component` and calls it between `hook_in` and
`hook_out`; that call is where a site is intercepted, so that x is what the user's hooks left of it and `hook_out` shows
the patched output. In compatibility mode a gated MLP multiplies processed weights itself; there the hook points serve.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters import transformers_names as naming
from tl_paramdecomp.adapters.base import Output, RowMask, Rows
from tl_paramdecomp.adapters.computed import is_computed, made_plain, peeked, sources
from tl_paramdecomp.adapters.interception import Interception
from tl_paramdecomp.adapters.lens import GENERATE, HookRoute, LensAdapter
from tl_paramdecomp.adapters.passes import refuse_wrapped, watch_generate, watch_passes
from tl_paramdecomp.adapters.shared_parameters import held_tensors, keep_apart, shares_memory
from tl_paramdecomp.adapters.wiring import READABLE, Tap, Wiring, find_module, plain_path, read_parameter
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError

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
    core_path = "original_model"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kind = getattr(model.cfg, "architecture", None) or type(model).__name__
        refuse_wrapped(model)
        refuse_wrapped(model.original_model)
        if not hasattr(model, "blocks"):
            raise UnsupportedModelError(
                f"This bridge of {kind} has no list of decoder blocks; only decoder-only language models are supported."
            )
        self._paths = {id(module): path for path, module in model.original_model.named_modules()}
        tops = (self._paths[id(block)] for block in model.blocks if id(block) in self._paths)
        self.blocks_path = plain_path(next(tops, "")).rpartition(".")[0]
        self._add_table("embed.W_E", "embed")
        self._add_table("pos_embed.W_pos", "pos_embed")
        for i, block in enumerate(model.blocks):
            self._add_block(block, i)
        unembedding = self._original("unembed")
        if unembedding is not None and naming.is_linear(unembedding):
            self._add_component("unembed.W_U", "unembed", unembedding)
        self.refuse_repeated()
        self.gives_logits = naming.has_unembedding(model.original_model)
        self.context_length = naming.context_of(model.original_model, self._original("pos_embed"))
        known = kind in KNOWN_ARCHITECTURES and not any(self.flags()) and naming.all_plain(self.root, self.wirings)
        if not known:
            self._add_the_rest()
        self.settle(known)

    @property
    def vocabulary_size(self) -> int | None:
        return naming.vocabulary_of(self.core) or super().vocabulary_size

    # --- finding sites ------------------------------------------------------------------------------------------------
    def _component(self, path: str) -> Any:
        module: Any = self.model
        for part in path.split("."):
            held = getattr(module, "_modules", {})
            module = held[part] if part in held else getattr(module, part, None)
        return module

    def _original(self, path: str) -> Any:
        """The transformers module in the component at a path, or None."""
        return getattr(self._component(path), "original_component", None)

    def _add_component(self, name: str, path: str, original: nn.Module) -> None:
        self.add(self._aliased(naming.module_wiring(name, f"{path}.original_component", original), path))

    def _aliased(self, wiring: Wiring, path: str) -> Wiring:
        """The wiring with its component's path, and that in transformers, as aliases."""
        hf_path = plain_path(self._paths.get(id(self._component(path)), ""))
        return wiring.renamed(aliases=(path, *((hf_path, f"{hf_path}.weight") if hf_path else ())))

    def _add_table(self, name: str, path: str) -> None:
        original = self._original(path)
        if isinstance(original, nn.Embedding):
            self._add_component(name, path, original)
        elif original is not None:
            self.refused[name] = f"{type(original).__name__} is not a plain embedding table"

    def _add_block(self, block: nn.Module, i: int) -> None:
        cfg = self.model.cfg
        found: dict[str, Wiring] = {}
        for role, part in PARTS.items():
            name, path = f"blocks.{i}.{role}", f"blocks.{i}.{part}"
            original = self._original(path)
            if original is None:
                continue
            if not naming.is_linear(original):
                self.refused[name] = f"{type(original).__name__} is not one linear map"
            elif role in ("attn.W_Q", "attn.W_K", "attn.W_V") and any(getattr(cfg, f, False) for f in SPLITTING_FLAGS):
                self.refused[name] = (
                    "the heads' inputs are split; call set_use_split_qkv_input(False) and set_use_attn_in(False)"
                )
            elif role == "attn.W_O" and getattr(cfg, "use_attn_result", False):
                self.refused[name] = "the heads' results are computed one by one; call set_use_attn_result(False)"
            else:
                wiring = naming.module_wiring(name, f"{path}.original_component", original)
                found[name] = self._aliased(self._processed(naming.with_heads(wiring, role, cfg), i), path)
        found |= self._unwrapped(block, i, found)
        reasons = naming.block_refusals(found, block, i)
        for name, wiring in found.items():
            if name not in reasons:
                self.add(wiring, may_be_attribute=wiring.weight != "weight")
        self.refused = reasons | self.refused

    def _unwrapped(self, block: nn.Module, i: int, found: Mapping[str, Wiring]) -> dict[str, Wiring]:
        """Roles that modules play which the bridge leaves as transformers has them, such as a dense MLP among experts."""
        top = self._paths.get(id(block))
        if top is None:
            return {}
        played = naming.by_role(naming.linear_maps(block, f"original_model.{top}"), self.model.cfg, i)
        added = {name: wiring for name, wiring in played.items() if name not in found and name not in self.refused}
        paths = {name: plain_path(w.owner.removeprefix("original_model.")) for name, w in added.items()}
        return {name: w.renamed(aliases=(paths[name], f"{paths[name]}.weight")) for name, w in added.items()}

    def _processed(self, wiring: Wiring, i: int) -> Wiring:
        """Wiring of a gated MLP in compatibility mode, which multiplies its own processed weights."""
        path, role = f"blocks.{i}.mlp", wiring.site.name.rsplit(".", 1)[1]
        mlp, part = self._component(path), {"W_gate": "gate", "W_in": "in", "W_out": "out"}.get(role)
        processes = getattr(mlp, "_use_processed_weights", False) and getattr(mlp, "gate", None) is not None
        if part is None or not processes:
            return wiring
        x = Tap(f"{path}.out.hook_in" if role == "W_out" else f"{path}.hook_in", "output")
        wiring = replace(wiring, x=x, y=Tap(f"{path}.{part}.hook_out", "output"))
        weight, bias = f"_processed_{role}", f"_processed_{role.replace('W_', 'b_')}"
        if getattr(mlp, weight, None) is None:  # transformer-lens 4 keeps them in the module itself
            return wiring
        bias = bias if getattr(mlp, bias, None) is not None else None
        wiring = replace(wiring, owner=path, weight=weight, bias=bias, layout="out_in")
        return wiring.renamed(has_bias=bias is not None)

    def _add_the_rest(self) -> None:
        """Linear maps that the bridge has no role for, under their names in transformers."""
        covered = naming.storages(self.root, self.wirings)
        for path, module in self.model.original_model.named_modules():
            plain = plain_path(path)
            is_map = isinstance(module, nn.Embedding) or naming.is_linear(module)
            if not is_map or naming.computes_another(path):
                continue
            storage = naming.storage_behind(module, "weight")
            if plain.endswith(".qkv"):
                self.refused[f"{plain}.weight"] = "the bridge multiplies its three parts: W_Q, W_K and W_V"
            elif peeked(module, "weight").dtype in READABLE and storage not in covered:
                wiring = naming.module_wiring(f"{plain}.weight", f"original_model.{path}", module)
                self.wirings[wiring.site.name] = wiring.renamed(aliases=(plain,))
            else:
                continue
            covered.add(storage)
        self.refused |= naming.unreachable_matrices(self.model.original_model, covered)

    # --- state of the host --------------------------------------------------------------------------------------------
    @property
    def processing(self) -> str | None:
        folded = getattr(self.model, "compatibility_mode", False)
        return "compatibility mode (weights may be folded and centred)" if folded else None

    def flags(self) -> tuple[bool, ...]:
        """Flags under which a bridge takes other paths."""
        cfg, processed = self.model.cfg, getattr(self._component("blocks.0.mlp"), "_use_processed_weights", False)
        flags = tuple(bool(getattr(cfg, f, False)) for f in (*SPLITTING_FLAGS, "use_attn_result", "use_hook_mlp_in"))
        return (*flags, bool(getattr(self.model, "compatibility_mode", False)), bool(processed))

    # --- running ------------------------------------------------------------------------------------------------------
    def watch(self, stack: contextlib.ExitStack, interception: Interception) -> None:
        watch_passes(stack, self.core, interception)
        watch_generate(stack, self.model, interception.tracker, GENERATE)
        watch_generate(stack, self.core, interception.tracker, ("generate",), of_transformers=True)  # for `hf_generate`

    def run(self, tokens: Rows, attention_mask: RowMask = None) -> Output:
        return self.model(tokens) if attention_mask is None else self.model(tokens, attention_mask=attention_mask)

    # --- changing weights ---------------------------------------------------------------------------------------------
    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        """As the base's; what are views of one fused matrix, such as q, k and v of GPT-2's c_attn, is written into that one,
        which is what a bridge saves."""
        parts = {name: self._part_of_fused(name) for name in weights}
        for name, part in parts.items():
            if part is None:
                continue
            wiring = self.wirings[name]
            owner = find_module(self.root, wiring.owner)
            stored = wiring.stored_weight(weights[name], read_parameter(self.root, wiring))
            if is_computed(owner, wiring.weight):
                made_plain(owner, wiring.weight, stored)
                owner._parameters[wiring.weight] = part
            with torch.no_grad():
                part.data.copy_(stored)
        super().write_weights({name: weight for name, weight in weights.items() if parts[name] is None})
        keep_apart(self.core, weights)

    def _part_of_fused(self, name: str) -> Any:
        """The tensor behind a site's weight that is a view of a matrix which no site reads, or the bridge's own; else None."""
        wiring = self.wirings[name]
        owner = find_module(self.root, wiring.owner)
        held = peeked(owner, wiring.weight)
        slots = {(id(find_module(self.root, w.owner)), w.weight): other for other, w in self.wirings.items()}
        for part in sources(owner, wiring.weight) if is_computed(owner, wiring.weight) else [held]:
            around = [(m, a) for m, a, t in held_tensors(self.root) if t is not part and shares_memory(t, part)]
            sharing = [slots.get((id(m), a)) for m, a in around]
            fused = None in sharing and part.shape == held.shape
            another = next((other for other in sharing if other not in (None, name)), None)
            if fused and another is not None:
                raise UnsupportedSiteError(
                    f"{name} and {another} read the same entries of one fused matrix, so that an edit of one alone cannot be "
                    "kept in this bridge; use edited_weights(...) or patched(...)."
                )
            if fused or not isinstance(part, nn.Parameter):
                return part
        return None

    # --- hook points --------------------------------------------------------------------------------------------------
    def hook_registries(self) -> list[dict[str, Any]]:
        return [self.model._hook_registry]

    def hook_route(self, name: str) -> HookRoute:
        wiring = self.wirings[name]
        if wiring.y.point == "output":
            return HookRoute(wiring.x.path, wiring.y.path)
        path = wiring.owner.removesuffix(".original_component")
        return HookRoute(f"{path}.hook_in", f"{path}.hook_out")
