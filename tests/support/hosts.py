"""Tiny random models on every host the installed libraries have, and how their users call them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter, adapt

from .models import VOCAB, tokenizer

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4 has only the bridge
    HookedTransformer = None
try:
    from transformer_lens.model_bridge.sources import build_bridge_from_module
except ImportError:  # transformer-lens 2 has no bridge
    build_bridge_from_module = None


def off_trivial(model: nn.Module, seed: int = 7) -> nn.Module:
    """Biases and norm gains away from 0 and 1: a wrong bias could not be seen where every bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or ".b_" in name or "._b_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def needs_bridge() -> None:
    if build_bridge_from_module is None:
        pytest.skip("this version of transformer-lens has no TransformerBridge")


def needs_hooked_transformer() -> None:
    if HookedTransformer is None:
        pytest.skip("this version of transformer-lens has no HookedTransformer")


_ALIVE: list[Any] = []


def adapted(model: Any) -> ModelAdapter:
    """The adapter of a model, which it refers to weakly: the model is kept until the test ends (`let_go`)."""
    _ALIVE.append(model)
    return adapt(model)


let_go = _ALIVE.clear


def on_host(model: nn.Module, host: str, architecture: str | None = None) -> Any:
    """A copy of a transformers model as its user holds it on a host; skips where the installed libraries lack it."""
    model = copy.deepcopy(model)
    if host == "transformers":
        return model
    if host == "bridge":
        needs_bridge()
        return build_bridge_from_module(model, architecture or type(model).__name__, hf_config=model.config)
    if host == "nnsight":
        from nnsight import NNsight

        return NNsight(model)
    if host == "language_model":
        from nnsight import LanguageModel

        return LanguageModel(model, tokenizer=tokenizer())
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(model, task="text-generation", tokenizer=tokenizer())


def hooked(**changes: Any) -> Any:
    """A random float64 HookedTransformer of transformer-lens 2 and 3."""
    needs_hooked_transformer()
    settings: dict[str, Any] = {
        **{"n_layers": 2, "d_model": 20, "n_ctx": 16, "d_head": 6, "n_heads": 4, "d_mlp": 28, "d_vocab": VOCAB},
        **{"act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, "dtype": torch.float64, "device": "cpu"},
        **{"init_weights": True, "initializer_range": 0.3},
    }
    model = HookedTransformer(HookedTransformerConfig(**(settings | changes))).eval()
    return off_trivial(model).requires_grad_(False)


def root_of(model: Any) -> nn.Module:
    """The torch module under a host's model."""
    return getattr(model, "_module", model)


def run(model: Any, inputs: Tensor | dict[str, Tensor]) -> Tensor:
    """The output tensor (logits, where there are any) of any host, called the way its user calls it."""
    kwargs = inputs if isinstance(inputs, dict) else None
    with torch.no_grad():
        if type(model).__module__.startswith("nnsight"):
            with model.trace(inputs):
                out = model.output.save()
        elif kwargs is not None and hasattr(model, "original_model"):
            out = model(kwargs["input_ids"])
        elif kwargs is not None:
            out = model(**kwargs)
        else:
            out = model(inputs)
    for name in ("logits", "last_hidden_state", "projected_states"):
        out = getattr(out, name, out)
    return out


def assets() -> Path:
    """The folder of test assets; skips where it is missing."""
    import os

    root = Path(os.environ.get("TLPD_TEST_ASSETS", Path(__file__).parents[2] / ".." / "shared"))
    if not (root / "models").is_dir():
        pytest.skip(f"no test assets in {root} (set TLPD_TEST_ASSETS)")
    return root
