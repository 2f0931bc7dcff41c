"""Parts of a forward pass that its caller can do without: blocks whose output is known, and the unembedding.

1. While a clean pass runs, keep the very object that each block's `forward` returned (`kept_outputs`).
2. In later passes over the same rows, let the blocks before the one that changed return those objects (`skipped`).
3. Where only the vectors before the unembedding are wanted, end the pass as they reach it (`run_until_unembedding`).
4. Try all of it out once on a few tokens, and offer only what reproduces the model (`find_blocks_to_skip`,
   `find_after_unembedding`).

A module's `forward` is shadowed by an attribute of that one instance, put back on leaving. What is kept is what `forward`
returned, before torch hooks: a hook that a user has on a block acts on a skipped block as on any other, and acts once.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters.boundary import shadowed_method
from tl_paramdecomp.adapters.passes import first_argument
from tl_paramdecomp.adapters.wiring import find_module
from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.sites import SiteCall

if TYPE_CHECKING:
    from tl_paramdecomp.adapters.base import ModelAdapter

UNEMBEDDING = "unembed.W_U"
PROBE_SHAPE = (2, 3)  # rows and positions of the tokens on which shortcuts are tried out
ROUNDING = 64.0
"""Largest difference of two ways to compute the same, in units of the dtype's rounding of the largest entry."""

LOGIT_FACTORS = {
    "logit_scale": lambda value: value,
    "lm_head_multiplier": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
}
"""Settings of hosts that scale the logits after the unembedding, each to the factor (Cohere, Falcon-H1, Granite)."""
LOGIT_CAPS = ("final_logit_softcapping", "output_logits_soft_cap", "logits_soft_cap")
"""Settings of hosts that cap the logits by cap * tanh(logits / cap) (Gemma 2, TransformerLens, RecurrentGemma)."""

AfterUnembedding = Callable[[Tensor], Tensor]  # what a host does to x W_U + b before it calls it logits


class ReachedEnd(Exception):  # noqa: N818 - ends a pass, tells of no error
    """The pass has come as far as its caller wants."""


