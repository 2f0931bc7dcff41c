"""The toys of L3D, medians of three seeds: what each circuit's subnetwork is, and what they leave of the gradients.

Thresholds leave room over errors measured with the published code's divergence: .11 (TMS), .05 (circuits), .14 (high rank).
"""

import statistics

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp.experiments.recipes import RECIPES
from tl_paramdecomp.experiments.reproduce import data_of, find_target, heldout_rows, reproduce

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SEEDS = 3


def seeds_of(name, tmp_path, **changes):
    return reproduce(name, SEEDS, tmp_path, lambda text: None, **changes)["seeds"]


def median(seeds, key):
    values = [seed[key] for seed in seeds]
    print(f"{key}: {', '.join(f'{v:.3f}' for v in values)}")
    return statistics.median(values)


def test_every_feature_of_tms_has_its_subnetwork(tmp_path):
    seeds = seeds_of("l3d-tms", tmp_path)
    assert all(seed["circuits_found"] == 5 and seed["dead"] == 0 for seed in seeds)
    assert median(seeds, "purity") >= 0.95 and median(seeds, "cosine") >= 0.98
    assert median(seeds, "bound") < median(seeds, "heldout_error") <= 0.15


def test_every_superposed_circuit_has_its_subnetwork(tmp_path):
    seeds = seeds_of("l3d-circuits", tmp_path)
    assert median(seeds, "circuits_found") == 10 and median(seeds, "purity") >= 0.98
    assert median(seeds, "row_cosine") >= 0.95 and median(seeds, "pooled_r") >= 0.88
    assert median(seeds, "bound") < median(seeds, "heldout_error") <= 0.08


def test_every_group_of_inputs_has_its_subnetwork(tmp_path):
    seeds = seeds_of("l3d-high-rank", tmp_path)
    assert max(seed["circuits_found"] for seed in seeds) == 6 and median(seeds, "circuits_found") >= 5
    assert median(seeds, "dead") <= 5 and median(seeds, "heldout_error") <= 0.18


def test_each_square_moves_an_output_of_its_own(tmp_path):
    seeds = seeds_of("l3d-squared", tmp_path)
    print(median(seeds, "moved_share"), median(seeds, "heldout_error"))
    assert max(seed["moved_outputs"] for seed in seeds) == 5


def test_subnetworks_of_a_network_that_reads_digits_lean_to_classes(tmp_path):
    seeds = seeds_of("l3d-digits", tmp_path)
    assert min(seed["accuracy"] for seed in seeds) >= 0.97
    assert median(seeds, "bound") < median(seeds, "heldout_error") <= 0.10
    assert median(seeds, "purity") >= median(seeds, "purity_shuffled") + 0.05
    assert median(seeds, "dead") <= 40 and min(seed["classes_owned"] for seed in seeds) >= 9


def errors_of(name, tmp_path, changes, steps):
    """Held-out errors of every change, medians over targets and seeds, and the least distance from the bound."""
    recipe, medians, above = RECIPES[name], [], []
    for change in changes:
        found = []
        for seed in range(SEEDS):
            model = find_target(recipe, seed, tmp_path / f"{seed}", lambda text: None).model
            data, method = data_of(recipe, recipe.batch_size, seed), tlpd.L3D.paper_code(**change)
            made = tlpd.decompose(model, "*", method, data, steps, recipe.batch_size, seed, progress=False)
            found.append(tlpd.evaluate_subnetworks(model, made, heldout_rows(recipe), rows_at_once=1000))
        print(change, [f"{one.batch_error:.3f}" for one in found])
        medians.append(statistics.median(one.batch_error for one in found))
        above.append(min(one.batch_error - one.bound for one in found))
    return medians, min(above)


def test_more_subnetworks_reconstruct_more(tmp_path):
    """Of the squares, at rank 1: the error falls with their number (figure S11)."""
    changes = [{"n_subnetworks": n, "rank": 1, "warm_start": 0.1} for n in (3, 5, 10, 15)]
    errors, above = errors_of("l3d-squared", tmp_path, changes, 4000)
    assert errors == sorted(errors, reverse=True) and above > 0
    assert errors[2] <= 0.15 and errors[3] <= 0.08


def test_the_rank_hardly_matters_to_circuits_of_one_rank(tmp_path):
    """Of six groups of inputs, ranks 1 to 5 (figure S5)."""
    changes = [{"n_subnetworks": 10, "rank": rank} for rank in range(1, 6)]
    errors, above = errors_of("l3d-high-rank", tmp_path, changes, 3000)
    assert max(errors) - min(errors) <= 0.03 and above > 0
