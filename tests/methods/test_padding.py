"""What stands at padded positions changes no term: neither value nor gradient, on the left or on the right."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import VOCAB, gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
)
from tl_paramdecomp.methods.step import LossStep
from tl_paramdecomp.settings import kinds_of

LOSSES = {
    "faithfulness": Faithfulness(rows=3),
    "power": ImportanceMinimality(frequency=0.3),
    "smooth_l0": ImportanceMinimality(penalty="smooth_l0", frequency=0.3, frequency_reference=7),
    "all": StochasticReconstruction(),
    "layerwise": StochasticReconstruction(sites="layerwise", delta="absent"),
    "subset": StochasticReconstruction(sites="subset", samples=2),
    "binomial": StochasticReconstruction(sampling="binomial"),
    "importance": ImportanceMaskedReconstruction(sites="subset"),
    "unmasked": UnmaskedReconstruction(),
    "hidden": HiddenActsReconstruction(),
    "hidden-inputs": HiddenActsReconstruction(masks="importance", at="inputs", relative=False),
    "patterns": AttentionPatternReconstruction(),
    "patterns-importance": AttentionPatternReconstruction(masks="importance"),
    "pgd": AdversarialReconstruction(steps=2, step_size=0.3),
    "pgd-positions": AdversarialReconstruction(scope="broadcast_across_batch", sites="subset"),
    "pgd-own": AdversarialReconstruction(scope="per_batch_per_position", sites="layerwise"),
    "persistent": PersistentAdversarialReconstruction(ramp=0.0),
    "persistent-shared": PersistentAdversarialReconstruction(ramp=0.0, scope="single_source", sites="subset"),
}
SITES = ["blocks.0.attn.W_Q", "blocks.1.attn.W_O", "blocks.*.mlp.W_in", "embed.W_E", "pos_embed.W_pos"]


def test_every_loss_is_among_them():
    assert {name for name, cls in kinds_of(Loss).items() if cls.__module__.startswith("tl_paramdecomp.")} == {
        type(loss).__name__ for loss in LOSSES.values()
    }


@pytest.fixture(scope="module")
def model():
    return gpt2().requires_grad_(False)


def rows(side):
    """Three rows of six tokens of which the first two are shorter."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:], mask[1, 2:] = 0, 0
    return torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0)), mask.flip(
        1
    ) if side == "left" else mask


def outcome(model, made, loss, tokens, mask, chunk=None, measure="kl"):
    memory = {}
    generator = torch.Generator().manual_seed(2)
    step = LossStep.of(adapt(model), made, tokens, mask, generator, 0.5, measure, memory, chunk)
    value = loss(step)
    grads = torch.autograd.grad(value, list(made.parameters()), allow_unused=True)
    return value, grads, memory


def made_for(model, kind):
    config = ImportanceConfig(kind, hidden=8, heads=2, layers=1)
    method = tlpd.SPD(n_components=5, warm_up_steps=0, start="random", importance=config)
    sites = tlpd.find_sites(model, SITES)
    return method.initialise(adapt(model), sites, torch.Generator().manual_seed(0), lambda _, n: range(n))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LOSSES)
def test_tokens_under_padding_do_not_matter(model, name, side):
    """1e-12 in float64, with the importance function that looks at other positions."""
    made, loss = made_for(model, "global_transformer"), LOSSES[name]
    tokens, mask = rows(side)
    other = torch.where(mask == 1, tokens, (tokens + 17) % VOCAB)
    value, grads, memory = outcome(model, made, loss, tokens, mask)
    same, again, kept = outcome(model, made, loss, other, mask)
    assert (value - same).abs() < 1e-12
    for a, b in zip(grads, again, strict=True):
        assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-12)
    assert all((memory[k] - t).abs().max() < 1e-12 for k, t in kept.items())
    if not isinstance(loss, Faithfulness | UnmaskedReconstruction):
        every, _, _ = outcome(model, made, loss, tokens, torch.ones_like(mask))
        assert (every - value).abs() > 1e-7  # the mask does something


@pytest.mark.parametrize("chunk, measure", [(4, "kl"), (None, "mse")])
@pytest.mark.parametrize("name", ["all", "pgd", "persistent"])
def test_nor_in_chunks_or_as_squares(model, name, chunk, measure):
    made, loss = made_for(model, "shared_mlp"), LOSSES[name]
    tokens, mask = rows("left")
    other = torch.where(mask == 1, tokens, (tokens + 17) % VOCAB)
    (value, grads, _), (same, again, _) = (outcome(model, made, loss, t, mask, chunk, measure) for t in (tokens, other))
    assert (value - same).abs() < 1e-12
    assert all(a is None or (a - b).abs().max() < 1e-12 for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("name", ["power", "importance", "unmasked", "hidden-inputs", "patterns-importance"])
def test_padding_on_the_right_is_as_if_it_were_not_there(model, name):
    """A batch cut to its scored rows and positions gives the same, where no random number depends on the batch's shape."""
    made, loss = made_for(model, "global_transformer"), LOSSES[name]
    if name == "importance":
        loss = ImportanceMaskedReconstruction()
    tokens, _ = rows("right")
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[:, 4:] = 0
    value, grads, _ = outcome(model, made, loss, tokens, mask)
    short, again, _ = outcome(model, made, loss, tokens[:, :4], None)
    assert (value - short).abs() < 1e-12
    assert all(a is None or (a - b).abs().max() < 1e-12 for a, b in zip(grads, again, strict=True))
