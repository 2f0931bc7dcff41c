"""Component activations and importances of a clean pass, against inputs read by torch hooks put on here."""

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import NoImportanceError

from ..support.models import BUILDERS, C, build, decomposition_of, gpt2, logits, tolerance

PATHS = {
    "blocks.0.attn.W_V": "h.0.attn.c_attn",
    "blocks.1.mlp.W_out": "h.1.mlp.c_proj",
    "blocks.0.attn.W_O": "h.0.attn.c_proj",
}


def test_activations_are_the_input_times_v(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, ["embed.W_E", "pos_embed.W_pos", *PATHS])
    seen: dict[str, Tensor] = {}
    for name, path in PATHS.items():
        module = model.transformer.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    acts = tlpd.component_acts(model, dec, tokens)
    assert list(acts) == list(dec) and not any(a.requires_grad for a in acts.values())
    for name in PATHS:
        assert (acts[name] - seen[name] @ dec[name].V).abs().max() < 1e-12
    assert torch.equal(acts["embed.W_E"], dec["embed.W_E"].V[tokens])
    assert torch.equal(acts["pos_embed.W_pos"], dec["pos_embed.W_pos"].V[:7].expand(2, 7, C))


@pytest.mark.parametrize("host", BUILDERS)
def test_activations_are_of_the_model_as_it_stands(host: str, tokens: Tensor) -> None:
    model = build(host)
    dec = decomposition_of(model, ["blocks.0.mlp.W_in", "blocks.1.mlp.W_in"])
    clean = tlpd.component_acts(model, dec, tokens)
    masks = dec.masks().ablate("blocks.0.mlp.W_in", slice(None))
    with tlpd.patched(model, dec, masks):
        patched = tlpd.component_acts(model, dec, tokens)
    with tlpd.edited_weights(model, dec, masks):
        edited = tlpd.component_acts(model, dec, tokens)
    assert (patched["blocks.0.mlp.W_in"] - clean["blocks.0.mlp.W_in"]).abs().max() < tolerance(model)
    assert (patched["blocks.1.mlp.W_in"] - clean["blocks.1.mlp.W_in"]).abs().max() > 1e-3
    for name in dec:
        assert (patched[name] - edited[name]).abs().max() < tolerance(model)


@pytest.mark.parametrize("host", ["gpt2", "hooked", "bridge", "nnsight"])
def test_padding_is_honoured(host: str, tokens: Tensor) -> None:
    """Right padding: what stands before it sees nothing of it."""
    model = build(host)
    dec = decomposition_of(model, "blocks.*")
    padded, attention = tokens.clone(), torch.ones_like(tokens)
    padded[:, 5:], attention[:, 5:] = 0, 0
    short = tlpd.component_acts(model, dec, tokens[:, :5])
    for name, acts in tlpd.component_acts(model, dec, padded, attention).items():
        assert (acts[:, :5] - short[name]).abs().max() < tolerance(model)


@pytest.mark.parametrize("kind", ["component_mlp", "shared_mlp"])
def test_importances_are_of_the_clean_pass_and_in_range(kind: str, tokens: Tensor) -> None:
    model = gpt2()
    plain = decomposition_of(model, ["embed.W_E", *PATHS])
    factors = {name: (c.V, c.U) for name, c in plain.items()}
    dec = tlpd.Decomposition(factors, plain.sites, plain.fingerprints, ImportanceConfig(kind, 8, "leaky"))
    before = logits(model, tokens)
    found = tlpd.causal_importances(model, dec, tokens)
    for g in found.values():
        assert g.shape == (2, 7, C) and g.min() >= 0 and g.max() <= 1 and not g.requires_grad
    masks = tlpd.importance_masks(model, dec, tokens)
    for name, g in found.items():
        assert torch.equal(masks[name].m.clamp(0, 1), g) and (masks[name].d == 0).all()
    with tlpd.patched(model, dec, masks):
        assert not torch.equal(logits(model, tokens), before)
    with pytest.raises(NoImportanceError):
        tlpd.causal_importances(model, plain, tokens)
