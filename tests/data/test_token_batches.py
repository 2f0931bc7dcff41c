"""`token_batches`: the rows of every form of data are those made by hand, and begin as the model was trained."""

import json
import tracemalloc

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.data import files
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.data.tokenizer import row_tokenizer
from tl_paramdecomp.errors import DataError, SettingError

from ..support.hosts import assets
from ..support.models import bridge, gpt2, hooked, tokenizer
from ..support.task_tokenizers import bpe
from .texts import FORMS, LENGTH, batches, documents, in_every_form, rows_by_hand

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return in_every_form(tmp_path_factory.mktemp("forms"), documents(), tokenizer())


def by_hand(texts=None, bos=None, length=LENGTH):
    return rows_by_hand(documents() if texts is None else texts, tokenizer(), length, bos, EOS)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_made_by_hand(forms, form, bos):
    data, arguments = forms[form]
    wanted = by_hand(bos=BOS if bos else None)
    source = tlpd.token_batches(data, tokenizer(), length=LENGTH, shuffle=0, bos=bos, **arguments).source(4)
    passes = 2 * len(wanted) // 4 + 2
    found = batches(source, 0, passes).flatten(0, 1)
    assert found.dtype == torch.int64 and found.tolist() == (wanted * 3)[: len(found)]


@pytest.mark.parametrize("form", ["text files", "stream in shards", "parquet", "records"])
def test_a_stream_is_shuffled_within_windows(forms, form):
    data, arguments = forms[form]
    wanted = by_hand()
    n = len(wanted)
    made = tlpd.token_batches(data, tokenizer(), length=LENGTH, shuffle=50, **arguments)
    found = batches(made.source(1, seed=3), 0, 2 * n).flatten(0, 1).tolist()
    assert found != batches(made.source(1, seed=4), 0, 2 * n).flatten(0, 1).tolist()
    for begin in (0, n):
        one = found[begin : begin + n]
        for place in range(0, n, 50):
            window = one[place : place + 50]
            assert sorted(window) == sorted(wanted[place : place + 50]) and window != wanted[place : place + 50]
    assert found[:n] != found[n:], "each pass has its own order"


def test_names_with_signs_of_globs(tmp_path):
    import datasets

    folder = tmp_path / "some [1] files*"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": documents()}).to_parquet(folder / "x[2].parquet")
    (folder / "x[2].jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    for name in ("x[2].parquet", "x[2].jsonl"):
        made = tlpd.token_batches(str(folder / name), tokenizer(), length=LENGTH, shuffle=0)
        assert made.first_rows(50).tokens.tolist() == by_hand()[:50]


def test_a_seed_of_its_own_goes_before_the_runs(forms):
    data, arguments = forms["json lines"]
    made = [tlpd.token_batches(data, tokenizer(), length=LENGTH, seed=seed, **arguments) for seed in (3, None)]
    first = [[m.source(4, seed).batch(0).tokens for seed in (3, 4)] for m in made]
    assert torch.equal(first[0][0], first[0][1]) and torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[1][0], first[1][1])


# --- tokens -------------------------------------------------------------------------------------------------------------
def test_one_long_line_of_tokens():
    line = torch.randint(3, 60, (1000,), generator=torch.Generator().manual_seed(0))
    for kind in (line, line.to(torch.int32), line.numpy(), line.to(torch.uint8)):
        source = tlpd.token_batches(kind, length=8, shuffle=0).source(5)
        assert batches(source, 0, 25).flatten().tolist() == line.tolist()
    source = tlpd.token_batches(line, tokenizer(), length=8, shuffle=0, bos=True).source(71)
    tokens = source.batch(0).tokens
    assert (tokens[:, 0] == BOS).all() and tokens[:, 1:].flatten().tolist() == line[: 71 * 7].tolist()
    line[14] = BOS  # where the third row is cut
    third = tlpd.token_batches(line, tokenizer(), length=8, shuffle=0, bos=True).first_rows(3).tokens[2]
    assert third.tolist() == [BOS, *line[14:21].tolist()]


