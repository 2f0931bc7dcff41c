"""Where in the user's token rows a forward pass stands: which columns it computes, and what came before them.

A tracker is told of each pass as it begins and ends, and of the hosts' decoding loops; the watchers here tell it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters.boundary import Hook, shadowed_method
from tl_paramdecomp.adapters.wiring import plain_path
from tl_paramdecomp.errors import ShapeError, UnsupportedModelError
from tl_paramdecomp.sites import Span


class RowTracker:
    """Knows, while a model runs, where in the user's token rows the present forward pass stands."""

    thread: int | None = None  # the thread whose forward pass is under way
    _start: int | None = None
    _length: int | None = None
    _batch: int | None = None
    _end: int | None = None
    _prompt: int | None = None
    _prompt_known = True
    _generating = False

    def __init__(self) -> None:
        self.fired: set[str] = set()
        self._outside: dict[str, int] = {}

    def begin(self, start: int, tokens: Tensor | None) -> None:
        """A forward pass begins after `start` cached columns; `tokens` are its own, where the host says."""
        rows = tokens.shape if tokens is not None and tokens.ndim >= 2 else (None, None)
        self.thread = threading.get_ident()
        self._start, self._batch, self._length = start, rows[0], rows[1]
        if not self._generating and start == 0:
            self._prompt, self._prompt_known = None, True
        elif not self._generating and self._prompt is not None and (rows[1] != 1 or start != self._end):
            self._prompt_known = False  # more of the prompt, tokens that were guessed ahead, or another row's cache?
        self._end = None if rows[1] is None else start + rows[1]
        self.fired.clear()

    def end(self) -> None:
        """The forward pass is over, however it ended."""
        self._start = self._batch = self._length = self.thread = None

    @contextlib.contextmanager
    def generating(self, prompt: int | None = None, known: bool = True) -> Iterator[None]:
        """Inside a host's `generate`: later passes extend the first one's rows, with or without a cache.

        `prompt` is how many columns it was called with, None for those of the first pass; `known`, whether that can be told.
        """
        before = self._generating, self._prompt, self._prompt_known
        self._generating, self._prompt, self._prompt_known = True, prompt, known
        self._outside.clear()
        try:
            yield
        finally:
            self._generating, self._prompt, self._prompt_known = before

    def fold_rows(self, x: Tensor, y: Tensor, kind: str) -> tuple[int, int] | None:
        """The (batch, length) that a host flattened into one axis before this site, or None."""
        batch, length = self._batch, self._length
        if not (batch and length) or x.ndim != (1 if kind == "embedding" else 2) or y.ndim != 2:
            return None
        return (batch, length) if len(x) == batch * length else None

    def span(self, y: Tensor, name: str) -> Span:
        """Columns that one site's call [batch, pos, d_out] covers; the unembedding may be called for the last ones alone.

        ShapeError where it covers other columns than the pass, and nothing tells which.
        """
        if y.ndim < 3:
            return Span()
        span = self._span(y, name)
        alone = self._start is None and not self._generating  # a module called by itself, between two passes
        return span if self._prompt_known or alone else replace(span, prompt_known=False)

    def _span(self, y: Tensor, name: str) -> Span:
        length = y.shape[-2]
        if self._start is None and self._generating:
            # HookedTransformer.generate embeds outside its forward: the whole row, or the one token that was added
            start = 0 if length > 1 else self._outside.get(name, 0)
            self._outside[name] = start + length
            self._prompt = start + length if self._prompt is None else self._prompt
            return Span(start, self._prompt, True)
        start, whole = self._start or 0, self._length or length
        if self._prompt is None:
            self._prompt = start + whole
        if self._length is None and not self._generating and not start:
            return Span(0, length)  # the host did not say what the rows are: the site's own, then
        if length != whole:
            if name != "unembed.W_U":
                raise ShapeError(
                    f"A weight site was called with {length} positions in a forward pass over {whole}; masks by position "
                    "have no meaning there. Patch other sites of this model."
                )
            start += whole - length
        return Span(start, self._prompt, self._generating)


# --- watching hosts ---------------------------------------------------------------------------------------------------
def watch_passes(stack: contextlib.ExitStack, root: nn.Module, interception: Any) -> None:
    """Tell an interception of each pass of `root`, and of `root.base_model` for users who call the body directly."""
    outermost: tuple[nn.Module, int] | None = None  # the module whose pass is under way, and its thread

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal outermost
        me = (module, threading.get_ident())
        if outermost is not None and outermost[1] == me[1] and outermost[0] is not module:
            return  # the body within the whole; the same module again was interrupted before its end
        interception.begin(cached_columns(kwargs), input_rows(args, kwargs))
        outermost = me

    def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal outermost
        if outermost != (module, threading.get_ident()):
            return
        outermost = None
        interception.tracker.end()
        if output is not None and module is root:  # None: the pass was stopped or failed
            interception.check_fired(exempt=() if kwargs.get("inputs_embeds") is None else ("embed.W_E",))

    base = root._modules.get(getattr(root, "base_model_prefix", "") or "")
    for module in (root,) if base is None else (root, base):
        stack.callback(module.register_forward_pre_hook(Hook(begin), with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(Hook(end), with_kwargs=True, always_call=True).remove)


def watch_generate(
    stack: contextlib.ExitStack, owner: Any, tracker: RowTracker, names: tuple[str, ...], of_transformers: bool = False
) -> None:
    """Tell a tracker that a host's decoding loops are running.

    The first pass of TransformerLens' own reads the whole prompt; of transformers' it is known what they were called with.
    """

    def around(original: Callable, *args: Any, **kwargs: Any) -> Any:
        prompt = prompt_columns(args, kwargs) if of_transformers else None
        with tracker.generating(prompt, known=not of_transformers or prompt is not None):
            return original(*args, **kwargs)

    for name in names:
        if hasattr(owner, name):
            stack.enter_context(shadowed_method(owner, name, around))


def prompt_columns(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Columns of the rows that transformers' `generate` is called with; None where it makes them itself.

    The passes do not tell: a prompt may be read in chunks, and tokens that were guessed ahead are read along with it.
    """
    rows = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    both = (rows, kwargs.get("inputs_embeds"))
    known = [part.shape[1] for part in both if isinstance(part, Tensor) and part.ndim >= 2 and part.shape[1]]
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


def first_argument(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a module was called with first, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


# --- what cannot be watched -------------------------------------------------------------------------------------------
def refuse_wrapped(root: nn.Module) -> None:
    """Refuse modules that would run past the hooks put on them, or whose weights hold no numbers (UnsupportedModelError):
    wrappers for several devices, encoder-decoders, what is on the meta device or compiled, in part or whole.
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
    forward = module.forward  # torch.compiler.disable wraps a function as well
    compiled = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
    own = type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
    return "torch.compile" if own or compiled else ""
