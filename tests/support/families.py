"""Tiny random float64 transformers models of the families that must be exact, and where each keeps its weights.

The tables are written by hand from the families' own code: they are what the library's naming is compared with.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .hosts import VOCAB, off_trivial

LAYERS = 2
EAGER = {"attn_implementation": "eager"}
LLAMA_LIKE = {
    **{"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
    **{"num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 32, "initializer_range": 0.3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@dataclass(frozen=True)
class Place:
    """Where a family keeps one site's weight."""

    path: str
    """Module that holds it, `{i}` being the layer."""
    stored: str
    """`in_out` (Conv1D, embeddings) or `out_in` (nn.Linear)."""
    columns: tuple[int, ...] | None = None
    """Output columns of a fused weight."""
    heads: int | None = None
    """Heads that the site divides into."""


@dataclass(frozen=True)
class Family:
    """One family: its class and configuration in transformers, and its sites in the order of a forward pass."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    blocks: dict[str, Place]
    embed: str
    pos_embed: str | None = None

    def places(self) -> dict[str, Place]:
        """Every site's place, in the order of a forward pass."""
        found = {"embed.W_E": Place(self.embed, "in_out")}
        if self.pos_embed:
            found["pos_embed.W_pos"] = Place(self.pos_embed, "in_out")
        for i in range(LAYERS):
            for role, place in self.blocks.items():
                found[f"blocks.{i}.{role}"] = Place(place.path.format(i=i), place.stored, place.columns, place.heads)
        older_neox = self.model_class == "GPTNeoXForCausalLM" and transformers.__version__.startswith("4")
        head = "embed_out" if older_neox else "lm_head"
        return found | {"unembed.W_U": Place(head, "out_in")}


def _columns(width: int, start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(width)[start:stop])


def _by_head(heads: int, d_head: int, which: int) -> tuple[int, ...]:
    """Columns of the query (0), key (1) or value (2) of every head, stored head by head."""
    return tuple(torch.arange(heads * 3 * d_head).view(heads, 3, d_head)[:, which].reshape(-1).tolist())


def _llama_like(names: str, config: dict[str, Any] | None = None) -> Family:
    attn, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    blocks = {
        "attn.W_Q": Place(attn + "q_proj", "out_in", heads=4),
        "attn.W_K": Place(attn + "k_proj", "out_in", heads=2),
        "attn.W_V": Place(attn + "v_proj", "out_in", heads=2),
        "attn.W_O": Place(attn + "o_proj", "out_in", heads=4),
        "mlp.W_gate": Place(mlp + "gate_proj", "out_in"),
        "mlp.W_in": Place(mlp + "up_proj", "out_in"),
        "mlp.W_out": Place(mlp + "down_proj", "out_in"),
    }
    return Family(f"{names}ForCausalLM", f"{names}Config", LLAMA_LIKE | (config or {}), blocks, "model.embed_tokens")