def test_rows_of_tokens_are_rows_already():
    rows = torch.arange(120).view(12, 10)
    in_order = tlpd.token_batches(rows, shuffle=0).source(5)
    assert torch.equal(batches(in_order, 0, 12).flatten(0, 1), rows.repeat(5, 1))
    assert torch.equal(tlpd.token_batches(rows, length=6, shuffle=0).first_rows(12).tokens, rows[:, :6])
    begun = tlpd.token_batches(rows % 60, tokenizer(), length=10, shuffle=0, bos=True).first_rows(12).tokens
    assert (begun[:, 0] == BOS).all() and torch.equal(begun[1:, 1:], rows[1:, :9] % 60)
    marked = torch.cat([torch.full((12, 1), BOS), rows % 60], 1)
    assert torch.equal(tlpd.token_batches(marked, tokenizer(), shuffle=0, bos=True).first_rows(12).tokens, marked)
    as_they_are = tlpd.token_batches(rows, bpe(bos_by_itself=True), shuffle=0)
    assert torch.equal(as_they_are.first_rows(12).tokens, rows) and as_they_are.info["bos"] is None
    shuffled = batches(tlpd.token_batches(rows, shuffle=2).source(4), 0, 6).flatten(0, 1)
    assert all(sorted(part[:, 0].tolist()) == rows[:, 0].tolist() for part in shuffled.split(12))
    assert not torch.equal(*shuffled.split(12)) and not torch.equal(shuffled[:12], rows)
    joined = tlpd.token_batches(rows % 60, tokenizer(), length=5, join=True, shuffle=0, bos=False).first_rows(20).tokens
    line = [token for row in (rows % 60).tolist() for token in (*row, EOS)]
    assert joined.flatten().tolist() == line[:100]


@pytest.mark.parametrize("streamed", [True, False])
def test_rows_of_a_token_column_and_their_padding(streamed):
    import datasets

    mask = torch.ones(9, 6, dtype=torch.long)
    mask[::2, 3:] = 0
    rows = torch.randint(3, 60, (9, 6), generator=torch.Generator().manual_seed(1))
    data = datasets.Dataset.from_dict(
        {"n": list(range(9)), "input_ids": rows.tolist(), "attention_mask": mask.tolist()}
    )
    data = data.to_iterable_dataset() if streamed else data
    tokens, found = tlpd.token_batches(data, shuffle=0).source(3).batch(1)
    assert torch.equal(tokens, rows[3:6]) and torch.equal(found, mask[3:6])
    tokens, found = tlpd.token_batches(data, tokenizer(), length=5, bos=True, shuffle=0).source(3).batch(0)
    assert torch.equal(tokens[:, 1:], rows[:3, :4]) and torch.equal(found[:, 1:], mask[:3, :4])
    assert found[:, 0].all()
    named = tlpd.token_batches(data.select_columns(["n", "input_ids"]), column="input_ids", shuffle=0).source(3)
    assert torch.equal(named.batch(2).tokens, rows[6:]) and named.batch(2).attention_mask is None


# --- what is used of it -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["text files", "dataset of tokens, joined", "tensor", "dataset of rows"])
def test_rows_that_are_left_out_are_the_first(forms, form):
    import datasets

    rows = torch.arange(60 * LENGTH).view(60, LENGTH) % 50 + 3
    own = {"tensor": (rows, {}), "dataset of rows": (datasets.Dataset.from_dict({"tokens": rows.tolist()}), {})}
    data, arguments = (forms | own)[form]
    made = tlpd.token_batches(data, tokenizer(), length=LENGTH, skip=7, **arguments)
    held_out = made.first_rows(7).tokens.tolist()
    wanted = rows.tolist() if form in own else by_hand()
    assert held_out == wanted[:7]
    n = len(wanted) - 7
    found = batches(made.source(1), 0, 2 * n).flatten(0, 1).tolist()
    assert sorted(found[:n]) == sorted(found[n:]) == sorted(wanted[7:])


@pytest.mark.parametrize("form", ["json lines", "tensor"])
def test_iterating_reads_the_data_once(forms, form):
    rows = torch.arange(60 * LENGTH).view(60, LENGTH) % 50 + 3
    data, wanted = (rows, rows.tolist()) if form == "tensor" else (forms[form][0], by_hand())
    made = tlpd.token_batches(data, tokenizer(), length=LENGTH, batch_size=7, shuffle=0)
    for _ in range(2):
        found = [batch.tokens for batch in made]
        assert torch.cat(found).tolist() == wanted
        assert [len(tokens) for tokens in found[:-1]] == [7] * (len(found) - 1) and 0 < len(found[-1]) <= 7


