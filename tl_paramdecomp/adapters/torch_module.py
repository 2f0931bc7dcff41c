"""Adapter for any torch module: transformers models under canonical names, all others under dotted paths."""

import contextlib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tl_paramdecomp.adapters import transformers_names as naming
from tl_paramdecomp.adapters.base import ModelAdapter, Output, RowMask, Rows
from tl_paramdecomp.adapters.convolution import why_no_patches
from tl_paramdecomp.adapters.interception import Interception
from tl_paramdecomp.adapters.limits import positions_of, starts_later
from tl_paramdecomp.adapters.passes import refuse_wrapped, watch_generate, watch_passes
from tl_paramdecomp.adapters.shared_parameters import keep_apart
from tl_paramdecomp.adapters.wiring import Wiring, find_module
from tl_paramdecomp.errors import UnsupportedModelError

KNOWN_FAMILIES = {
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "bloom", "mpt",
}  # fmt: skip
"""transformers model types whose wiring the tests hold exact; others are probed when first seen."""


class TorchModuleAdapter(ModelAdapter):
    """Hooks the linear maps and embeddings of a module tree, and of a plain one the convolutions, as linear maps of patches."""

    host = "torch"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        root: Any = self.root
        refuse_wrapped(root)
        config: Any = getattr(root, "config", None)
        self.reads_tokens = hasattr(config, "model_type") and root.main_input_name == "input_ids"
        if self.reads_tokens:
            self.gives_logits = naming.has_unembedding(root)
            self.context_length = naming.context_of(root, self._name_language_model(config.get_text_config()))
        else:
            self.gives_logits = getattr(root, "base_model", None) is not root  # a body of transformers without any head
        covered = {wiring.owner for wiring in self.wirings.values()}
        self.refuse_repeated()
        self._add_the_rest(covered)
        known = not self.reads_tokens or config.model_type in KNOWN_FAMILIES
        if self.reads_tokens:
            self.refused |= naming.unreachable_matrices(root, naming.storages(root, self.wirings))
            known = known and naming.all_plain(root, self.wirings)
        self.settle(known)

    @property
    def vocabulary_size(self) -> int | None:
        return naming.vocabulary_of(self.root) if self.reads_tokens else super().vocabulary_size

    def _name_language_model(self, config: Any) -> nn.Module | None:
        """Name what has a role; the table of learned positions, where there is one."""
        paths = {id(module): path for path, module in self.root.named_modules()}
        embedding, output = (naming.part_of(self.root, f"get_{side}_embeddings") for side in ("input", "output"))
        where = paths.get(id(embedding), "")
        if isinstance(embedding, nn.Embedding) and id(embedding) in paths:
            self.add(naming.module_wiring("embed.W_E", where, embedding))
        beside = {f"{where.rpartition('.')[0]}.{name}".lstrip("."): None for name in naming.POSITIONS}
        tables = {path: module for path, module in self.root.named_modules() if path in beside}
        positions = next((path for path in beside if isinstance(tables.get(path), nn.Embedding)), None)
        if positions is not None:
            self.add(naming.module_wiring("pos_embed.W_pos", positions, tables[positions]))
        self.blocks_path, blocks = naming.find_blocks(self.root, config, where) or ("", ())
        for i, block in enumerate(blocks):
            maps = naming.linear_maps(block, f"{self.blocks_path}.{i}")
            wirings = naming.name_block(maps, config, i)
            for wiring in wirings.values():
                self.add(wiring)
            self.refuse(naming.block_refusals(wirings, block, i))
        if output is not None and id(output) in paths and naming.is_linear(output):
            self.add(naming.module_wiring("unembed.W_U", paths[id(output)], output))
        return None if positions is None else tables[positions]

    def _add_the_rest(self, covered: set[str]) -> None:
        """Linear maps without a role, and a plain module's convolutions, under dotted paths."""
        for path, module in self.root.named_modules():
            name, convolution = f"{path}.weight".lstrip("."), None if self.reads_tokens else module
            if naming.computes_another(path) or path in covered:
                continue
            if isinstance(convolution, _ConvNd) and (reason := why_no_patches(convolution)) is not None:
                self.refused[name] = reason
            elif isinstance(convolution, _ConvNd) or isinstance(module, nn.Embedding) or naming.is_linear(module):
                self.add(naming.module_wiring(name, path, module))

    def add(self, wiring: Wiring, may_be_attribute: bool = False) -> None:
        """As every adapter's; a plain module is not tried out, and so must be known by its type."""
        module, name = find_module(self.root, wiring.owner), wiring.site.name
        super().add(wiring, may_be_attribute)
        if name in self.wirings and not self.reads_tokens and not naming.is_plain(module):
            self.refuse({name: f"{type(module).__name__} has a forward of its own, or is used without being called"})

    # --- running ----------------------------------------------------------------------------------------------------
    def watch(self, stack: contextlib.ExitStack, interception: Interception) -> None:
        watch_passes(stack, self.root, interception)
        watch_generate(stack, self.root, interception.tracker, ("generate",), of_transformers=True)

    @functools.cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.root).forward).parameters

    def run(self, tokens: Rows, attention_mask: RowMask = None) -> Output:
        given: dict[str, Tensor] = {} if attention_mask is None else {"attention_mask": attention_mask}
        if attention_mask is not None and self._takes_positions and starts_later(attention_mask):
            given["position_ids"] = positions_of(attention_mask)  # transformers counts padded columns, too
        out = self.root(tokens, **given)
        for name in ("logits", "last_hidden_state"):
            out = getattr(out, name, out)
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, Tensor):
            raise UnsupportedModelError(
                f"{type(self.root).__name__} gives {type(out).__name__}, which holds neither logits nor last_hidden_state; "
                "give a model, or the part of it, that returns one tensor."
            )
        return out

    def block_modules(self) -> Sequence[nn.Module]:
        blocks = find_module(self.root, self.blocks_path) if self.blocks_path else None
        return tuple(blocks) if isinstance(blocks, nn.ModuleList) else ()

    def pattern_taps(self) -> Mapping[int, nn.Module]:
        outputs = ((i, self.wirings.get(f"blocks.{i}.attn.W_O")) for i in range(len(self.block_modules())))
        return {i: find_module(self.root, w.owner.rpartition(".")[0]) for i, w in outputs if w is not None}

    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        super().write_weights(weights)
        if self.reads_tokens:
            paths = [f"{self.wirings[name].owner}.{self.wirings[name].weight}" for name in weights]
            keep_apart(self.root, weights, paths)
