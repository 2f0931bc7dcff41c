"""Rows that the command trains on, from text, JSON lines, parquet and folders with datasets."""

import json

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.cli.rows import HELD_OUT, open_rows
from tl_paramdecomp.errors import DataError

from ..support.commands import command

STORIES = ["the cat saw mary .", "then mary went to the store .", "so john gave a book to mary ."] * 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("files")
    (folder / "x.txt").write_text("\n".join(STORIES))
    (folder / "x.jsonl").write_text("".join(json.dumps({"story": text, "n": 3}) + "\n" for text in STORIES))
    datasets.Dataset.from_dict({"text": STORIES}).to_parquet(folder / "x.parquet")
    (folder / "data").mkdir()
    datasets.Dataset.from_dict({"text": STORIES}).to_parquet(folder / "data" / "train.parquet")
    return folder


def test_held_out_rows_are_the_first_and_never_trained_on(files):
    model, own = tlpd.load_micro_gpt2(), tlpd.micro_gpt2_tokenizer()
    line = [token for text in STORIES for token in (*own(text)["input_ids"], own.eos_token_id)]
    wanted = [[0, *line[begin : begin + 11]] for begin in range(0, len(line) - 10, 11)]
    for source in ({"text": files / "x.jsonl"}, {"text": files / "x.parquet"}, {"dataset": str(files / "data")}):
        rows = open_rows("micro-gpt2", model, source.get("text"), source.get("dataset"), 12)
        assert rows.held_out.tolist() == wanted[:HELD_OUT]
        found = torch.cat([batch.tokens for batch in rows.train]).tolist()
        assert sorted(found) == sorted(wanted[HELD_OUT:]) and found != wanted[HELD_OUT:]


def test_a_text_file_is_one_document(files):
    model, own = tlpd.load_micro_gpt2(), tlpd.micro_gpt2_tokenizer()
    rows = open_rows("micro-gpt2", model, files / "x.txt", None, 12)
    line = own("\n".join(STORIES))["input_ids"]
    assert rows.held_out.tolist() == [[0, *line[begin : begin + 11]] for begin in range(0, HELD_OUT * 11, 11)]
    by_line = open_rows("micro-gpt2", model, files / "x.txt", None, 12, separator="\n")
    assert by_line.held_out.tolist() != rows.held_out.tolist()


def test_too_few_rows_are_refused(files):
    model, own = tlpd.load_micro_gpt2(), tlpd.micro_gpt2_tokenizer()
    there = sum(len(own(text)["input_ids"]) + 1 for text in STORIES) // 44
    with pytest.raises(DataError, match=f"gives {there} rows, and 64 are needed"):
        open_rows("micro-gpt2", model, files / "x.jsonl", None, 45)
    with pytest.raises(DataError, match="Name one source"):
        open_rows("micro-gpt2", model, files / "x.jsonl", "some/dataset", 12)
    with pytest.raises(DataError, match="Name what to train on"):
        open_rows("gpt2", model, None, None, 12)


def test_the_command_trains_on_json_lines(files, tmp_path):
    what = ("--sites", "blocks.0.mlp.W_in", "--steps", 2, "--batch-size", 2, "--components", 4, "--length", 12)
    shown = command("decompose", "micro-gpt2", *what, "--text", files / "x.jsonl", "--out", tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    told = tlpd.Decomposition.load(tmp_path / "run" / "decomposition").info["run"]["data"]
    assert (told["column"], told["bos"], told["skip"]) == ("story", 0, HELD_OUT)
    (tmp_path / "bad.txt").write_bytes(b"the cat \xff")
    shown = command("decompose", "micro-gpt2", *what, "--text", tmp_path / "bad.txt", "--out", tmp_path / "other")
    assert shown.returncode == 1 and "byte 8 (0xff)" in shown.stderr and "Traceback" not in shown.stderr
    assert not (tmp_path / "other").exists()


def test_rows_of_unequal_length_are_cut_before_they_are_measured_on(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"tokens": [3] * (5 + i % 3)}) + "\n" for i in range(100)))
    model = tlpd.load_micro_gpt2()
    with pytest.raises(DataError, match=r"differ in length \(5 to 7 tokens\).*--length"):
        open_rows("micro-gpt2", model, path, None, None)
    assert open_rows("micro-gpt2", model, path, None, 5).held_out.shape == (HELD_OUT, 5)
