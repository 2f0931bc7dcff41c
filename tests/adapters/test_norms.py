"""Normalisation gains that hosts offer: their names, their formula, and what is refused."""

import pytest
import torch
from torch import nn

import tl_paramdecomp as tlpd
from tests.support import families
from tests.support.hosts import on_host
from tests.support.models import bridge, gpt2, hooked, llama, logits
from tests.support.norms import NORMED, OffsetNorm, normed
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import UnsupportedSiteError


def tokens():
    return torch.randint(0, 61, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NORMED)
def test_gains_are_the_hosts_own_and_no_weight_sites(name):
    host = normed(name)
    adapter = adapt(host.model)
    assert set(adapter.norms.sites) == set(host.gains) and not adapter.norms.refused
    assert not set(host.gains) & set(tlpd.find_sites(host.model))
    for norm, site in adapter.norms.sites.items():
        assert adapter.gain(norm) is host.gains[norm] and adapter.is_norm(norm)
        assert adapter.gain_bias(norm) is host.biases.get(norm) and site.has_bias == (norm in host.biases)
        assert site.width == len(host.gains[norm])
    assert not any(adapter.is_norm(site) for site in adapter.sites) and not adapter.is_norm("nowhere")


@pytest.mark.parametrize("name", NORMED)
def test_what_multiplies_a_gain(name):
    """xhat times the gain, plus the bias, is what the module writes, as its hook shows."""
    host = normed(name)
    adapter, found = adapt(host.model), {}

    def keep(norm, call):
        found.setdefault(norm, []).append((call.x, call.y, call.bias))
        return call.y

    fns = {norm: (lambda call, norm=norm: keep(norm, call)) for norm in adapter.norms.sites}
    with adapter.intercept(fns):
        logits(host.model, tokens())
    assert set(found) == set(host.gains)
    offset = 1.0 if "gemma2" in name else 0.0
    for norm, calls in found.items():
        for x, y, bias in calls:
            written = x * (host.gains[norm] + offset) + host.biases.get(norm, 0.0)
            assert (written - y).abs().max() < 1e-12 and (bias is None) == (norm not in host.biases)
        assert len(calls) == (3 if name.startswith("hooked") and norm.endswith("ln1.w") else 1)


@pytest.mark.parametrize("family", ["pythia", "gpt-j", "mistral", "qwen2", "gemma2", "gpt-neo", "neox-sequential"])
def test_families_have_the_same_norms_on_every_host(family):
    names = {}
    for host in ("transformers", "bridge", "nnsight"):
        model = on_host(families.build(family), host)
        norms = adapt(model).norms
        assert not norms.refused
        names[host] = {name: (w.centred, w.eps, w.in_float32) for name, w in norms.wirings.items()}
    assert names["transformers"] == names["bridge"] == names["nnsight"]
    inside = {"gpt-j": ["ln1"], "gemma2": ["ln1", "ln1_post", "ln2", "ln2_post"]}.get(family, ["ln1", "ln2"])
    assert set(names["bridge"]) == {f"blocks.{i}.{role}.w" for i in range(2) for role in inside} | {"ln_final.w"}


def test_a_norm_after_the_sublayer_is_named_as_in_transformer_lens():
    from tl_paramdecomp.adapters.norms import canonical_norms

    paths = [f"model.layers.0.{n}" for n in ("post_attention_layernorm", "post_feedforward_layernorm", "other.norm")]
    assert canonical_norms([*paths, "model.norm", "vision.norm"], "model.layers") == {
        paths[0]: "blocks.0.ln1.w",
        paths[1]: "blocks.0.ln2.w",
        "model.norm": "ln_final.w",
    }


def test_plain_modules_are_tried_out():
    class Doubled(nn.LayerNorm):  # named for a norm, and something else
        def forward(self, x):
            return 2.0 * super().forward(x) + x

    class ScaledNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.beta, self.epsilon = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)), 3e-4

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return x / (x.var(-1, correction=0, keepdim=True) + self.epsilon).sqrt() * self.gamma + self.beta

    offset = OffsetNorm(nn.RMSNorm(6, eps=2e-3))
    modules = [
        nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False),
        nn.PReLU(6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.LayerNorm((2, 6)), Doubled(6), ScaledNorm(), offset,
    ]  # fmt: skip
    model = nn.Sequential(*modules).float()
    running = modules[6].running_mean.clone()
    norms = adapt(model).norms
    forms = {name: (w.centred, w.eps, w.in_float32, w.site.has_bias) for name, w in norms.wirings.items()}
    assert forms == {
        "1.weight": (True, 1e-5, False, True),
        "2.weight": (False, None, False, False),
        "3.weight": (True, 1e-5, False, False),
        "10.gamma": (True, 3e-4, False, True),
        "11.weight": (False, 2e-3, False, False),
    }
    assert set(norms.refused) == {"6.weight", "7.weight", "8.weight", "9.weight"}
    assert "statistics" in norms.refused["6.weight"] and "shape [2, 6]" in norms.refused["8.weight"]
    assert "neither LayerNorm's nor RMSNorm's" in norms.refused["9.weight"] and torch.equal(
        modules[6].running_mean, running
    )
    x = torch.randn(3, 6)
    assert torch.allclose(norms.wirings["2.weight"].normalised(x), modules[2](x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_models_have_the_same_norms(dtype):
    for make in (gpt2, llama, lambda dtype: hooked(dtype=dtype), lambda dtype: bridge(gpt2(dtype))):
        narrow, wide = make(dtype=dtype), make(dtype=torch.float64)
        forms = [
            {name: (w.centred, w.eps) for name, w in adapt(model).norms.wirings.items()} for model in (narrow, wide)
        ]
        assert forms[0] == forms[1] and len(forms[0]) == 5


def test_folded_models_have_none_and_old_names_say_so():
    assert not adapt(model := hooked(normalization_type="LNPre")).norms.sites, model
    assert not adapt(model := hooked(normalization_type=None)).norms.sites, model
    model = hooked()
    before = adapt(model)
    assert len(before.norms.sites) == 5
    with torch.no_grad():
        model.process_weights_(fold_ln=True, center_writing_weights=False)
    assert not adapt(model).norms.sites and adapt(model).processing
    with pytest.raises(UnsupportedSiteError, match="folded meanwhile"):
        before.gain("ln_final.w")
