"""Purity of subnetworks for classes, worked out by hand, and the scores of a network that reads digits."""

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.experiments.l3d_scores import chosen_subnetworks, class_purities, digit_scores
from tl_paramdecomp.toy_models import Digits, DigitsConfig, load_digits
from tl_paramdecomp.toy_models.targets import fresh


def test_purities_by_hand() -> None:
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
