"""The same documents in every form that data comes in, and the rows that anyone would make of them by hand."""

import json
import random
from pathlib import Path

import torch

LENGTH = 9


def documents(n=60, seed=0):
    """Texts of words w3 to w59, one to forty each."""
    numbers = random.Random(seed)
    return [" ".join(f"w{numbers.randint(3, 59)}" for _ in range(numbers.randint(1, 40))) for _ in range(n)]


def rows_by_hand(texts, tokenizer, length=LENGTH, bos=None, eos=None):
    """Everything tokenised, written down one behind the other, and cut."""
    line = []
    for text in texts:
        line.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
        if eos is not None:
            line.append(eos)
    body = length - (bos is not None)
    rows = []
    for begin in range(0, len(line) - body + 1, body):
        rows.append(([] if bos is None else [bos]) + line[begin : begin + body])
    return rows


class Texts:
    """Records that can be iterated over again and again, and nothing else."""

    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return iter([{"text": text} for text in self.texts])


def in_every_form(folder: Path, texts, tokenizer):
    """{form: (data, arguments of token_batches)}."""
    import datasets

    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    third = len(texts) // 3
    parts = [texts[:third], texts[third : 2 * third], texts[2 * third :]]
    for i, part in enumerate(parts):
        (folder / f"part{i}.jsonl").write_text("".join(json.dumps({"n": 1, "text": t}) + "\n" for t in part))
        (folder / f"part{i}.txt").write_text("\n\n".join(part) + "\n\n")
        datasets.Dataset.from_dict({"text": part, "n": list(range(len(part)))}).to_parquet(folder / f"part{i}.parquet")
    (folder / "array.json").write_text(json.dumps([{"body": text, "n": 1} for text in texts]))
    (folder / "marked.txt").write_text("<|endoftext|>\n".join(texts))
    for i, text in enumerate(texts):
        (folder / f"single{i:04d}.txt").write_text(text)
    whole = datasets.Dataset.from_dict({"text": texts, "n": list(range(len(texts)))})
    tokens = datasets.Dataset.from_dict({"input_ids": ids})

    def records():
        yield from ({"story": text} for text in texts)

    parquet = [str(folder / f"part{i}.parquet") for i in range(3)]
    return {
        "text files": (str(folder / "single*.txt"), {}),
        "list of text files": ([folder / f"single{i:04d}.txt" for i in range(len(texts))], {}),
        "text, blank lines": (str(folder / "part?.txt"), {"separator": "\n\n"}),
        "text, marks": (folder / "marked.txt", {"separator": "<|endoftext|>"}),
        "json lines": (folder / "part*.jsonl", {}),
        "json lines, column": (str(folder / "part*.jsonl"), {"column": "text"}),
        "json array": (folder / "array.json", {"column": "body"}),
        "parquet": (folder / "part*.parquet", {}),
        "dataset": (whole, {}),
        "dataset of tokens, joined": (tokens, {"join": True}),
        "stream in shards": (whole.to_iterable_dataset(num_shards=3), {}),
        "stream of a generator": (datasets.IterableDataset.from_generator(records), {}),
        "stream, mapped": (whole.to_iterable_dataset(num_shards=4).map(lambda x: {"text": x["text"]}), {}),
        "stream of parquet": (
            datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True),
            {"column": "text"},
        ),
        "stream of tokens, joined": (tokens.to_iterable_dataset(), {"join": True}),
        "records": (Texts(texts), {}),
        "records in a list": ([{"text": text} for text in texts], {}),
    }


FORMS = [
    "text files", "list of text files", "text, blank lines", "text, marks", "json lines", "json lines, column", "json array",
    "parquet", "dataset", "dataset of tokens, joined", "stream in shards", "stream of a generator", "stream, mapped",
    "stream of parquet", "stream of tokens, joined", "records", "records in a list",
]  # fmt: skip


def batches(source, first, last):
    """Tokens of steps first to last - 1."""
    return torch.stack([source.batch(step).tokens for step in range(first, last)])
