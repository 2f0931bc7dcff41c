"""Masks as values: what each method means, in every form of its arguments, worked out by hand on small vectors."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tl_paramdecomp.components.indices import component_indices
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.components.positions import parse_positions
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DtypeError,
    HeadIndexError,
    MaskNotConstantError,
    NoMatchingSiteError,
    PositionIndexError,
    SettingError,
    ShapeError,
)
from tl_paramdecomp.patching.act_patches import ActPatches
from tl_paramdecomp.sites import Span, WeightSite

C = 5
W_IN = WeightSite("blocks.0.mlp.W_in", 4, 6, aliases=("transformer.h.0.mlp.c_fc", "blocks.0.mlp.in"))
W_Q = WeightSite("blocks.0.attn.W_Q", 4, 8, n_heads=4, head_side="out")
W_K = WeightSite("blocks.0.attn.W_K", 4, 4, n_heads=2, head_side="out")
W_V = WeightSite("blocks.0.attn.W_V", 4, 4, n_heads=2, head_side="out")
W_O = WeightSite("blocks.0.attn.W_O", 8, 4, n_heads=4, head_side="in")
SITES = {site.name: site for site in (W_Q, W_K, W_V, W_O, W_IN)}
SITE = W_IN.name


def masks() -> Masks:
    return Masks(SITES, dict.fromkeys(SITES, C))


def ones_but(**changed: float) -> Tensor:
    """[C] with entries c0=..., c1=... changed."""
    values = torch.ones(C)
    for key, value in changed.items():
        values[int(key[1:])] = value
    return values


def m_of(made: Masks, site: str = SITE) -> Tensor:
    """m [C] of a constant mask."""
    return made[site].m.flatten()


# --- composition ------------------------------------------------------------------------------------------------------
def test_a_new_value_is_the_model_itself() -> None:
    assert torch.equal(m_of(masks()), torch.ones(C)) and masks()[SITE].d == 1.0
    assert masks().changed() == {}


def test_ablations_and_scales_multiply() -> None:
    made = masks().ablate(SITE, 1).scale(SITE, [1, 2], 0.5).scale(SITE, 2, 3)
    assert torch.equal(m_of(made), ones_but(c1=0.0, c2=1.5)) and made[SITE].d == 1.0


def test_keep_only_removes_the_others_and_sets_the_delta() -> None:
    made = masks().scale(SITE, 3, 0.5).keep_only(SITE, [1, 3])
    assert torch.equal(m_of(made), torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0])) and made[SITE].d == 0.0
    made = made.keep_only(SITE, [1], delta=0.25)
    assert torch.equal(m_of(made), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])) and made[SITE].d == 0.25


def test_keep_only_of_nothing_removes_everything() -> None:
    assert torch.equal(m_of(masks().keep_only(SITE, [])), torch.zeros(C))


def test_with_values_replaces_what_was_there() -> None:
    values = torch.arange(float(C))
    made = masks().keep_only(SITE, [0]).with_values(SITE, values)
    assert torch.equal(m_of(made), values) and made[SITE].d == 1.0
    assert torch.equal(m_of(made.ablate(SITE, 4)), torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0]))


def test_other_sites_stay_as_they_are() -> None:
    made = masks().ablate(SITE, 1).ablate(W_Q.name, 2)
    assert list(made.changed()) == [W_Q.name, SITE]
    assert torch.equal(m_of(made, W_O.name), torch.ones(C))


def test_methods_return_new_values() -> None:
    first = masks().ablate(SITE, 1)
    before = m_of(first).clone()
    for change in (
        first.ablate(SITE, 2),
        first.scale(SITE, 3, 2.0),
        first.keep_only(SITE, 4),
        first.with_values(SITE, 0.0),
    ):
        assert change is not first and not torch.equal(m_of(change), before)
    assert torch.equal(m_of(first), before)


def test_in_place_changes_of_what_was_given_or_read_have_no_effect() -> None:
    m, d, there = torch.rand(2, 3, C), torch.rand(2, 3), torch.tensor([True, False, True])
    made = masks().with_values(SITE, m, delta=d).ablate(W_Q.name, 0, positions=there)
    kept_m, kept_d = m.clone(), d.clone()
    m.zero_(), d.zero_(), there.zero_()
    assert torch.equal(made[SITE].m, kept_m) and torch.equal(made[SITE].d, kept_d)
    made[SITE].m.zero_(), made[SITE].d.zero_()
    assert torch.equal(made[SITE].m, kept_m) and torch.equal(made[SITE].d, kept_d)
    assert made.at(W_Q.name, 3).m[..., 0].flatten().tolist() == [0.0, 1.0, 0.0]
    constant = masks().ablate(SITE, 1)
    constant[SITE].m.zero_()
    assert torch.equal(m_of(constant), ones_but(c1=0.0))


def test_gradients_reach_given_values() -> None:
    m, d = torch.rand(C, requires_grad=True), torch.rand((), requires_grad=True)
    pair = masks().with_values(SITE, m, delta=d)[SITE]
    (pair.m.sum() * pair.d).backward()
    assert m.grad is not None and d.grad is not None


@pytest.mark.parametrize("m", [0.5, 1, True, torch.tensor(0.5), torch.tensor([0.5]), torch.ones(C, dtype=torch.bool)])
@pytest.mark.parametrize("delta", [0, 0.5, True, torch.tensor(0.5), torch.tensor([1, 0, 1])])
def test_numbers_and_booleans_are_values(m: object, delta: object) -> None:
    pair = masks().with_values(SITE, m, delta=delta)[SITE]
    assert pair.m.shape[-1] == C and pair.m.is_floating_point() and pair.d.is_floating_point()
    assert torch.equal(pair.m.flatten()[:C], torch.as_tensor(m, dtype=torch.float32).expand(C))
    assert torch.equal(pair.d.flatten(), torch.as_tensor(delta, dtype=torch.float32).flatten())


# --- a Mapping --------------------------------------------------------------------------------------------------------
def test_masks_are_a_mapping_over_all_sites() -> None:
    made = masks().ablate(SITE, 1)
    assert list(made) == list(SITES) and len(made) == len(SITES)
    assert SITE in made and "blocks.0.mlp.in" in made and "blocks.9.mlp.W_in" not in made
    assert {name: pair.m.shape[-1] for name, pair in made.items()} == dict.fromkeys(SITES, C)
    assert made == made and made != masks() and len({made, masks()}) == 2
    assert "1 changed" in repr(made) and SITE in repr(made)


@pytest.mark.parametrize("alias", [SITE, *W_IN.aliases])
def test_aliases_name_the_site(alias: str) -> None:
    made = masks().ablate(alias, 1).scale(alias, 2, 0.5)
    assert torch.equal(m_of(made), ones_but(c1=0.0, c2=0.5)) and list(made.changed()) == [SITE]
    assert torch.equal(m_of(made.keep_only(alias, 0).with_values(alias, 1.0), alias), torch.ones(C))


def test_an_unknown_site_names_the_nearest() -> None:
    with pytest.raises(NoMatchingSiteError, match=r"blocks\.0\.mlp\.W_in\b"):
        masks().ablate("blocks.0.mlp.W_inn", 0)
    with pytest.raises(NoMatchingSiteError):
        masks()["blocks.0.mlp.*"]


# --- components -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, expected",
    [
        (1, [1]),
        (-1, [4]),
        ([0, -2], [0, 3]),
        ((1, 1, 2), [1, 2]),
        (range(2), [0, 1]),
        ({3}, [3]),
        (slice(2, None), [2, 3, 4]),
        (slice(None, -3), [0, 1]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(3, 99), [3, 4]),
        (slice(0, 0), []),
        ([], []),
        (torch.tensor(2), [2]),
        (torch.tensor([0, -1]), [0, 4]),
        (torch.tensor([True, False, False, False, True]), [0, 4]),
        ([True, False, False, False, True], [0, 4]),
        (np.int64(2), [2]),
        (np.array([1, 2]), [1, 2]),
        (np.array([True, False, False, True, False]), [0, 3]),
        ([np.int32(1), torch.tensor(2)], [1, 2]),
    ],
)
def test_components_in_every_form(given: object, expected: list[int]) -> None:
    ablated = m_of(masks().ablate(SITE, given))
    assert (ablated == 0).nonzero().flatten().tolist() == expected
    kept = m_of(masks().keep_only(SITE, given))
    assert (kept == 1).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    "given",
    [5, -6, [0, 5], torch.tensor([7]), np.array([-6]), slice(5, 9), torch.tensor([0.5]), torch.ones(4).bool(),
     [True, False], [0, True], torch.zeros(2, 2, dtype=torch.long)],
)  # fmt: skip
def test_components_out_of_range_or_of_no_form(given: object) -> None:
    for ask in (masks().ablate, masks().keep_only, lambda s, c: masks().scale(s, c, 2.0)):
        with pytest.raises(ComponentIndexError, match=r"blocks\.0\.mlp\.W_in") as caught:
            ask(SITE, given)
        assert isinstance(caught.value, IndexError) and "given" in str(caught.value)


# --- positions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, expected",
    [
        (1, [1]),
        (-1, [5]),
        ([0, -2], [0, 4]),
        ((1, 1), [1]),
        (range(2, 4), [2, 3]),
        (slice(4, None), [4, 5]),
        (slice(-2, None), [4, 5]),
        (slice(None, 2), [0, 1]),
        (slice(None, -4), [0, 1]),
        (slice(-3, -1), [3, 4]),
        (slice(1, -1, 2), [1, 3]),
        (slice(-99, 1), [0]),
        (slice(4, 99), [4, 5]),
        (slice(None), [0, 1, 2, 3, 4, 5]),
        (slice(np.int64(4), None), [4, 5]),
        (torch.tensor(3), [3]),
        (torch.tensor([0, -1]), [0, 5]),
        (torch.arange(6) > 3, [4, 5]),
        ([True, False, False, False, False, True], [0, 5]),
        (np.int64(2), [2]),
        (np.array([1, 2]), [1, 2]),
        ([np.int64(1), torch.tensor(2)], [1, 2]),
        (np.arange(6) == 2, [2]),
    ],
)
def test_positions_in_every_form(given: object, expected: list[int]) -> None:
    made = masks().ablate(SITE, 1, positions=given)
    m = made.at(SITE, 6).m.expand(1, 6, C)[0]
    assert (m[:, 1] == 0).nonzero().flatten().tolist() == expected
    assert torch.equal(m[:, [0, 2, 3, 4]], torch.ones(6, 4))
    kept = masks().keep_only(SITE, 1, positions=given).at(SITE, 6)
    assert (kept.d.expand(1, 6)[0] == 0).nonzero().flatten().tolist() == expected


def test_a_boolean_mask_may_differ_by_row() -> None:
    there = torch.tensor([[True, False, False], [False, True, True]])
    for given in (there, there.numpy()):
        pair = masks().keep_only(SITE, [1], delta=0.5, positions=given).at(SITE, 3, batch=2)
        assert torch.equal(pair.m[..., 0] == 0, there) and torch.equal(pair.d == 0.5, there)
        assert (pair.m[..., 1] == 1).all()


@pytest.mark.parametrize(
    "given", [6, -7, [0, 6], torch.tensor([6]), slice(6, None), slice(3, 3), slice(4, 2), slice(0, 3, -1)]
)
def test_positions_out_of_range(given: object) -> None:
    made = masks().ablate(SITE, 1, positions=given)
    with pytest.raises(PositionIndexError, match="0 to 5") as caught:
        made.at(SITE, 6)
    assert SITE in str(caught.value) and isinstance(caught.value, IndexError)


@pytest.mark.parametrize("given", [[], "1", 0.5, [0.5], [0, True], [[0]], torch.ones(1, 1, 1).bool(), slice(0.5, None)])
def test_positions_of_no_form(given: object) -> None:
    with pytest.raises(PositionIndexError):
        parse_positions(given)


@pytest.mark.parametrize("given", ["1", 0.5, [0.5], [[0]], [None], None, True])
def test_components_of_no_form(given: object) -> None:
    with pytest.raises(ComponentIndexError, match="has components 0 to 4"):
        component_indices(given, C, SITE)


@pytest.mark.parametrize("given", [torch.ones(5).bool(), torch.ones(3, 6).bool()])
def test_boolean_positions_of_another_shape(given: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"\[6\] or \[2, 6\]"):
        masks().ablate(SITE, 1, positions=given).at(SITE, 6, batch=2)


def test_positions_need_a_position_axis() -> None:
    mask = masks().ablate(SITE, 1, positions=0).site_mask(SITE)
    with pytest.raises(ShapeError, match="no position axis"):
        mask.resolve((4,), Span(), torch.device("cpu"), torch.float32)


def test_reading_a_mask_by_position_needs_a_length() -> None:
    made = masks().ablate(SITE, 1, positions=0)
    with pytest.raises(MaskNotConstantError, match=r"masks\.at"):
        made[SITE]


# --- heads ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("site, heads", [(W_Q, 4), (W_O, 4), (W_K, 2), (W_V, 2)])
def test_a_head_is_a_row_of_the_mask(site: WeightSite, heads: int) -> None:
    for head in range(heads):
        m = masks().ablate(site.name, [1, 2], head=head)[site.name].m.reshape(heads, C)
        expected = torch.ones(heads, C)
        expected[head, 1:3] = 0.0
        assert torch.equal(m, expected)
    assert m.shape == (heads, C)


def test_heads_positions_and_whole_components_combine() -> None:
    pair = masks().ablate(W_Q.name, 1, head=2, positions=[0]).ablate(W_Q.name, 3).at(W_Q.name, 2)
    expected = torch.ones(2, 4, C)
    expected[0, 2, 1] = 0.0
    expected[..., 3] = 0.0
    assert torch.equal(pair.m.reshape(2, 4, C), expected) and (pair.d == 1).all()


@pytest.mark.parametrize("head", [4, -1, True])
def test_no_such_head(head: object) -> None:
    with pytest.raises(HeadIndexError, match="query heads 0 to 3"):
        masks().scale(W_Q.name, 0, 0.5, head=head)


def test_heads_are_key_value_heads_where_those_are_fewer() -> None:
    assert masks().ablate(W_K.name, 0, head=np.int64(1))[W_K.name].m.reshape(2, C)[1, 0] == 0
    with pytest.raises(HeadIndexError, match="key/value heads 0 to 1; given 2"):
        masks().ablate(W_V.name, 0, head=2)


def test_sites_without_heads_have_none() -> None:
    with pytest.raises(HeadIndexError, match=r"does not divide into heads.*W_Q, W_K, W_V and W_O"):
        masks().ablate(SITE, 0, head=0)


# --- given values -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 3, C), (3, 6)])
def test_values_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\[batch, pos, C=5\]"):
        masks().with_values(SITE, torch.ones(shape))


def test_delta_values_of_another_shape() -> None:
    with pytest.raises(ShapeError, match=r"\[batch, pos\]"):
        masks().with_values(SITE, torch.ones(C), delta=torch.ones(1, 2, 3))


@pytest.mark.parametrize("values", [torch.ones(C, dtype=torch.complex64)])
def test_values_that_are_no_real_numbers(values: Tensor) -> None:
    with pytest.raises(DtypeError, match="real numbers"):
        masks().with_values(SITE, values)
    with pytest.raises(DtypeError, match="real numbers"):
        masks().with_values(SITE, 1.0, delta=values[0])


@pytest.mark.parametrize("rows", [(2, 4), (3, 3)])
def test_values_that_do_not_broadcast_to_the_rows(rows: tuple[int, int]) -> None:
    for made in (
        masks().with_values(SITE, torch.ones(2, 3, C)),
        masks().with_values(SITE, 1.0, delta=torch.ones(2, 3)),
    ):
        with pytest.raises(ShapeError, match="mask of blocks.0.mlp.W_in"):
            made.site_mask(SITE).resolve(rows, Span(prompt=rows[1]), torch.device("cpu"), torch.float32)


def test_values_by_position_cover_the_prompt_and_leave_the_rest_to_the_model() -> None:
    """Prompt of 3 columns: whole, its last two, two columns across its end, one far behind it."""
    m, d = torch.rand(2, 3, C), torch.rand(2, 3)
    ones = torch.ones(2, 4, C)
    row_m, row_d = torch.cat([m, ones], 1), torch.cat([d, ones[..., 0]], 1)
    for made, expected_d in (
        (masks().with_values(SITE, m, delta=d), row_d),
        (masks().with_values(SITE, m, delta=0.0), torch.cat([torch.zeros(2, 3), ones[..., 0]], 1)),
    ):
        for start, length in ((0, 3), (1, 2), (2, 2), (6, 1), (0, 7)):
            span = Span(start, prompt=3, generating=True)
            found = made.site_mask(SITE).resolve((2, length), span, torch.device("cpu"), torch.float32)
            assert torch.equal(found.m, row_m[:, start : start + length])
            found_d = torch.as_tensor(found.d).expand(2, length)
            assert torch.equal(found_d, expected_d[:, start : start + length])


def test_a_delta_by_position_ends_with_the_prompt_too() -> None:
    made = masks().with_values(SITE, torch.zeros(C), delta=torch.zeros(3)).site_mask(SITE)
    found = made.resolve((2, 1), Span(5, prompt=3, generating=True), torch.device("cpu"), torch.float32)
    assert (found.m == 1).all() and torch.as_tensor(found.d).eq(1).all()


@pytest.mark.parametrize(
    "positions, fires",
    [(-1, [2]), ([-3, 4], [0, 4]), (slice(-2, None), [1, 2]), (slice(1, None), [1, 2, 3, 4]), (4, [4]), (99, []),
     (slice(None), [0, 1, 2, 3, 4]), (slice(None, -1), [0, 1]), (torch.tensor([True, False, True]), [0, 2])],
)  # fmt: skip
@pytest.mark.parametrize("cache", [True, False])
def test_positions_while_decoding(positions: object, fires: list[int], cache: bool) -> None:
    """A prompt of 3 columns and two decoded ones, each pass by itself or with the whole row again."""
    mask = masks().ablate(SITE, 1, positions=positions).site_mask(SITE)
    passes = [(0, 3), (3, 1), (4, 1)] if cache else [(0, 3), (0, 4), (0, 5)]
    for start, length in passes:
        span = Span(start, prompt=3, generating=True)
        m = mask.resolve((1, length), span, torch.device("cpu"), torch.float32).m.expand(length, C)
        fired = [start + t for t in range(length) if m[t, 1] == 0]
        assert fired == [p for p in fires if start <= p < start + length]


def test_what_inference_mode_made_does_not_reach_autograd() -> None:
    mask = masks().ablate(SITE, 1).site_mask(SITE)
    with torch.inference_mode():
        mask.resolve((1, 1), Span(), torch.device("cpu"), torch.float32)
    h = torch.rand(C, requires_grad=True)
    resolved = mask.resolve((1, 1), Span(), torch.device("cpu"), torch.float32)
    (resolved.weight * h).sum().backward()
    assert torch.equal(h.grad, ones_but(c1=0.0) - 1)


# --- what is no number, index or slice --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), Fraction(1, 2)]
)
def test_numbers_of_every_kind(number: Any) -> None:
    assert masks().scale(SITE, 1, number)[SITE].m[1] == 0.5
    assert masks().keep_only(SITE, 1, delta=number)[SITE].d == 0.5
    pair = masks().with_values(SITE, number, delta=number)[SITE]
    assert (pair.m == 0.5).all() and (pair.d == 0.5).all()


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), -float("inf"), 10**400, -(10**39), torch.tensor(float("nan"))]
)
def test_numbers_that_are_not_finite(number: Any) -> None:
    for ask in (
        lambda: masks().scale(SITE, 0, number),
        lambda: masks().keep_only(SITE, 0, delta=number),
        *((lambda: masks().with_values(SITE, number),) if not isinstance(number, torch.Tensor) else ()),
        *((lambda: masks().with_values(SITE, 1, number),) if not isinstance(number, torch.Tensor) else ()),
    ):
        with pytest.raises(SettingError, match=r"blocks\.0\.mlp\.W_in must be finite"):
            ask()


@pytest.mark.parametrize("number", [torch.ones(2), np.ones(2), torch.tensor(0.5, requires_grad=True), torch.tensor(1j)])
def test_factors_that_are_no_constant_number(number: Any) -> None:
    """A factor is read once: a gradient would be lost in it without a word."""
    with pytest.raises(DtypeError, match="with_values|one real number"):
        masks().scale(SITE, 0, number)
    with pytest.raises(DtypeError, match="with_values|one real number"):
        masks().keep_only(SITE, 0, delta=number)


def test_numbers_and_integers_keep_their_float64_value() -> None:
    """0.1 and 2**24 + 1 are no float32."""
    for m, expected in ((0.1, 0.1), (torch.tensor(2**24 + 1), 2.0**24 + 1.0)):
        mask = masks().with_values(SITE, m).site_mask(SITE)
        assert (mask.resolve((1, 1), Span(), torch.device("cpu"), torch.float64).m == expected).all()
    pair = masks().with_values(SITE, 1.0, delta=torch.tensor(0.1, dtype=torch.float64))[SITE]
    assert pair.d.item() == 0.1


def test_given_values_without_common_rows() -> None:
    for m, d in (((2, 3, 5), (4,)), ((2, 1, 5), (3, 1)), ((3, 5), (2, 2))):
        with pytest.raises(ShapeError, match="no rows"):
            masks().with_values(SITE, torch.ones(m), delta=torch.ones(d))


@pytest.mark.parametrize("some", [slice(0.5, None), slice(None, None, 0), slice(-9, -7), slice("a", None), slice(True, None),
                                  slice(torch.tensor(0.5), None), slice([1], None)])  # fmt: skip
def test_slices_of_components_that_are_none(some: slice) -> None:
    with pytest.raises(ComponentIndexError, match="components 0 to 4"):
        masks().ablate(SITE, some)


@pytest.mark.parametrize(
    "some", [slice(torch.tensor(0.5), None), slice(True, None), slice([1], None), slice("a", None)]
)
def test_slices_of_positions_that_are_none(some: slice) -> None:
    with pytest.raises(PositionIndexError, match="positions must be"):
        masks().ablate(SITE, 0, positions=some)


@pytest.mark.parametrize("head", [torch.tensor(True), torch.tensor(0.0), torch.tensor([1, 2]), np.array([1]), 10**30])
def test_heads_that_are_no_whole_number(head: Any) -> None:
    with pytest.raises(HeadIndexError, match="query heads 0 to 3"):
        masks().ablate(W_Q.name, 0, head=head)
    with pytest.raises(HeadIndexError, match="query heads 0 to 3"):
        ActPatches(SITES, dict.fromkeys(SITES, C)).zero(W_Q.name, 0, head=head)


@pytest.mark.parametrize("length, batch", [(0, 1), (-1, 1), (3, 0)])
def test_rows_of_nothing(length: int, batch: int) -> None:
    with pytest.raises(SettingError, match="at least one"):
        masks().ablate(SITE, 0, positions=0).at(SITE, length, batch)


@pytest.mark.parametrize("axes", [(), (2,), (4, 3)])
def test_masks_by_row_where_a_site_has_more_axes_than_batch_and_position(axes: tuple[int, ...]) -> None:
    """A batch axis is the first one, not the one next to the positions, also where both have one size."""
    rng, rows = np.random.default_rng(0), (2, *axes, 3)
    m, d = torch.from_numpy(rng.standard_normal((2, 3, 5))), torch.from_numpy(rng.standard_normal((2, 3)))
    there = torch.tensor([[True, False, False], [False, True, True]])
    made = masks().with_values(SITE, m, delta=d).keep_only(SITE, [1, 2], delta=0.3, positions=there)
    found = made.site_mask(SITE).resolve(rows, Span(), torch.device("cpu"), torch.float64)
    for index in np.ndindex(rows):
        b, t = index[0], index[-1]
        kept = m[b, t] * torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]) if there[b, t] else m[b, t]
        assert torch.equal(found.m.expand(*rows, 5)[index], kept)
        assert found.d.expand(rows)[index] == (0.3 if there[b, t] else d[b, t])
