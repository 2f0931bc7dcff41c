"""Scores of subnetworks: of toys on subnetworks set by hand, whose circuits are known, and purities for classes of digits."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.experiments.figures import coefficient_figure, effect_figure, subnetwork_figure
from tl_paramdecomp.experiments.l3d_scores import (
    chosen_subnetworks,
    class_purities,
    digit_scores,
    feature_cosines,
    moved_outputs,
    products,
    purities,
    read_off,
    toy_scores,
)
from tl_paramdecomp.toy_models import TMS, Circuits, CircuitsConfig, Digits, DigitsConfig, TMSConfig, fresh, load_digits


def subnetworks(model, n, rows, **settings):
    method = tlpd.L3D.paper_code(n_subnetworks=n, **settings)
    return tlpd.decompose(model, "*", method, rows, steps=0, progress=False)


def put(made, k, site, A, B):
    """One subnetwork at one site, in both dictionaries."""
    with torch.no_grad():
        for side in (made.encoder, made.decoder):
            side[site].A[k, :, 0], side[site].B[k, :, 0] = A, B


def circuits(inputs=4, group=1):
    torch.manual_seed(0)
    model = Circuits(CircuitsConfig(n_inputs=inputs, n_hidden=3, group=group))
    return model, model.config.data(64, 0)(0)


def true_circuits(model, rows):
    """Subnetwork k is input k's own path: its row of the first matrix, and what the second makes of it."""
    made = subnetworks(model, rows.shape[1], rows)
    for k in range(rows.shape[1]):
        first, last = model.layers[0].weight.T.detach(), model.layers[1].weight.T.detach()
        put(made, k, "layers.0.weight", torch.eye(rows.shape[1])[k], first[k])
        put(made, k, "layers.1.weight", first[k], first[k] @ last)
    return made


def test_purity_is_the_share_of_a_circuits_own_inputs():
    model, rows = circuits(4, group=2)
    made = subnetworks(model, 2, rows)
    put(made, 0, "layers.0.weight", torch.tensor([0.0, 0.0, 3.0, 4.0]), torch.ones(3))
    put(made, 1, "layers.0.weight", torch.tensor([2.0, 2.0, 1.0, 0.0]), torch.ones(3))
    pure, owner = purities(made, group=2)
    assert pure.tolist() == pytest.approx([1.0, 8 / 9]) and owner.tolist() == [1, 0]


def test_true_circuits_are_found_and_read_off():
    model, rows = circuits()
    with torch.no_grad():  # a network that does what it was asked for
        model.A.copy_((model.layers[1].weight @ model.layers[0].weight).T)
    made = true_circuits(model, rows)
    found = toy_scores(model, made, rows)
    assert found["circuits"] == 4 and found["purity"] == pytest.approx(1.0)
    assert found["circuits_found"] == sum(value > 0.01 for value in found["active"])
    assert found["row_cosine"] == pytest.approx(1.0, abs=1e-5)
    # every product is a row of A, times a size of its own
    sizes = torch.cat([product / truth for product, truth in products(model, made)]).unflatten(0, (4, -1))
    assert (sizes / sizes[:, :1]).sub(1.0).abs().max() < 1e-3 and 0 < read_off(model, made)["pooled_r"] < 1.0
    put(made, 0, "layers.0.weight", torch.ones(4), model.layers[0].weight.T[0].detach())
    spoilt = toy_scores(model, made, rows)
    assert purities(made)[0][0] == pytest.approx(0.25)
    assert spoilt["circuits_found"] == sum(value > 0.01 for value in spoilt["active"][1:])