def test_it_is_a_source_itself(forms):
    made = tlpd.token_batches(forms["parquet"][0], tokenizer(), length=LENGTH, batch_size=3, seed=5)
    other = made.source(3, 0)
    made.check()
    assert all(torch.equal(made.batch(step).tokens, other.batch(step).tokens) for step in range(50))
    assert made.state() == other.state()
    again = tlpd.token_batches(forms["parquet"][0], tokenizer(), length=LENGTH, batch_size=3, seed=5)
    again.restore(made.state())
    assert torch.equal(again.batch(50).tokens, other.batch(50).tokens)


def test_decompose_evaluate_and_tuning_take_it(forms, tmp_path):
    model, wanted = gpt2(dtype=torch.float32), by_hand()
    method = tlpd.SPD(n_components=4)
    dec = []
    rows = tlpd.token_batches(forms["dataset"][0], tokenizer(), length=LENGTH, shuffle=0)
    for data, run_dir in ((rows, tmp_path), (list(torch.tensor(wanted).split(4)), None)):
        dec.append(tlpd.decompose(model, "blocks.0.mlp.W_in", method, data, 5, 4, run_dir=run_dir, progress=False))
    assert all(torch.equal(x, y) for x, y in zip(*(d.state_dict().values() for d in dec), strict=True))
    told = dec[0].info["run"]["data"]
    assert (told["bos"], told["eos"], told["length"]) == (None, EOS, LENGTH) and "puts none" in told["bos_because"]
    protocol = tlpd.EvaluationConfig(restarts=1, ladder=(1,), ablated=0, by_site=False)
    found = [
        tlpd.evaluate(model, dec[0], data, rows=20, protocol=protocol, progress=False).headline
        for data in (rows, torch.tensor(wanted[:20]))
    ]
    assert found[0] == found[1]


