"""Exact bases: that they sum to W, what each is best at in closed form, and that only their importances are trained."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.next_tokens import masked_kl
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.methods.baselines import second_moments
from tl_paramdecomp.methods.starts import head_factors, neuron_factors, random_factors, svd_factors, whitened_factors
from tl_paramdecomp.sites import WeightSite

BASES = [tlpd.SVD, tlpd.WhitenedSVD, tlpd.NeuronBasis, tlpd.RandomBasis]
SITES = ["blocks.*.mlp.*", "blocks.*.attn.*", "embed.W_E"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows=8, length=7, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def made(model, basis, training=None, sites=SITES, **settings):
    return tlpd.decompose(model, sites, basis(training=training), tokens(), batch_size=4, progress=False, **settings)


@pytest.mark.parametrize("basis", BASES)
def test_a_basis_at_full_rank_is_the_model(basis):
    model = gpt2()
    dec = made(model, basis)
    for name, components in dec.items():
        W = tlpd.site_weight(model, name)
        assert (components.product() - W).norm() < 1e-12 * W.norm(), name
        assert torch.allclose(components.V.norm(dim=0), components.U.norm(dim=1), rtol=1e-6, atol=1e-9)
    masks = tlpd.importance_masks(model, dec, tokens(), "unmasked")
    assert masked_kl(model, dec, tokens(), masks) < 1e-9
    assert dec.importance is None and dec.info["run"]["steps"] == 0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_first_singular_components_are_the_best_of_their_number(shape):
    """Eckart and Young: what the first k leave is the rest of the singular values."""
    W = normal(*shape)
    V, U = svd_factors(W)
    values = torch.linalg.svdvals(W)
    for k in range(1, 5):
        assert abs((W - V[:, :k] @ U[:k]).norm() - values[k:].norm()) < 1e-12


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_first_whitened_components_keep_the_most_of_the_outputs(shape):
    """No k components leave less of X W than its own singular values from the k-th on."""
    X = normal(40, shape[0], seed=2) @ torch.diag(torch.logspace(0, 2, shape[0], dtype=torch.float64))
    W = normal(*shape)
    V, U = whitened_factors(W, X.T @ X, ridge=1e-14)
    values = torch.linalg.svdvals(X @ W)
    for k in range(1, 5):
        assert abs((X @ W - X @ V[:, :k] @ U[:k]).norm() / values[k:].norm() - 1) < 1e-6
    plain_V, plain_U = svd_factors(W)
    assert (X @ W - X @ plain_V[:, :1] @ plain_U[:1]).norm() > 1.01 * values[1:].norm()


def test_whitening_an_embedding_weighs_rows_by_their_use():
    W, rows = normal(6, 4), torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    V, U = whitened_factors(W, torch.bincount(rows, minlength=6).double(), ridge=1e-14)
    values = torch.linalg.svdvals(W[rows])
    assert abs((W[rows] - V[rows, :2] @ U[:2]).norm() - values[2:].norm()) < 1e-6
    assert (V @ U - W).abs().max() < 1e-8


def test_directions_without_data_stay_exact():
    X, W = torch.zeros(3, 5, dtype=torch.float64), normal(5, 4)
    X[:, 0] = 1.0
    V, U = whitened_factors(W, X.T @ X)
    assert (V @ U - W).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_a_neuron_component_touches_one_neuron(shape):
    V, U = neuron_factors(normal(*shape))
    single = U if shape[1] >= shape[0] else V.T
    assert ((single != 0).sum(1) == 1).all() and len(single) == max(shape)


def test_a_head_component_touches_one_head_and_is_singular_within_it():
    for side, shape in (("in", (12, 7)), ("out", (7, 12))):
        site, W = WeightSite("blocks.0.attn.W", *shape, n_heads=3, head_side=side), normal(*shape)
        V, U = head_factors(site, W)
        assert (V @ U - W).abs().max() < 1e-12 and V.shape[1] == 12
        parts = (V.T if side == "in" else U).unflatten(1, (3, 4))  # component, head, channel
        assert ((parts.abs().sum(-1) > 1e-9).sum(1) == 1).all()
        head = W[4:8] if side == "in" else W[:, 4:8]
        values = torch.linalg.svdvals(head)
        assert abs((V[:, 4:5] @ U[4:5]).norm() - values[0]) < 1e-12


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_random_directions_are_orthogonal_and_of_their_seed(shape):
    W = normal(*shape)
    V, U = random_factors(W, torch.Generator().manual_seed(0))
    side = V.T if shape[0] <= shape[1] else U
    unit = side / side.norm(dim=1, keepdim=True)
    assert (unit @ unit.T - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-12
    assert not torch.allclose(V, random_factors(W, torch.Generator().manual_seed(1))[0])


def test_second_moments_are_those_of_the_scored_inputs():
    model = gpt2()
    adapter, rows = adapt(model), tokens(4)
    mask = torch.ones_like(rows)
    mask[1, 3:] = 0
    name = "blocks.1.mlp.W_out"
    halves = [Batch(rows[:2], mask[:2]), Batch(rows[2:], mask[2:])]
    sites = {n: adapter.site(n) for n in (name, "embed.W_E")}
    found = second_moments(adapter, sites, halves.__getitem__, 2, lambda what, n: range(n))
    kept = {}
    handle = model.transformer.h[1].mlp.c_proj.register_forward_hook(lambda m, args, out: kept.update(x=args[0]))
    model(rows, attention_mask=mask)
    handle.remove()
    x = kept["x"][mask.bool()]
    assert (found[name] - x.T @ x).abs().max() < 1e-9
    assert torch.equal(found["embed.W_E"], torch.bincount(rows[mask.bool()], minlength=61).double())


@pytest.mark.parametrize("basis", BASES)
def test_only_importances_are_trained(basis):
    model = gpt2(torch.float32)
    training, sites = tlpd.SPD(), "blocks.0.mlp.*"
    start = made(model, basis, training, sites, steps=0)
    dec = made(model, basis, training, sites, steps=3)
    assert dec.info["run"]["method"]["type"] == basis.__name__
    for name in dec:
        assert torch.equal(dec[name].V, start[name].V) and torch.equal(dec[name].U, start[name].U)
        assert dec[name].V.grad is None
    trained = zip(dec.importance.parameters(), start.importance.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in trained)


def test_importances_are_trained_as_the_method_trains_its_own():
    """With components whose learning rate is next to nothing, SPD from the same factors is the baseline."""
    model, sites = gpt2(torch.float64), "blocks.0.mlp.*"
    still = replace(tlpd.SPD(start="svd", n_components=24), lr=1e-30)
    settings = {"steps": 3, "batch_size": 4, "progress": False}
    learned = tlpd.decompose(model, sites, still, tokens(), **settings)
    basis = tlpd.decompose(model, sites, tlpd.SVD(training=still), tokens(), **settings)
    for a, b in zip(learned.importance.parameters(), basis.importance.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_baseline_goes_on_where_it_stopped(tmp_path):
    model = gpt2(torch.float32)

    def run(folder, callbacks=()):
        return made(
            model, tlpd.WhitenedSVD, tlpd.SPD(), "blocks.0.mlp.*", steps=6, run_dir=folder, callbacks=callbacks,
            log_every=1,
        )  # fmt: skip

    def stop(info):
        if info.step == 3:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [stop])
    again = run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("basis", BASES)
def test_a_plain_basis_takes_no_steps(tmp_path, basis):
    """Nor data, but for the one that looks at inputs; however many are given it is the same, and none are recorded."""
    model, method = gpt2(), basis(training=None)
    data = (tokens(),) if basis is tlpd.WhitenedSVD else ()
    plain = tlpd.decompose(model, SITES, method, *data, run_dir=tmp_path, progress=False)
    assert plain.importance is None and plain.info["run"]["steps"] == 0
    again = tlpd.decompose(model, SITES, method, tokens(), 5, progress=False)
    assert again.info["run"]["steps"] == 0
    for name, kept in tlpd.Decomposition.load(tmp_path / "decomposition").items():
        for other in (plain, again):
            assert torch.equal(kept.V, other[name].V) and torch.equal(kept.U, other[name].U)
    assert tlpd.estimate_run(model, SITES, method, *(data or (None,))).run["steps"] == 0


def test_what_is_missing_is_named():
    model = gpt2()
    with pytest.raises(DataError, match="WhitenedSVD"):
        tlpd.decompose(model, SITES, tlpd.WhitenedSVD(training=None), progress=False)
    with pytest.raises(SettingError, match=r"SVD needs steps.*SVD\(training=None\) is the plain basis"):
        tlpd.decompose(model, SITES, tlpd.SVD(), tokens(), progress=False)
    with pytest.raises(DataError, match=r"NeuronBasis needs data.*NeuronBasis\(training=None\)"):
        tlpd.decompose(model, SITES, tlpd.NeuronBasis(), steps=3, progress=False)
    for steps in (-1, True, 2.5):
        for method in (tlpd.SVD(training=None), tlpd.SPD()):
            with pytest.raises((SettingError, TypeCheckError), match="from 0 on|steps"):
                tlpd.decompose(model, SITES, method, tokens(), steps, progress=False)
    with pytest.raises(DataError, match="needs data"):
        tlpd.decompose(model, SITES, tlpd.SPD(), steps=3, progress=False)
    with pytest.raises(SettingError, match="ridge"):
        tlpd.WhitenedSVD(ridge=0.0)
