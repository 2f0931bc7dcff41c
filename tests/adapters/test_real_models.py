"""Pretrained models from the folder of test assets (TLPD_TEST_ASSETS), on every host."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd

from ..support.exactness import (
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    patched_run,
    random_decomposition,
    roles,
)
from ..support.families import FAMILIES, Place, subtract
from ..support.hosts import HookedTransformer, assets, needs_hooked_transformer, on_host, root_of, run

MODELS = {"stories260K": "llama", "babyllama-tok105": "llama", "gpt-nano-sort": "gpt2"}
HOSTS = ("transformers", "nnsight", "bridge")


@functools.cache
def _loaded(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets() / "models" / name, attn_implementation="eager")
    return model.to(torch.float64).eval().requires_grad_(False)


def load(name: str) -> nn.Module:
    return copy.deepcopy(_loaded(name))


def tokens_of(model: nn.Module) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))


def place(name: str, site: str, model: nn.Module) -> Place:
    """Where the family keeps a site, by the table of the tiny models; c_attn's columns by this model's width."""
    i, role = site.split(".", 2)[1:]
    found = FAMILIES[MODELS[name]].blocks[role]
    columns = None
    if found.columns is not None:
        d = model.config.n_embd
        start = {"attn.W_Q": 0, "attn.W_K": d, "attn.W_V": 2 * d}[role]
        columns = tuple(range(start, start + d))
    return Place(found.path.format(i=i), found.stored, columns)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", MODELS)
def test_all_block_sites_on_every_host(name: str, host: str) -> None:
    original = load(name)
    tokens = tokens_of(original)
    model = on_host(original, host)
    n_layers, per_block = original.config.num_hidden_layers, len(FAMILIES[MODELS[name]].blocks)
    decomposition = random_decomposition(original, "blocks.*", size=0.1)
    assert len(decomposition) == len(tlpd.find_sites(model, "blocks.*")) == n_layers * per_block
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    # Llama's norms compute in float32; trained models amplify its rounding
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-6, roles(decomposition).values())
    for site in decomposition:
        subtract(original, place(name, site, original), gone(decomposition, site))
    hooked = patched_run(model, decomposition, ablate(decomposition), tokens)
    assert difference(hooked, run(on_host(original, host), tokens)) < 1e-6


@pytest.mark.parametrize("host", ["nnsight", "bridge"])
@pytest.mark.parametrize("name", MODELS)
def test_hosts_agree(name: str, host: str) -> None:
    original = load(name)
    tokens = tokens_of(original)
    decomposition = random_decomposition(original, size=0.1)
    masks = (
        decomposition.masks()
        .ablate("blocks.1.attn.W_O", 1, head=2)
        .ablate("blocks.0.mlp.W_in", [0, 2], positions=[3, -1])
    )
    model = on_host(original, host)
    assert (
        difference(
            patched_run(model, decomposition, masks, tokens), patched_run(original, decomposition, masks, tokens)
        )
        < 1e-5
    )


def test_embeddings_and_unembedding_tied_or_not() -> None:
    for name in MODELS:
        model = load(name)
        tokens = tokens_of(model)
        decomposition = random_decomposition(model, ["embed.W_E", "unembed.W_U"], size=0.1)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert (decomposition.sites["unembed.W_U"].tied_to is not None) == tied
        assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
        assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-6, [["embed.W_E"], ["unembed.W_U"]])


def test_the_sorting_model_still_sorts_under_masks_of_ones() -> None:
    """A trained model does what it was trained for while every site is patched, and not without its components."""
    model: Any = load("gpt-nano-sort")
    digits = torch.randint(0, 3, (16, 6), generator=torch.Generator().manual_seed(0))
    row = torch.cat([digits, digits.sort(dim=1).values], dim=1)[:, :-1]
    decomposition = random_decomposition(model, "blocks.*", size=0.1)

    def sorted_by(masks: Any) -> float:
        return (
            (patched_run(model, decomposition, masks, row)[:, 5:].argmax(-1) == digits.sort(dim=1).values)
            .double()
            .mean()
            .item()
        )

    assert sorted_by(decomposition.masks()) == 1.0
    without = decomposition.masks()
    for site in roles(decomposition)["blocks.*.attn.W_V"]:
        without = without.keep_only(site, [], delta=0.0)
    assert sorted_by(without) < 0.9


@pytest.mark.parametrize("name", MODELS)
def test_converted_to_hooked_transformer(name: str) -> None:
    """The same weights, unprocessed, in transformer-lens 2 and 3: the same decomposition, the same logits."""
    needs_hooked_transformer()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    original = load(name)
    cfg, tokens = original.config, tokens_of(original)
    shared = {"n_layers": cfg.num_hidden_layers, "d_model": cfg.hidden_size, "n_heads": cfg.num_attention_heads,
              "d_head": cfg.hidden_size // cfg.num_attention_heads, "d_vocab": cfg.vocab_size, "dtype": torch.float64,
              "device": "cpu", "init_weights": False}  # fmt: skip
    if MODELS[name] == "gpt2":
        config = HookedTransformerConfig(
            **shared, n_ctx=cfg.n_positions, d_mlp=4 * cfg.n_embd, act_fn="gelu_new", normalization_type="LN", eps=1e-5
        )
        state = weight_conversions.convert_gpt2_weights(original, config)
    else:
        rope = getattr(cfg, "rope_parameters", None) or {}
        config = HookedTransformerConfig(
            **shared, n_ctx=cfg.max_position_embeddings, d_mlp=cfg.intermediate_size, act_fn="silu", normalization_type="RMS",
            eps=cfg.rms_norm_eps, positional_embedding_type="rotary", rotary_dim=shared["d_head"], final_rms=True,
            gated_mlp=True, n_key_value_heads=cfg.num_key_value_heads, rotary_adjacent_pairs=False,
            rotary_base=int(rope.get("rope_theta", getattr(cfg, "rope_theta", 10000))),
        )  # fmt: skip
        state = weight_conversions.convert_llama_weights(original, config)
    model = HookedTransformer(config).eval().requires_grad_(False)
    model.load_state_dict({key: value.to(torch.float64) for key, value in state.items()}, strict=False)
    if not any(key.startswith("unembed.b_U") for key in state):
        model.unembed.b_U.zero_()
    decomposition = random_decomposition(original, "blocks.*", size=0.1)
    tlpd.check_target(model, decomposition)
    assert difference(run(model, tokens), run(original, tokens)) < 1e-5
    masks = ablate(decomposition)
    assert (
        difference(
            patched_run(model, decomposition, masks, tokens), patched_run(original, decomposition, masks, tokens)
        )
        < 1e-5
    )
    assert next(root_of(model).parameters()).dtype == torch.float64
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, 1e-10, roles(decomposition).values())
