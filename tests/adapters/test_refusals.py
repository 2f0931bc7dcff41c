"""What cannot be decomposed is refused by name, before anything is touched."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import NoMatchingSiteError, UnsupportedModelError, UnsupportedSiteError

from ..support.exactness import ablate, patched_run, random_decomposition
from ..support.families import FAMILIES, build
from ..support.hosts import hooked, needs_bridge, needs_hooked_transformer, on_host


@pytest.mark.parametrize(
    "garbage", [None, 3, "gpt2", {"a": 1}, [nn.Linear(2, 2)], nn.Linear, torch.ones(2, 2), object()]
)
def test_what_is_no_model(garbage: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Expected a HookedTransformer.*not"):
        tlpd.find_sites(garbage)


def test_modules_without_a_linear_map() -> None:
    for module in (nn.ReLU(), nn.Conv3d(2, 3, 1), nn.LSTM(2, 3), nn.LayerNorm(4)):
        with pytest.raises(UnsupportedModelError, match="no linear map"):
            tlpd.find_sites(module)


def test_wrappers_for_several_devices() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\.module"):
        tlpd.find_sites(nn.DataParallel(build("gpt2")))


def test_compiled_models() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile"):
        tlpd.find_sites(torch.compile(model))
    model.compile()
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile"):
        tlpd.find_sites(model)


def part_of(model: Any, host: str) -> tuple[nn.Module, str]:
    """The module that holds a model's first MLP."""
    if host == "plain":
        return model, "0"
    root = getattr(model, "_module", model)
    return (root.transformer.h[0] if hasattr(root, "transformer") else root.blocks[0]), "mlp"


COMPILED = {
    "wrapped": lambda holder, name: setattr(holder, name, torch.compile(getattr(holder, name))),
    "in place": lambda holder, name: getattr(holder, name).compile(),
    "its forward": lambda holder, name: setattr(
        getattr(holder, name), "forward", torch.compile(getattr(holder, name).forward)
    ),
    "scripted": lambda holder, name: setattr(holder, name, torch.jit.script(nn.Sequential(nn.Linear(2, 2)))),
    "traced": lambda holder, name: setattr(holder, name, torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("host", ["plain", "transformers", "nnsight", "bridge", "hooked"])
def test_partly_compiled_models(host: str, how: str) -> None:
    """The part is named, and by what it is compiled; with the original back in its place the model is as any other."""

    def fresh() -> Any:
        if host == "plain":
            return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        return hooked() if host == "hooked" else on_host(build("gpt2"), host)

    model = fresh()
    holder, name = part_of(model, host)
    original = getattr(holder, name)
    if host == "nnsight" and how == "its forward":
        pytest.skip("nnsight itself holds the instance's forward")
    COMPILED[how](holder, name)
    by = r"torch\.jit" if how in ("scripted", "traced") else r"torch\.compile"
    with pytest.raises(UnsupportedModelError, match=rf"part '[^']*{name}' of this .* is compiled by {by}.*was before"):
        tlpd.find_sites(model)
    if how in ("wrapped", "scripted", "traced"):
        setattr(holder, name, original)
        assert list(tlpd.find_sites(model)) == list(tlpd.find_sites(fresh()))


def test_functions_that_are_kept_from_being_compiled_are_no_compiled_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    model[1].forward = torch.compiler.disable(model[1].forward)
    assert list(tlpd.find_sites(model)) == ["0.weight"]


def test_encoder_decoders() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        tlpd.find_sites(model)
    needs_bridge()
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        tlpd.find_sites(on_host(model, "bridge"))


@pytest.mark.parametrize("host", ["transformers", "nnsight"])
def test_models_without_numbers(host: str) -> None:
    import transformers

    family = FAMILIES["gpt2"]
    with torch.device("meta"):
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**family.config))
    if host == "nnsight":
        from nnsight import NNsight

        model = NNsight(model)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        tlpd.find_sites(model)


def test_nnsight_models_that_are_not_loaded() -> None:
    from nnsight.modeling.base import NNsight

    class VLLM(NNsight):
        pass

    with pytest.raises(UnsupportedModelError, match="VLLM"):
        tlpd.find_sites(VLLM(build("gpt2")))


@pytest.mark.parametrize(
    "kind", ["RemoteBridge", "VLLMBridge", "HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"]
)
def test_kinds_of_transformer_lens(kind: str) -> None:
    """By a stand-in of the same name and package: the real ones need a server or a GPU."""
    stand_in = type(kind, (nn.Module,), {"__module__": "transformer_lens.elsewhere"})()
    with pytest.raises(UnsupportedModelError, match=kind):
        tlpd.find_sites(stand_in)


