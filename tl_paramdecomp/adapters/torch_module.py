"""Adapter for any torch module: transformers models under canonical names, all others under dotted paths."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tl_paramdecomp.adapters.base import ModelAdapter, make_interception
from tl_paramdecomp.adapters.boundary import Hook, shadowed_method
from tl_paramdecomp.adapters.computed import peeked, why_unknown
from tl_paramdecomp.adapters.convolution import why_no_patches
from tl_paramdecomp.adapters.interception import Interception, OnError, torch_call_hook
from tl_paramdecomp.adapters.norm_wiring import NormWiring
from tl_paramdecomp.adapters.norms import canonical_norms, module_norms, renamed
from tl_paramdecomp.adapters.padding import positions_of, starts_later
from tl_paramdecomp.adapters.probe import probe
from tl_paramdecomp.adapters.shared_parameters import keep_apart, repeated, with_ties
from tl_paramdecomp.adapters.transformers_names import (
    POSITIONS,
    block_refusals,
    context_of,
    find_blocks,
    has_unembedding,
    is_plain,
    linear_kind,
    module_wiring,
    name_block,
    plain_path,
    storage_behind,
    unreachable_matrices,
    vocabulary_of,
)
from tl_paramdecomp.adapters.wiring import READABLE, Wiring, find_module
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import SiteFn

KNOWN_FAMILIES = {
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "bloom", "mpt",
}  # fmt: skip
"""transformers model types whose wiring the tests hold exact; others are probed when first seen."""

TABLES = frozenset(("embed.W_E", "unembed.W_U"))
"""Sites that a configuration's `tie_word_embeddings` is about."""


