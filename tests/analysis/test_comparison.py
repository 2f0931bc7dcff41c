"""Curves, areas and matched figures of a comparison against values worked out by hand."""

import json
import math

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.analysis.evaluation.comparison import area, height, spread
from tl_paramdecomp.analysis.evaluation.matching import active_components, matched_cosines, split_share
from tl_paramdecomp.errors import DecompositionFileError, NoMatchingSiteError

SITES = "blocks.*.mlp.*"


def point(method, sparsity, seed, l0, kl):
    """A run whose KLs are kl, 2 kl and 3 kl, with ten weights in each component."""
    return {
        "method": method, "sparsity": sparsity, "seed": seed, "l0": l0, "active_parameters": 10 * l0, "active": 7,
        "components": 9, "unmasked": 0.0, "rounded": kl, "stochastic": 2 * kl, "adversarial": 3 * kl, "importance": kl,
        "permuted": 6.0, "zero": 7.0,
    }  # fmt: skip


@pytest.fixture
def found():
    """Two methods, two seeds: curves over L0 2 to 32, and 4 to 16."""
    points = [point("a", s, seed, l0, kl + seed) for seed in (0, 1) for s, l0, kl in ((1, 32, 1), (2, 8, 3), (4, 2, 5))]
    points += [point("b", s, seed, l0, kl) for seed in (0, 1) for s, l0, kl in ((1, 4, 6), (2, 16, 2))]
    side = {"read": 0.9, "write": 0.8, "rank_one": 0.7, "components": 9.0}
    return tlpd.Comparison(
        protocol={"seeds": [0, 1], "evaluation": {"ladder": [20]}},
        methods={"a": {}, "b": {}}, ranks=64, parameters=640, points=points,
        stability=[{"method": "a", "sparsity": 1, "trained": side, "untrained": side}],
        splitting=[{"method": "a", "capacity": 2.0, "components": 9, "active": 5, "split": 0.25, "l0": 3.0, "rounded": 1.0}],
        versions={},
    )  # fmt: skip


# --- by hand ----------------------------------------------------------------------------------------------------------
def test_a_curve_is_straight_in_the_logarithm():
    curve = [(2.0, 5.0), (8.0, 3.0), (32.0, 1.0)]
    assert height(curve, 4.0) == pytest.approx(4.0) and height(curve, 16.0) == pytest.approx(2.0)
    assert [height(curve, x) for x in (2.0, 8.0, 32.0)] == pytest.approx([5.0, 3.0, 1.0])
    assert height(curve, 1.9) is None and height(curve, 33.0) is None and height([], 3.0) is None
    assert height([(4.0, 1.5)], 4.0) == 1.5


def test_area_is_the_mean_height_between_two_places():
    curve = [(1.0, 4.0), (math.e, 2.0), (math.e**3, 2.0)]
    # a slope of width 1 and mean 3, then 2 units of height 2
    assert area(curve, 1.0, math.e**3) == pytest.approx((3.0 + 4.0) / 3)
    assert area(curve, math.e**0.5, math.e) == pytest.approx(2.5)


def test_methods_are_compared_at_equal_sparsity(found):
    at = found.at(1 / 8, "rounded")  # L0 8
    assert at["a"] == pytest.approx([3.0, 4.0]) and at["b"] == pytest.approx([4.0, 4.0])
    assert found.at(1 / 8, "adversarial", "active_parameters")["a"] == pytest.approx([9.0, 12.0])
    assert found.at(1 / 32, "stochastic") == {"a": pytest.approx([10.0, 12.0]), "b": []}
    assert found.shared_range() == (4.0, 16.0) and found.shared_range("active_parameters") == (40.0, 160.0)
    areas = found.areas("rounded")
    assert areas["a"] == pytest.approx([3.0, 4.0]) and areas["b"] == pytest.approx([4.0, 4.0])


def test_curves_that_share_nothing_have_no_area(found):
    apart = [p for p in found.points if p["method"] == "a"] + [point("b", 1, s, 64, 1) for s in (0, 1)]
    other = tlpd.Comparison(**{**found.__dict__, "points": apart})
    assert other.shared_range() is None and other.areas("rounded") == {} and "mean, L0" not in str(other)


def test_spread_is_median_and_range():
    assert (spread([]), spread([1.0]), spread([3.0, 1.0, 2.5], 1)) == ("", "1.000", "2.5 (1.0-3.0)")


