"""Top contexts against a sort over all positions, components made by hand, and every host."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.contexts.top_contexts import TopContexts, top_contexts
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    NoImportanceError,
    NoMatchingSiteError,
    SettingError,
    ShapeError,
)

from ..support.models import BUILDERS, VOCAB, build, decomposition_of, gpt2, plain, tokenizer

W_IN, W_O, W_E = "blocks.0.mlp.W_in", "blocks.1.attn.W_O", "embed.W_E"
CHOSEN = {W_O: [4, 1], W_IN: [2], W_E: slice(0, 2)}


def rows(n: int = 7, length: int = 6, seed: int = 2) -> Tensor:
    return torch.randint(1, VOCAB - 1, (n, length), generator=torch.Generator().manual_seed(seed))


def padded(n: int = 7, length: int = 6, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of several lengths and their mask; padding is token 60."""
    tokens, mask = rows(n, length), torch.ones(n, length, dtype=torch.long)
    for i in range(n):
        gone = i % 3
        at = slice(0, gone) if left else slice(length - gone, length)
        tokens[i, at], mask[i, at] = VOCAB - 1, 0
    return tokens, mask


def with_importance(dec: Decomposition, kind: str = "shared_mlp") -> Decomposition:
    """The same components with a random importance function whose values are neither all 0 nor all 1."""
    factors = {name: (c.V, c.U) for name, c in dec.items()}
    made = Decomposition(factors, dec.sites, dec.fingerprints, ImportanceConfig(kind, hidden=16))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.importance.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.4)
    return made


def by_hand(
    acts: Tensor, g: Tensor | None, mask: Tensor | None, n: int, by: str, distinct: bool
) -> list[tuple[int, int]]:
    """All places, sorted as one list of tuples."""
    places = []
    for row in range(len(acts)):
        for p in range(acts.shape[1]):
            if mask is None or mask[row, p]:
                h = abs(float(acts[row, p]))
                places.append(((-float(g[row, p]), -h) if by == "importance" else (-h,), row, p))
    places.sort()
    kept: list[tuple[int, int]] = []
    for _, row, p in places:
        if not distinct or row not in {r for r, _ in kept}:
            kept.append((row, p))
    return kept[:n]


def places(found: TopContexts, site: str, c: int) -> list[tuple[int, int]]:
    return [(context.row, context.position) for context in found.of(site, c)]


# --- against a sort over everything --------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", BUILDERS)
def test_they_are_the_largest_of_all_positions_on_every_host(host: str) -> None:
    model = build(host)
    dec = decomposition_of(model, [W_IN, W_O, W_E])
    tokens, mask = padded()
    found = top_contexts(model, dec, tokens, CHOSEN, n=9, attention_mask=mask, rows_at_once=3, before=2, after=1)
    parts = [tlpd.component_acts(model, dec, *pair) for pair in zip(tokens.split(3), mask.split(3))]
    assert found.positions == int(mask.sum()) and [own.component for own in found.components] == [4, 1, 2, 0, 1]
    for own in found.components:
        acts = torch.cat([part[own.site] for part in parts])[..., own.component]
        assert places(found, own.site, own.component) == by_hand(acts, None, mask, 9, "activation", False)
        for context in own.contexts:
            assert context.activation == pytest.approx(float(acts[context.row, context.position]), rel=1e-5, abs=1e-7)
            assert context.importance is None
            kept = [p for p in range(context.position - 2, context.position + 2) if 0 <= p < 6 and mask[context.row, p]]
            assert context.tokens == tokens[context.row, kept].tolist() and kept[context.place] == context.position


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("kind", ["shared_mlp", "global_transformer"])
def test_by_importance_ties_go_to_the_larger_activation(kind: str, distinct: bool) -> None:
    model = gpt2()
    dec = with_importance(decomposition_of(model, [W_IN, W_O]), kind)
    tokens, mask = padded()
    found = top_contexts(
        model, dec, tokens, n=12, by="importance", distinct_rows=distinct, attention_mask=mask, rows_at_once=4
    )
    acts, g = tlpd.component_acts(model, dec, tokens, mask), tlpd.causal_importances(model, dec, tokens, mask)
    assert any(len(set(g[name][mask.bool()][:, c].tolist())) < mask.sum() - 5 for name in dec for c in range(5)), "ties"
    for name in dec:
        for c in range(5):
            expected = by_hand(acts[name][..., c], g[name][..., c], mask, 12, "importance", distinct)
            assert places(found, name, c) == expected
            for context in found.of(name, c):
                at = (context.row, context.position, c)
                assert context.importance == pytest.approx(float(g[name][at]), abs=1e-9)
    by_activation = top_contexts(model, dec, tokens, {W_IN: 0}, n=3, distinct_rows=distinct, attention_mask=mask)
    assert places(by_activation, W_IN, 0) == by_hand(acts[W_IN][..., 0], None, mask, 3, "activation", distinct)
    assert all(context.importance is not None for context in by_activation.of(W_IN, 0))


