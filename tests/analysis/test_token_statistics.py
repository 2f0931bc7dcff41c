"""Token statistics against counting by hand, components made by hand, and every host."""

import math
from collections import Counter

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.contexts.token_statistics import KINDS, TokenStatistics, token_statistics
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    DecompositionFileError,
    NoImportanceError,
    SettingError,
)

from ..support.models import BUILDERS, VOCAB, build, decomposition_of, gpt2, logits, tokenizer
from .test_top_contexts import CHOSEN, W_E, W_IN, W_O, padded, rows, with_importance


def few(n: int = 9, length: int = 6, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of few different tokens, so that they repeat, and their mask."""
    tokens, mask = padded(n, length, left)
    return torch.where(mask.bool(), tokens % 7 + 1, tokens), mask


def counted(active: Tensor, tokens: Tensor, mask: Tensor, predicted: Tensor, kind: str) -> tuple[Counter, Counter]:
    """Counts where it is active, and in all, position by position."""
    own, total = Counter(), Counter()
    for row in range(len(tokens)):
        for p in range(tokens.shape[1]):
            if not mask[row, p]:
                continue
            if kind == "following":
                followed = p + 1 < tokens.shape[1] and mask[row, p + 1]
                here = [int(tokens[row, p + 1])] if followed else []
            else:
                here = [int(tokens[row, p])] if kind == "input" else predicted[row, p].tolist()
            total.update(here)
            if active[row, p]:
                own.update(here)
    return own, total


def check(
    found: TokenStatistics, site: str, c: int, active: Tensor, tokens: Tensor, mask: Tensor, predicted: Tensor
) -> None:
    """One component's rankings against counts by hand, with min_count 2."""
    component = found.of(site, c)
    assert component.active == int((active & mask.bool()).sum())
    for kind in KINDS:
        own, total = counted(active, tokens, mask, predicted, kind)
        expected = [
            (token, n, total[token], math.log(n / own.total() / (total[token] / total.total())))
            for token, n in own.items()
            if n >= 2
        ]
        listed = getattr(component, kind)
        assert sorted((t.token, t.active, t.total) for t in listed) == sorted(e[:3] for e in expected)
        pmi = {e[0]: e[3] for e in expected}
        assert all(t.pmi == pytest.approx(pmi[t.token], abs=1e-9) for t in listed)
        assert listed == sorted(listed, key=lambda t: (-t.pmi, -t.active, t.token))


@pytest.mark.parametrize("host", BUILDERS)
def test_by_activation_on_every_host(host: str) -> None:
    """The top tenth by absolute value: 5 of 45 positions."""
    model = build(host)
    dec, (tokens, mask) = decomposition_of(model, [W_IN, W_O, W_E]), few()
    found = token_statistics(
        model, dec, tokens, CHOSEN, n=VOCAB, quantile=0.9, predictions=2, attention_mask=mask, rows_at_once=9
    )
    predicted = logits(model, tokens, attention_mask=mask).topk(2, dim=-1).indices
    assert found.active_by == "activation" and found.positions == int(mask.sum()) == 45
    for own in found.components:
        acts = tlpd.component_acts(model, dec, tokens, mask)[own.site][..., own.component].abs()
        least = acts[mask.bool()].sort(descending=True).values[4]  # the fifth of 45
        assert own.threshold == pytest.approx(float(least), rel=1e-6) and own.active >= 5
        check(found, own.site, own.component, acts >= least, tokens, mask, predicted)


@pytest.mark.parametrize("left", [False, True])
def test_by_importance_and_over_batches(left: bool) -> None:
    model = gpt2()
    dec, (tokens, mask) = with_importance(decomposition_of(model, [W_IN, W_O])), few(left=left)
    found = token_statistics(model, dec, tokens, n=VOCAB, threshold=0.3, attention_mask=mask, rows_at_once=2)
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)  # transformers would count the padding, too
    predicted = logits(model, tokens, attention_mask=mask, position_ids=places).topk(1, dim=-1).indices
    g = tlpd.causal_importances(model, dec, tokens, mask)
    assert found.active_by == "importance" and len(found.components) == 10
    for own in found.components:
        assert own.threshold == 0.3
        check(found, own.site, own.component, g[own.site][..., own.component] > 0.3, tokens, mask, predicted)
    assert any(0 < own.active < 45 and own.input and own.following and own.predicted for own in found.components)
    pairs = list(zip(tokens.split(4), mask.split(4)))
    assert token_statistics(model, dec, iter(pairs), n=VOCAB, threshold=0.3) == found
    by_activation = [
        token_statistics(model, dec, data, n=VOCAB, active="activation", quantile=0.8, predictions=0)
        for data in (iter(pairs), {"tokens": tokens, "attention_mask": mask})
    ]
    assert by_activation[0].components[3].active == by_activation[1].components[3].active == 9
    assert [c.input for c in by_activation[0].components] == [c.input for c in by_activation[1].components]
    assert all(not c.predicted for c in by_activation[0].components)