def test_evaluation_takes_the_first_rows_of_batches_and_their_padding():
    import datasets

    model = gpt2(dtype=torch.float32)
    dec = tlpd.decompose(model, "blocks.0.mlp.W_in", tlpd.SPD(n_components=4), None, 0, progress=False)
    rows = torch.randint(3, 60, (9, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(9, 12, dtype=torch.long)
    mask[::2, 7:] = 0
    data = datasets.Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": mask.tolist()})
    short = datasets.Dataset.from_dict(
        {"input_ids": [row[keep == 1].tolist() for row, keep in zip(rows, mask, strict=True)]}
    )
    protocol = tlpd.EvaluationConfig(restarts=1, ladder=(1,), ablated=0, by_site=False)
    wanted = tlpd.evaluate(model, dec, rows[:7], attention_mask=mask[:7], protocol=protocol, progress=False).headline
    for one in (data, short):
        made = tlpd.token_batches(one, shuffle=0, batch_size=4)
        found = tlpd.evaluate(model, dec, made, rows=7, protocol=protocol, progress=False)
        assert found.rows == 7 and found.headline == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    with pytest.raises(SettingError, match="rows must be at least 1"):
        tlpd.evaluate(model, dec, made, rows=0)
    with pytest.raises(DataError, match="gives no batch"):
        tlpd.evaluate(model, dec, [])


def test_a_comparison_knows_its_rows_again(forms):
    from tl_paramdecomp.experiments.compare import _digest

    made = [
        tlpd.token_batches(forms[form][0], tokenizer(), length=LENGTH) for form in ("parquet", "parquet", "dataset")
    ]
    assert _digest(made[0]) == _digest(made[1]) != _digest(made[2])


def test_neighbours_stay_neighbours(forms):
    wanted = by_hand()
    source = batch_source(
        tlpd.token_batches(forms["records"][0], tokenizer(), length=LENGTH, shuffle=21), 4, 0, together=2
    )
    found = batches(source, 0, len(wanted) // 4 * 2).flatten(0, 1).tolist()
    places = [wanted.index(row) for row in found]
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(places[::2], places[1::2], strict=True))
    assert places[: len(places) // 2] != sorted(places[: len(places) // 2])


# --- long files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("separator", [None, "<|>"])
def test_a_long_document_comes_in_pieces(tmp_path, monkeypatch, separator):
    """Cut at line ends, its lines are the same tokens; the end token comes once."""
    monkeypatch.setattr(files, "PIECE", 200)
    texts = [text.replace(" w7", "\nw7") for text in documents(20)]
    long = ["\n".join(texts), texts[3], "\n".join(texts[5:])]
    path = tmp_path / "long.txt"
    path.write_text((separator or "").join(long) if separator else long[0], encoding="utf-8")
    wanted = by_hand(long if separator else long[:1])
    assert len(path.read_text()) > 2000
    made = tlpd.token_batches(path, tokenizer(), length=LENGTH, shuffle=0, separator=separator)
    assert torch.cat([batch.tokens for batch in made]).tolist() == wanted


def test_pieces_end_with_whole_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 16)
    text = "añ漢😀" * 37 + "end"
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    pieces = list(files.TextFiles([tmp_path / "x.txt"]))
    assert "".join(piece.text for piece in pieces) == text and len(pieces) > 10
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_line_ends_of_any_kind_are_one(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"w3\r\nw4\rw5\nw6")
    assert next(iter(files.TextFiles([tmp_path / "x.txt"]))).text == "w3\nw4\nw5\nw6"


class Bytes:
    """A tokenizer that costs no time."""

    bos_token_id, eos_token_id, model_max_length = 256, 257, 10**30

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("form", ["text", "parquet"])
def test_memory_stays_flat(tmp_path, monkeypatch, form):
    """Over a file many times as long as the pieces and windows of it that are held at once."""
    import datasets

    monkeypatch.setattr(files, "PIECE", 1 << 14)
    texts = documents(4000)
    if form == "text":
        path = tmp_path / "long.txt"
        path.write_text("\n".join(texts))
    else:
        path = tmp_path / "long.parquet"
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path, batch_size=50)
    source = tlpd.token_batches(path, Bytes(), length=64, shuffle=100).source(16)
    source.batch(0)
    rows, peaks = sum(len(text) + 1 for text in texts) // 63, []
    tracemalloc.start()
    try:
        for part in range(4):
            tracemalloc.reset_peak()
            for step in range(1 + part * rows // 80, 1 + (part + 1) * rows // 80):
                source.batch(step)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert source.state()["pass"] == 0 and source.state()["window"]["number"] * 100 > 0.7 * rows
    assert max(peaks[1:]) < 1.1 * peaks[0] + 100_000 and max(peaks) < 2_000_000, peaks


# --- how rows begin -----------------------------------------------------------------------------------------------------
def begun(made, n=3):
    return made.first_rows(n).tokens[:, 0].tolist()


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_llamas_own_tokenizers_put_the_mark_in_front(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets() / "models" / name
    text = assets() / "text" / "tinystories_sample.txt"
    own, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    made = tlpd.token_batches(text, model, tokenizer=own, length=64, shuffle=0)
    assert made.info["bos"] == 1 and made.info["eos"] == 2
    wanted = rows_by_hand([text.read_text()], own, 64, own.bos_token_id, own.eos_token_id)
    assert torch.cat([batch.tokens for batch in made]).tolist() == wanted
    assert tlpd.token_batches(text, own, length=64, bos=False).info["bos"] is None


def test_micro_gpt2_was_trained_with_the_mark(tmp_path):
    (tmp_path / "x.txt").write_text("the cat saw mary . then mary went to the store . " * 20)
    model = tlpd.load_micro_gpt2("transformers")
    for who in (model, tlpd.micro_gpt2_tokenizer()):
        made = tlpd.token_batches(tmp_path / "x.txt", who, length=16)
        assert made.info["bos_because"] == "micro-gpt2 was trained so" and begun(made) == [0] * 3
    late = tlpd.token_batches(tmp_path / "x.txt", length=16).source(4, model=model)
    assert late.batch(0).tokens[:, 0].tolist() == [0] * 4


def test_a_tokenizer_that_puts_none_in_front(tmp_path):
    (tmp_path / "x.txt").write_text("Mary went to the store. " * 40)
    for own, first in ((bpe(), False), (bpe(bos_by_itself=True), True)):
        made = tlpd.token_batches(tmp_path / "x.txt", own, length=16)
        assert (made.info["bos"] == own.bos_token_id) == first and ("none" in made.info["bos_because"]) != first
        assert (begun(made) == [own.bos_token_id] * 3) == first


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("host", [hooked, bridge])
def test_transformer_lens_says_whether_it_puts_the_mark_in_front(forms, host, default):
    model = host()
    model.tokenizer, model.cfg.default_prepend_bos = tokenizer(), default
    made = tlpd.token_batches(forms["dataset"][0], model, length=LENGTH)
    assert made.info["bos"] == (BOS if default else None) and "default_prepend_bos" in made.info["bos_because"]
    late = tlpd.token_batches(forms["dataset"][0], length=LENGTH)
    assert late.source(4, model=model).info["bos"] == (BOS if default else None)
    assert str(default) in repr(made)


def test_rows_are_as_long_as_the_model_reads(forms):
    assert tlpd.token_batches(forms["dataset"][0], gpt2(), tokenizer=tokenizer()).info["length"] == 32
    assert tlpd.token_batches(forms["dataset"][0], tokenizer(), bos=False).info["length"] == 1024
    with pytest.raises(SettingError, match="reads 32 positions; given length=33"):
        tlpd.token_batches(forms["dataset"][0], gpt2(), tokenizer=tokenizer(), length=33)


def test_rules_of_an_adapter_are_those_of_its_model():
    from tl_paramdecomp.adapters import adapt

    model = gpt2()
    assert row_tokenizer(adapt(model), tokenizer()).n_vocab == row_tokenizer(model, tokenizer()).n_vocab == 61
    assert row_tokenizer(torch.nn.Sequential(torch.nn.Linear(3, 3))).n_vocab is None


def test_data_without_a_model_waits_for_one(forms):
    made = tlpd.token_batches(forms["dataset"][0], length=LENGTH, shuffle=0)
    with pytest.raises(DataError, match="needs a tokenizer"):
        made.source()
    assert made.source(3, model=gpt2(), tokenizer=tokenizer()).batch(0).tokens.tolist() == by_hand()[:3]


# --- datasets by name -----------------------------------------------------------------------------------------------------
def test_a_dataset_of_the_hub_is_opened_as_asked(monkeypatch):
    """Name, configuration, split and streaming reach `datasets`, and end in what the run remembers."""
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split, streaming):
        asked.append((path, name, split, streaming))
        data = datasets.Dataset.from_dict({"text": documents()})
        return data.to_iterable_dataset(num_shards=2) if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    streamed = tlpd.token_batches("some/stories", tokenizer(), length=LENGTH, shuffle=0)
    whole = tlpd.token_batches("some/stories", tokenizer(), length=LENGTH, name="small", split="test", streaming=False)
    assert asked == [("some/stories", None, "train", True), ("some/stories", "small", "test", False)]
    assert streamed.first_rows(9).tokens.tolist() == whole.first_rows(9).tokens.tolist() == by_hand()[:9]
    told = whole.info["data"]
    assert (told["dataset"], told["name"], told["split"]) == ("some/stories", "small", "test")
    assert streamed.info["data"] != told


@pytest.mark.parametrize("streaming", [True, False])
def test_folders_with_datasets(tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    data = datasets.Dataset.from_dict({"text": documents()})
    data.to_parquet(tmp_path / "files" / "train.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select(range(9))}).save_to_disk(tmp_path / "splits")
    for folder in ("files", "saved", "splits"):
        made = tlpd.token_batches(tmp_path / folder, tokenizer(), length=LENGTH, shuffle=0, streaming=streaming)
        assert torch.cat([batch.tokens for batch in made]).tolist() == by_hand(), folder
    few = tlpd.token_batches(tmp_path / "splits", tokenizer(), length=LENGTH, shuffle=0, split="test")
    assert torch.cat([batch.tokens for batch in few]).tolist() == by_hand(documents()[:9])
