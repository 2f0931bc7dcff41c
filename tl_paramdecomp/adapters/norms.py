"""A model's normalisation gains: where they are, what multiplies them, and other ones in their places.

LayerNorm and RMSNorm are affine in their gains: y = xhat * w + b, or xhat * (1 + w) in Gemma. xhat is worked out anew from
what the module reads; a gain's offset does not matter to a move along it. Which formula a module follows is tried out:

1. A candidate is a module whose only parameters are a vector of gains and perhaps one of biases.
2. With random gains and biases in their places, its output on random rows must be LayerNorm's or RMSNorm's, the gain taken
   as it is or from 1; nothing is taken from names but the value of epsilon.
3. What matches neither is refused with the reason.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters.computed import computed_tensors, peeked, read_tensor
from tl_paramdecomp.adapters.swapping import swapped_parameter
from tl_paramdecomp.adapters.wiring import READABLE, Tap, find_module, plain_path
from tl_paramdecomp.sites import NormSite

ATTRIBUTES = (("weight", "bias"), ("w", "b"), ("scale", "bias"), ("gain", "bias"), ("gamma", "beta"))
"""Names under which modules hold gain and bias."""
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)  # tried where a module does not say its own
EXACT, IN_FLOAT32 = 1e-10, 2e-5
"""Largest difference relative to the largest output, of modules that compute in float64, and of those that do in float32."""
COARSE = {torch.float64: IN_FLOAT32, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""The same where the trial itself runs in the number type of the gain."""


@dataclass(frozen=True)
class NormWiring:
    """How one normalisation is read, written and intercepted in a tree of torch modules."""

    site: NormSite
    path: str  # dotted path of the module that is called
    owner: str  # dotted path of the module that holds the gain
    weight: str  # attribute of the owner that holds it
    bias: str | None  # attribute that holds the bias, or None
    x: Tap
    y: Tap
    centred: bool = False  # LayerNorm, which takes the mean away first; else RMSNorm
    eps: float | None = 0.0
    """Added to the mean square under the root; None: the smallest step of the number type, as `torch.nn.RMSNorm` has it."""
    in_float32: bool = False  # whether the module normalises in float32 whatever it is given
    offset: float = 0.0  # added to the gain: 1 in Gemma

    def normalised(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """xhat, in the number type in which the module works it out: float32 at least."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        x = x.float() if self.in_float32 or x.dtype in (torch.bfloat16, torch.float16) else x
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def stored_weight(self, gain: Float[Tensor, " width"], old: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """A gain, or bias, as the module holds it."""
        return gain.detach().to(old.dtype)

    stored_bias = stored_weight

    def renamed(self, name: str, *aliases: str) -> "NormWiring":
        """The same under another name."""
        return replace(self, site=replace(self.site, name=name, aliases=tuple(filter(None, aliases))))


class Norms(NamedTuple):
    """A model's normalisations, in the order of its tree."""

    wirings: dict[str, NormWiring]
    refused: dict[str, str]  # names of those whose gains cannot be moved exactly, each with the reason

    @property
    def sites(self) -> dict[str, NormSite]:
        """By canonical name."""
        return {name: wiring.site for name, wiring in self.wirings.items()}


def read_norm_bias(root: nn.Module, wiring: NormWiring) -> Float[Tensor, " width"] | None:
    """Bias of a norm, attached to the host's parameter, or None."""
    return read_tensor(find_module(root, wiring.owner), wiring.bias, wiring.site.name) if wiring.bias else None


# --- finding ----------------------------------------------------------------------------------------------------------
def find_norms(root: nn.Module, candidates: Iterable[NormWiring]) -> Norms:
    """Those of the candidates that are LayerNorm or RMSNorm, and why each other one is not."""
    norms = Norms({}, {})
    for candidate in candidates:
        tried = _probed(root, candidate)
        if isinstance(tried, NormWiring):
            norms.wirings[candidate.site.name] = tried
        elif is_called_norm(find_module(root, candidate.owner)):
            norms.refused[candidate.site.name] = tried
    return norms


def norm_candidates(tree: nn.Module, top: str, blocks: str) -> Iterator[NormWiring]:
    """Modules of a tree that may be normalisations with gains, under canonical names where those are known.

    `top` is the path of the tree, `blocks` that in it of the list of blocks. A bridge's are called as wrappers.
    """
    found: dict[str, NormWiring] = {}
    wrapped: set[int] = set()
    for path, module in tree.named_modules():
        holder, where = getattr(module, "original_component", None), f"{top}.{path}".strip(".")
        candidate = None
        if isinstance(holder, nn.Module):
            wrapped.add(id(holder))
            candidate = _candidate(where, module, f"{where}.original_component", holder)
        elif id(module) not in wrapped:
            candidate = _candidate(where, module, where, module)
        if candidate is not None:
            found[plain_path(path)] = candidate
    names = canonical_norms(found, blocks) if blocks else {}
    for path, candidate in found.items():
        dotted = f"{path}.{candidate.weight}".lstrip(".")
        yield candidate.renamed(names.get(path, dotted), path, dotted)


def _candidate(path: str, module: nn.Module, owner: str, holder: nn.Module) -> NormWiring | None:
    """Hook points for input and output, where the module has them, are where it is intercepted."""
    computed = computed_tensors(holder)
    parts = {part for names in computed.values() for part in names}
    held = {key: p for key, p in holder._parameters.items() if p is not None and key not in parts}
    held |= {key: peeked(holder, key) for key in computed}
    pair = next(((w, b) for w, b in ATTRIBUTES if w in held and held.keys() <= {w, b}), None)
    if pair is None or not (held[pair[0]].ndim == 1 or is_called_norm(holder)):
        return None
    weight, bias = pair[0], pair[1] if pair[1] in held else None
    x = y = Tap(path)
    if {"hook_in", "hook_out"} <= module._modules.keys():
        x, y = Tap(f"{path}.hook_in", "output"), Tap(f"{path}.hook_out", "output")
    width = held[weight].shape[-1] if held[weight].ndim else 1
    return NormWiring(NormSite("", width, has_bias=bias is not None), path, owner, weight, bias, x, y)


def is_called_norm(module: nn.Module) -> bool:
    """Whether a module's class, or one it is derived from, is named so."""
    return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)


