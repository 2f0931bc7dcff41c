"""Scores of toy targets: against solutions written by hand, and broken ones."""

import itertools
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import MissingExtraError, ShapeError
from tl_paramdecomp.experiments import scores as toys
from tl_paramdecomp.experiments.reproduce import reproduce
from tl_paramdecomp.experiments.scores import best_assignment
from tl_paramdecomp.toy_models import ResidMLP, ResidMLPConfig, train_resid_mlp


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (4, 6), (5, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_the_best_of_all(rows, columns, seed):
    values = drawn(rows, columns, seed=seed).round(decimals=1 + seed % 2)
    found = best_assignment(values)
    assert len(set(found.tolist())) == rows
    best = max(sum(values[i, c].item() for i, c in enumerate(p)) for p in itertools.permutations(range(columns), rows))
    assert values[torch.arange(rows), found].sum().item() == pytest.approx(best)


def test_more_features_than_components_have_no_assignment():
    with pytest.raises(ShapeError, match="3 rows, 2 columns"):
        best_assignment(drawn(3, 2))


def test_without_scipy_the_extra_is_named_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"tl-paramdecomp\[toys\]"):
        best_assignment(drawn(2, 2))
    with pytest.raises(MissingExtraError, match="scipy"):
        reproduce("tms-5-2", 1, tmp_path, print)
    assert not list(tmp_path.iterdir())


# MMCS and ML2R ---------------------------------------------------------------------------------------------------
def test_true_components_score_one_in_any_order():
    W = drawn(5, 2) - 0.5
    order = torch.tensor([3, 0, 4, 1, 2])
    figures = toys.feature_scores(2.0 * torch.eye(5)[:, order], 0.5 * W[order], W).figures()
    assert figures["mmcs"] == pytest.approx(1.0) and figures["ml2r"] == pytest.approx(1.0)
    assert figures["mmcs_sd"] == pytest.approx(0.0, abs=1e-6) and figures["ml2r_sd"] == pytest.approx(0.0, abs=1e-6)


def test_feature_scores_are_those_of_the_definition():
    """mean_j max_c cos(P_c[j], W[j]) with P_c the rank-one matrix itself, and the length of that row."""
    W, V, U = drawn(6, 3, seed=1) - 0.5, drawn(6, 4, seed=2) - 0.5, drawn(4, 3, seed=3) - 0.5
    P = torch.einsum("jc,ch->cjh", V, U)
    cosines = torch.cosine_similarity(P, W.unsqueeze(0), dim=-1)
    best = cosines.argmax(0)
    lengths = torch.stack([P[best[j], j].norm() / W[j].norm() for j in range(6)])
    found = toys.feature_scores(V, U, W)
    assert torch.allclose(found.cosines, cosines.max(0).values, atol=1e-6)
    assert torch.equal(found.best, best) and torch.allclose(found.ratios, lengths, atol=1e-6)


def test_shrunken_components_keep_mmcs_and_lose_ml2r():
    W = drawn(5, 2) - 0.5
    figures = toys.feature_scores(torch.eye(5), 0.3 * W, W).figures()
    assert figures["mmcs"] == pytest.approx(1.0) and figures["ml2r"] == pytest.approx(0.3)


def test_an_unused_parallel_component_counts_only_among_all():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    U = torch.tensor([[1.0, 0.05], [0.05, 1.0], [1e-3, 0.0], [0.0, 1e-3]])
    V = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert toys.feature_scores(V, U, W).figures()["ml2r"] == pytest.approx(1e-3)
    alive = torch.tensor([True, True, False, False])
    assert toys.feature_scores(V, U, W, among=alive).figures()["ml2r"] == pytest.approx(1.00125, abs=1e-4)


# importance patterns ---------------------------------------------------------------------------------------------
def test_identity_error_counts_wrong_entries():
    matrix = torch.zeros(4, 7)
    matrix[range(4), [6, 2, 0, 5]] = 1.0
    assert toys.identity_error(matrix) == 0
    assert toys.lined_up(matrix)[:4].tolist() == [6, 2, 0, 5]
    matrix[0, 6] = 0.85  # a weak one
    assert toys.identity_error(matrix) == 1
    matrix[1, 3] = 0.2  # and one too many
    assert toys.identity_error(matrix) == 2
    matrix[2, 3] = 0.05  # below what counts
    assert toys.identity_error(matrix) == 2
    assert toys.identity_error(torch.zeros(4, 7)) == 4
    with pytest.raises(ShapeError):
        toys.identity_error(torch.zeros(4, 3))