def test_a_subnetwork_that_writes_one_output_moves_that_output_alone():
    torch.manual_seed(0)
    model = Circuits(CircuitsConfig("squared", n_inputs=3, n_hidden=4, hidden_layers=1))
    rows = model.config.data(64, 0)(0)
    made = subnetworks(model, 2, rows)
    for side in (made.encoder, made.decoder):
        for part in side.values():
            with torch.no_grad():
                part.A[0].zero_()
                part.bias[0].zero_()
    put(made, 0, "layers.1.weight", torch.ones(4), torch.tensor([0.0, 1.0, 0.0]))
    shares, outputs = moved_outputs(model, made, rows)
    assert shares[0].item() == pytest.approx(1.0) and outputs[0] == 1 and shares[1] < 1.0
    assert {"moved_share", "moved_outputs"} <= set(toy_scores(model, made, rows))


def test_cosines_of_tms_are_those_of_both_matrices():
    torch.manual_seed(0)
    model = TMS(TMSConfig(3, 2))
    made = subnetworks(model, 3, torch.rand(16, 3))
    read, write = (tlpd.site_weight(model, f"linear{i}.weight") for i in (1, 2))
    for k in range(3):
        put(made, k, "linear1.weight", torch.eye(3)[k], -2.0 * read[k])
        put(made, k, "linear2.weight", write[:, k], torch.eye(3)[k])
    owner = purities(made)[1]
    assert owner.tolist() == [0, 1, 2] and feature_cosines(model, made, owner) == pytest.approx([1.0] * 3, abs=1e-5)
    aside = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) @ read[1]  # a quarter turn
    put(made, 1, "linear1.weight", torch.eye(3)[1], aside)
    assert feature_cosines(model, made, owner)[1] == pytest.approx(0.0, abs=1e-5)
    assert toy_scores(model, made, torch.rand(16, 3))["cosine"] == pytest.approx(0.0, abs=1e-5)


def test_the_pictures_show_every_subnetwork(tmp_path):
    pytest.importorskip("matplotlib")
    model, rows = circuits()
    made = true_circuits(model, rows)
    assert len(subnetwork_figure(model, made).axes) == 2 * (1 + 4)
    assert len(coefficient_figure(model, made).axes[0].collections) == 4
    assert [len(axes.lines) for axes in effect_figure(model, made, rows).axes] == [4] * 4


# --- digits -----------------------------------------------------------------------------------------------------------
def test_purities_of_classes_by_hand() -> None:
    impacts = torch.tensor([[1.0, 0.0, 2.0], [1.0, 3.0, 2.0], [0.0, 1.0, 2.0], [6.0, 0.0, 2.0]])
    labels = torch.tensor([0, 0, 1, 2])
    pure, owner = class_purities(impacts, labels, 3)
    assert torch.allclose(pure, torch.tensor([6 / 8, 3 / 4, 4 / 8])) and owner.tolist() == [2, 0, 0]
    assert chosen_subnetworks(impacts, labels, [0.1, 0.1, 0.1], 3) == {1: 0, 0: 2}
    assert chosen_subnetworks(impacts, labels, [0.1, 0.0, 0.1], 3) == {2: 0, 0: 2}


def test_scores_of_a_network_that_reads_digits() -> None:
    config = DigitsConfig((3, 4))
    model, (images, labels) = fresh(Digits, config).requires_grad_(False), load_digits("held_out", 500)
    images, labels = images[:60], labels[:60]
    made = tlpd.decompose(
        model, "*", tlpd.L3D(n_subnetworks=6), config.data(16, 0), 5, 16, progress=False
    )  # fmt: skip
    found = digit_scores(model, made, images, labels)
    live = torch.tensor(found["active"]) > 0
    pure, owner = class_purities(tlpd.impacts(model, made, images), labels)
    assert found["purity"] == pure[live].median().item() and found["dead"] == int((~live).sum())
    assert found["p_act"]["least"] <= found["p_act"]["median"] <= found["p_act"]["most"] == max(found["active"])
    assert found["classes_owned"] == len(set(owner[live].tolist()))
    assert found["bound"] <= found["heldout_error"] and 0.1 <= found["purity_shuffled"] < 0.4
    assert found["accuracy"] == (model(images).argmax(1) == labels).float().mean().item()
    assert found == digit_scores(model, made, images, labels)
