"""Data that cannot be used says so before a run begins: what was found, and what to try."""

import json

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.data import files
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.errors import DataError, SettingError

from ..support.hosts import assets
from ..support.models import gpt2, tokenizer
from ..support.task_tokenizers import bpe, whole_words
from .texts import documents

WORDS = "w3 w4 w5 w6 w7 w8 w9\n" * 30


def refused(words, data, model=None, **arguments):
    """Nothing is trained, and the message says all of this."""
    with pytest.raises((DataError, SettingError)) as caught:
        made = tlpd.token_batches(data, model, **({"length": 8} | arguments))
        made.source().check()
    assert isinstance(caught.value, ValueError)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(caught.value), str(caught.value)


def file(tmp_path, content, name="x.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# --- what there is not ----------------------------------------------------------------------------------------------------
def test_a_dataset_that_cannot_be_reached():
    refused(
        ["'roneneldan/TinyStories'", "network", "HF_HUB_OFFLINE", "local files"], "roneneldan/TinyStories", tokenizer()
    )


def test_the_network_that_breaks_down_on_the_way(monkeypatch):
    import datasets

    def breaking():
        yield from ({"text": text} for text in documents(5))
        raise ConnectionError("the line is dead")

    stream = datasets.IterableDataset.from_generator(breaking)
    source = tlpd.token_batches(stream, tokenizer(), length=4, shuffle=0).source(2)
    with pytest.raises(DataError, match="failed after 5 items .*the line is dead.*goes on from its checkpoint"):
        source.check()


@pytest.mark.parametrize("error, words", [
    (ValueError("Unknown split 'tran'. Should be one of ['train', 'test']"), ["one of ['train', 'test']", "split='train'"]),
    (ValueError("BuilderConfig 'x' not found. Available: ['small']"), ["Available: ['small']", "name='x'"]),
    (FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), ["doesn't exist", "name is right"]),
])  # fmt: skip
def test_what_the_hub_says(monkeypatch, error, words):
    import datasets

    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused(["'a/b'", *words], "a/b", tokenizer(), name="x")


# --- columns ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["dataset", "stream", "generator", "jsonl", "json", "parquet"])
def test_unknown_columns_name_the_nearest(tmp_path, form):
    import datasets

    records = [{"my_text": text, "number": i, "other": "w3"} for i, text in enumerate(documents(9))]
    data = datasets.Dataset.from_list(records)
    data.to_parquet(tmp_path / "x.parquet")
    forms = {
        "dataset": data, "stream": data.to_iterable_dataset(), "parquet": tmp_path / "x.parquet",
        "generator": datasets.IterableDataset.from_generator(lambda: iter(records)),
        "jsonl": file(tmp_path, lines(*records), "x.jsonl"), "json": file(tmp_path, json.dumps(records), "x.json"),
    }  # fmt: skip
    refused(["no column 'my_txt'", "'my_text'", "my_text, number, other"], forms[form], tokenizer(), column="my_txt")
    refused(["columns my_text, number, other", "column=..."], forms[form], tokenizer())
    refused("int where text or a list", forms[form], tokenizer(), column="number")