def test_two_features_on_one_component_are_an_error():
    matrix = torch.zeros(3, 3)
    matrix[range(3), [0, 0, 1]] = 1.0
    assert toys.identity_error(matrix) == 2  # an empty diagonal entry, and one off it


def test_dense_error_counts_wrong_entries():
    matrix = torch.zeros(5, 6)
    matrix[:, [1, 4]] = 1.0
    assert toys.dense_error(matrix, 2, strong_entries=5) == 0
    assert toys.dense_error(matrix, 1) == 5
    assert toys.dense_error(matrix, 3) == 1
    matrix[0, 4], matrix[3, 2] = 0.5, 0.3
    assert toys.dense_error(matrix, 2, strong_entries=5) == 2


def test_a_feature_may_have_its_component_in_any_layer():
    first, second, dense = torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 1)
    first[0, 2] = first[3, 0] = second[1, 1] = second[2, 0] = 1.0
    matrices = {"layers.0.in": first, "layers.1.in": second, "layers.0.out": dense, "layers.1.out": dense}
    assert toys.pattern_errors(matrices, ["layers.*.in"], {"layers.*.out": 2}) == (
        {"layers.*.in": 0},
        {"layers.*.out": 0},
    )
    second[0, 0] = 1.0  # a second one for feature 0, which serves feature 2 as well
    assert toys.pattern_errors(matrices, ["layers.*.in"], {"layers.*.out": 1}) == (
        {"layers.*.in": 1},
        {"layers.*.out": 4},
    )


# a residual MLP with hand-made components ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def solved():
    """Each feature has a neuron: W_in reads it, W_out doubles it; components are the features' own."""
    n = 4
    model = ResidMLP(ResidMLPConfig(1, n_features=n, d_resid=n, n_neurons=n)).requires_grad_(False)
    model.W_E.copy_(torch.eye(n))
    model.layers[0].mlp_in.weight.copy_(torch.eye(n))
    model.layers[0].mlp_out.weight.copy_(torch.eye(n))
    return model


def importances_by_hand(monkeypatch, matrices):
    monkeypatch.setattr(toys, "importance_matrices", lambda *_, **__: matrices)


def test_scrubbing_spares_what_owns_the_active_features(solved, monkeypatch):
    order = torch.tensor([2, 0, 3, 1])  # feature j owns component order[j]
    V = torch.zeros(4, 6)
    V[range(4), order] = 1.0
    name = "layers.0.mlp_in.weight"
    made = tlpd.from_factors(solved, {name: (V, torch.cat([V[:, :4].T, torch.zeros(2, 4)]))})
    importances_by_hand(monkeypatch, {name: V})
    x = torch.diag(torch.tensor([0.9, 0.5, -0.4, 0.7]))
    found = toys.scrubbed_errors(solved, made, x)
    assert found["target"] == found["scrubbed"] == found["own_only"] == pytest.approx(0.0, abs=1e-12)
    lost = torch.relu(x).square().mean().item()
    assert found["anti_scrubbed"] == found["none"] == pytest.approx(lost)
    assert found["own_share"] == pytest.approx(1.0) and found["others_share"] == pytest.approx(0.0)


def test_neuron_contributions_of_target_and_components(solved, monkeypatch):
    name = "layers.0.mlp_in.weight"
    made = tlpd.from_factors(solved, {name: (torch.eye(4), 0.5 * torch.eye(4))})
    importances_by_hand(monkeypatch, {name: torch.eye(4)})
    assert torch.allclose(toys.neuron_contributions(solved), torch.eye(4))
    assert torch.allclose(toys.neuron_contributions(solved, made), 0.5 * torch.eye(4))


def test_neuron_contributions_are_derivatives():
    """With every neuron switched on, they add up to the slope of each output in its own input, less the embedding's."""
    config = ResidMLPConfig(2, n_features=3, d_resid=8, n_neurons=4, steps=0)
    model = train_resid_mlp(config, 1).double().requires_grad_(False)
    for layer in model.layers:  # the second layer reads none of the first, so that paths are single neurons
        layer.mlp_in.weight.abs_()
    model.W_E.abs_()
    model.layers[0].mlp_out.weight.mul_(1e-9)
    contributions = toys.neuron_contributions(model)
    x = torch.full((1, 3), 0.3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v), x)[0, :, 0]
    slopes = jacobian.diagonal() - (model.W_E @ model.W_E.T).diagonal()
    assert torch.allclose(contributions.sum(1), slopes, atol=1e-6)
