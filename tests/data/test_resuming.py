"""Every source goes on from a saved state bit for bit, whatever it reads, and says so where the data is not what it was."""

import json
import random

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.data.texts import FORMS, LENGTH, Texts, batches, documents, in_every_form
from tl_paramdecomp.data import files
from tl_paramdecomp.data.documents import TextRows
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.data.streams import items_of, own_copy
from tl_paramdecomp.errors import DataError

from ..support.models import tokenizer


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return in_every_form(tmp_path_factory.mktemp("forms"), documents(), tokenizer())


def written(source):
    """The state as a checkpoint keeps it."""
    text = json.dumps(source.state())
    assert len(text) < 8000, "states are places, not contents"
    return json.loads(text)


def goes_on(make, stops, last):
    """Whether sources restored at these steps give what an uninterrupted one gives."""
    whole = make()
    whole.check()
    wanted = [whole.batch(step).tokens for step in range(last)]
    going = make()
    for stop, until in zip(stops, [*stops[1:], last], strict=True):
        state = written(going)
        going = make()
        going.check()
        going.restore(state)
        assert written(going) == state
        for step in range(stop, until):
            assert torch.equal(going.batch(step).tokens, wanted[step]), (stops, step)
    return wanted


@pytest.mark.parametrize("form", FORMS)
def test_every_form_goes_on_from_anywhere(forms, form):
    data, arguments = forms[form]
    for seed in range(4):
        numbers = random.Random(seed)
        stops = [0, *sorted(numbers.sample(range(1, 90), 3))]
        made = tlpd.token_batches(
            data, tokenizer(), length=LENGTH, shuffle=numbers.choice([0, 7, 40, 1000]), skip=numbers.choice([0, 5]),
            bos=numbers.choice([True, False]), **arguments,
        )  # fmt: skip
        size = numbers.choice([1, 3, 8])
        wanted = goes_on(lambda made=made, size=size, seed=seed: made.source(size, seed), stops, 90)
        assert not torch.equal(wanted[0], wanted[1])


class Marking:
    """A tokenizer of bytes that marks every beginning, so that each cut between pieces is seen."""

    bos_token_id, eos_token_id, model_max_length = 256, 257, 10**30

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [258, *text.encode()] if text else []}


@pytest.mark.parametrize("seed", range(3))
def test_long_documents_go_on_in_the_middle(tmp_path, monkeypatch, seed):
    """Where they are cut does not depend on how much of the file happened to be read ahead."""
    monkeypatch.setattr(files, "PIECE", 150)
    numbers = random.Random(seed)
    for i in range(3):
        parts = ["".join(numbers.choices("ab   \n", k=numbers.randint(1, 400))) for _ in range(9)]
        (tmp_path / f"{i}.txt").write_text("<|>".join(parts))
    for separator in (None, "<|>"):
        made = tlpd.token_batches(tmp_path / "*.txt", Marking(), length=LENGTH, shuffle=5, separator=separator)
        stops = [0, *sorted(numbers.sample(range(1, 300), 12))]
        goes_on(lambda made=made: made.source(2), stops, 300)


def test_rows_of_tokens_are_a_function_of_the_step():
    made = tlpd.token_batches(torch.arange(120).view(12, 10), shuffle=3)
    wanted = goes_on(lambda: made.source(5), [0, 4, 11], 20)
    assert torch.equal(made.source(5).batch(13).tokens, wanted[13])


def test_a_stream_read_backwards_begins_anew(forms):
    source = tlpd.token_batches(forms["parquet"][0], tokenizer(), length=LENGTH, shuffle=9).source(2)
    wanted = [source.batch(step).tokens for step in range(30)]
    assert torch.equal(source.batch(3).tokens, wanted[3]) and torch.equal(source.batch(20).tokens, wanted[20])