_GPT2 = Family(
    "GPT2LMHeadModel",
    "GPT2Config",
    {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": LAYERS, "n_head": 3, "initializer_range": 0.3,
     "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 40, "bos_token_id": 1, "eos_token_id": 2},
    {
        "attn.W_Q": Place("transformer.h.{i}.attn.c_attn", "in_out", _columns(72, 0, 24), 3),
        "attn.W_K": Place("transformer.h.{i}.attn.c_attn", "in_out", _columns(72, 24, 48), 3),
        "attn.W_V": Place("transformer.h.{i}.attn.c_attn", "in_out", _columns(72, 48, 72), 3),
        "attn.W_O": Place("transformer.h.{i}.attn.c_proj", "in_out", None, 3),
        "mlp.W_in": Place("transformer.h.{i}.mlp.c_fc", "in_out"),
        "mlp.W_out": Place("transformer.h.{i}.mlp.c_proj", "in_out"),
    },
    "transformer.wte",
    "transformer.wpe",
)  # fmt: skip

_NEO = Family(
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    {"vocab_size": VOCAB, "hidden_size": 24, "num_layers": LAYERS, "num_heads": 3, "intermediate_size": 40,
     "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 32,
     "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2},
    {
        "attn.W_Q": Place("transformer.h.{i}.attn.attention.q_proj", "out_in", None, 3),
        "attn.W_K": Place("transformer.h.{i}.attn.attention.k_proj", "out_in", None, 3),
        "attn.W_V": Place("transformer.h.{i}.attn.attention.v_proj", "out_in", None, 3),
        "attn.W_O": Place("transformer.h.{i}.attn.attention.out_proj", "out_in", None, 3),
        "mlp.W_in": Place("transformer.h.{i}.mlp.c_fc", "out_in"),
        "mlp.W_out": Place("transformer.h.{i}.mlp.c_proj", "out_in"),
    },
    "transformer.wte",
    "transformer.wpe",
)  # fmt: skip

_GPTJ = Family(
    "GPTJForCausalLM",
    "GPTJConfig",
    {"vocab_size": VOCAB, "n_embd": 24, "n_layer": LAYERS, "n_head": 3, "rotary_dim": 4, "n_positions": 32, "n_inner": 40,
     "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2},
    {
        "attn.W_Q": Place("transformer.h.{i}.attn.q_proj", "out_in", None, 3),
        "attn.W_K": Place("transformer.h.{i}.attn.k_proj", "out_in", None, 3),
        "attn.W_V": Place("transformer.h.{i}.attn.v_proj", "out_in", None, 3),
        "attn.W_O": Place("transformer.h.{i}.attn.out_proj", "out_in", None, 3),
        "mlp.W_in": Place("transformer.h.{i}.mlp.fc_in", "out_in"),
        "mlp.W_out": Place("transformer.h.{i}.mlp.fc_out", "out_in"),
    },
    "transformer.wte",
)  # fmt: skip

_NEOX = Family(
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 40,
     "max_position_embeddings": 32, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
     "use_parallel_residual": True},
    {
        "attn.W_Q": Place("gpt_neox.layers.{i}.attention.query_key_value", "out_in", _by_head(4, 8, 0), 4),
        "attn.W_K": Place("gpt_neox.layers.{i}.attention.query_key_value", "out_in", _by_head(4, 8, 1), 4),
        "attn.W_V": Place("gpt_neox.layers.{i}.attention.query_key_value", "out_in", _by_head(4, 8, 2), 4),
        "attn.W_O": Place("gpt_neox.layers.{i}.attention.dense", "out_in", None, 4),
        "mlp.W_in": Place("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "out_in"),
        "mlp.W_out": Place("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "out_in"),
    },
    "gpt_neox.embed_in",
)  # fmt: skip


def _changed(family: Family, **config: Any) -> Family:
    return Family(**(vars(family) | {"config": family.config | config}))


FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt2-untied": _changed(_GPT2, tie_word_embeddings=False),
    "gpt-neo": _NEO,
    "gpt-j": _GPTJ,
    "pythia": _NEOX,
    "neox-sequential": _changed(_NEOX, use_parallel_residual=False),
    "llama": _llama_like("Llama"),
    "llama-biased-tied": _llama_like("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": _llama_like("Mistral", {"sliding_window": 4}),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma2": _llama_like(
        "Gemma2", {"query_pre_attn_scalar": 10, "sliding_window": 4, "hidden_activation": "gelu_pytorch_tanh"}
    ),
}


@functools.cache
def _built(name: str) -> nn.Module:
    family = FAMILIES[name]
    config = getattr(transformers, family.config_class)(**family.config)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, family.model_class)(config).to(torch.float64).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return off_trivial(model)


def build(name: str) -> nn.Module:
    """A fresh copy of a family's model."""
    return copy.deepcopy(_built(name))


def read(model: nn.Module, place: Place) -> Tensor:
    """W [d_in, d_out] by hand."""
    module = model.get_submodule(place.path)
    stored = module.weight if place.stored == "in_out" else module.weight.T
    stored = stored if place.columns is None else stored[:, list(place.columns)]
    return stored * getattr(module, "embed_scale", 1.0)


def subtract(model: nn.Module, place: Place, delta: Tensor) -> None:
    """W -= delta [d_in, d_out] by hand, in that place alone."""
    module = model.get_submodule(place.path)
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)  # unties a tied one
    stored = module.weight if place.stored == "in_out" else module.weight.T
    delta = delta / getattr(module, "embed_scale", 1.0)
    if place.columns is None:
        stored -= delta
    else:
        stored[:, list(place.columns)] -= delta
