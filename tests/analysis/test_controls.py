"""The control with shuffled weights: the same entries, elsewhere, and back again."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import PatchConflictError, TargetMismatchError

HOSTS = ("transformers", "hooked_transformer", "transformer_bridge", "nnsight")


def weights(model):
    return {name: tlpd.site_weight(model, name).clone() for name in tlpd.find_sites(model)}


def others(model):
    """Parameters that are no weight of a site: biases, norm gains."""
    return {
        name: p.detach().clone()
        for name, p in adapt(model).root.named_parameters()
        if p.ndim == 1 or name.rpartition(".")[2].startswith("b_")
    }


@pytest.fixture(scope="module")
def in_transformers():
    model = tlpd.load_micro_gpt2("transformers")
    with tlpd.shuffled_weights(model, seed=1):
        return weights(model)


@pytest.mark.parametrize("host", HOSTS)
def test_entries_are_elsewhere_and_back_again(host, in_transformers):
    model = tlpd.load_micro_gpt2(host)
    before, rest = weights(model), others(model)
    held = list(adapt(model).root.parameters())
    with tlpd.shuffled_weights(model, seed=1):
        within, meanwhile = weights(model), others(model)
    assert all(a is b for a, b in zip(held, adapt(model).root.parameters(), strict=True))
    after = weights(model)
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
        assert (within[name] != weight).float().mean() > 0.9, name
        assert torch.equal(within[name].flatten().sort().values, weight.flatten().sort().values), name
        assert torch.equal(within[name], in_transformers[name]), name
    assert torch.equal(within["embed.W_E"], within["unembed.W_U"].T)
    assert len(rest) > 8 and all(torch.equal(meanwhile[name], kept) for name, kept in rest.items())


def test_seeds_shuffle_differently_and_repeat():
    model = gpt2()
    found = []
    for seed in (0, 0, 1):
        with tlpd.shuffled_weights(model, seed):
            found.append(tlpd.site_weight(model, "blocks.0.mlp.W_in").clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_weights_are_back_after_an_error_and_decompositions_know_theirs():
    model = gpt2()
    before = weights(model)
    with pytest.raises(RuntimeError, match="on the way"), tlpd.shuffled_weights(model):
        made = tlpd.decompose(model, "blocks.0.mlp.*", tlpd.SVD(training=None), progress=False)
        raise RuntimeError("on the way")
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    with pytest.raises(TargetMismatchError):
        tlpd.check_target(model, made)
    with tlpd.shuffled_weights(model):
        tlpd.check_target(model, made)


def test_a_patched_model_is_not_shuffled():
    model = gpt2()
    made = tlpd.decompose(model, "blocks.0.mlp.*", tlpd.SVD(training=None), progress=False)
    before = weights(model)
    with tlpd.patched(model, made, made.masks().ablate("blocks.0.mlp.W_in", 0)):
        with pytest.raises(PatchConflictError), tlpd.shuffled_weights(model):
            pass
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
