"""Toy targets: their data's distribution, their training against a plain form, their files, their sites."""

import dataclasses

import pytest
import torch
from torch import nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import DecompositionFileError, DivergedError
from tl_paramdecomp.toy_models import (
    TMS,
    InductionConfig,
    InductionRows,
    InductionTransformer,
    ResidMLP,
    ResidMLPConfig,
    SparseFeatures,
    TMSConfig,
    load_target,
    save_target,
    train_induction,
    train_resid_mlp,
    train_tms,
    train_until_sound,
)

SMALL_RESID = ResidMLPConfig(2, n_features=6, d_resid=20, n_neurons=4, steps=3, batch_size=16, probability=0.3)


# data ------------------------------------------------------------------------------------------------------------
def test_batches_are_a_function_of_seed_and_step():
    data = SparseFeatures(5, 0.05, 64, seed=3)
    assert torch.equal(data(7), data(7))
    assert not torch.equal(data(7), data(8))
    assert not torch.equal(data(7), dataclasses.replace(data, seed=4)(7))


@pytest.mark.parametrize("low, mean", [(0.0, 0.5), (-1.0, 0.0)])
def test_features_are_sparse_and_uniform(low, mean):
    x = SparseFeatures(8, 0.1, 50_000, low)(0)
    active = x != 0
    assert active.float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert x[active].mean().item() == pytest.approx(mean, abs=0.01)
    assert x.min() >= low and x.max() <= 1.0


@pytest.mark.parametrize("n, p", [(5, 0.05), (3, 0.4), (100, 0.01), (2, 1.0)])
def test_leaving_out_empty_rows_keeps_the_others_as_they_are(n, p):
    rows = 200_000
    x = SparseFeatures(n, p, rows, seed=1, without_empty=True)(0)
    active = x != 0
    assert bool(active.any(1).all())
    some = 1.0 - (1.0 - p) ** n
    # Each number of active features, and each feature, as often as the binomial distribution has it, given one at least.
    for k in range(1, min(n, 4) + 1):
        binomial = torch.exp(torch.distributions.Binomial(n, torch.tensor(p)).log_prob(torch.tensor(float(k)))) / some
        share = (active.sum(1) == k).float().mean()
        assert share.item() == pytest.approx(binomial.item(), abs=4 * (0.25 / rows) ** 0.5)
    assert torch.allclose(active.float().mean(0), torch.tensor(p / some), atol=5 * (0.25 / rows) ** 0.5)


def test_induction_rows_repeat_the_special_token():
    data = InductionRows(32, 12, 500)
    rows = data(0)
    assert bool(((rows == 0).sum(1) == 2).all()) and bool((rows[:, -1] == 0).all())
    for row, answer in zip(rows.tolist(), data.answers(rows).tolist()):
        assert row[row.index(0) + 1] == answer != 0


# forward passes and training -------------------------------------------------------------------------------------
def test_tms_is_tied_and_its_identity_is_one():
    model = train_tms(TMSConfig(identity=True, steps=20, batch_size=64))
    W, b = model.linear1.weight, model.linear2.bias
    assert torch.equal(model.linear2.weight, W.T) and torch.equal(model.hidden_layers[0].weight, torch.eye(2))
    x = torch.rand(3, 5)
    assert torch.allclose(model(x), torch.relu(x @ W.T @ W + b), atol=1e-6)


def test_resid_mlp_by_hand():
    """One feature, one neuron: W_E = (1, 0), the neuron reads 2 r_0 and writes 3 to it: y = x + 6 ReLU(x)."""
    model = ResidMLP(ResidMLPConfig(1, n_features=1, d_resid=2, n_neurons=1))
    with torch.no_grad():
        model.W_E.copy_(torch.tensor([[1.0, 0.0]]))
        model.layers[0].mlp_in.weight.copy_(torch.tensor([[2.0, 5.0]]))
        model.layers[0].mlp_out.weight.copy_(torch.tensor([[3.0], [7.0]]))
    assert model(torch.tensor([[0.5], [-0.5]])).flatten().tolist() == pytest.approx([3.5, -0.5])
    assert model.strengths().tolist() == pytest.approx([6.0])