def test_a_sign_leaves_the_other_out() -> None:
    model = gpt2()
    dec, tokens = decomposition_of(model, W_IN), rows()
    acts = tlpd.component_acts(model, dec, tokens)[W_IN][..., 1]
    for sign, factor in (("positive", 1), ("negative", -1)):
        found = top_contexts(model, dec, tokens, {W_IN: 1}, n=100, sign=sign).of(W_IN, 1)
        assert len(found) == int((factor * acts > 0).sum()) < tokens.numel()
        assert all(factor * context.activation > 0 for context in found)
        values = [factor * context.activation for context in found]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(float((factor * acts).max()))


def test_every_form_of_data_gives_the_same() -> None:
    model = gpt2()
    dec, (tokens, mask) = decomposition_of(model, W_IN), padded()
    whole = top_contexts(model, dec, tokens, {W_IN: [0, 3]}, attention_mask=mask)
    pairs = list(zip(tokens.split(2), mask.split(2)))
    forms: list[Any] = [
        {"input_ids": tokens, "attention_mask": mask},
        pairs,
        iter(pairs),
        [{"tokens": t, "attention_mask": m} for t, m in pairs],
        [Batch(t, m) for t, m in pairs],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, mask), batch_size=3),
    ]
    for data in forms:
        found = top_contexts(model, dec, data, {W_IN: [0, 3]}, rows_at_once=2)
        assert found.positions == whole.positions
        for c in (0, 3):
            assert places(found, W_IN, c) == places(whole, W_IN, c)
    bare = top_contexts(model, dec, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens)), {W_IN: 0})
    assert bare.positions == tokens.numel()


def test_left_padding_is_left_out_and_columns_are_those_of_the_row() -> None:
    model = gpt2()
    dec, (tokens, mask) = decomposition_of(model, W_IN), padded(left=True)
    found = top_contexts(model, dec, tokens, {W_IN: 2}, n=100, attention_mask=mask).of(W_IN, 2)
    assert {(context.row, context.position) for context in found} == {tuple(p) for p in mask.nonzero().tolist()}
    assert all(VOCAB - 1 not in context.tokens for context in found)


def test_rows_of_other_lengths_stream_along_and_the_model_as_it_stands_is_read() -> None:
    model = gpt2()
    dec = decomposition_of(model, [W_IN, W_O])
    found = top_contexts(model, dec, [rows(2, 4), rows(3, 9)], {W_O: 0}, n=100)
    assert found.positions == 8 + 27 and max(context.row for context in found.of(W_O, 0)) == 4
    tokens = rows()
    with tlpd.patched(model, dec, dec.masks().ablate(W_IN, [0, 1])):
        patched = top_contexts(model, dec, tokens, {W_O: 0}, n=1).of(W_O, 0)[0]
        acts = tlpd.component_acts(model, dec, tokens)[W_O][..., 0]
    assert abs(patched.activation) == pytest.approx(float(acts.abs().max()))
    assert abs(patched.activation) != pytest.approx(
        abs(top_contexts(model, dec, tokens, {W_O: 0}).of(W_O, 0)[0].activation)
    )


def test_the_unembedding_and_positions_can_be_looked_at() -> None:
    model = gpt2()
    dec, tokens = decomposition_of(model, ["unembed.W_U", "pos_embed.W_pos"]), rows()
    found = top_contexts(model, dec, tokens, {"unembed.W_U": 0, "pos_embed.W_pos": 0}, n=3)
    for site, acts in tlpd.component_acts(model, dec, tokens).items():
        acts = acts.expand(*tokens.shape, -1)[..., 0]
        values = [abs(context.activation) for context in found.of(site, 0)]
        assert values == pytest.approx(acts.abs().flatten().sort(descending=True).values[:3].tolist())