# --- names ------------------------------------------------------------------------------------------------------------
ROLES: dict[str, tuple[str, ...]] = {
    "ln1": ("ln_1", "input_layernorm", "norm_1", "self_attn_layer_norm", "ln_attn", "attention_norm", "attn_norm", "norm1",
            "temporal_pre_norm"),
    "attn.q_norm": ("self_attn.q_norm", "attention.q_norm", "attn.q_norm", "self_attn.q_layernorm"),
    "attn.k_norm": ("self_attn.k_norm", "attention.k_norm", "attn.k_norm", "self_attn.k_layernorm"),
    "ln1_post": ("post_self_attn_layernorm",),
    "ln2": ("ln_2", "post_attention_layernorm", "norm_2", "final_layer_norm", "ln_mlp", "ffn_norm", "mlp_norm", "norm2",
            "channel_pre_norm"),
    "ln2_post": ("post_mlp_layernorm",),
}  # fmt: skip
"""Role in a block -> names of the module that plays it."""
AROUND = {
    "ln1": ("input_layernorm",), "ln1_post": ("post_attention_layernorm",), "ln2": ("pre_feedforward_layernorm",),
    "ln2_post": ("post_feedforward_layernorm",),
}  # fmt: skip
"""The same in blocks that normalise before and after both halves, such as Gemma 2's."""
AFTER = {"ln1": ("post_attention_layernorm",), "ln2": ("post_feedforward_layernorm",)}
"""The same in blocks that normalise only after them, such as OLMo 2's."""
FINAL = ("ln_f", "norm", "norm_f", "final_layer_norm", "final_layernorm", "final_norm")
"""Names of the last normalisation, beside the list of blocks."""