# --- what it is like to use -------------------------------------------------------------------------------------------
def test_it_can_be_read_framed_kept_and_drawn(found, tmp_path):
    from tl_paramdecomp.report.comparison import draw_comparison

    text = str(found)
    assert (
        "3.500 (3.000-4.000)" in text and "0.700" in text and "25.0%" in text and "all components removed 7.000" in text
    )
    assert max(map(len, text.splitlines())) <= 120
    assert len(found.to_frame()) == 10 and {"method", "l0", "rounded"} <= set(found.to_frame().columns)
    assert tlpd.Comparison.load(found.save(tmp_path / "found.json")) == found
    (tmp_path / "other.json").write_text(json.dumps({"kl": 3}))
    for name in ("other.json", "none.json"):
        with pytest.raises(DecompositionFileError, match=name):
            tlpd.Comparison.load(tmp_path / name)
    picture = draw_comparison(found, tmp_path / "picture.png", "two methods")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


# --- matching ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def bases(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.linalg.qr(torch.randn(s.d_in, s.d_in, generator=generator))[0],
               torch.linalg.qr(torch.randn(s.d_out, s.d_out, generator=generator))[0])
        for name, s in tlpd.find_sites(model, SITES).items()
    }  # fmt: skip


def picked(model, bases, order, sign=1.0, scale=1.0):
    """Components that read along some of orthonormal directions and write along as many."""
    return tlpd.from_factors(model, {n: (sign * scale * V[:, order], U[order] / scale) for n, (V, U) in bases.items()})


def test_order_scale_and_a_pair_of_signs_do_not_matter(model, bases):
    a, b = picked(model, bases, [0, 1, 2]), picked(model, bases, [2, 0, 1], scale=3.0)
    found = matched_cosines(a, b)
    assert found is not None and found[:3] == pytest.approx((1.0, 1.0, 1.0), abs=1e-6) and found.components == 12
    turned = {n: (-c.V, -c.U) for n, c in b.items()}
    assert matched_cosines(a, tlpd.from_factors(model, turned)) == pytest.approx(found, abs=1e-6)


def test_one_sign_turned_is_another_matrix(model, bases):
    found = matched_cosines(picked(model, bases, [0, 1]), picked(model, bases, [0, 1], sign=-1.0))
    assert found is not None and found[:3] == pytest.approx((1.0, 1.0, 0.0), abs=1e-6)


def test_only_chosen_components_take_part(model, bases):
    """Of three components one is shared: a third of the mean, or all of it where it alone takes part."""
    a, b = picked(model, bases, [0, 1, 2]), picked(model, bases, [0, 3, 4])
    found = matched_cosines(a, b)
    assert found is not None and found.rank_one == pytest.approx(1 / 3, abs=1e-6)
    first = {n: torch.tensor([True, False, False]) for n in a}
    alone = matched_cosines(a, b, first, first)
    assert alone is not None and alone.rank_one == pytest.approx(1.0, abs=1e-6) and alone.components == 4
    assert matched_cosines(a, b, {n: torch.zeros(3, dtype=torch.bool) for n in a}) is None


def test_a_component_splits_where_two_match_it(model, bases):
    small, large = picked(model, bases, [0, 1]), picked(model, bases, [0, 0, 1, 2])
    assert split_share(small, large) == 0.5 and split_share(small, small) == 0.0
    one = {n: torch.tensor([True, False, True, True]) for n in large}
    assert split_share(small, large, of_large=one) == 0.0
    with pytest.raises(NoMatchingSiteError, match=r"W_out|W_in"):
        fewer = {n: p for n, p in bases.items() if "W_in" in n}
        matched_cosines(small, picked(model, fewer, [0, 1]))


def test_active_components_are_those_that_reach_the_threshold_anywhere(model):
    tokens = torch.randint(0, 61, (5, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[3:] = 0
    made = tlpd.decompose(model, SITES, tlpd.SPD(n_components=12, start="random"), tokens, steps=0, progress=False)
    for given, rows in ((None, tokens), (mask, tokens[:3])):
        found = active_components(model, made, tokens, given, threshold=0.5, rows_at_once=2)
        for name, g in tlpd.causal_importances(model, made, rows).items():
            assert torch.equal(found[name], (g > 0.5).flatten(0, 1).any(0)) and found[name].any()
    bare = tlpd.decompose(model, SITES, tlpd.SVD(training=None), progress=False)
    assert all(every.all() for every in active_components(model, bare, tokens).values())
