"""The toys of L3D, medians of three seeds: what each circuit's subnetwork is, and what they leave of the gradients.

Thresholds leave room over errors measured with the published code's divergence: .11 (TMS), .05 (circuits), .14 (high rank).
"""

import statistics

import pytest
from rich.console import Console

import tl_paramdecomp as tlpd
from tl_paramdecomp.cli.recipes import RECIPES
from tl_paramdecomp.cli.reproduce import data_of, find_target, heldout_rows, reproduce

pytestmark = pytest.mark.slow
SEEDS = 3


def seeds_of(name, tmp_path, **changes):
    return reproduce(name, SEEDS, tmp_path, Console(quiet=True), **changes)["seeds"]


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


def test_more_subnetworks_reconstruct_more(tmp_path):
    """Of the squares, at rank 1: the error falls with their number."""
    recipe = RECIPES["l3d-squared"]
    model = find_target(recipe, 0, tmp_path, Console(quiet=True)).model
    errors = []
    for n in (3, 5, 10, 15):
        made = tlpd.decompose(
            model,
            "*",
            tlpd.L3D.paper_code(n_subnetworks=n, warm_start=0.1),
            data_of(recipe, 128, 0),
            4000,
            progress=False,
        )
        found = tlpd.evaluate_subnetworks(model, made, heldout_rows(recipe), rows_at_once=1000)
        errors.append(found.batch_error)
        assert found.batch_error >= found.bound
    print(errors)
    assert errors == sorted(errors, reverse=True)
