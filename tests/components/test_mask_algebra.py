"""Any sequence of operations on masks is what a slow textbook says it is; and the laws of order and union that hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import masked_weight
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import (
    MaskNotConstantError,
    PositionIndexError,
)
from tl_paramdecomp.sites import SiteCall, Span, WeightSite

from ..support import mask_algebra as algebra
from ..support.mask_algebra import NUMBERS, Rows, Textbook
from ..support.searching import few_and_many, searching

CPU = torch.device("cpu")
W_IN = WeightSite("blocks.0.mlp.W_in", 4, 6, aliases=("transformer.h.0.mlp.c_fc",), has_bias=True)
W_Q = WeightSite("blocks.0.attn.W_Q", 4, 6, n_heads=3, head_side="out", has_bias=True)
W_K = WeightSite("blocks.0.attn.W_K", 4, 4, n_heads=1, head_side="out")
W_O = WeightSite("blocks.0.attn.W_O", 6, 4, n_heads=2, head_side="in", has_bias=True, aliases=("out",))
W_E = WeightSite("embed.W_E", 7, 4, "embedding")
SITES = {site.name: site for site in (W_IN, W_Q, W_K, W_O, W_E)}
N = {W_IN.name: 5, W_Q.name: 3, W_K.name: 2, W_O.name: 4, W_E.name: 8}
SOME_SITE = st.sampled_from(list(SITES.values()))


def no_masks() -> Masks:
    return Masks(SITES, N)


def textbook(site: WeightSite, row: Rows) -> Textbook:
    return Textbook(row, N[site.name], site.n_heads)


def canonical(name: str) -> str:
    return next(site.name for site in SITES.values() if name in (site.name, *site.aliases))


def dense(masks: Masks, site: WeightSite, row: Rows, cached: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """m [batch, pos, head, C] and d [batch, pos] over whole rows, pass by pass or in one pass over all that was decoded."""
    passes = list(row.spans()) if cached else [(Span(0, row.prompt, generating=True), row.length)]
    heads, parts = site.n_heads or 1, []
    for span, length in passes:
        found = masks.site_mask(site.name).resolve((row.batch, length), span, CPU, torch.float64)
        m = found.m if found.by_head else found.m.unsqueeze(-2)
        d = torch.as_tensor(found.d, dtype=torch.float64)
        parts.append((m.expand(row.batch, length, heads, N[site.name]), d.expand(row.batch, length)))
    m, d = (torch.cat(some, 1).numpy() for some in zip(*parts))
    return m, d


def assert_is(masks: Masks, site: WeightSite, expected: Textbook) -> None:
    """To the last bit, through the cache and without it."""
    for cached in (True, False):
        m, d = dense(masks, site, expected.row, cached)
        assert np.array_equal(m, expected.m) and np.array_equal(d, expected.d)


def assert_same(a: Masks, b: Masks, site: WeightSite, row: Rows, rounding: float = 0.0) -> None:
    for one, other in zip(dense(a, site, row), dense(b, site, row)):
        assert np.allclose(one, other, rtol=rounding, atol=0.0)


# --- masks against the textbook ---------------------------------------------------------------------------------------
@few_and_many(100, 3000)
def test_any_sequence_is_the_textbooks_and_every_value_before_it_stays(examples: int) -> None:
    """Through prompts in pieces and decoded tokens; also after the caller's own tensors and lists have changed."""

    @searching(examples)
    @given(data=st.data(), row=algebra.rows())
    def sequences(data: st.DataObject, row: Rows) -> None:
        masks, books = no_masks(), {name: textbook(site, row) for name, site in SITES.items()}
        history = [(masks, books)]
        steps = data.draw(algebra.sequences(SITES.values(), N, row))
        for name, operation in steps:
            own = canonical(name)
            books = books | {own: books[own](operation)}
            masks = operation.of(masks, name)
            history.append((masks, books))
        for _, operation in steps:
            operation.spoil()
        touched = {canonical(name) for name, _ in steps}
        for masks, books in history:
            for name in touched:
                assert_is(masks, SITES[name], books[name])
        assert set(masks.changed()) <= touched

    sequences()


