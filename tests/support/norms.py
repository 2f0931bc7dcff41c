"""Tiny models on every host with their norms' parameters at hand, found by the families' own paths."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import build as family
from .models import bridge, gpt2, hooked, hooked_gqa, llama, nnsight

GPT2 = {"ln1": "transformer.h.{i}.ln_1", "ln2": "transformer.h.{i}.ln_2", "final": "transformer.ln_f"}
LLAMA = {
    "ln1": "model.layers.{i}.input_layernorm",
    "ln2": "model.layers.{i}.post_attention_layernorm",
    "final": "model.norm",
}
GEMMA2 = {
    "ln1": "model.layers.{i}.input_layernorm",
    "ln1_post": "model.layers.{i}.post_attention_layernorm",
    "ln2": "model.layers.{i}.pre_feedforward_layernorm",
    "ln2_post": "model.layers.{i}.post_feedforward_layernorm",
    "final": "model.norm",
}
QWEN3 = {
    "attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    **LLAMA,
}
HOOKED = {"ln1": "blocks.{i}.ln1", "ln2": "blocks.{i}.ln2", "final": "ln_final"}


class OffsetNorm(nn.Module):
    """Gemma's RMSNorm without its detour through float32."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(like.weight.detach().clone()), like.eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (1.0 + self.weight)


def gemma2() -> nn.Module:
    """A float64 Gemma 2 whose norms compute in float64."""
    model = family("gemma2")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Gemma2RMSNorm":
                setattr(parent, name, OffsetNorm(child))
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Normed:
    """A model and its norms' parameters by canonical name."""

    model: Any
    gains: dict[str, nn.Parameter]
    biases: dict[str, nn.Parameter]


def _normed(module: Any, paths: dict[str, str], host: Any = None) -> Normed:
    gains, biases = {}, {}
    for i in range(2):
        for role, path in paths.items():
            name = "ln_final.w" if role == "final" else f"blocks.{i}.{role}.w"
            norm = module.get_submodule(path.format(i=i))
            gains[name] = norm.w if hasattr(norm, "w") else norm.weight
            bias = getattr(norm, "b", None) if hasattr(norm, "w") else getattr(norm, "bias", None)
            if bias is not None:
                biases[name] = bias
    return Normed(module if host is None else host(module), gains, biases)


NORMED = {
    "gpt2": lambda: _normed(gpt2(), GPT2),
    "gpt2-bridge": lambda: _normed(gpt2(), GPT2, bridge),
    "gpt2-nnsight": lambda: _normed(gpt2(), GPT2, nnsight),
    "llama": lambda: _normed(llama(torch.float64), LLAMA),
    "llama-bridge": lambda: _normed(llama(torch.float64), LLAMA, bridge),
    "llama-nnsight": lambda: _normed(llama(torch.float64), LLAMA, nnsight),
    "gemma2": lambda: _normed(gemma2(), GEMMA2),
    "gemma2-nnsight": lambda: _normed(gemma2(), GEMMA2, nnsight),
    "qwen3": lambda: _normed(family("qwen3"), QWEN3),
    "qwen3-bridge": lambda: _normed(family("qwen3"), QWEN3, bridge),
    "hooked": lambda: _normed(hooked(), HOOKED),
    "hooked-gqa": lambda: _normed(hooked_gqa(), HOOKED),
    "hooked-qk-norm": lambda: _normed(
        hooked_gqa(use_qk_norm=True),
        HOOKED | {"attn.q_norm": "blocks.{i}.attn.q_norm", "attn.k_norm": "blocks.{i}.attn.k_norm"},
    ),
}


def normed(host: str) -> Normed:
    """A frozen model on a host, or a skip where the installed libraries have no such host."""
    made = NORMED[host]()
    for parameter in getattr(made.model, "_module", made.model).parameters():
        parameter.requires_grad_(False)
    return made
