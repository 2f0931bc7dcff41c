"""Adapter for TransformerLens' TransformerBridge (3.x and 4.x).

A bridge keeps the transformers module of every linear map as `original_component` and calls it between `hook_in` and
`hook_out`; that call is where a site is intercepted, so that x is what the user's hooks left of it and `hook_out` shows
the patched output. In compatibility mode a gated MLP multiplies processed weights itself; there the hook points serve.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_paramdecomp.adapters.base import make_interception
from tl_paramdecomp.adapters.computed import is_computed, made_plain, peeked, sources, why_unknown
from tl_paramdecomp.adapters.interception import OnError, torch_call_hook
from tl_paramdecomp.adapters.lens import HookRoute, LensAdapter, watch_generate
from tl_paramdecomp.adapters.norm_wiring import NormWiring
from tl_paramdecomp.adapters.norms import canonical_norms, norm_candidate, renamed
from tl_paramdecomp.adapters.probe import probe
from tl_paramdecomp.adapters.shared_parameters import held_tensors, keep_apart, repeated, shares_memory, with_ties
from tl_paramdecomp.adapters.torch_module import TABLES, PassWatch, refuse_wrapped, watch_transformers_generate
from tl_paramdecomp.adapters.transformers_names import (
    ROLES,
    block_refusals,
    context_of,
    has_unembedding,
    is_plain,
    linear_kind,
    module_wiring,
    plain_path,
    storage_behind,
    unreachable_matrices,
    vocabulary_of,
    with_heads,
)
from tl_paramdecomp.adapters.wiring import READABLE, Tap, Wiring, find_module, read_parameter, stored_weight
from tl_paramdecomp.errors import UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.sites import SiteFn

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
        kind = getattr(model.cfg, "architecture", None) or type(model).__name__
        refuse_wrapped(model)
        refuse_wrapped(model.original_model)
        if not hasattr(model, "blocks"):
            raise UnsupportedModelError(
                f"This bridge of {kind} has no list of decoder blocks; only decoder-only language models are supported."
            )
        self._paths = {id(module): path for path, module in model.original_model.named_modules()}
        self._add_table("embed.W_E", "embed")
        self._add_table("pos_embed.W_pos", "pos_embed")
        for i, block in enumerate(model.blocks):
            self._add_block(block, i)
        self._add_unembedding()
        for name, reason in repeated(self.root, self.wirings, model.blocks).items():
            self.refused[name] = reason
            del self.wirings[name]
        plain = all(is_plain(find_module(self.root, wiring.owner)) for wiring in self.wirings.values())
        if kind not in KNOWN_ARCHITECTURES or any(self.flags()) or not plain:
            self._add_the_rest()
            self.wirings, reasons = probe(self, self._run_probe)
            self.refused |= reasons
        self.wirings = with_ties(self.root, self.wirings)
        if not self.wirings:
            name, reason = next(iter(self.refused.items()), ("Its tree", "holds no linear map that can be read"))
            raise UnsupportedModelError(f"No site of this bridge of {kind} is exact. {name}: {reason}.")

    def _component(self, path: str) -> Any:
        module: Any = self.model
        for part in path.split("."):
            module = (
                module._modules.get(part) if part in getattr(module, "_modules", {}) else getattr(module, part, None)
            )
            if module is None:
                return None
        return module

    def _add(self, wiring: Wiring, path: str, component: Any) -> None:
        hf_path = plain_path(self._paths.get(id(component), ""))
        if component is not None:
            aliases = (path, *((hf_path, f"{hf_path}.weight") if hf_path else ()))
            wiring = replace(wiring, site=replace(wiring.site, aliases=aliases))
        owner = find_module(self.root, wiring.owner)
        weight = peeked(owner, wiring.weight)
        unknown = why_unknown(owner, wiring.weight) if wiring.weight == "weight" else None
        if unknown is not None or weight.dtype not in READABLE:
            quantised = f"its weight is stored as {weight.dtype}; load the model unquantised"
            self.refused[wiring.site.name] = unknown or quantised
            return
        self.wirings[wiring.site.name] = wiring

    def _add_table(self, name: str, path: str) -> None:
        component = self._component(path)
        original = getattr(component, "original_component", None)
        if isinstance(original, nn.Embedding):
            self._add(module_wiring(name, f"{path}.original_component", original), path, component)
        elif original is not None:
            self.refused[name] = f"{type(original).__name__} is not a plain embedding table"

    def _add_block(self, block: nn.Module, i: int) -> None:
        cfg = self.model.cfg
        found: dict[str, Wiring] = {}
        for role, part in PARTS.items():
            name, path = f"blocks.{i}.{role}", f"blocks.{i}.{part}"
            original = getattr(self._component(path), "original_component", None)
            if original is None:
                continue
            if linear_kind(original) is None:
                self.refused[name] = f"{type(original).__name__} is not one linear map"
            elif role in ("attn.W_Q", "attn.W_K", "attn.W_V") and any(getattr(cfg, f, False) for f in SPLITTING_FLAGS):
                self.refused[name] = (
                    "the heads' inputs are split; call set_use_split_qkv_input(False) and set_use_attn_in(False)"
                )
            elif role == "attn.W_O" and getattr(cfg, "use_attn_result", False):
                self.refused[name] = "the heads' results are computed one by one; call set_use_attn_result(False)"
            else:
                wiring = with_heads(module_wiring(name, f"{path}.original_component", original), role, cfg)
                found[name] = self._processed(wiring, i) or wiring
        self._find_unwrapped(block, i, found)
        for name, reason in block_refusals(found, block, i).items():
            found.pop(name, None)
            self.refused.setdefault(name, reason)
        for name, wiring in found.items():
            path = f"blocks.{i}.{PARTS[name.split('.', 2)[2]]}"
            self._add(wiring, path, self._component(path))

    def _find_unwrapped(self, block: nn.Module, i: int, found: dict[str, Wiring]) -> None:
        """Roles that modules play which the bridge leaves as transformers has them, such as a dense MLP among experts."""
        top = self._paths.get(id(block))
        modules = {plain_path(path): (path, module) for path, module in block.named_modules() if linear_kind(module)}
        for role, candidates in ROLES.items():
            name, chosen = f"blocks.{i}.{role}", next((c for c in candidates if c in modules), None)
            if top is None or chosen is None or name in found or name in self.refused:
                continue
            path, module = modules[chosen]
            wiring = with_heads(module_wiring(name, f"original_model.{top}.{path}", module), role, self.model.cfg)
            aliases = (f"{plain_path(top)}.{chosen}", f"{plain_path(top)}.{chosen}.weight")
            found[name] = replace(wiring, site=replace(wiring.site, aliases=aliases))

    def _processed(self, wiring: Wiring, i: int) -> Wiring | None:
        """Wiring of a gated MLP in compatibility mode, which multiplies its own processed weights."""
        mlp = self._component(f"blocks.{i}.mlp")
        role = wiring.site.name.rsplit(".", 1)[1]
        if role not in ("W_gate", "W_in", "W_out") or not getattr(mlp, "_use_processed_weights", False):
            return None
        path, part = f"blocks.{i}.mlp", {"W_gate": "gate", "W_in": "in", "W_out": "out"}[role]
        if getattr(mlp, "gate", None) is None:
            return None
        x = Tap(f"{path}.out.hook_in", "output") if role == "W_out" else Tap(f"{path}.hook_in", "output")
        wiring = replace(wiring, x=x, y=Tap(f"{path}.{part}.hook_out", "output"))
        if getattr(mlp, f"_processed_{role}", None) is None:  # transformer-lens 4 keeps them in the module itself
            return wiring
        bias = f"_processed_{role.replace('W_', 'b_')}"
        has_bias = getattr(mlp, bias, None) is not None
        return replace(
            wiring,
            owner=path,
            weight=f"_processed_{role}",
            bias=bias if has_bias else None,
            layout="out_in",
            site=replace(wiring.site, has_bias=has_bias),
        )

    def _add_unembedding(self) -> None:
        component = self._component("unembed")
        original = getattr(component, "original_component", None)
        if original is None or linear_kind(original) is None:
            return
        self._add(module_wiring("unembed.W_U", "unembed.original_component", original), "unembed", component)

    def _add_the_rest(self) -> None:
        """Linear maps that the bridge has no role for, under their names in transformers."""
        covered = {storage_behind(find_module(self.root, w.owner), w.weight) for w in self.wirings.values()}
        for path, module in self.model.original_model.named_modules():
            plain = plain_path(path)
            if not isinstance(module, nn.Embedding) and linear_kind(module) is None:
                continue
            if ".parametrizations." in f".{path}.":
                continue  # it takes part in computing another module's weight
            if plain.endswith(".qkv"):
                self.refused[f"{plain}.weight"] = "the bridge multiplies its three parts: W_Q, W_K and W_V"
                covered.add(storage_behind(module, "weight"))
            elif peeked(module, "weight").dtype in READABLE and storage_behind(module, "weight") not in covered:
                wiring = module_wiring(f"{plain}.weight", f"original_model.{path}", module)
                self.wirings[wiring.site.name] = replace(wiring, site=replace(wiring.site, aliases=(plain,)))
                covered.add(storage_behind(module, "weight"))
        self.refused |= unreachable_matrices(self.model.original_model, covered)

    def _run_probe(self) -> Tensor:
        return self.forward(torch.arange(3, device=self.device).unsqueeze(0))

    def norm_candidates(self) -> Iterable[NormWiring]:
        found: dict[str, NormWiring] = {}
        wrapped: set[int] = set()
        for path, module in self.model.original_model.named_modules():
            holder, where = getattr(module, "original_component", None), f"original_model.{path}"
            if isinstance(holder, nn.Module):
                wrapped.add(id(holder))
                candidate = norm_candidate("", where, module, f"{where}.original_component", holder)
            else:
                candidate = None if id(module) in wrapped else norm_candidate("", where, module, where, module)
            if candidate is not None:
                found[plain_path(path)] = candidate
        first = next(
            (plain_path(self._paths[id(block)]) for block in self.model.blocks if id(block) in self._paths), ""
        )
        names = canonical_norms(found, first.rpartition(".")[0]) if first else {}
        for path, candidate in found.items():
            dotted = f"{path}.{candidate.weight}"
            yield renamed(candidate, names.get(path, dotted), (path, dotted))

    @property
    def core(self) -> nn.Module:
        return self.model.original_model

    # --- state of the host --------------------------------------------------------------------------------------------
    @property
    def processing(self) -> str | None:
        if getattr(self.model, "compatibility_mode", False):
            return "compatibility mode (weights may be folded and centred)"
        return None

    def flags(self) -> tuple[bool, ...]:
        """Flags under which a bridge takes other paths."""
        cfg = self.model.cfg
        flags = tuple(bool(getattr(cfg, f, False)) for f in (*SPLITTING_FLAGS, "use_attn_result", "use_hook_mlp_in"))
        return (*flags, bool(getattr(self.model, "compatibility_mode", False)), self._weights_processed())

    def _weights_processed(self) -> bool:
        first = self._component("blocks.0.mlp")
        return bool(getattr(first, "_use_processed_weights", False))

    # --- running ------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def intercept(self, fns: Mapping[str, SiteFn], on_error: OnError | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            interception = make_interception(self, fns, on_error, stack)
            interception.install(stack, torch_call_hook)
            PassWatch(self.model.original_model, interception).install(stack)
            watch_generate(stack, self.model, interception, "generate", "generate_stream")
            watch_transformers_generate(stack, self.model.original_model, interception)  # `hf_generate` calls it
            yield

    @property
    def vocabulary_size(self) -> int | None:
        return vocabulary_of(self.model.original_model) or super().vocabulary_size

    @property
    def gives_logits(self) -> bool:
        return has_unembedding(self.model.original_model)

    @property
    def context_length(self) -> int | None:
        positions = getattr(self._component("pos_embed"), "original_component", None)
        config: Any = getattr(self.model.original_model, "config", None)  # a native model has none
        return context_of(None if config is None else config.get_text_config(), positions)

    def run(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
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
            stored = stored_weight(wiring, weights[name], read_parameter(self.root, wiring))
            if is_computed(owner, wiring.weight):
                made_plain(owner, wiring.weight, stored)
                owner._parameters[wiring.weight] = part
            with torch.no_grad():
                part.data.copy_(stored)
        super().write_weights({name: weight for name, weight in weights.items() if parts[name] is None})
        keep_apart(self.model.original_model, not TABLES.isdisjoint(weights), ())

    def _part_of_fused(self, name: str) -> Any:
        """The tensor behind a site's weight that is a view of a matrix which no site reads, or the bridge's own; else None.

        Raises:
            UnsupportedSiteError: Another site reads the same entries.
        """
        wiring = self.wirings[name]
        owner = find_module(self.root, wiring.owner)
        held = peeked(owner, wiring.weight)
        candidates = sources(owner, wiring.weight) if is_computed(owner, wiring.weight) else [held]
        slots = {(id(find_module(self.root, w.owner)), w.weight): other for other, w in self.wirings.items()}
        for part in candidates:
            around = [(m, a) for m, a, t in held_tensors(self.root) if t is not part and shares_memory(t, part)]
            sharing = [slots.get((id(m), a)) for m, a in around]
            fused = any(other is None for other in sharing) and part.shape == held.shape
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
