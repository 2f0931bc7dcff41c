"""Recognising the model that a decomposition was made from."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import base, weights
from tl_paramdecomp.adapters.wiring import read_parameter
from tl_paramdecomp.errors import DeviceError, TargetMismatchError

from ..support.models import BUILDERS, bridge, build, decomposition_of, gpt2, hooked, llama, logits, module_of, nnsight

SITE = "blocks.0.mlp.W_in"


def enter(model: Any, dec: tlpd.Decomposition) -> None:
    """Every way into a patch compares the weights first."""
    with tlpd.patched(model, dec, dec.masks()):
        pass


@pytest.mark.parametrize("host", BUILDERS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_one_changed_entry_is_noticed(host: str, part: str, tokens: Tensor) -> None:
    """In each half of the entries in turn, at both ways of looking, and forgiven once the entry is put back."""
    model = build(host)
    dec = decomposition_of(model, "blocks.*")
    adapter = base_adapter(model)
    for name in list(dec)[: len(dec) // 2]:
        tensor = adapter.weight(name) if part == "weight" else adapter.bias(name)
        if tensor is None:
            continue
        stored = read_parameter(adapter.root, adapter.wirings[name])
        if part == "weight" and tensor.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
            tensor = stored  # TransformerLens stores heads apart: the flat W is a copy
        for index in (0, -1):
            entry = (index,) * tensor.ndim
            with torch.no_grad():
                old = tensor[entry].item()
                tensor[entry] += 1e-3
            for look in (tlpd.check_target, enter):
                with pytest.raises(TargetMismatchError, match=rf"{name.replace('.', r'[.]')}: .*(norm|entries)"):
                    look(model, dec)
            with torch.no_grad():
                tensor[entry] = old
            tlpd.check_target(model, dec)
            enter(model, dec)


def base_adapter(model: Any) -> base.ModelAdapter:
    from tl_paramdecomp.adapters import adapt

    return adapt(model)


def test_two_swapped_entries_and_a_flipped_sign_are_noticed() -> None:
    model = gpt2()
    dec = decomposition_of(model, SITE)
    weight = model.transformer.h[0].mlp.c_fc.weight
    for change in (lambda w: w[:2].copy_(w[:2].flip(0)), lambda w: w.neg_(), lambda w: w.copy_(w.flip(1))):
        old = weight.detach().clone()
        with torch.no_grad():
            change(weight)
        with pytest.raises(TargetMismatchError, match="entries of the weight"):
            tlpd.check_target(model, dec)
        with torch.no_grad():
            weight.copy_(old)
    tlpd.check_target(model, dec)


def test_changes_behind_autograds_back_are_found_by_check_target() -> None:
    model = gpt2()
    dec = decomposition_of(model, SITE)
    enter(model, dec)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1.0
    with pytest.raises(TargetMismatchError):
        tlpd.check_target(model, dec)
    with pytest.raises(TargetMismatchError):  # and remembered from there on
        enter(model, dec)


def test_another_parameter_object_is_looked_at_anew() -> None:
    model = gpt2()
    dec = decomposition_of(model, SITE)
    enter(model, dec)
    fc = model.transformer.h[0].mlp.c_fc
    fc.weight = torch.nn.Parameter(fc.weight.detach().clone())
    enter(model, dec)
    fc.weight = torch.nn.Parameter(fc.weight.detach() * 1.01)
    with pytest.raises(TargetMismatchError, match="norm"):
        enter(model, dec)


def test_sites_that_were_not_decomposed_may_change() -> None:
    model = gpt2()
    dec = decomposition_of(model, SITE)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2)
        model.transformer.h[0].ln_1.weight.mul_(2)
    enter(model, dec)
    tlpd.check_target(model, dec)


@pytest.mark.parametrize("host", BUILDERS)
def test_fingerprints_are_computed_once(host: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(host)
    dec = decomposition_of(model, "blocks.*")
    calls: list[int] = []
    real = weights.fingerprint
    monkeypatch.setattr(weights, "fingerprint", lambda *args: calls.append(1) or real(*args))
    masks = dec.masks().ablate(SITE, 0)
    for _ in range(3):
        with tlpd.patched(model, dec, masks):
            logits(model, tokens)
    tlpd.component_acts(model, dec, tokens) if "nnsight" not in host else None
    assert calls == [], "from_factors has computed them already"
    tlpd.check_target(model, dec)
    assert len(calls) == len(dec)
    with tlpd.edited_weights(model, dec, masks):
        calls.clear()
        enter(model, decomposition_of_rest(dec))
    enter(model, dec)
    calls.clear()
    enter(model, dec)
    assert calls == []


def decomposition_of_rest(dec: tlpd.Decomposition) -> tlpd.Decomposition:
    rest = [name for name in dec if name != SITE]
    return tlpd.Decomposition({n: (dec[n].V, dec[n].U) for n in rest}, dec.sites, dec.fingerprints, None, dec.info)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision_of_the_same_weights_is_accepted(dtype: torch.dtype) -> None:
    model = gpt2(torch.float32)
    dec = decomposition_of(model, "*")
    coarse = copy.deepcopy(model).to(dtype)
    enter(coarse, dec)
    other = gpt2(torch.float32, seed=4).to(dtype)
    with pytest.raises(TargetMismatchError):
        enter(other, dec)
    with torch.no_grad():
        coarse.transformer.h[0].mlp.c_fc.weight[0] *= -1
    with pytest.raises(TargetMismatchError, match=SITE):
        enter(coarse, dec)


def test_hosts_of_one_model_know_each_other(tokens: Tensor) -> None:
    """Fingerprints are of W [d_in, d_out] in one orientation, whatever the host stores."""
    for make in (gpt2, llama):
        dec = decomposition_of(make(), "*")
        for model in (nnsight(make()), make()):
            tlpd.check_target(model, dec)
    tlpd.check_target(bridge(gpt2()), decomposition_of(gpt2(), "*"))
    tlpd.check_target(bridge(llama()), decomposition_of(llama(), "*"))


def test_another_architecture_says_which_sites_are_missing() -> None:
    dec = decomposition_of(llama(), "blocks.0.mlp.*")
    with pytest.raises(TargetMismatchError, match=r"blocks\.0\.mlp\.W_gate: not a site of this model"):
        enter(gpt2(), dec)


def test_a_message_lists_a_few_sites_and_counts_the_rest() -> None:
    dec = decomposition_of(gpt2(), "blocks.*")
    with pytest.raises(TargetMismatchError, match=r"and 8 more sites\).*revision it was made from, or decompose"):
        enter(gpt2(seed=3), dec)


def test_folded_and_plain_weights_of_a_hooked_transformer() -> None:
    plain = hooked()
    folded = copy.deepcopy(plain)
    folded.cfg.normalization_type = "LN"
    folded.load_and_process_state_dict(
        folded.state_dict(), fold_ln=True, center_writing_weights=True, fold_value_biases=False
    )
    for made_on, opened in ((plain, folded), (folded, plain)):
        dec = decomposition_of(made_on, "blocks.*")
        enter(made_on, dec)
        with pytest.raises(
            TargetMismatchError, match=r"processed on one side.*from_pretrained_no_processing\(name\)"
        ) as caught:
            enter(opened, dec)
        if folded.cfg.normalization_type == "LNPre":  # TransformerLens 2 sets it when it loads, not when it folds
            assert "LayerNorm folded" in str(caught.value) and "as trained" in str(caught.value)


def test_centred_weights_without_folding_are_recognised_by_their_means() -> None:
    plain = hooked()
    centred = copy.deepcopy(plain)
    centred.load_and_process_state_dict(
        centred.state_dict(), fold_ln=False, center_writing_weights=True, fold_value_biases=False
    )
    for made_on, opened in ((plain, centred), (centred, plain)):
        dec = decomposition_of(made_on, ["blocks.0.attn.W_O", "blocks.0.mlp.W_out"])
        with pytest.raises(TargetMismatchError, match="processed on one side.*no_processing"):
            enter(opened, dec)


def test_compatibility_mode_of_a_bridge() -> None:
    plain, processed = bridge(gpt2(torch.float32)), bridge(gpt2(torch.float32))
    processed.enable_compatibility_mode(disable_warnings=True)
    for made_on, opened in ((plain, processed), (processed, plain)):
        dec = decomposition_of(made_on, "blocks.*.mlp.*")
        enter(made_on, dec)
        with pytest.raises(
            TargetMismatchError,
            match=r"compatibility mode.*boot_transformers\(name\) without enable_compatibility_mode",
        ):
            enter(opened, dec)


def test_compatibility_mode_after_decomposing() -> None:
    model = bridge(gpt2(torch.float32))
    dec = decomposition_of(model, "blocks.*.mlp.*")
    enter(model, dec)
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(TargetMismatchError, match="processed on one side"):
        enter(model, dec)


def test_components_on_another_device_say_so(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, SITE).to("meta")
    before = logits(model, tokens)
    for use in (tlpd.patched, tlpd.edited_weights):
        with pytest.raises(
            DeviceError, match=rf"{SITE} are on meta, the model's weight on cpu.*decomposition\.to\('cpu'\)"
        ):
            with use(model, dec, dec.masks()):
                pass
    with pytest.raises(DeviceError, match="meta"):
        tlpd.component_acts(model, dec, tokens)
    assert torch.equal(logits(model, tokens), before)


def test_the_bias_takes_part(tokens: Tensor) -> None:
    """Weights that agree with a bias that does not, by its norm and by its entries alone."""
    model = gpt2()
    dec = decomposition_of(model, SITE)
    bias = model.transformer.h[0].mlp.c_fc.bias
    for change, said in ((lambda b: b.mul_(1.5), "bias norm"), (lambda b: b.copy_(b.flip(0)), "entries of the bias")):
        old = bias.detach().clone()
        with torch.no_grad():
            change(bias)
        with pytest.raises(TargetMismatchError, match=said):
            enter(model, dec)
        with torch.no_grad():
            bias.copy_(old)


def test_a_fingerprint_knows_shape_and_layout() -> None:
    model = gpt2()
    known = base_adapter(model).fingerprint(SITE)
    W = tlpd.site_weight(model, SITE)
    assert known.shape == tuple(W.shape) and abs(known.norm - W.norm().item()) < 1e-9 and known.dtype == "float64"
    transposed = weights.fingerprint(W.T.contiguous(), None)
    assert dataclasses.replace(transposed, shape=known.shape).projections != known.projections
    assert module_of(model) is model