# --- bytes ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("before", [0, 7, 5_000, 3_000_000])
def test_bytes_that_are_no_utf_8(tmp_path, name, before):
    """The byte's place is told, however far it is behind the first batch."""
    good = ("w3 é 漢\n" if name == "x.txt" else '{"text": "w3 é 漢"}\n').encode()
    start = (good * (before // len(good) + 1))[: before - before % len(good)]
    path = file(tmp_path, start + b"caf\xe9 noir\n" + good * 5, name)
    refused([name, f"byte {len(start) + 3} (0xe9)", "UTF-8"], path, tokenizer())


def test_bytes_behind_a_character_that_two_reads_share(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 16)
    for before in range(14, 20):
        refused(f"byte {2 * before + 1} (0xff)", file(tmp_path, b"w" + "é".encode() * before + b"\xff"), tokenizer())


def test_what_is_too_far_on_to_be_looked_at_first_is_found_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHECKED", 100)
    for name, good in (("x.txt", WORDS), ("x.jsonl", lines({"text": WORDS}) * 3)):
        path = file(tmp_path, good.encode() + b"\xff\n", name)
        with pytest.raises(DataError, match=rf"byte {len(good.encode())} \(0xff\)"):
            list(tlpd.token_batches(path, tokenizer(), length=8, shuffle=0))


# --- tokenizers and vocabularies --------------------------------------------------------------------------------------------
def test_text_without_a_tokenizer(tmp_path):
    refused(["x.txt is text", "tokenizer=..."], file(tmp_path, WORDS))
    refused("needs a tokenizer", file(tmp_path, WORDS), gpt2())
    with pytest.raises(DataError, match="needs a tokenizer"):
        tlpd.decompose(
            gpt2(), "blocks.0.mlp.W_in", tlpd.SPD(n_components=2), tlpd.token_batches(file(tmp_path, WORDS)), 1
        )
    from tokenizers import Tokenizer, models

    refused("PreTrainedTokenizerFast", file(tmp_path, WORDS), tokenizer=Tokenizer(models.BPE()))


def test_a_tokenizer_of_another_model(tmp_path):
    path = file(tmp_path, WORDS)
    small = gpt2(vocab_size=50)
    refused(["tokens up to 59", "embeds 50 tokens", "do not belong together"], path, small, tokenizer=tokenizer())
    made = tlpd.token_batches(path, tokenizer(), length=8)
    with pytest.raises(DataError, match="do not belong together"):
        tlpd.decompose(small, "blocks.0.mlp.W_in", tlpd.SPD(n_components=2), made, 1)
    for data in (documents(), [{"text": text} for text in documents()]):
        with pytest.raises(DataError, match="do not belong together"):
            batch_source(data, 4, 0, tokenizer(), 8, model=small)
    refused("do not belong together", path, gpt2(vocab_size=60), tokenizer=bpe())
    refused("embeds 50", path, tokenizer(), vocab_size=50)


def test_real_tokenizers_that_do_not_belong():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = assets() / "models", assets() / "text" / "tinystories_sample.txt"
    model = AutoModelForCausalLM.from_pretrained(folder / "babyllama-tok105")
    refused(
        ["tokens up to 511", "embeds 105"], text, model, tokenizer=AutoTokenizer.from_pretrained(folder / "stories260K")
    )


def test_tokens_added_for_padding_may_lie_beyond_the_embedding(tmp_path):
    own = tokenizer()
    own.add_special_tokens({"pad_token": "[PAD]"})
    assert len(own) == 62
    path = file(tmp_path, WORDS)
    assert tlpd.token_batches(path, gpt2(), tokenizer=own, length=8).first_rows(2).tokens.shape == (2, 8)
    refused(["'w3 [PAD]", "token 61"], file(tmp_path, "w3 [PAD] " * 99), gpt2(), tokenizer=own)


@pytest.mark.parametrize("form", ["rows", "line", "dataset", "stream", "joined"])
def test_tokens_that_the_model_has_not(form):
    import datasets

    model, joined = gpt2(), {"join": True} if form == "joined" else {}
    for bad in (61, -1):
        rows = torch.full((20, 8), 5)
        rows[19 if form in ("rows", "line") else 0, 3] = bad  # tensors are looked at to the end
        data = datasets.Dataset.from_dict({"tokens": rows.tolist()})
        forms = {
            "rows": rows,
            "line": rows.flatten(),
            "dataset": data,
            "stream": data.to_iterable_dataset(),
            "joined": data,
        }
        one = tlpd.token_batches(forms[form], length=8, shuffle=0, **joined)
        with pytest.raises(DataError, match=f"token {bad}, and the model has tokens 0 to 60"):
            tlpd.decompose(model, "blocks.0.mlp.W_in", tlpd.SPD(n_components=2), one, 1, 2, progress=False)


@pytest.mark.parametrize("form", ["tensor", "dict", "batches", "rows", "function", "dataset", "stream"])
def test_other_forms_with_tokens_that_the_model_has_not(form, tmp_path):
    """Before the run's directory is made, where the data can be looked at beforehand."""
    import datasets

    rows = torch.full((8, 8), 5)
    rows[0, 0] = 61
    data = datasets.Dataset.from_dict({"tokens": rows.tolist()})
    forms = {"tensor": rows, "dict": {"tokens": rows}, "batches": [rows], "rows": list(rows), "function": lambda step: rows,
             "dataset": data, "stream": data.to_iterable_dataset()}  # fmt: skip
    with pytest.raises(DataError, match="token 61, and the model has tokens 0 to 60"):
        tlpd.decompose(
            gpt2(),
            "blocks.0.mlp.W_in",
            tlpd.SPD(n_components=2),
            forms[form],
            1,
            8,
            run_dir=tmp_path / "run",
            progress=False,
        )
    assert (tmp_path / "run").exists() == (form == "function")


# --- a table of what is refused -----------------------------------------------------------------------------------------------
def text(content, name="x.txt"):
    return lambda folder: file(folder, content, name)


def dataset(streamed=False, **columns):
    def made(folder):
        import datasets

        found = datasets.Dataset.from_dict(columns)
        return found.to_iterable_dataset() if streamed else found

    return made


def splits(folder):
    import datasets

    empty = datasets.Dataset.from_dict({"text": []})
    return datasets.DatasetDict({"train": empty, "test": empty})


def no_records(folder):
    import datasets

    return datasets.IterableDataset.from_generator(lambda: iter([]))


def two_empty(folder):
    (folder / "other").mkdir()
    return [file(folder, b"", "x.txt"), file(folder / "other", b"", "x.txt")]


WHOLE, TWENTY, SHORT = text(WORDS), torch.zeros(20, 8, dtype=torch.long), {"tokens": [[3] * 8, [3] * 5]}
REFUSED = {
    # what there is not
    "no file": ("'missing.txt' is no file", "missing.txt", {}),
    "no match": ("matches no file", lambda folder: str(folder / "*.jsonl"), {}),
    "one is missing": ("no file", lambda folder: [file(folder, WORDS), folder / "missing.parquet"], {}),
    "packed": ("is packed; unpack it", text(b"\x1f\x8b", "x.txt.gz"), {}),
    "two kinds": ("one kind", lambda folder: [file(folder, WORDS), file(folder, "{}", "x.jsonl")], {}),
    "text has no columns": ("no columns", WHOLE, {"column": "text"}),
    "records have no separator": ("each record is a document", text(lines({"text": "w3"}), "x.jsonl"), {"separator": "\n"}),
    "no parquet": ("cannot be read", text(b"no parquet", "x.parquet"), {}),
    "empty text": (["x.txt", "is empty"], text(b""), {}), "empty lines": (["x.jsonl", "is empty"], text(b"", "x.jsonl"), {}),
    "empty json": (["x.json", "is empty"], text(b"", "x.json"), {}), "two empty files": ("empty", two_empty, {}),
    "empty parquet": (["x.parquet", "is empty"], text(b"", "x.parquet"), {}),
    "blank lines": ("empty", text("\n\n", "x.jsonl"), {}), "blanks": ("fills no row", text(" \n \n"), {}),
    "empty records": ("hold nothing", text(lines({"text": ""}, {"text": None}), "x.jsonl"), {}),
    "empty dataset": ("is empty", dataset(text=[]), {}), "empty stream": ("is empty", no_records, {}),
    "empty rows": ("empty", torch.zeros(0, 8, dtype=torch.long), {}),
    "empty line": ("empty", torch.zeros(0, dtype=torch.long), {}),
    "splits": (["splits 'train', 'test'", "data['train']"], splits, {}),
    # columns and lines
    "column missing further on": (
        ["no column 'text'", "nearest: 'txt'"], text(lines({"text": "w3"}, {"txt": "w4"}), "x.jsonl"), {}
    ),
    "half a line": (["x.jsonl", "line that begins at byte 15", "no JSON"], text('{"text": "w3"}\n{"te', "x.jsonl"), {}),
    "a number": (["holds int", "byte 15"], text('{"text": "w3"}\n3\n', "x.jsonl"), {}),
    "half a character": (["x.txt", "ends within a character, at byte 6"], text(b"w3 w4 \xc3"), {}),
    # tokenizers
    "unknown words": (["cannot write", "xylophone"], text("a xylophone " * 9), {"tokenizer": tlpd.micro_gpt2_tokenizer()}),
    "no tokenizer": (["x.txt is text", "tokenizer=..."], WHOLE, {"tokenizer": None}),
    "a number as tokenizer": ("given int", WHOLE, {"tokenizer": 3}),
    "no such mark": ("bos=True needs", text("a b"), {"tokenizer": whole_words(), "bos": True}),
    "a name as model": ("Expected a model or a tokenizer, given str", WHOLE, {"model": "gpt2", "tokenizer": None}),
    # shapes and settings
    "too few words": (["fills no row", "7 tokens in all", "length="], text("w3 w4 w5 w6 w7 w8"), {}),
    "short rows": (["row of 6 tokens", "length=8"], torch.zeros(5, 6, dtype=torch.long), {}),
    "short line": (["has 7 tokens", "a row takes 8"], torch.zeros(7, dtype=torch.long), {}),
    "short records": (["row of 5 tokens", "length=8", "join=True"], dataset(**SHORT), {"batch_size": 2}),
    "short stream": (["row of 5 tokens", "length=8", "join=True"], dataset(True, **SHORT), {"batch_size": 2}),
    "all left out": ("behind the first 99 rows", WHOLE, {"skip": 99}),
    "all rows left out": ("skip=20 leaves none", TWENTY, {"skip": 20}),
    "floats": ("torch.float32 [3, 4]", torch.zeros(3, 4), {}),
    "a cube": ("[3, 4, 5]", torch.zeros(3, 4, 5, dtype=torch.long), {}),
    "an int": ("given int", 3, {}), "a dict of rows": ("given dict", {"tokens": [[3]]}, {}),
    "an iterator": ("one-time iterator", lambda folder: iter([{"text": "w3"}]), {}), "ints": ("holds int", [3, 4], {}),
    "nested": ("torch.int64 [1, 1]", [{"text": [[3]]}], {}), "nothing": ("is empty", [], {}),
    "words in a list": ("holds list where text", [{"text": ["w3"]}], {}),
    "length 1 with a mark": ("at least 2 tokens", WHOLE, {"length": 1, "bos": True}),
    "length 0": ("at least 1", WHOLE, {"length": 0}),
    "shuffle": ("shuffle must be", WHOLE, {"shuffle": -1}), "batch_size": ("batch_size must be", WHOLE, {"batch_size": 0}),
    "skip": ("skip must be", WHOLE, {"skip": -1}), "join": ("leave join out", WHOLE, {"join": False}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    words, data, arguments = REFUSED[what]
    model = arguments.get("model", None)
    given = {"tokenizer": None if isinstance(data, torch.Tensor) else tokenizer(), **arguments}
    given.pop("model", None)
    refused(words, data(tmp_path) if callable(data) else data, model, **given)


def test_fewer_rows_than_are_asked_for(tmp_path):
    with pytest.raises(DataError, match="gives 26 rows, and 99 are needed"):
        tlpd.token_batches(file(tmp_path, WORDS), tokenizer(), length=8).first_rows(99)