class TorchModuleAdapter(ModelAdapter):
    """Hooks the linear maps and embeddings of a module tree, and of a plain one the convolutions, as linear maps of patches."""

    host = "torch"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        refuse_wrapped(self.root)
        self._blocks_path, self._positions_path = "", ""
        config: Any = getattr(self.root, "config", None)
        self._is_language_model = hasattr(config, "model_type") and self.root.main_input_name == "input_ids"
        if self._is_language_model:
            self._name_language_model(config.get_text_config())
        covered = {wiring.owner for wiring in self.wirings.values()}
        self._refuse_repeated()
        for path, module in self.root.named_modules():
            name = f"{path}.weight".lstrip(".")
            if ".parametrizations." in f".{path}.":
                continue  # it takes part in computing another module's weight
            if path not in covered and (isinstance(module, nn.Embedding) or linear_kind(module) is not None):
                self._add(module_wiring(name, path, module))
            elif isinstance(module, _ConvNd) and not self._is_language_model:
                reason = why_no_patches(module)
                if reason is None:
                    self._add(module_wiring(name, path, module))
                else:
                    self.refused[name] = reason
        if self._is_language_model:
            covered = {storage_behind(find_module(self.root, w.owner), w.weight) for w in self.wirings.values()}
            self.refused |= unreachable_matrices(self.root, covered)
            known = config.model_type in KNOWN_FAMILIES
            if not known or not all(is_plain(find_module(self.root, w.owner)) for w in self.wirings.values()):
                self.wirings, reasons = probe(self, self._run_probe)
                self.refused |= reasons
        self.wirings = with_ties(self.root, self.wirings)
        if not self.wirings:
            raise UnsupportedModelError(
                f"{type(self.root).__name__} holds no linear map or embedding table that can be read "
                f"(nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d). {self._refusals()}"
            )

    def _add(self, wiring: Wiring) -> None:
        module = find_module(self.root, wiring.owner)
        weight, name = peeked(module, wiring.weight), wiring.site.name
        unknown = why_unknown(module, wiring.weight)
        if unknown is not None:
            self.refused[name] = unknown
        elif weight.dtype not in READABLE:
            self.refused[name] = f"its weight is stored as {weight.dtype}; load the model unquantised"
        elif not self._is_language_model and not is_plain(module):
            self.refused[name] = f"{type(module).__name__} has a forward of its own, or is used without being called"
        else:
            self.wirings[name] = wiring

    def _name_language_model(self, config: Any) -> None:
        paths = {id(module): path for path, module in self.root.named_modules()}
        embedding, output = (_maybe(self.root, f"get_{side}_embeddings") for side in ("input", "output"))
        if isinstance(embedding, nn.Embedding) and id(embedding) in paths:
            self._add(module_wiring("embed.W_E", paths[id(embedding)], embedding))
        parent = paths.get(id(embedding), "").rpartition(".")[0]
        for path in (f"{parent}.{name}".lstrip(".") for name in (*POSITIONS, "position_embeddings")):
            if isinstance(module := _maybe_module(self.root, path), nn.Embedding):
                self._add(module_wiring("pos_embed.W_pos", path, module))
                self._positions_path = path
                break
        blocks = find_blocks(self.root, config, paths.get(id(embedding), ""))
        path, listed = blocks or ("", ())
        self._blocks_path = path
        for i, block in enumerate(listed):
            wirings = name_block(block, config, f"{path}.{i}", i)
            reasons = block_refusals(wirings, block, i)
            self.refused |= reasons
            for wiring in wirings.values():
                if wiring.site.name not in reasons:
                    self._add(wiring)
        if output is not None and id(output) in paths and linear_kind(output) is not None:
            self._add(module_wiring("unembed.W_U", paths[id(output)], output))

    def _refuse_repeated(self) -> None:
        reasons = repeated(self.root, self.wirings, self.block_modules())
        self.refused |= reasons
        self.wirings = {name: wiring for name, wiring in self.wirings.items() if name not in reasons}

    def _run_probe(self) -> Tensor:
        return self.forward(torch.arange(3, device=self.device).unsqueeze(0))

    def _refusals(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in list(self.refused.items())[:3])

    # --- running ----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def intercept(self, fns: Mapping[str, SiteFn], on_error: OnError | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            interception = make_interception(self, fns, on_error, stack)
            interception.install(stack, self.call_hook)
            PassWatch(self.root, interception).install(stack)
            watch_transformers_generate(stack, self.root, interception)
            yield

    @functools.cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.root).forward).parameters

    @property
    def vocabulary_size(self) -> int | None:
        return vocabulary_of(self.root) if self._is_language_model else super().vocabulary_size

    @property
    def reads_tokens(self) -> bool:
        return self._is_language_model

    @property
    def gives_logits(self) -> bool:
        if self._is_language_model:
            return has_unembedding(self.root)
        return getattr(self.root, "base_model", None) is not self.root  # a body of transformers without any head

    @property
    def context_length(self) -> int | None:
        if not self._is_language_model:
            return None
        config: Any = self.root.config
        positions = find_module(self.root, self._positions_path) if self._positions_path else None
        return context_of(config.get_text_config(), positions)

    def block_modules(self) -> Sequence[nn.Module]:
        blocks = find_module(self.root, self._blocks_path) if self._blocks_path else None
        return tuple(blocks) if isinstance(blocks, nn.ModuleList) else ()

    def pattern_taps(self) -> Mapping[int, nn.Module]:
        outputs = ((i, self.wirings.get(f"blocks.{i}.attn.W_O")) for i in range(len(self.block_modules())))
        return {i: find_module(self.root, w.owner.rpartition(".")[0]) for i, w in outputs if w is not None}

    def norm_candidates(self) -> Iterable[NormWiring]:
        found = {candidate.path: candidate for candidate in module_norms(self.root)}
        names = canonical_norms(found, self._blocks_path) if self._blocks_path else {}
        for path, candidate in found.items():
            aliases = (path, f"{path}.{candidate.weight}")
            yield renamed(candidate, names[path], aliases) if path in names else candidate

    def call_hook(self, module: nn.Module, fn: Callable[[Any, Any], Any]) -> contextlib.AbstractContextManager[None]:
        """Intercept one module's own call."""
        return torch_call_hook(module, fn)

    def run(
        self, tokens: Shaped[Tensor, "batch ..."], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch ..."]:
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

    def write_weights(self, weights: Mapping[str, Float[Tensor, "d_in d_out"]]) -> None:
        super().write_weights(weights)
        if self._is_language_model:
            paths = [f"{self.wirings[name].owner}.{self.wirings[name].weight}" for name in weights]
            keep_apart(self.root, not TABLES.isdisjoint(weights), paths)


class PassWatch:
    """Notes where each forward pass of `root` stands, and sees at its end that every site fired.

    The model without its head (`root.base_model`) is watched as well, for users who call it directly.
    """

    def __init__(self, root: nn.Module, interception: Interception) -> None:
        self.root = root
        self.interception = interception
        self._outermost: tuple[nn.Module, int] | None = None
        """The module whose pass is under way, and its thread."""

    def install(self, stack: contextlib.ExitStack) -> None:
        """Hook the model, until the stack is left."""
        prefix = getattr(self.root, "base_model_prefix", "")
        base = self.root._modules.get(prefix) if prefix else None
        for module in (self.root,) if base is None else (self.root, base):
            stack.callback(module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True).remove)
            ended = module.register_forward_hook(Hook(self._end), with_kwargs=True, always_call=True)
            stack.callback(ended.remove)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        me = (module, threading.get_ident())
        if self._outermost is not None and self._outermost[1] == me[1] and self._outermost[0] is not module:
            return  # the body within the whole; the same module again was interrupted before its end
        self.interception.begin(cached_columns(kwargs), input_rows(args, kwargs))
        self._outermost = me

    def _end(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._outermost is None or self._outermost != (module, threading.get_ident()):
            return
        self._outermost = None
        self.interception.tracker.end()
        if output is not None and module is self.root:  # None: the pass was stopped or failed
            embedded = kwargs.get("inputs_embeds") is not None
            self.interception.check_fired(exempt=lambda name: embedded and name == "embed.W_E")


def watch_transformers_generate(stack: contextlib.ExitStack, owner: Any, interception: Interception) -> None:
    """Let the tracker know that transformers' own decoding loop is running, and over which rows it was called."""

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        prompt = prompt_columns(args, kwargs)
        with interception.tracker.generating(prompt, known=prompt is not None):
            return original(*args, **kwargs)

    if hasattr(owner, "generate"):
        stack.enter_context(shadowed_method(owner, "generate", around))


def prompt_columns(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Columns of the rows that transformers' `generate` is called with; None where it makes them itself.

    The passes do not tell: a prompt may be read in chunks, and tokens that were guessed ahead are read along with it.
    """
    rows = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    embedded = kwargs.get("inputs_embeds")
    known = [
        part.shape[1] for part in (rows, embedded) if isinstance(part, Tensor) and part.ndim >= 2 and part.shape[1]
    ]
    cached, mask = cached_columns(kwargs), kwargs.get("attention_mask")
    if len(known) != 1 or not cached:
        return known[0] if len(known) == 1 else None
    # the rows are the whole prompt, or what comes after the cached columns
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1] if mask.shape[1] in (known[0], cached + known[0]) else None
    return known[0] if known[0] > cached else None


def cached_columns(kwargs: Mapping[str, Any]) -> int:
    """Columns a transformers forward pass finds in its key/value cache."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache else 0


def input_rows(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token rows (or their embeddings) of a forward pass; None where the input is something else."""
    for rows in (kwargs.get("input_ids"), *args[:1]):
        if isinstance(rows, Tensor) and rows.ndim == 2 and not rows.is_floating_point():
            return rows
    return kwargs.get("inputs_embeds")


def refuse_wrapped(root: nn.Module) -> None:
    """Refuse modules that would run past the hooks put on them, or whose weights hold no numbers.

    Raises:
        UnsupportedModelError: The module is a wrapper for several devices, an encoder-decoder, or on the meta device; it or
            a part of it is compiled.
    """
    kind = type(root).__name__
    if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
        raise UnsupportedModelError(f"{kind} runs copies or shards of the model; give the model inside it (.module).")
    for path, module in root.named_modules():
        how = _compiled(module)
        if how:
            what = f"The part {plain_path(path)!r} of this {kind} is" if path else "This model is"
            raise UnsupportedModelError(
                f"{what} compiled by {how}: what is compiled runs past hooks that are put on it later. Give the model as it "
                f"was before {how}, with the original module in that place (torch.compile keeps it as ._orig_mod)."
            )
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        held = type(getattr(root, "original_model", root)).__name__  # a bridge's own model
        raise UnsupportedModelError(f"{held} is an encoder-decoder; decoder-only language models are supported.")
    if any(parameter.is_meta for parameter in root.parameters()):
        raise UnsupportedModelError(
            f"This {kind} has parameters on the meta device, which hold no numbers: it is remote, offloaded, or not loaded "
            "yet. Load the whole model on this side (nnsight: dispatch=True)."
        )


def _compiled(module: nn.Module) -> str:
    """By what a module is compiled; empty where it is not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit"
    if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
        return "torch.compile"
    forward = module.forward  # torch.compiler.disable wraps a function as well
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    return "torch.compile" if compiled else ""


def _maybe_module(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    try:
        return find_module(root, path)
    except AttributeError:
        return None


def _maybe(model: Any, method: str) -> Any:
    """What an optional accessor of transformers models returns; None where the model has no such part."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