@few_and_many(60, 1000)
def test_what_is_read_is_the_textbooks_and_is_a_copy(examples: int) -> None:
    """`at` for rows of a length, and `masks[site]` where no operation names positions."""

    @searching(examples)
    @given(data=st.data(), site=SOME_SITE, row=algebra.rows(decoding=False))
    def readings(data: st.DataObject, site: WeightSite, row: Rows) -> None:
        n, everywhere = N[site.name], data.draw(st.booleans())
        masks, expected = no_masks(), textbook(site, row)
        for operation in data.draw(st.lists(algebra.operations(n, row, site.n_heads, everywhere), max_size=4)):
            masks, expected = operation.of(masks, site.name), expected(operation)
        readers = [lambda: masks.at(site.name, row.prompt, row.batch)]
        readers += [lambda: masks[site.name]] if everywhere else []
        for read in readers:
            for _ in range(2):
                m, d = read()
                by_head = m.ndim > 1 and any(edit.head is not None for edit in masks.site_mask(site.name).edits)
                heads = (site.n_heads,) if by_head else ()
                shown = m.double().expand(row.batch, row.prompt, *heads, n).numpy()
                # read in the given tensors' own precision, bfloat16 among them
                close = {"rtol": 0.05, "atol": 0.0} if m.itemsize == 2 else {"rtol": 1e-6, "atol": 0.0}
                assert np.allclose(shown, expected.m if by_head else expected.m[:, :, 0], **close)
                assert np.allclose(d.double().expand(row.batch, row.prompt).numpy(), expected.d, **close)
                m.zero_(), d.zero_()
        assert_is(masks, site, expected)

    readings()


@few_and_many(60, 1000)
def test_positions_that_no_row_has_are_refused(examples: int) -> None:
    """A row that will not grow has no column behind its last; no row has one before its first."""

    @searching(examples)
    @given(data=st.data(), row=algebra.rows(), index=st.integers(-9, 9) | st.sampled_from([10**30, -(10**30)]))
    def rows(data: st.DataObject, row: Rows, index: int) -> None:
        form = data.draw(st.sampled_from([lambda i: i, lambda i: [0, i], lambda i: (i, -1)]))
        mask = no_masks().ablate(W_IN.name, 0, positions=form(index)).site_mask(W_IN.name)
        for generating in (True, False):
            span, length = Span(0, row.prompt, generating), row.prompt
            if -row.prompt <= index and (index < length or generating):
                mask.resolve((row.batch, length), span, CPU, torch.float64)
                continue
            with pytest.raises(PositionIndexError, match=f"0 to {length - 1}"):
                mask.resolve((row.batch, length), span, CPU, torch.float64)

    rows()


@few_and_many(60, 1000)
def test_slices_of_positions_that_select_nothing_are_refused(examples: int) -> None:
    @searching(examples)
    @given(row=algebra.rows(), some=algebra.slices(-9, 9, (1, 2, 0, -1)))
    def rows(row: Rows, some: slice) -> None:
        mask = no_masks().ablate(W_IN.name, 0, positions=some).site_mask(W_IN.name)
        start, _ = algebra.ends(some, row.prompt)
        fine = (some.step or 1) >= 1 and some.step != 0 and algebra.selects(some, row.prompt)
        for generating in (True, False):
            span = Span(0, row.prompt, generating)
            if fine and (generating or start < row.prompt):
                found = mask.resolve((1, row.prompt), span, CPU, torch.float64).m.expand(1, row.prompt, 5)[0, :, 0]
                assert found.tolist() == [float(not algebra.named(some, 0, t, row.prompt)) for t in range(row.prompt)]
                continue
            with pytest.raises(PositionIndexError, match="selects nothing"):
                mask.resolve((1, row.prompt), span, CPU, torch.float64)

    rows()


