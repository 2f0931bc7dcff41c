"""Tiny random models on every installed host, decompositions of them, and one way to run them all.

Biases and norm gains are moved away from 0 and 1: transformers starts every bias at zero, and a wrong bias would not show.
"""

import functools
import tempfile
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd

VOCAB, C = 61, 5


def _off_trivial(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or ".b_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _seeded(make: Any) -> Any:
    @functools.wraps(make)
    def seeded(*args: Any, seed: int = 0, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make(*args, **kwargs)

    return seeded


@_seeded
def gpt2(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A transformers GPT-2: fused c_attn, Conv1D, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "attn_implementation": "eager",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _off_trivial(GPT2LMHeadModel(GPT2Config(**(settings | changes))).to(dtype).eval())


@_seeded
def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers Llama: grouped key/value heads, gated MLP, no biases, untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "attn_implementation": "eager",
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _off_trivial(LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype).eval())


@_seeded
def hooked(**changes: Any) -> Any:
    """A HookedTransformer with unfolded LayerNorm; skips the test where TransformerLens has none."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer")
    settings = {
        "n_layers": 2,
        "d_model": 24,
        "n_ctx": 32,
        "d_head": 8,
        "n_heads": 3,
        "d_mlp": 96,
        "d_vocab": VOCAB,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "dtype": torch.float64,
        "init_weights": True,
        "device": "cpu",
        "seed": 0,
        "initializer_range": 0.3,
    }
    return _off_trivial(HookedTransformer(HookedTransformerConfig(**(settings | changes))).eval())


def hooked_gqa(**changes: Any) -> Any:
    """A HookedTransformer with grouped key/value heads, rotary positions and a gated MLP."""
    settings = {
        "normalization_type": "RMS",
        "gated_mlp": True,
        "act_fn": "silu",
        "n_heads": 4,
        "d_head": 6,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "rotary_dim": 6,
    }
    return hooked(**(settings | changes))


def bridge(model: Any = None) -> Any:
    """A TransformerBridge around a transformers model; skips the test where TransformerLens has none."""
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError:
        pytest.skip("this TransformerLens has no TransformerBridge")
    model = gpt2() if model is None else model
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def nnsight(model: Any = None) -> Any:
    """An nnsight model around a transformers model."""
    from nnsight import NNsight

    return NNsight(gpt2() if model is None else model)


def nnsight_lm(model: Any = None) -> Any:
    """An nnsight language model, which can generate."""
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(gpt2() if model is None else model, task="text-generation", tokenizer=tokenizer())


@functools.cache
def _tokenizer_folder() -> tempfile.TemporaryDirectory:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tempfile.TemporaryDirectory()
    special = {"unk_token": "w0", "pad_token": "w60", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder.name)
    return folder


def tokenizer() -> Any:
    """Words w0 to w60, the last for padding; from a folder that stays, as TransformerLens loads it again from there."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder().name)


def plain() -> nn.Module:
    """A torch module with a square weight and one without a bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()


BUILDERS = {
    "hooked": hooked,
    "hooked-gqa": hooked_gqa,
    "bridge": bridge,
    "bridge-llama": lambda: bridge(llama()),
    "nnsight": nnsight,
    "nnsight-llama": lambda: nnsight(llama()),
    "gpt2": gpt2,
    "llama": llama,
}
LENS = [host for host in BUILDERS if host.startswith(("hooked", "bridge"))]
GPT2_LIKE = ["hooked", "bridge", "nnsight", "gpt2"]


def build(host: str) -> Any:
    """A frozen model on a host, or a skip where the installed libraries have no such host."""
    model = BUILDERS[host]()
    module_of(model).requires_grad_(False)
    return model


def module_of(model: Any) -> nn.Module:
    """The torch module that holds a host's parameters."""
    return getattr(model, "_module", model)


def dtype_of(model: Any) -> torch.dtype:
    """Number type of a model's weights."""
    return next(module_of(model).parameters()).dtype


def tolerance(model: Any) -> float:
    """What rounding may do to logits of size 1 to 10."""
    return 1e-10 if dtype_of(model) == torch.float64 else 3e-4


def logits(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits [batch, pos, vocab] of any host, the way its user calls it."""
    with torch.no_grad():
        if type(model).__module__.startswith("nnsight"):
            with model.trace(tokens, **kwargs):
                out = model.output.logits.save()
            return out
        out = model(tokens, **kwargs)
    return getattr(out, "logits", out)


def random_factors(model: Any, names: Iterable[str], n: int = C, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """V and U that do not sum to W, so that only a right delta component keeps the model's output."""
    generator = torch.Generator().manual_seed(seed)
    sites, factors = tlpd.find_sites(model), {}
    for name in names:
        site, dtype = sites[name], tlpd.site_weight(model, name).dtype
        V = torch.randn(site.d_in, n, generator=generator, dtype=torch.float64) * 0.3
        U = torch.randn(n, site.d_out, generator=generator, dtype=torch.float64) * 0.3
        factors[name] = (V.to(dtype), U.to(dtype))
    return factors


def decomposition_of(model: Any, pattern: Any = "*", n: int = C, seed: int = 0) -> tlpd.Decomposition:
    """A decomposition of a model's sites into random components."""
    return tlpd.from_factors(model, random_factors(model, tlpd.find_sites(model, pattern), n, seed))