@pytest.mark.parametrize("layers", [1, 2])
def test_training_through_products_of_weights_is_plain_training(layers):
    config = dataclasses.replace(SMALL_RESID, n_layers=layers)
    fast, plain = train_resid_mlp(config, 5), train_resid_mlp(dataclasses.replace(config, steps=0), 5)
    data = dataclasses.replace(config.data(config.batch_size, 5), without_empty=True)
    free = [p for p in plain.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(free, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for step in range(config.steps):
        x = data(step)
        optimiser.zero_grad()
        nn.functional.mse_loss(plain(x), x + torch.relu(x)).backward()
        optimiser.step()
        schedule.step()
    for ours, theirs in zip(fast.parameters(), plain.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_induction_reads_positions_in_queries_and_keys_alone():
    """With values and outputs as they are and equal scores, attention is the mean over what is visible."""
    model = InductionTransformer(InductionConfig(n_vocab=7, d_model=4, length=5))
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.q.weight.zero_()
    tokens = torch.tensor([[1, 2, 3, 4, 0]])
    r = model.embed(tokens)
    for layer in model.layers:
        mean = torch.stack([layer.attn.v(r[:, : i + 1]).mean(1) for i in range(5)], 1)
        r = r + layer.attn.o(mean)
    assert torch.allclose(model(tokens), model.unembed(r[:, -1]), atol=1e-5)


@pytest.mark.parametrize("train, config", [
    (train_tms, TMSConfig(steps=3, batch_size=8)),
    (train_resid_mlp, SMALL_RESID),
    (train_induction, InductionConfig(n_vocab=7, d_model=4, length=5, steps=2, batch_size=4)),
])  # fmt: skip
def test_training_depends_on_the_seed_alone(train, config):
    state = torch.get_rng_state()
    first = train(config, 1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again, other = train(config, 1), train(config, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


# sites -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model, names", [
    (TMS(TMSConfig(identity=True)), ["linear1.weight", "hidden_layers.0.weight", "linear2.weight"]),
    (ResidMLP(SMALL_RESID), [f"layers.{i}.mlp_{side}.weight" for i in (0, 1) for side in ("in", "out")]),
    (InductionTransformer(InductionConfig()),
     ["embed.weight", *(f"layers.{i}.attn.{m}.weight" for i in (0, 1) for m in "qkvo"), "unembed.weight"]),
])  # fmt: skip
def test_sites_of_the_targets(model, names):
    assert set(tlpd.find_sites(model)) == set(names)


# sound targets, and files ----------------------------------------------------------------------------------------
def _tms_with_norms(*norms):
    model = TMS(TMSConfig(len(norms), 2))
    with torch.no_grad():
        model.linear1.weight.copy_(torch.tensor([norms, [0.0] * len(norms)]))
    return model


def test_a_target_without_a_feature_is_trained_again():
    asked, said = [], []

    def train(config, seed, progress):
        asked.append(seed)
        return _tms_with_norms(1.0, 0.01 if seed < 2000 else 1.1, 1.2)

    trained = train_until_sound(train, TMSConfig(3), seed=1, say=said.append)
    assert asked == [1, 1001, 2001] and (trained.seed, trained.tried) == (2001, 3)
    assert len(said) == 2 and "0.010" in said[0] and "norms" in said[0]
    with pytest.raises(DivergedError, match="None of 2 seeds"):
        train_until_sound(train, TMSConfig(3), seed=1, say=said.append, tries=2)


def test_a_target_comes_back_from_its_files(tmp_path):
    config = TMSConfig(steps=5, batch_size=8)
    trained = train_until_sound(train_tms, config, 3)
    save_target(trained, tmp_path / "t")
    found = load_target(TMS(config), tmp_path / "t")
    assert found is not None and (found.seed, found.tried) == (trained.seed, trained.tried)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), trained.model.parameters()))
    assert load_target(TMS(dataclasses.replace(config, steps=6)), tmp_path / "t") is None
    assert load_target(TMS(config), tmp_path / "nowhere") is None
    (tmp_path / "t" / "target.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DecompositionFileError, match="cannot be read"):
        load_target(TMS(config), tmp_path / "t")


def test_tms_represents_every_feature_from_every_seed():
    """The recipe's own training, shortened: the pentagon, all norms alike."""
    for seed in range(2):
        norms = train_tms(TMSConfig(steps=1500, batch_size=256), seed).strengths()
        print(f"seed {seed}: {norms.tolist()}")
        assert norms.min() > 1.05 and norms.max() < 1.2