def test_going_back_reads_no_more_than_a_window(tmp_path, monkeypatch):
    """Of 400 files, those before the place are not read again."""
    for i in range(400):
        (tmp_path / f"{i:03d}.txt").write_text(documents(1, i)[0])
    made = tlpd.token_batches(tmp_path / "*.txt", tokenizer(), length=LENGTH, shuffle=20)
    source = made.source(4)
    for step in range(100):
        source.batch(step)
    opened, decode = [], files._decoded
    monkeypatch.setattr(
        files, "_decoded", lambda path, raw, byte: (opened.append(int(path.stem)), decode(path, raw, byte))[1]
    )
    state, again = written(source), made.source(4)
    again.restore(state)
    assert (
        0 < len(opened) < 20 + 2 and min(opened) > 50 and torch.equal(again.batch(100).tokens, source.batch(100).tokens)
    )


# --- datasets -----------------------------------------------------------------------------------------------------------
def streams():
    import datasets

    data = datasets.Dataset.from_dict({"text": documents(), "n": list(range(60))})
    stream = data.to_iterable_dataset(num_shards=5)
    return {
        "shuffled by itself": lambda: stream.shuffle(seed=3, buffer_size=10),
        "interleaved": lambda: datasets.interleave_datasets(
            [stream, stream.filter(lambda x: x["n"] % 3 == 0)], probabilities=[0.5, 0.5], seed=1
        ),
        "mapped in batches": lambda: stream.map(lambda x: {"text": x["text"] * 2}, batched=True, batch_size=7,
                                                remove_columns=["n"]),
        "skipped and taken": lambda: stream.skip(5).take(40),
        "shuffled inside": lambda: datasets.concatenate_datasets([stream.shuffle(seed=1, buffer_size=9), stream]).map(
            lambda x: {"text": x["text"]}
        ),
        "concatenated": lambda: datasets.concatenate_datasets([stream, stream]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", streams())
@pytest.mark.parametrize("own_state", [True, False])
def test_streams_of_every_make(kind, own_state, monkeypatch):
    """Also those whose own state is not exact, and where `datasets` keeps none, as its versions before 2.20."""
    import datasets

    if not own_state:
        for name in ("state_dict", "load_state_dict"):
            monkeypatch.delattr(datasets.IterableDataset, name, raising=False)
    data = streams()[kind]()
    made = tlpd.token_batches(data, tokenizer(), length=LENGTH, shuffle=12)
    goes_on(lambda: made.source(3, 1), [0, 9, 23, 61], 70)


def test_a_state_that_does_not_lead_back_is_found_out(monkeypatch):
    """The pass is then read again up to the place, and the rows there are those that were."""
    import datasets

    if not hasattr(datasets.IterableDataset, "load_state_dict"):
        pytest.skip("these datasets keep no state")
    monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", lambda self, state: None)
    made = tlpd.token_batches(streams()["skipped and taken"](), tokenizer(), length=LENGTH, shuffle=12)
    goes_on(lambda: made.source(3, 1), [0, 9, 23, 61], 70)


@pytest.mark.parametrize("kind", ["shuffled by itself", "shuffled inside", "skipped and taken"])
def test_two_readers_of_one_stream_do_not_move_each_other(kind):
    made = tlpd.token_batches(streams()[kind](), tokenizer(), length=LENGTH, shuffle=5)
    alone = batches(made.source(2), 0, 40)
    a, b = made.source(2), made.source(2)
    for step in range(40):
        assert torch.equal(a.batch(step).tokens, alone[step])
        if step % 3:
            b.batch(step)
    state = written(b)
    again = made.source(2)
    again.restore(state)
    assert torch.equal(again.batch(39 + 1).tokens, b.batch(39 + 1).tokens)


def test_a_copy_of_a_stream_keeps_a_place_of_its_own():
    data = streams()["concatenated"]()
    if not hasattr(data, "state_dict"):
        pytest.skip("these datasets keep no state")
    first, second = own_copy(data), own_copy(data)
    read, other = iter(first), iter(second)
    texts = [next(read)["text"] for _ in range(17)]
    for _ in range(3):
        next(other)
    state = first.state_dict()
    third = own_copy(data)
    third.load_state_dict(state)
    assert [*texts, *(x["text"] for x in third)] == [x["text"] for x in data]


# --- the other forms ----------------------------------------------------------------------------------------------------
def rows(n=10, length=4):
    return torch.arange(n * length).reshape(n, length)


class Shuffled:
    """Batches in an order that differs in each pass, as a shuffling loader's."""

    def __init__(self, data, seed):
        self.data, self.numbers = data, random.Random(seed)

    def __iter__(self):
        return iter(self.numbers.sample(self.data, len(self.data)))


def other_forms():
    import datasets

    data = datasets.Dataset.from_dict({"tokens": rows(40).tolist()})
    text = datasets.Dataset.from_dict({"text": documents()})
    loader = {"batch_size": 3, "shuffle": True}
    return {
        "tensor": lambda: rows(),
        "dict": lambda: {"input_ids": rows(), "attention_mask": torch.ones(10, 4, dtype=torch.long)},
        "function": lambda: lambda step: rows() + step,
        "list of batches": lambda: list(rows().split(3)),
        "list of rows": lambda: list(rows()),
        "one-time iterator": lambda: (rows(2) + i for i in range(100)),
        "object": lambda: Shuffled(list(rows().split(2)), 5),
        "loader": lambda: torch.utils.data.DataLoader(rows(), generator=torch.Generator().manual_seed(3), **loader),
        "dataset": lambda: data,
        "stream": lambda: data.to_iterable_dataset(num_shards=3),
        "texts": lambda: documents(),
        "text dataset": lambda: text,
        "text stream": lambda: text.to_iterable_dataset(num_shards=3),
        "text rows": lambda: TextRows(Texts(documents()), tokenizer(), LENGTH),
        "text rows of a stream": lambda: TextRows(text.to_iterable_dataset(num_shards=2), tokenizer(), LENGTH),
    }


@pytest.mark.parametrize("form", other_forms())
def test_every_other_form_goes_on(form):
    """Also where there is no state, and what was used is read again."""
    make = other_forms()[form]
    for seed in range(3):
        stops = [0, *sorted(random.Random(seed).sample(range(1, 60), 3))]
        wanted = goes_on(lambda seed=seed: batch_source(make(), 4, seed, tokenizer(), LENGTH), stops, 60)
        without = batch_source(make(), 4, seed, tokenizer(), LENGTH)
        assert torch.equal(without.batch(stops[1]).tokens, wanted[stops[1]])


def test_texts_are_not_tokenised_again_to_get_to_a_place():
    class Counting:
        bos_token_id, eos_token_id, model_max_length, read = 1, 2, 100, 0

        def __call__(self, text, add_special_tokens):
            type(self).read += 1
            return tokenizer()(text, add_special_tokens=add_special_tokens)

    source = batch_source(documents(), 4, 0, Counting(), LENGTH)
    for step in range(20):
        source.batch(step)
    again, Counting.read = batch_source(documents(), 4, 0, Counting(), LENGTH), 0
    again.restore(written(source))
    assert Counting.read <= 1 and torch.equal(again.batch(20).tokens, source.batch(20).tokens)


# --- other data ---------------------------------------------------------------------------------------------------------
def test_a_state_of_other_data_is_refused(forms):
    data, _ = forms["json lines"]
    source = tlpd.token_batches(data, tokenizer(), length=LENGTH).source(4)
    source.batch(0)
    state = written(source)
    others = {
        "data was": tlpd.token_batches(forms["parquet"][0], tokenizer(), length=LENGTH).source(4),
        "length was 9 and is 8": tlpd.token_batches(data, tokenizer(), length=8).source(4),
        "bos was None and is 1": tlpd.token_batches(data, tokenizer(), length=LENGTH, bos=True).source(4),
        "seed was 0 and is 1": tlpd.token_batches(data, tokenizer(), length=LENGTH).source(4, 1),
        "batch_size was 4 and is 5": tlpd.token_batches(data, tokenizer(), length=LENGTH).source(5),
        "form was 'token_batches' and is 'rows'": batch_source(rows(), 4, 0),
        "is 'stream'": batch_source(list(rows()), 4, 0),
        "is 'function of the step'": batch_source(lambda step: rows(), 4, 0),
    }
    for words, other in others.items():
        with pytest.raises(DataError, match="other data") as caught:
            other.restore(state)
        assert words in str(caught.value)
    state = batch_source(rows(), 4, 0).state()
    for other in (rows() + 1, rows(9), rows().int()):
        with pytest.raises(DataError, match="digest was"):
            batch_source(other, 4, 0).restore(state)


def test_data_that_changed_under_its_name_is_noticed(tmp_path):
    """Same names, same sizes, other words: the rows at the place are not the same."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    made = tlpd.token_batches(path, tokenizer(), length=LENGTH, shuffle=10)
    source = made.source(4)
    for step in range(9):
        source.batch(step)
    state = written(source)
    path.write_text(path.read_text().replace("w4", "w5"))
    with pytest.raises(DataError, match="not those that it saw"):
        made.source(4).restore(state)


def test_a_run_does_not_go_on_with_other_rows(tmp_path):
    from tl_paramdecomp.errors import SettingError

    from ..training.test_fit import fit, tiny_gpt2, tokens

    model = tiny_gpt2()
    fit(model, run_dir=tmp_path, steps=4)
    with pytest.raises(SettingError, match="other data"):
        fit(model, run_dir=tmp_path, steps=4, data=(tokens() + 1) % 31)


def test_a_resumed_run_reads_on(tmp_path, forms):
    """Through `decompose`: stopped and gone on is never stopped."""
    from ..training.test_fit import fit, same, tiny_gpt2
    from ..training.test_resume import stop_once

    (tmp_path / "x.txt").write_text(" ".join(documents(40)))
    model, own = tiny_gpt2(), tokenizer()

    class Few:
        bos_token_id, eos_token_id, model_max_length = 1, 2, 100

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [i % 31 for i in own(text, add_special_tokens=add_special_tokens)["input_ids"]]}

    data = tlpd.token_batches(tmp_path / "x.txt", Few(), length=12, shuffle=20)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data=data, run_dir=tmp_path / "cut", steps=9, log_every=1, callbacks=[stop_once(5)])
    cut = fit(model, data=data, run_dir=tmp_path / "cut", steps=9, log_every=1)
    assert same(cut, fit(model, data=data, steps=9))
    assert not same(cut, fit(model, data=data, steps=9, seed=1))


# --- several processes --------------------------------------------------------------------------------------------------
def test_a_state_serves_any_number_of_processes(forms):
    """Two processes save, three go on: together they see what one would."""
    made = tlpd.token_batches(forms["parquet"][0], tokenizer(), length=LENGTH, shuffle=30)
    alone = batches(made.source(6), 0, 30)
    two = [made.source(6) for _ in range(2)]
    for step in range(13):
        parts = [source.batch(step).rows(slice(3 * rank, 3 * rank + 3)).tokens for rank, source in enumerate(two)]
        assert torch.equal(torch.cat(parts), alone[step])
    states = [written(source) for source in two]
    assert states[0] == states[1]
    three = [made.source(6) for _ in range(3)]
    for source in three:
        source.restore(states[0])
    for step in range(13, 30):
        parts = [source.batch(step).rows(slice(2 * rank, 2 * rank + 2)).tokens for rank, source in enumerate(three)]
        assert torch.equal(torch.cat(parts), alone[step])


def test_items_are_read_the_cheapest_way():
    import datasets

    data = datasets.Dataset.from_dict({"text": documents()})
    kinds = {
        "ListItems": [data, ["a"], ("a",)],
        "StreamedItems": [data.to_iterable_dataset()],
        "PlainItems": [Texts(["a"])],
    }
    for kind, made in kinds.items():
        assert all(type(items_of(thing)).__name__ == kind for thing in made)