# --- one site's output ------------------------------------------------------------------------------------------------
class Linear:
    """One site with random numbers in it and inputs of its own, everything in float64."""

    def __init__(self, site: WeightSite, row: Rows, seed: int, bias: bool, looked_up_once: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.site, self.row = site, row
        self.W, self.V, self.U = (
            rng.standard_normal(shape)
            for shape in ((site.d_in, site.d_out), (site.d_in, N[site.name]), (N[site.name], site.d_out))
        )
        self.b = rng.standard_normal(site.d_out) if bias else None
        batch = 1 if looked_up_once else row.batch
        embedding = site.kind == "embedding"
        shape = (batch, row.length) if embedding else (batch, row.length, site.d_in)
        self.x = rng.integers(0, site.d_in, shape) if embedding else rng.standard_normal(shape)
        self.y = (self.W[self.x] if embedding else self.x @ self.W) + (0.0 if self.b is None else self.b)
        self.components = Components(site, torch.from_numpy(self.V), torch.from_numpy(self.U))

    def output(self, masks: Masks) -> np.ndarray:
        """The site's outputs [batch, pos, d_out], pass by pass."""
        mask, parts = masks.site_mask(self.site.name), []
        bias = None if self.b is None else torch.from_numpy(self.b)
        for span, length in self.row.spans():
            x, y = (torch.from_numpy(whole[:, span.start : span.start + length]) for whole in (self.x, self.y))
            part = mask.output(self.components, SiteCall(x, y, bias, span)).detach()
            parts.append(part.expand(self.row.batch, *part.shape[1:]))
        return torch.cat(parts, 1).numpy()

    def textbook(self, book: Textbook) -> np.ndarray:
        return book.output(self.x, self.W, self.V, self.U, self.b, self.site.head_side)


def rounding(book: Textbook) -> float:
    """What float64 may lose in sums of this size."""
    return 1e-12 * (1.0 + np.abs(book.m).max() + np.abs(book.d).max())


@few_and_many(100, 3000)
def test_any_sequence_gives_the_textbooks_output(examples: int) -> None:
    """Linear maps with and without a bias, heads on either side, embeddings, position embeddings looked up once; masks that
    are constant also as one edited weight."""

    @searching(examples)
    @given(data=st.data(), site=SOME_SITE, row=algebra.rows(), bias=st.booleans(), seed=st.integers(0, 999))
    def outputs(data: st.DataObject, site: WeightSite, row: Rows, bias: bool, seed: int) -> None:
        once = site.kind == "embedding" and data.draw(st.booleans())
        linear = Linear(site, row, seed, bias, once)
        masks, expected = no_masks(), textbook(site, row)
        for operation in data.draw(st.lists(algebra.operations(N[site.name], row, site.n_heads), max_size=5)):
            masks, expected = operation.of(masks, site.name), expected(operation)
        outputs, by_hand = linear.output(masks), linear.textbook(expected)
        assert np.abs(outputs - by_hand).max() < rounding(expected)
        if not masks.site_mask(site.name).is_constant:
            with pytest.raises(MaskNotConstantError):
                masks.site_mask(site.name).constant(CPU, torch.float64)
            return
        resolved = masks.site_mask(site.name).constant(CPU, torch.float64)
        weight = masked_weight(linear.components, resolved, torch.from_numpy(linear.W)).detach().numpy()
        edited = (weight[linear.x] if site.kind == "embedding" else linear.x @ weight) + (
            0.0 if linear.b is None else linear.b
        )
        assert np.abs(edited - by_hand).max() < rounding(expected)

    outputs()


@few_and_many(40, 1000)
def test_gradients_reach_given_masks_through_any_sequence(examples: int) -> None:
    """The outputs' sum is linear in m and d: its gradient is the difference that a step of one in each entry makes."""

    @searching(examples)
    @given(data=st.data(), site=SOME_SITE, row=algebra.rows(), seed=st.integers(0, 999))
    def gradients(data: st.DataObject, site: WeightSite, row: Rows, seed: int) -> None:
        n, linear = N[site.name], Linear(site, row, seed, bias=True)
        after = data.draw(st.lists(algebra.operations(n, row, site.n_heads, values=False), max_size=3))
        rng = np.random.default_rng(seed)
        m, d = (
            torch.tensor(rng.standard_normal(s), requires_grad=True) for s in ((row.batch, row.prompt, n), row.prompt)
        )

        def total(m: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            masks = no_masks().with_values(site.name, m, delta=d)
            for operation in after:
                masks = operation.of(masks, site.name)
            mask = masks.site_mask(site.name)
            x, y = (torch.from_numpy(whole[:, : row.prompt]) for whole in (linear.x, linear.y))
            call = SiteCall(x, y, torch.from_numpy(linear.b), Span(0, row.prompt, True))
            return mask.output(linear.components, call).sum()

        found = torch.autograd.grad(total(m, d), [m, d], materialize_grads=True)
        with torch.no_grad():
            before = total(m, d)
            for given_, gradient in zip((m, d), found):
                entry = data.draw(st.tuples(*(st.integers(0, size - 1) for size in given_.shape)))
                step = torch.zeros_like(given_)
                step[entry] = 1.0
                moved = total(m + step, d) if given_ is m else total(m, d + step)
                assert abs(moved - before - gradient[entry]) < 1e-9

    gradients()


# --- laws -------------------------------------------------------------------------------------------------------------
class Setting:
    """A site whose masks are anything to begin with, and what a law is said about."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.site = draw(SOME_SITE)
        self.row = draw(algebra.rows())
        self.name, self.n = self.site.name, N[self.site.name]
        self.before = no_masks()
        for operation in draw(st.lists(algebra.operations(self.n, self.row, self.site.n_heads), max_size=3)):
            self.before = operation.of(self.before, self.name)
        self.A, self.B = (draw(st.sets(st.integers(0, self.n - 1))) for _ in range(2))
        self.f, self.g = (draw(st.sampled_from(NUMBERS)) for _ in range(2))
        self.P, self.Q = (draw(algebra.positions(self.row)).given for _ in range(2))
        heads = self.site.n_heads
        self.head = draw(st.none() | st.integers(0, heads - 1)) if heads else None

    def fires(self, positions: Any, row: Rows) -> np.ndarray:
        """[batch, pos] of whole rows: where an edit at these positions is made."""
        return dense(no_masks().ablate(self.name, 0, positions=positions), self.site, row)[0][:, :, 0, 0] == 0.0


def ablating_is_scaling_by_zero(s: Setting) -> None:
    ablated = s.before.ablate(s.name, s.A, positions=s.P, head=s.head)
    assert_same(ablated, s.before.scale(s.name, s.A, 0.0, positions=s.P, head=s.head), s.site, s.row)


def ablating_twice_is_ablating_once(s: Setting) -> None:
    once = s.before.ablate(s.name, s.A, positions=s.P, head=s.head)
    assert_same(once.ablate(s.name, s.A, positions=s.P, head=s.head), once, s.site, s.row)


def ablations_unite_their_components(s: Setting) -> None:
    one_by_one = s.before.ablate(s.name, s.A, positions=s.P, head=s.head).ablate(
        s.name, s.B, positions=s.P, head=s.head
    )
    assert_same(one_by_one, s.before.ablate(s.name, s.A | s.B, positions=s.P, head=s.head), s.site, s.row)


def ablations_unite_their_positions(s: Setting) -> None:
    """Compared column by column, as a boolean mask cannot name decoded tokens: where either fires, and nowhere else."""
    m, d = dense(s.before, s.site, s.row)
    found, same_d = dense(s.before.ablate(s.name, s.A, positions=s.P).ablate(s.name, s.A, positions=s.Q), s.site, s.row)
    gone = np.zeros(m.shape, dtype=bool)
    gone[..., sorted(s.A)] = (s.fires(s.P, s.row) | s.fires(s.Q, s.row))[:, :, None, None]
    assert np.array_equal(found, np.where(gone, 0.0, m)) and np.array_equal(same_d, d)


def keeping_at_two_places_is_keeping_at_both(s: Setting) -> None:
    row = Rows(s.row.batch, s.row.length)
    P, Q = (s.draw(algebra.positions(row)).given for _ in range(2))
    both = torch.from_numpy(s.fires(P, row) | s.fires(Q, row))
    start = no_masks().scale(s.name, s.B, s.g)
    found = start.keep_only(s.name, s.A, delta=s.f, positions=P).keep_only(s.name, s.A, delta=s.f, positions=Q)
    assert_same(found, start.keep_only(s.name, s.A, delta=s.f, positions=both), s.site, row)


def scales_commute_and_multiply(s: Setting) -> None:
    """Of any components, positions and heads; to the last bit where no component is in both."""
    one, other = (s.A, s.f, s.P, s.head), (s.B, s.g, s.Q, None)
    ab, ba = s.before.scale(s.name, *one).scale(s.name, *other), s.before.scale(s.name, *other).scale(s.name, *one)
    assert_same(ab, ba, s.site, s.row, 1e-14 if s.A & s.B else 0.0)
    twice = s.before.scale(s.name, s.A, s.f, s.P).scale(s.name, s.A, s.g, s.P)
    assert_same(twice, s.before.scale(s.name, s.A, s.f * s.g, s.P), s.site, s.row, 1e-14)


def keeping_commutes_with_scaling(s: Setting) -> None:
    kept = s.before.keep_only(s.name, s.A, delta=s.f, positions=s.P).scale(s.name, s.B, s.g, s.Q, s.head)
    scaled = s.before.scale(s.name, s.B, s.g, s.Q, s.head).keep_only(s.name, s.A, delta=s.f, positions=s.P)
    assert_same(kept, scaled, s.site, s.row)


def keeping_twice_keeps_what_is_in_both_and_the_last_delta(s: Setting) -> None:
    twice = s.before.keep_only(s.name, s.A, delta=s.f, positions=s.P).keep_only(s.name, s.B, delta=s.g, positions=s.P)
    assert_same(twice, s.before.keep_only(s.name, s.A & s.B, delta=s.g, positions=s.P), s.site, s.row)


def keeping_the_others_and_the_delta_is_ablating(s: Setting) -> None:
    """Where the delta mask is 1 to begin with."""
    start = no_masks().scale(s.name, s.B, s.f, positions=s.Q, head=s.head)
    kept = start.keep_only(s.name, set(range(s.n)) - s.A, delta=1.0, positions=s.P)
    assert_same(kept, start.ablate(s.name, s.A, positions=s.P), s.site, s.row)


def given_values_forget_what_was_before(s: Setting) -> None:
    """And so commute with nothing."""
    given_ = s.draw(algebra.operations(s.n, s.row).filter(lambda one: one.method == "with_values"))
    assert_same(given_.of(s.before, s.name), given_.of(no_masks(), s.name), s.site, s.row)


def heads_together_are_the_whole(s: Setting) -> None:
    """As masks, and as the sum of what each head's edit alone does to a site's output."""
    heads = s.site.n_heads or 1
    whole, one_by_one = s.before.scale(s.name, s.A, s.f, s.P), s.before
    linear = Linear(s.site, s.row, s.draw(st.integers(0, 999)), bias=True)
    plain, effect = linear.output(s.before), np.zeros_like(linear.y)
    for head in range(heads):
        only = head if s.site.n_heads else None
        one_by_one = one_by_one.scale(s.name, s.A, s.f, s.P, only)
        effect += linear.output(s.before.scale(s.name, s.A, s.f, s.P, only)) - plain
    assert_same(one_by_one, whole, s.site, s.row)
    size = 1.0 + np.abs(plain).max() + np.abs(linear.output(whole)).max()
    assert np.abs(linear.output(whole) - plain - effect).max() < 1e-11 * size


def scaling_by_one_is_nothing_bit_for_bit(s: Setting) -> None:
    linear = Linear(s.site, s.row, s.draw(st.integers(0, 999)), bias=s.draw(st.booleans()))
    scaled = s.before.scale(s.name, s.A, 1.0, s.P, s.head)
    assert_same(scaled, s.before, s.site, s.row)
    assert np.array_equal(linear.output(no_masks().scale(s.name, s.A, 1, s.P, s.head)), linear.y)
    alike = linear.output(scaled), linear.output(s.before)  # by head it is another sum of the same terms
    assert np.array_equal(*alike) or (s.head is not None and np.allclose(*alike, rtol=1e-11, atol=1e-11))


def sites_do_not_meet(s: Setting) -> None:
    """Operations on two sites commute, however they are mixed."""
    other = s.draw(SOME_SITE.filter(lambda site: site is not s.site))
    first = s.draw(st.lists(algebra.operations(s.n, s.row, s.site.n_heads), max_size=3))
    second = s.draw(st.lists(algebra.operations(N[other.name], s.row, other.n_heads), max_size=3))
    calls = [(s.name, one) for one in first] + [(other.name, one) for one in second]
    mixed = no_masks()
    order = s.draw(st.permutations([s.name] * len(first) + [other.name] * len(second)))
    waiting = {s.name: iter(first), other.name: iter(second)}
    for name in order:
        mixed = next(waiting[name]).of(mixed, name)
    in_turn = no_masks()
    for name, one in calls:
        in_turn = one.of(in_turn, name)
    for site in (s.site, other):
        assert_same(mixed, in_turn, site, s.row)


LAWS = [
    ablating_is_scaling_by_zero,
    ablating_twice_is_ablating_once,
    ablations_unite_their_components,
    ablations_unite_their_positions,
    keeping_at_two_places_is_keeping_at_both,
    scales_commute_and_multiply,
    keeping_commutes_with_scaling,
    keeping_twice_keeps_what_is_in_both_and_the_last_delta,
    keeping_the_others_and_the_delta_is_ablating,
    given_values_forget_what_was_before,
    heads_together_are_the_whole,
    scaling_by_one_is_nothing_bit_for_bit,
    sites_do_not_meet,
]


@few_and_many(20, 1000)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_of_order_and_union(law: Callable[[Setting], None], examples: int) -> None:
    """From any masks to begin with, unless the law says otherwise."""

    @searching(examples)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        law(Setting(data.draw))

    holds()


def test_orders_that_matter() -> None:
    """What is not a law: the last delta stays, and given values replace all that was before them and nothing after."""
    a, b = (no_masks().keep_only(W_IN.name, 0, delta=d).keep_only(W_IN.name, 0, delta=1 - d) for d in (0.0, 1.0))
    assert a[W_IN.name].d == 1.0 and b[W_IN.name].d == 0.0
    values = torch.full((5,), 0.5)
    a = no_masks().keep_only(W_IN.name, [0, 1]).with_values(W_IN.name, values)
    b = no_masks().with_values(W_IN.name, values).keep_only(W_IN.name, [0, 1])
    assert a[W_IN.name].m.tolist() == [0.5] * 5 and a[W_IN.name].d == 1.0
    assert b[W_IN.name].m.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0] and b[W_IN.name].d == 0.0