def test_a_patch_at_the_unembedding_leaves_what_is_read_before_it() -> None:
    model = gpt2()
    dec, tokens = decomposition_of(model, [W_IN, "unembed.W_U"]), rows()
    with tlpd.patched(model, dec, dec.masks().ablate("unembed.W_U", 0)):
        patched = top_contexts(model, dec, tokens, {W_IN: 0})
    assert patched == top_contexts(model, dec, tokens, {W_IN: 0})


# --- by hand -------------------------------------------------------------------------------------------------------------
def test_a_component_that_reads_one_row_of_the_embedding_fires_at_that_token() -> None:
    model = gpt2()
    weight = tlpd.site_weight(model, W_E)
    V = torch.zeros(VOCAB, 1, dtype=weight.dtype)
    V[17, 0] = -2.0
    dec = tlpd.from_factors(model, {W_E: (V, weight[17:18])})
    tokens = rows(20)
    tokens[tokens == 17] = 16
    tokens[3, 2] = tokens[11, 0] = tokens[11, 5] = 17
    found = top_contexts(model, dec, tokens, n=4, before=1, after=1, tokenizer=tokenizer(), sign="negative")
    assert places(found, W_E, 0) == [(3, 2), (11, 0), (11, 5)]
    assert [context.activation for context in found.of(W_E, 0)] == [-2.0] * 3
    named = [[f"w{t}" for t in context.tokens] for context in found.of(W_E, 0)]
    assert [context.texts for context in found.of(W_E, 0)] == named
    assert str(found.of(W_E, 0)[1]) == f"[w17] w{tokens[11, 1]}" and "[w17]" in str(found)
    once = top_contexts(model, dec, tokens, n=3, distinct_rows=True)
    assert places(once, W_E, 0) == [(3, 2), (11, 0), (0, 0)] and "[#17]" in str(once)


def test_they_are_kept_as_json(tmp_path) -> None:
    model = gpt2()
    dec = with_importance(decomposition_of(model, W_IN))
    found = top_contexts(model, dec, rows(), {W_IN: [1]}, n=2, tokenizer=tokenizer())
    assert TopContexts.load(found.save(tmp_path / "top.json")) == found
    assert "2" in str(found) and W_IN in str(found)


# --- refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"n": 0}, SettingError),
        ({"before": -1}, SettingError),
        ({"by": "size"}, SettingError),
        ({"sign": "plus"}, SettingError),
        ({"rows_at_once": 0}, SettingError),
        ({"by": "importance"}, NoImportanceError),
        ({"components": {W_IN: 5}}, ComponentIndexError),
        ({"components": {"blocks.7.mlp.W_in": 0}}, NoMatchingSiteError),
        ({"components": {}}, SettingError),
        ({"components": {W_IN: []}}, SettingError),
        ({"components": [1, 2]}, SettingError),
        ({"attention_mask": torch.ones(2, 2, dtype=torch.long)}, ShapeError),
        ({"data": []}, DataError),
        ({"data": rows()[:0]}, DataError),
        ({"data": "some text"}, DataError),
        ({"data": [{"text": "a"}]}, DataError),
        ({"data": 5}, DataError),
        ({"data": rows()[0]}, ShapeError),
        ({"data": ["a", "b"]}, DataError),
        ({"data": [rows()], "attention_mask": torch.ones_like(rows())}, SettingError),
        ({"data": {"tokens": rows(), "attention_mask": rows()}, "attention_mask": rows()}, SettingError),
    ],
)
def test_what_cannot_be_looked_at_is_refused(settings: dict[str, Any], error: type[Exception]) -> None:
    model = gpt2()
    dec = decomposition_of(model, W_IN)
    given = {"data": rows(), "components": {W_IN: [0]}} | settings
    with pytest.raises((error, TypeCheckError) if settings.keys() & {"by", "sign", "components"} else error):
        top_contexts(model, dec, **given)


def test_other_inputs_than_tokens_are_refused_and_other_components_are_not_found() -> None:
    model = plain()
    dec = decomposition_of(model)
    with pytest.raises(DataError, match="whole numbers"):
        top_contexts(model, dec, torch.randn(3, 6, dtype=torch.float64))
    model = gpt2()
    found = top_contexts(model, decomposition_of(model, W_IN), rows(), {W_IN: 0})
    with pytest.raises(ComponentIndexError, match="components="):
        found.of(W_IN, 1)