@pytest.mark.filterwarnings("ignore:HookedEncoder is deprecated:DeprecationWarning")
def test_hooked_encoder() -> None:
    needs_hooked_transformer()
    from transformer_lens import HookedEncoder, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1,
        d_model=8,
        n_ctx=8,
        d_head=4,
        n_heads=2,
        d_mlp=8,
        d_vocab=9,
        act_fn="gelu",
        attention_dir="bidirectional",
    )
    with pytest.raises(UnsupportedModelError, match="HookedEncoder"):
        tlpd.find_sites(HookedEncoder(config, tokenizer=None))


class Quantised(nn.Linear):
    """A linear map in 8 bits, as quantisers hold it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("host", ["transformers", "nnsight"])
def test_quantised_weights(host: str) -> None:
    original = build("llama")
    original.model.layers[0].mlp.up_proj = Quantised(original.model.layers[0].mlp.up_proj)
    model = on_host(original, host)
    assert "blocks.1.mlp.W_in" in tlpd.find_sites(model)
    assert "blocks.0.mlp.W_in" not in tlpd.find_sites(model)
    for ask in (tlpd.find_sites, tlpd.site_weight):
        with pytest.raises(UnsupportedSiteError, match=r"int8.*unquantised"):
            ask(model, "blocks.0.mlp.W_in")


class Lowered(nn.Linear):
    """x W + b and a low-rank part beside it, as adapters for fine-tuning add."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


@pytest.mark.parametrize("host", ["transformers", "nnsight", "bridge"])
def test_a_linear_map_that_does_more_is_found_out(host: str) -> None:
    """Even in a family that is known: the type of the module is not the one that is known."""
    original = build("llama")
    old = original.model.layers[1].mlp.down_proj
    new = Lowered(old.in_features, old.out_features, bias=False).to(torch.float64)
    new.weight = old.weight
    original.model.layers[1].mlp.down_proj = new
    model = on_host(original, host)
    sites = tlpd.find_sites(model)
    assert "blocks.1.mlp.W_out" not in sites and "blocks.0.mlp.W_out" in sites
    with pytest.raises(UnsupportedSiteError, match="something else happens inside"):
        tlpd.find_sites(model, "blocks.1.mlp.W_out")
    plain = nn.Sequential(copy.deepcopy(new))
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        tlpd.find_sites(plain)


def test_a_weight_that_is_also_used_past_its_call_is_found_out() -> None:
    original = build("llama")
    mlp = original.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = types.MethodType(lambda self, x: forward(x) + 0.1 * self.up_proj.weight.mean(), mlp)
    original.config.model_type = "unknown"  # so that it is tried out
    with pytest.raises(UnsupportedSiteError, match="without calling it"):
        tlpd.find_sites(original, "blocks.1.mlp.W_in")
    assert "blocks.1.mlp.W_gate" in tlpd.find_sites(original)


def test_names_that_match_nothing_name_the_nearest() -> None:
    model = build("gpt2")
    with pytest.raises(NoMatchingSiteError, match=r"blocks\.0\.mlp\.W_in"):
        tlpd.find_sites(model, "blocks.0.mlp.Win")
    assert list(tlpd.find_sites(model, "transformer.h.1.mlp.c_fc")) == ["blocks.1.mlp.W_in"]
    assert torch.equal(
        tlpd.site_weight(model, "transformer.h.1.mlp.c_fc.weight"), tlpd.site_weight(model, "blocks.1.mlp.W_in")
    )


def test_a_path_that_the_host_no_longer_takes_is_reported() -> None:
    """Never silently unpatched: a module replaced after the adapter was made does not fire."""
    model = build("llama")
    decomposition = random_decomposition(model, "blocks.0.mlp.W_in")
    tokens = torch.arange(5).unsqueeze(0)
    with pytest.raises(tlpd.errors.SiteNotFiredError, match=r"blocks\.0\.mlp\.W_in"):
        with tlpd.patched(model, decomposition, ablate(decomposition)):
            model.model.layers[0].mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)._apply(lambda t: t)
            model.model.layers[0].mlp.up_proj._forward_hooks.clear()
            model(tokens)
    patched_run(model, decomposition, ablate(decomposition), tokens)


def test_no_host_library_is_imported_for_a_plain_module() -> None:
    import subprocess

    code = (
        "import sys, torch, tl_paramdecomp as tlpd; tlpd.find_sites(torch.nn.Linear(2, 2));"
        "assert not {'transformer_lens', 'nnsight', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
