"""Rows of anything, read once and in order, for everything that asks a model about rows."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.data.rows import batches_of, rows_to_measure
from tl_paramdecomp.errors import DataError, SettingError

from ..support.models import decomposition_of, gpt2, hooked, tokenizer
from .test_tables import EVEN, RAGGED, ROWS, UNEVEN
from .texts import documents, rows_by_hand

EVEN = {form: data for form, data in EVEN.items() if form != "tensor of 8 bits"}  # which questions refuse
MASK = torch.ones_like(ROWS)
MASK[::2, 4:] = 0


def in_batches():
    import datasets

    data = datasets.Dataset.from_dict({"tokens": ROWS.tolist()})
    return {
        "batches": list(ROWS.split(5)), "iterator of batches": iter(ROWS.split(5)),
        "dicts": [{"input_ids": rows} for rows in ROWS.split(5)],
        "rows": list(ROWS), "lists": ROWS.tolist(), "dataset": data, "stream": data.to_iterable_dataset(num_shards=3),
        "token_batches": tlpd.token_batches(ROWS), "token_batches of a stream": tlpd.token_batches(data.to_iterable_dataset()),
        "loader": torch.utils.data.DataLoader(ROWS, batch_size=5),
        "set": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ROWS), batch_size=5),
    }  # fmt: skip


@pytest.mark.parametrize("form", [*EVEN, *in_batches()])
def test_rows_come_once_and_in_order(form):
    data = (EVEN | in_batches())[form]
    found = list(batches_of(data, 5))
    assert [len(batch.tokens) for batch in found] == [5, 5, 2]
    assert torch.equal(torch.cat([batch.tokens for batch in found]), ROWS)
    assert all(batch.attention_mask is None or batch.attention_mask.all() for batch in found)
    model = gpt2(torch.float32)
    made = decomposition_of(model, "blocks.0.mlp.*", n=3)
    wanted = tlpd.activation_means(model, made, ROWS, rows_at_once=5)
    means = tlpd.activation_means(model, made, (EVEN | in_batches())[form], rows_at_once=5)
    assert all(torch.equal(means[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", UNEVEN)
def test_rows_of_unequal_length_are_padded(form):
    found = rows_to_measure(UNEVEN[form], rows=12)
    assert found.attention_mask.sum(1).tolist() == [len(row) for row in RAGGED]
    assert [row[: len(wanted)].tolist() for row, wanted in zip(found.tokens, RAGGED)] == RAGGED


def test_what_is_measured_on():
    for data in (ROWS, {"tokens": ROWS}, EVEN["encoding"]):
        assert torch.equal(rows_to_measure(data, rows=3).tokens, ROWS), "one tensor is taken whole"
    for data in in_batches().values():
        assert torch.equal(rows_to_measure(data, rows=7).tokens, ROWS[:7])
    uneven = [(ROWS[:4, :3], None), (ROWS[4:8], MASK[4:8])]
    tokens, mask = rows_to_measure(uneven, rows=6)
    assert torch.equal(mask, torch.cat([torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 4), MASK[4:6]])) and tokens.shape == (
        6,
        7,
    )


@pytest.mark.parametrize("default", [True, False])
def test_texts_are_read_by_the_models_tokenizer_and_rule(default):
    model = hooked(d_vocab=61)
    model.tokenizer, model.cfg.default_prepend_bos = tokenizer(), default
    made = decomposition_of(model, "blocks.0.mlp.W_in", n=3)
    wanted = torch.tensor(rows_by_hand(documents(), tokenizer(), model.cfg.n_ctx, 1 if default else None, 2))
    texts = [{"text": text} for text in documents()]
    assert torch.equal(rows_to_measure(texts, rows=9, model=model).tokens, wanted[:9])
    found = tlpd.activation_means(model, made, texts)
    assert torch.allclose(found["blocks.0.mlp.W_in"], tlpd.activation_means(model, made, wanted)["blocks.0.mlp.W_in"])
    late = tlpd.token_batches(texts)
    assert torch.equal(rows_to_measure(late, rows=9, model=model).tokens, wanted[:9]), "batches made for no model"


@pytest.mark.parametrize("data, mask, error, words", [
    ([ROWS], MASK, SettingError, "one tensor of rows"),
    ({"tokens": ROWS, "attention_mask": MASK}, MASK, SettingError, "two attention"),
    ("w3 w4", None, DataError, "given str"), (["w3 w4"], None, DataError, "tokenizer"),
    (lambda step: ROWS, None, DataError, "no end"),
    ({"ids": ROWS}, None, DataError, "'input_ids'"), (3, None, DataError, "given int"),
])  # fmt: skip
def test_what_is_refused(data, mask, error, words):
    with pytest.raises(error, match=words):
        list(batches_of(data, 5, mask))
    with pytest.raises(SettingError, match="at least 1"):
        list(batches_of(ROWS, 0))
    with pytest.raises(SettingError, match="at least 1"):
        rows_to_measure([ROWS], rows=0)


def test_a_mask_beside_rows_of_any_form():
    for data in (ROWS, ROWS.numpy(), {"tokens": ROWS}):
        assert torch.equal(torch.cat([batch.attention_mask for batch in batches_of(data, 5, MASK)]), MASK)
