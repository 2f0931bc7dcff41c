"""The logit lens against edited weights, derivatives of logits, and folded models."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.contexts.logit_lens import LogitLens, final_norm, logit_lens
from tl_paramdecomp.errors import ComponentIndexError, SettingError, UnsupportedModelError, UnsupportedSiteError

from ..support.models import (
    BUILDERS,
    VOCAB,
    build,
    decomposition_of,
    dtype_of,
    gpt2,
    hooked,
    hooked_gqa,
    plain,
    tokenizer,
)
from ..support.zoo import ArchitectureMissing, tiny

W_OUT = "blocks.1.mlp.W_out"


def values_of(found: LogitLens, size: int = VOCAB) -> Tensor:
    """All values in the order of the vocabulary."""
    values = torch.full((size,), float("nan"), dtype=torch.float64)
    for token in found.top:
        values[token.token] = token.value
    return values


def written(adapter: Any, site: str, change: Tensor, tokens: Tensor) -> Tensor:
    """Logits with something added to what a site writes."""
    with torch.no_grad(), adapter.intercept({site: lambda call: call.y + change.to(call.y)}):
        return adapter.forward(tokens).double()


@pytest.mark.parametrize("host", BUILDERS)
def test_the_derivative_of_the_logits_is_the_lens_and_the_change_of_the_scale(host: str) -> None:
    """At the last block d logits = s (lens - k (logits - those of a row of zeros)): nothing else is in the way."""
    model = build(host)
    adapter, dec = adapt(model), decomposition_of(model, W_OUT)
    tokens = torch.randint(1, VOCAB, (1, 4), generator=torch.Generator().manual_seed(1))
    step = 1e-5 if dtype_of(model) == torch.float64 else 1e-2
    weight, bias = adapter.weight("unembed.W_U").double(), adapter.gain_bias("ln_final.w")
    constant = torch.zeros(VOCAB).double() if bias is None else bias.double() @ weight
    constant = constant if adapter.bias("unembed.W_U") is None else constant + adapter.bias("unembed.W_U").double()
    for c in (0, 3):
        write = dec[W_OUT].U[c].detach()
        ends = [written(adapter, W_OUT, sign * step * write, tokens)[0, -1] for sign in (1, -1)]
        derivative = (ends[0] - ends[1]) / (2 * step)
        lens = values_of(logit_lens(model, dec, W_OUT, c, VOCAB))
        columns = torch.stack([lens, sum(ends) / 2 - constant], 1)
        fit = torch.linalg.lstsq(columns, derivative.unsqueeze(1)).solution
        rest = derivative - (columns @ fit).squeeze(1)
        assert fit[0] > 0 and rest.norm() < (1e-6 if step == 1e-5 else 2e-3) * derivative.norm()


@pytest.mark.parametrize("host", BUILDERS)
def test_every_site_that_writes_into_the_residual_stream_has_one(host: str) -> None:
    model = build(host)
    dec = decomposition_of(model)
    for site in dec:
        role = site.rpartition(".")[2]
        if role in ("W_O", "W_out", "W_E", "W_pos"):
            found = logit_lens(model, dec, site, -1, 4)
            assert found.component == 4 and len(found.top) == len(found.bottom) == 4
        else:
            with pytest.raises(UnsupportedSiteError, match="residual stream"):
                logit_lens(model, dec, site, 0)


def test_without_attention_or_normalisation_it_is_the_change_that_an_edit_makes() -> None:
    model = hooked(normalization_type=None, n_layers=1, attn_only=True)
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
    dec = decomposition_of(model, "embed.W_E")
    found = logit_lens(model, dec, "embed.W_E", 2, VOCAB)
    edited, tokens = copy.deepcopy(model), torch.tensor([[3, 17, 9]])
    with torch.no_grad():
        edited.embed.W_E[17] += dec["embed.W_E"].U[2]
        change = (edited(tokens) - model(tokens))[0]
    torch.testing.assert_close(values_of(found), change[1], rtol=1e-9, atol=1e-9)
    assert "no last normalisation" in found.applied
    assert [t.token for t in found.top] == change[1].argsort(descending=True).tolist()
    assert [t.token for t in found.bottom] == change[1].argsort().tolist()


def test_an_mlp_without_normalisation_is_an_edited_bias() -> None:
    model = hooked(normalization_type=None, n_layers=1)
    site = "blocks.0.mlp.W_out"
    dec = decomposition_of(model, site)
    edited, tokens = copy.deepcopy(model), torch.tensor([[3, 17, 9]])
    with torch.no_grad():
        edited.blocks[0].mlp.b_out += dec[site].U[1]
        change = (edited(tokens) - model(tokens))[0]
    torch.testing.assert_close(values_of(logit_lens(model, dec, site, 1, VOCAB)), change[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("make", "words"), [(hooked, "LayerNorm"), (hooked_gqa, "RMSNorm")])
def test_a_folded_gain_changes_nothing(make: Any, words: str) -> None:
    model = make()
    folded = copy.deepcopy(model)
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    write = decomposition_of(model, W_OUT)[W_OUT]
    found = []
    for host in (model, folded):
        dec = tlpd.from_factors(host, {W_OUT: (write.V.detach(), write.U.detach())})
        found.append(logit_lens(host, dec, W_OUT, 2, VOCAB))
    torch.testing.assert_close(values_of(found[1]), values_of(found[0]), rtol=0, atol=1e-6)  # it folds in float32
    assert words in found[0].applied and "gain *" in found[0].applied
    assert words in found[1].applied and "without a gain" in found[1].applied


def tiny_or_skip(name: str) -> Any:
    try:
        return tiny(name)
    except ArchitectureMissing as error:
        pytest.skip(str(error))


def test_gains_from_one_are_counted_from_one() -> None:
    model = tiny_or_skip("GemmaForCausalLM")
    norm = final_norm(adapt(model))
    assert norm.kind == "RMSNorm"
    torch.testing.assert_close(norm.gain, model.model.norm.weight + 1)


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "Olmo2ForCausalLM"])
def test_writes_that_are_normalised_on_the_way_are_refused(name: str) -> None:
    model = tiny_or_skip(name)
    dec = decomposition_of(model, ["blocks.1.attn.W_O", W_OUT, "embed.W_E"])
    for site in ("blocks.1.attn.W_O", W_OUT):
        with pytest.raises(UnsupportedSiteError, match="before it is added"):
            logit_lens(model, dec, site, 0)
    assert logit_lens(model, dec, "embed.W_E", 0).top


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPTNeoXForCausalLM", "PhiForCausalLM", "FalconForCausalLM"])
def test_parallel_blocks_and_mixtures_of_experts_write_as_they_are(name: str) -> None:
    model = tiny_or_skip(name)
    dec = decomposition_of(model, ["blocks.1.attn.W_O"])
    assert len(logit_lens(model, dec, "blocks.1.attn.W_O", 0).top) == 10


def test_it_is_shown_with_text_and_kept_as_json(tmp_path) -> None:
    model = gpt2()
    dec = decomposition_of(model, W_OUT)
    found = logit_lens(model, dec, "transformer.h.1.mlp.c_proj", 1, 3, tokenizer=tokenizer())
    assert found.site == W_OUT and [t.text for t in found.top] == [f"w{t.token}" for t in found.top]
    text = str(found)
    assert f"'w{found.top[0].token}'" in text and "last LayerNorm" in text and f"{found.bottom[0].value:+.4f}" in text
    assert f"#{found.top[0].token}" in str(logit_lens(model, dec, W_OUT, 1, 3))
    assert LogitLens.load(found.save(tmp_path / "lens.json")) == found


def test_what_has_none_is_refused() -> None:
    model = gpt2()
    dec = decomposition_of(model, W_OUT)
    for n in (0, VOCAB + 1):
        with pytest.raises(SettingError, match=f"{VOCAB} tokens"):
            logit_lens(model, dec, W_OUT, 0, n)
    with pytest.raises(ComponentIndexError):
        logit_lens(model, dec, W_OUT, 5)
    module = plain()
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        logit_lens(module, decomposition_of(module), "0.weight", 0)
