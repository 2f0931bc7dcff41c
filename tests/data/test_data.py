"""Token batches from every form of data."""

import pytest
import torch

from tl_paramdecomp.data.documents import TextRows
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.errors import DataError


def rows(n=10, length=4):
    return torch.arange(n * length).reshape(n, length)


def test_a_tensor_is_seen_whole_before_any_row_comes_again():
    source = batch_source(rows(), 5, seed=3)
    first = torch.cat([source.batch(0).tokens, source.batch(1).tokens])
    assert sorted(first[:, 0].tolist()) == rows()[:, 0].tolist()
    second = torch.cat([source.batch(2).tokens, source.batch(3).tokens])
    assert sorted(second[:, 0].tolist()) == rows()[:, 0].tolist() and not torch.equal(first, second)


def test_batches_depend_on_seed_and_step_alone():
    a, b = batch_source(rows(), 3, seed=1), batch_source(rows(), 3, seed=1)
    wanted = [a.batch(step).tokens for step in range(9)][7]
    assert torch.equal(b.batch(7).tokens, wanted)
    assert not torch.equal(batch_source(rows(), 3, seed=2).batch(7).tokens, wanted)


def test_a_stream_resumed_at_a_step_gives_what_it_would_have_given():
    batches = [rows()[i : i + 2] for i in range(0, 10, 2)]
    whole = batch_source(batches, 2, seed=0)
    wanted = [whole.batch(step).tokens for step in range(8)][7]
    assert torch.equal(batch_source(batches, 2, seed=0).batch(7).tokens, wanted)


def test_rows_of_unequal_length_are_padded_and_the_padding_masked():
    source = batch_source([torch.tensor([1, 2, 3]), torch.tensor([4])], 2, seed=0)
    tokens, mask = source.batch(0)
    assert tokens.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_dicts_and_datasets():
    import datasets

    mask = torch.ones(10, 4, dtype=torch.long)
    mask[:, 0] = 0
    tokens, found = batch_source({"input_ids": rows(), "attention_mask": mask}, 2, seed=0).batch(0)
    assert tokens.shape == (2, 4) and found[:, 0].sum() == 0
    data = datasets.Dataset.from_dict({"tokens": rows().tolist()})
    assert batch_source(data, 3, seed=0).batch(0).tokens.shape == (3, 4)
    stream = datasets.IterableDataset.from_generator(lambda: ({"input_ids": row.tolist()} for row in rows()))
    assert torch.equal(batch_source(stream, 3, seed=0).batch(0).tokens, rows()[:3])


class Letters:
    """A tokenizer of letters."""

    bos_token_id, eos_token_id, model_max_length = 100, 101, 10**30

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 97 for letter in text]}


def test_text_is_joined_cut_and_begun_with_the_mark():
    found = [row.tolist() for row in TextRows(["abc", {"text": "de"}], Letters(), 4)]
    assert found == [[100, 0, 1, 2], [100, 101, 3, 4]]
    assert batch_source(["abcdef"] * 3, 2, seed=0, tokenizer=Letters(), length=4).batch(0).tokens.shape == (2, 4)


@pytest.mark.parametrize("data, words", [
    (torch.zeros(3), "[rows, pos]"), (torch.zeros(0, 4), "no rows"), ("text", "given str"), (3, "given int"),
    ({"ids": torch.zeros(2, 2)}, "input_ids"), (["some text"], "tokenizer"),
])  # fmt: skip
def test_unusable_data_says_what_was_expected(data, words):
    with pytest.raises(DataError) as caught:
        batch_source(data, 2, seed=0).batch(0)
    assert words in str(caught.value)


def test_a_one_time_iterator_that_ends_says_so():
    source = batch_source(iter([rows()[:2]]), 2, seed=0)
    source.batch(0)
    with pytest.raises(DataError, match="cannot be read again"):
        source.batch(1)


def test_rows_that_belong_together_stay_neighbours():
    rows = torch.arange(12).unsqueeze(1).expand(-1, 3)
    source = batch_source(rows, 4, 0, together=2)
    order = torch.cat([source.batch(step).tokens[:, 0] for step in range(6)])
    assert (order[1::2] == order[::2] + 1).all() and (order[::2] % 2 == 0).all()
    assert sorted(order[:12].tolist()) == list(range(12)) and order[:12].tolist() != list(range(12))
    for few, size in ((rows[:11], 4), (rows, 3)):
        with pytest.raises(DataError, match="together by 2"):
            batch_source(few, size, 0, together=2)