def test_a_component_that_reads_one_row_of_the_embedding_goes_with_that_token() -> None:
    """Token 5 stands at 3 of 24 positions, always before token 6: PMI log 8, and log(20 / 3) over the 20 that are followed."""
    model = gpt2()
    weight = tlpd.site_weight(model, W_E)
    V = torch.zeros(VOCAB, 2, dtype=weight.dtype)
    V[5, 0] = 1.0
    dec = tlpd.from_factors(model, {W_E: (V, weight[5:7])})
    tokens = torch.arange(10, 34).view(4, 6)
    for row, p in ((0, 1), (2, 0), (3, 4)):
        tokens[row, p], tokens[row, p + 1] = 5, 6
    found = token_statistics(model, dec, tokens, quantile=0.5, min_count=1, tokenizer=tokenizer())
    own = found.of(W_E, 0)
    assert own.active == 3 and [(t.token, t.text, t.active, t.total) for t in own.input] == [(5, "w5", 3, 3)]
    assert own.input[0].pmi == pytest.approx(math.log(8))
    assert [(t.token, t.active, t.total) for t in own.following] == [(6, 3, 3)]
    assert own.following[0].pmi == pytest.approx(math.log(20 / 3))
    assert found.of(W_E, 1).active == 0 and not found.of(W_E, 1).input
    text = str(found)
    assert "'w5'" in text and "following" in text and "+2.08" in text and "3 of 24" in text
    with pytest.raises(ComponentIndexError, match="components="):
        found.of(W_E, 2)


def test_counts_rank_otherwise_than_pmi() -> None:
    model = gpt2()
    dec, (tokens, mask) = decomposition_of(model, W_IN), few(30)
    ranked = {
        by: token_statistics(
            model, dec, tokens, {W_IN: 0}, quantile=0.5, rank_by=by, attention_mask=mask, min_count=3
        ).of(W_IN, 0)
        for by in ("pmi", "count")
    }
    counts = [t.active for t in ranked["count"].input]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 3
    assert {t.token for t in ranked["pmi"].input} == {t.token for t in ranked["count"].input}
    assert [t.token for t in ranked["pmi"].input] != [t.token for t in ranked["count"].input]


def test_they_are_kept_as_json(tmp_path) -> None:
    model = gpt2()
    found = token_statistics(model, decomposition_of(model, W_IN), rows(), quantile=0.5, tokenizer=tokenizer())
    assert TokenStatistics.load(found.save(tmp_path / "tokens.json")) == found
    (tmp_path / "other.json").write_text('{"components": [{}]}')
    with pytest.raises(DecompositionFileError, match="token statistics"):
        TokenStatistics.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"min_count": 0},
        {"predictions": -1},
        {"quantile": 1.0},
        {"quantile": -0.1},
        {"rank_by": "x"},
        {"active": "x"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict) -> None:
    model = gpt2()
    dec = decomposition_of(model, W_IN)
    with pytest.raises((SettingError, TypeCheckError) if settings.keys() & {"rank_by", "active"} else SettingError):
        token_statistics(model, dec, rows(), **settings)


def test_importance_needs_a_function_and_rows_are_needed() -> None:
    model = gpt2()
    dec = decomposition_of(model, W_IN)
    with pytest.raises(NoImportanceError, match="active='activation'"):
        token_statistics(model, dec, rows(), active="importance")
    with pytest.raises(DataError, match="no token rows"):
        token_statistics(model, dec, iter([]))