def canonical_norms(paths: Iterable[str], blocks: str) -> dict[str, str]:
    """Canonical names of a language model's normalisations by path, `blocks` being that of its blocks; others are left out."""
    inside: dict[str, set[str]] = {}
    found = {}
    parent = blocks.rpartition(".")[0]
    for path in paths:
        if path.startswith(f"{blocks}."):
            index, _, local = path[len(blocks) + 1 :].partition(".")
            inside.setdefault(index, set()).add(local)
        elif path in {f"{parent}.{name}".lstrip(".") for name in FINAL}:
            found.setdefault(path, "ln_final.w")
    for index, local in inside.items():
        only_after = "post_feedforward_layernorm" in local and "input_layernorm" not in local
        own = AROUND if "pre_feedforward_layernorm" in local else AFTER if only_after else {}
        for role, candidates in (ROLES | own).items():
            chosen = next((c for c in candidates if c in local), None)
            if chosen is not None:
                found[f"{blocks}.{index}.{chosen}"] = f"blocks.{index}.{role}.w"
    return found


# --- trial ------------------------------------------------------------------------------------------------------------
def _probed(root: nn.Module, candidate: NormWiring) -> NormWiring | str:
    """A candidate with the formula that its module follows, or the reason why it follows none."""
    module, holder = find_module(root, candidate.path), find_module(root, candidate.owner)
    gain, kind = peeked(holder, candidate.weight), type(holder).__name__
    if gain.ndim != 1:
        return f"its gain is of shape {list(gain.shape)}, not one vector"
    if gain.is_meta or gain.dtype not in READABLE:
        return f"its gain is stored as {gain.dtype} on {gain.device}; load the model's weights unquantised"
    if any(buffer is not None for m in (module, holder) for buffer in m._buffers.values()):
        return f"{kind} keeps statistics of its own"
    reason = f"the output of {kind} is neither LayerNorm's nor RMSNorm's, times its gain"
    for dtype in dict.fromkeys((torch.float64, gain.dtype)):
        try:
            if (found := _formula(candidate, module, holder, dtype, gain.device)) is not None:
                return found
        except Exception as error:
            reason = f"{kind} does not run on rows of {candidate.site.width} ({str(error).strip()[:80]})"
    return reason


@torch.no_grad()
def _formula(
    candidate: NormWiring, module: nn.Module, holder: nn.Module, dtype: torch.dtype, device: torch.device
) -> NormWiring | None:
    width = candidate.site.width
    drawn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.logspace(-4, 1, 6, dtype=torch.float64).view(2, 3, 1)  # small rows show epsilon
    x = ((drawn(2, 3, width) + 0.5) * sizes).to(device, dtype)
    gain, bias = (drawn(width).to(device, dtype) for _ in range(2))
    with ExitStack() as stack:
        stack.enter_context(swapped_parameter(holder, candidate.weight, gain))
        if candidate.bias is not None:
            stack.enter_context(swapped_parameter(holder, candidate.bias, bias))
        y = type(module).forward(module, x)  # past hooks and controllers on the call
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    shift = bias if candidate.bias is not None else torch.zeros_like(bias)
    tolerances = ((False, EXACT), (True, IN_FLOAT32)) if dtype == torch.float64 else ((True, COARSE[dtype]),)
    for (in_float32, tolerance), centred, eps, offset in itertools.product(
        tolerances, (True, False), _epsilons(module, holder), (0.0, 1.0)
    ):
        form = replace(candidate, centred=centred, eps=eps, in_float32=in_float32, offset=offset)
        expected = form.normalised(x).to(dtype) * (gain + offset) + shift
        if bool((expected - y).abs().max() <= tolerance * y.abs().max()):
            return form
    return None


def _epsilons(*modules: nn.Module) -> list[float | None]:
    """What modules and their configurations call epsilon, then what is usual."""
    holders: list[Any] = [*modules, *(vars(m).get(name) for m in modules for name in ("cfg", "config"))]
    known = [v for holder in holders if hasattr(holder, "__dict__") for k, v in vars(holder).items() if "eps" in k]
    return list(dict.fromkeys([*(v for v in known if v is None or isinstance(v, float)), *EPSILONS]))