# --- blocks ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def kept_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """A list that the passes inside fill with what each block's forward returned, cut from the graph."""
    outputs: list[Any] = [None] * len(blocks)

    def run_and_keep(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs[index] = _detached(output)
        return output

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(shadowed_method(block, "forward", functools.partial(run_and_keep, index)))
        yield outputs


def _detached(output: Any) -> Any:
    """The very object where nothing in it has a gradient; otherwise the same with its tensors detached."""
    if isinstance(output, Tensor):
        return output.detach() if output.requires_grad else output
    if type(output) in (tuple, list) and any(isinstance(part, Tensor) and part.requires_grad for part in output):
        return type(output)(map(_detached, output))
    return output


@contextlib.contextmanager
def skipped(blocks: Sequence[nn.Module], outputs: Sequence[Any], first: int) -> Iterator[None]:
    """Let every block before `first` return what it returned before (SettingError where these are not the outputs of all)."""
    if len(outputs) != len(blocks) or not 0 <= first <= len(blocks):
        raise SettingError(
            f"Expected the outputs of all {len(blocks)} blocks (capture(..., keep_blocks=True).blocks) and a block from 0 "
            f"to {len(blocks)} to begin at, not {len(outputs)} outputs and {first}. A model without blocks takes full passes."
        )
    with contextlib.ExitStack() as stack:
        for block, output in zip(blocks[:first], outputs):
            give = functools.partial(lambda known, *args, **kwargs: known, output)
            stack.enter_context(shadowed_method(block, "forward", give))
        yield


def find_blocks_to_skip(adapter: "ModelAdapter", blocks: Sequence[nn.Module]) -> bool:
    """Whether passes that begin at a later block are the model's own: tried out at every block, with what the last block that
    is left out returned in place of all of them.

    They are not where blocks share more than the residual stream (keys and values of an earlier layer, say), where a
    block is called twice in a pass, or where dropout makes every pass another.
    """
    tokens = probe_tokens(adapter)
    try:
        with torch.no_grad(), adapter.undisturbed():
            with kept_outputs(blocks) as outputs:
                full = adapter.forward(tokens)
            adapter.forward(tokens.roll(1, 1))  # what a block leaves behind for others is of other rows now
            for first in range(1, len(blocks) + 1):
                with skipped(blocks, [outputs[first - 1]] * len(blocks), first):
                    if not same(adapter.forward(tokens), full):
                        return False
    except Exception:  # whatever the host trips over when a block is left out
        return False
    return True


def _end(*args: Any, **kwargs: Any) -> None:
    raise ReachedEnd


def run_until_block(adapter: "ModelAdapter", block: int, run: Callable[[], Any]) -> Any:
    """What the block before a block returns in a pass that ends there, as `kept_outputs` keeps it."""
    before, ends = adapter.blocks[block - 1 : block], adapter.blocks[block : block + 1]
    with contextlib.ExitStack() as stack:
        outputs = stack.enter_context(kept_outputs(before))
        for module in ends:  # none after the last block: the pass runs to its end
            stack.enter_context(shadowed_method(module, "forward", _end))
        stack.enter_context(contextlib.suppress(ReachedEnd))
        run()
    return outputs[0]


# --- the unembedding -------------------------------------------------------------------------------------------------
def run_until_unembedding(adapter: "ModelAdapter", run: Callable[[], Any]) -> Tensor:
    """x of `unembed.W_U` in a pass that ends there; UnsupportedModelError where there is no such site or it is not reached."""
    if UNEMBEDDING not in adapter.wirings:
        raise UnsupportedModelError(
            f"This {type(adapter.root).__name__} has no site {UNEMBEDDING} before which a forward pass could end; "
            "compare logits instead."
        )
    module = find_module(adapter.root, adapter.wirings[UNEMBEDDING].x.path)
    reached: list[Tensor] = []

    def stop(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        reached[:] = [first_argument(args, kwargs)]
        raise ReachedEnd

    with shadowed_method(module, "forward", stop), contextlib.suppress(ReachedEnd):
        run()
    if not reached:
        raise UnsupportedModelError(f"The forward pass gave logits without calling {type(module).__name__}.")
    return reached[0]


def product(adapter: "ModelAdapter", x: Tensor) -> Tensor:
    """x W_U + b of the host's own weight."""
    weight, bias = adapter.weight(UNEMBEDDING), adapter.bias(UNEMBEDDING)
    return nn.functional.linear(x.to(weight.device), weight.T, bias)


def find_after_unembedding(adapter: "ModelAdapter") -> AfterUnembedding | None:
    """What the host does between x W_U + b and its logits, of the known forms; None where it is none of them.

    Tried out on a pass as it is and on one whose x W_U + b is made large: a cap hardly shows on small logits.
    """
    if UNEMBEDDING not in adapter.wirings:
        return None
    tokens, calls = probe_tokens(adapter), []

    def resized(size: float | None, call: SiteCall) -> Tensor:
        """The site's output scaled to a largest entry; notes what passed."""
        y = call.y if size is None else call.y * (size / call.y.abs().max().clamp(min=1e-6))
        calls.append((call.x, y))
        return y

    try:
        with torch.no_grad(), adapter.undisturbed():
            pairs = []
            for size in (None, 64.0):
                with adapter.intercept({UNEMBEDDING: functools.partial(resized, size)}):
                    logits = adapter.forward(tokens)
                pairs.append((calls[-1][1], logits))
            x, y = calls[0]
            if not same(product(adapter, x), y) or adapter.hidden(tokens).shape != x.shape:
                return None
    except Exception:  # whatever the host trips over when a pass is ended
        return None
    settings = logit_settings(adapter.root)
    factors = [None, *(LOGIT_FACTORS[name](value) for name, value in settings if name in LOGIT_FACTORS)]
    caps = [None, *(value for name, value in settings if name in LOGIT_CAPS)]
    candidates = (functools.partial(_finished, factor, cap) for factor in factors for cap in caps)
    return next((after for after in candidates if all(same(after(y), logits) for y, logits in pairs)), None)


def _finished(factor: float | None, cap: float | None, y: Tensor) -> Tensor:
    y = y if factor is None else y * factor
    return y if cap is None else cap * torch.tanh(y / cap)


def logit_settings(root: nn.Module) -> list[tuple[str, float]]:
    """What the host's configurations say is done to its logits after the unembedding."""
    names = (*LOGIT_FACTORS, *LOGIT_CAPS)
    configs = configurations(root)
    found = [(name, getattr(config, name, None)) for name in names for config in configs]
    return [(name, value) for name, value in found if isinstance(value, (int, float)) and value > 0]


def configurations(root: Any) -> list[Any]:
    """A host's own configuration, that of the transformers model in it, and that one's text part."""
    held: Any = getattr(getattr(root, "original_model", root), "config", None)
    text = held.get_text_config() if hasattr(held, "get_text_config") else None
    return [config for config in (getattr(root, "cfg", None), held, text) if config is not None]


# --- trying out ------------------------------------------------------------------------------------------------------
def probe_tokens(adapter: "ModelAdapter") -> Tensor:
    """A few token rows that every vocabulary has."""
    rows, length = PROBE_SHAPE
    vocab = next((w.site.d_in for w in adapter.wirings.values() if w.site.kind == "embedding"), rows * length)
    return torch.arange(rows * length, device=adapter.device).remainder(vocab).view(rows, length)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute the same differ by rounding alone."""
    if found.shape != expected.shape:
        return False
    bound = ROUNDING * max(torch.finfo(t.dtype).eps for t in (found, expected)) * expected.abs().max().item()
    return (found.to(expected.device, expected.dtype) - expected).abs().max().item() <= bound
