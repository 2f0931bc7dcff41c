"""Tables of other libraries as data give what a tensor of the same rows gives; what cannot be read is named."""

import json
from typing import Any

import numpy as np
import pytest
import torch

import tl_paramdecomp as tlpd
from tests.data.texts import documents
from tests.support.hosts import on_host
from tests.support.models import gpt2, tokenizer
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.errors import DataError

pandas = pytest.importorskip("pandas")
arrow = pytest.importorskip("pyarrow")
ROWS = torch.randint(0, 61, (12, 7), generator=torch.Generator().manual_seed(0))
LISTS = ROWS.tolist()
RAGGED = [row[: 3 + i % 4] for i, row in enumerate(LISTS)]
METHOD = tlpd.SPD(n_components=3, warm_up_steps=0)


class Exported:
    """What gives itself away as Arrow data, as frames of other libraries do."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.held.__arrow_c_stream__(requested_schema)


def encoding(rows: Any, **more: Any) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": rows, **more})


def forms(rows: Any) -> dict[str, Any]:
    """The same rows in every form of table, lists of equal or unequal length."""
    objects = np.empty(len(rows), dtype=object)
    objects[:] = [np.array(row) for row in rows]
    frame = pandas.DataFrame({"id": range(len(rows)), "input_ids": rows, "junk": [object()] * len(rows)})
    table = arrow.table({"id": list(range(len(rows))), "tokens": rows})
    return {
        "frame": frame, "frame of arrays": pandas.DataFrame({"tokens": list(objects)}), "series": frame["input_ids"],
        "series without a name": pandas.Series(rows, index=range(5, 5 + len(rows))), "arrow": table,
        "record batch": table.to_batches()[0], "several chunks": arrow.concat_tables([table[:5], table[5:]]),
        "arrow array": table["tokens"].combine_chunks(), "arrow chunks": table["tokens"], "dict": {"input_ids": rows},
        "encoding": encoding(rows), "objects": objects, "exported": Exported(table),
        "exported column": Exported(table["tokens"]),
    }  # fmt: skip


EVEN = forms(LISTS) | {
    "array": ROWS.numpy(), "array of 16 bits": ROWS.numpy().astype(np.uint16), "dict of arrays": {"tokens": ROWS.numpy()},
    "dict of tensors": {"tokens": ROWS}, "tensor of 8 bits": ROWS.to(torch.uint8),
    "masked encoding": encoding(LISTS, attention_mask=torch.ones(12, 7).long().tolist()),
    "fixed lists": arrow.table({"tokens": arrow.array(LISTS, arrow.list_(arrow.int32(), 7))}),
}  # fmt: skip
UNEVEN = forms(RAGGED)


def same(found: Any, wanted: Any) -> bool:
    masks = [torch.ones_like(b.tokens) if b.attention_mask is None else b.attention_mask for b in (found, wanted)]
    return torch.equal(found.tokens, wanted.tokens) and torch.equal(*masks) and found.tokens.dtype == torch.long


@pytest.mark.parametrize("form", EVEN)
def test_rows_are_those_of_a_tensor(form: str):
    model = gpt2()
    wanted, found = (batch_source(data, 4, 3, model=model) for data in (ROWS, EVEN[form]))
    assert all(same(found.batch(step), wanted.batch(step)) for step in range(7))
    if form != "masked encoding" and not form.startswith(("dict of", "tensor of")):
        wanted, found = (tlpd.token_batches(data).source(4, 3, model) for data in (ROWS, EVEN[form]))
        assert all(same(found.batch(step), wanted.batch(step)) for step in range(7))


@pytest.mark.parametrize("form", UNEVEN)
def test_rows_of_unequal_length_are_padded_as_those_of_a_dataset(form: str):
    import datasets

    dataset, model = datasets.Dataset.from_dict({"tokens": RAGGED}), gpt2()
    for make in (
        lambda data: batch_source(data, 4, 3, model=model),
        lambda d: tlpd.token_batches(d).source(4, 3, model),
    ):
        wanted, found = make(dataset), make(UNEVEN[form])
        found.check()
        assert all(same(found.batch(step), wanted.batch(step)) for step in range(7))


@pytest.mark.parametrize("rows", [LISTS, RAGGED])
def test_an_attention_mask_beside_the_rows_counts(rows: list[list[int]]):
    masks = [[0, *[1] * (len(row) - 1)] for row in rows]
    for data in (
        pandas.DataFrame({"input_ids": rows, "attention_mask": masks}), encoding(rows, attention_mask=masks),
        arrow.table({"tokens": rows, "attention_mask": masks}),
    ):  # fmt: skip
        source = batch_source(data, 4, 0)
        for step in range(3):
            tokens, mask = source.batch(step)
            assert mask is not None and not mask[:, 0].any()
            assert mask[:, 1:].sum() == sum(
                len(row) - 1 for row in rows if row in [t[: len(row)].tolist() for t in tokens]
            )


def test_a_run_on_a_table_is_the_run_on_a_tensor_and_goes_on(tmp_path):
    frame, model = EVEN["frame"], gpt2(torch.float32)

    def run(data: Any, folder: str, steps: int = 4, **more: Any) -> Any:
        return tlpd.decompose(
            model, "blocks.0.mlp.*", METHOD, data, steps, 3, run_dir=tmp_path / folder, progress=False, **more
        )

    wanted = run(ROWS, "tensor")
    whole = run(frame, "whole")
    stopped = run(frame, "parted", log_every=1, callbacks=[lambda info: tlpd.STOP if info.step == 2 else None])
    assert stopped.info["stopped_after"] == 2
    parted = run(frame, "parted")
    for name in wanted:
        assert torch.equal(whole[name].V, wanted[name].V) and torch.equal(parted[name].U, wanted[name].U)
    other = pandas.DataFrame({"input_ids": [*LISTS[:5], [1] * 7, *LISTS[6:]]})
    with pytest.raises(tlpd.errors.SettingError):  # a row in the middle is another
        run(other, "whole", resume=True, checkpoint_every=2)


def test_ragged_tables_differ_where_a_row_in_the_middle_does():
    one, other = (pandas.DataFrame({"tokens": rows}) for rows in (RAGGED, [*RAGGED[:5], [9, 9], *RAGGED[6:]]))
    assert batch_source(one, 4, 0).info != batch_source(other, 4, 0).info
    assert tlpd.token_batches(one).info != tlpd.token_batches(other).info


@pytest.mark.parametrize("column", ["text", "story"])
def test_texts_in_every_form_are_the_list_of_them(column: str):
    texts, own = documents(12), tokenizer()
    frame = pandas.DataFrame({"id": range(12), column: texts})
    many = {
        "frame": frame, "series": frame[column], "arrow": arrow.table({column: texts}), "dict": {column: texts},
        "array": np.array(texts), "objects": np.array(texts, dtype=object), "exported": Exported(arrow.table({column: texts})),
    }  # fmt: skip
    for form, data in many.items():
        wanted, found = (batch_source(d, 3, 0, own, 8) for d in (texts, data))
        assert all(same(found.batch(step), wanted.batch(step)) for step in range(3)), form
        wanted, found = (tlpd.token_batches(d, own, length=8).source(3) for d in (texts, data))
        assert all(same(found.batch(step), wanted.batch(step)) for step in range(3)), form


def test_missing_texts_are_left_out_and_other_things_refused():
    texts, own = ["w3 w4 w5", "w6 w7"], tokenizer()
    wanted = batch_source(texts, 1, 0, own, 3).batch(0)
    for missing in (None, float("nan")):
        frame = pandas.DataFrame({"text": [texts[0], missing, texts[1]]})
        assert same(batch_source(frame, 1, 0, own, 3).batch(0), wanted)
        assert same(tlpd.token_batches(frame, own, length=3, shuffle=0).source(1).batch(0), wanted)
    with pytest.raises(DataError, match="holds int .* where text should be"):
        batch_source(pandas.Series(["w3", 5], dtype=object), 1, 0, own, 8).batch(0)


@pytest.mark.parametrize("data, words", [
    (pandas.DataFrame(ROWS.numpy()), ["DataFrame has columns ['0', '1'", "array [rows, pos]"]),
    (pandas.DataFrame({"ids": LISTS}), ["columns ['ids']", "column=..."]),
    (pandas.DataFrame({"input_ids": [3, 4]}), ["'input_ids' of the DataFrame", "row 0", "list of token ids"]),
    (pandas.DataFrame({"tokens": [[3], None, [4]]}), ["'tokens'", "row 1 nothing"]),
    (pandas.DataFrame({"tokens": [[3], "w4"]}), ["row 1 text ('w4')"]),
    (pandas.DataFrame({"tokens": [[3, 4]], "attention_mask": [[1]]}), ["Row 0", "2 tokens", "mask of 1"]),
    (pandas.DataFrame([[1, 2]], columns=["a", "a"]), ["several columns of one name"]),
    (pandas.Series([3, 4]), ["Series has in row 0 int"]), (arrow.table({"x": [[3]]}), ["Table has columns ['x']"]),
    (arrow.array([3, 4]), ["row 0 int"]), ({"text": ["w3"], "n": [1, 2]}, ["unequal length"]),
    ({"input_ids": [3, 4]}, ["[batch, pos]; given [2]"]), (encoding([3, 4]), ["[batch, pos]; given [2]"]),
    ({"input_ids": ROWS, "attention_mask": ROWS[:3]}, ["[3, 7]", "[12, 7]"]), ({}, ["'input_ids'"]),
    ({"input_ids": ["w3 w4"]}, ["row 0 text"]), (np.array(3), ["[rows, pos]"]),
    (np.array(["2020-01-01"], dtype="M8[s]"), ["datetime64"]),
    (b"w3", ["given bytes"]), ([object()], ["no array of numbers"]), (["w3 w4"], ["tokenizer"]),
    (pandas.DataFrame({"text": ["w3 w4"]}), ["tokenizer"]),
], ids=lambda value: str(value)[:30] if isinstance(value, list) and "object" not in str(value) else "")  # fmt: skip
def test_what_holds_no_rows_is_refused_by_name(data: Any, words: list[str], tmp_path):
    with pytest.raises(DataError) as caught:
        tlpd.decompose(gpt2(), "blocks.0.mlp.W_in", METHOD, data, 1, 1, run_dir=tmp_path / "run", progress=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_lists_of_words_are_no_names_of_files_and_names_no_texts():
    own = tokenizer()
    for bad in (["w3", "w4"], ["corpus/train", "corpus/valid"]):
        with pytest.raises(DataError, match="is no file here.*texts themselves"):
            tlpd.token_batches(bad, own, length=2)
    for question in ("w3 w4? w5 w6", "w3 [w4] w5* w6\n" * 400):
        assert tlpd.token_batches([question], own, length=3, bos=False).first_rows(1).tokens.shape == (1, 3)


# --- what the model cannot read ----------------------------------------------------------------------------------------
def changed(row: int, position: int, token: int) -> torch.Tensor:
    rows = ROWS.clone()
    rows[row, position] = token
    return rows


BAD = {
    "too high": (changed(9, 4, 61), ["row 9", "position 4", "token 61", "0 to 60"]),
    "negative": (changed(9, 4, -100), ["row 9", "position 4", "token -100", "0 to 60"]),
    "too long": (torch.zeros(12, 40, dtype=torch.long), ["row 0", "40 positions", "reads 32", "length=32"]),
    "floats": (ROWS.double(), ["float64", "[12, 7]", "token ids"]),
    "truths": (ROWS > 5, ["bool", "token ids"]),
    "nothing": (torch.zeros(12, 0, dtype=torch.long), ["[12, 0]", "one token"]),
}
KEPT = {
    "tensor": lambda rows: rows, "dict": lambda rows: {"tokens": rows}, "encoding": lambda rows: encoding(rows.tolist()),
    "array": lambda rows: rows.numpy(), "frame": lambda rows: pandas.DataFrame({"tokens": rows.tolist()}),
}  # fmt: skip


@pytest.mark.parametrize("form", KEPT)
@pytest.mark.parametrize("fault", BAD)
def test_rows_that_the_model_cannot_read_are_named_before_a_run_begins(fault: str, form: str, tmp_path):
    rows, words = BAD[fault]
    if fault == "nothing" and form in ("encoding", "frame"):
        pytest.skip("a list of nothing has no type")
    with pytest.raises(DataError) as caught:
        tlpd.decompose(
            gpt2(), "blocks.0.mlp.W_in", METHOD, KEPT[form](rows), 1, 4, run_dir=tmp_path / "x", progress=False
        )
    words = ["float" if word == "float64" else word for word in words]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fault", ["too high", "negative", "too long"])
def test_ragged_rows_name_their_number_in_the_data(fault: str):
    bad = {"too high": [3, 61], "negative": [3, -1], "too long": [3] * 33}[fault]
    rows = [*RAGGED[:11], bad]
    words = {"too high": "position 1, token 61", "negative": "position 1, token -1", "too long": "33 positions"}[fault]
    for data in (pandas.DataFrame({"tokens": rows}), {"input_ids": rows}, list(map(torch.tensor, rows))):
        with pytest.raises(DataError, match=words) as caught:
            batch_source(data, 2, 0, model=gpt2()).check()
        assert "row 11" in str(caught.value) or "Item 11" in str(caught.value)
    made = tlpd.token_batches(pandas.DataFrame({"tokens": rows}))
    with pytest.raises(DataError, match=f"row 11.*{words}"):
        made.source(2, model=gpt2()).check()


@pytest.mark.parametrize("host", ["transformers", "bridge", "nnsight"])
@pytest.mark.parametrize("fault", ["too high", "too long", "floats"])
def test_a_stream_is_refused_at_the_batch_that_is_wrong(fault: str, host: str, tmp_path):
    rows, words = BAD[fault]
    good = [ROWS[:4], ROWS[4:8]]
    rows = rows[8:]

    def batches(step: int) -> torch.Tensor:
        return good[step] if step < 2 else rows

    model = on_host(gpt2(), host)
    for data in (batches, iter([*good, rows])):
        with pytest.raises(DataError) as caught:
            tlpd.decompose(
                model, "blocks.0.mlp.W_in", METHOD, data, 4, 4, run_dir=tmp_path / type(data).__name__, progress=False
            )
        told = [word for word in words if not word.startswith(("row", "[12"))]
        assert all(word in str(caught.value) for word in ["step 2", *told]), str(caught.value)
        if fault == "too high":
            assert "row 1" in str(caught.value)


def test_padding_has_to_be_a_token_as_well():
    rows, mask = changed(3, 6, -100), torch.ones_like(ROWS)
    mask[3, 6] = 0
    with pytest.raises(DataError, match="row 3, at position 6, token -100.*attention mask is 0.*such as 0"):
        batch_source({"input_ids": rows, "attention_mask": mask}, 4, 0, model=gpt2()).check()


def test_toy_models_keep_their_inputs():
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 7)).requires_grad_(False)
    x = torch.randn(12, 7)
    for data in (x, {"tokens": x}, x.numpy(), [x[:4], x[4:8]]):
        made = tlpd.decompose(model, "0.weight", tlpd.SPD(n_components=3, measure="mse"), data, 1, 4, progress=False)
        assert torch.isfinite(made["0.weight"].V).all()


# --- long documents ----------------------------------------------------------------------------------------------------
class Counting:
    """A tokenizer of words that notes how many characters it is given."""

    bos_token_id, eos_token_id, model_max_length = None, 60, 10**30

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.given.append(len(text))
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@pytest.mark.parametrize("form", ["jsonl", "records", "texts", "dataset"])
def test_a_long_document_is_tokenised_piece_by_piece_and_once(form: str, tmp_path, monkeypatch):
    import datasets

    from tl_paramdecomp.data import files

    monkeypatch.setattr(files, "PIECE", 1000)
    texts = [" ".join(f"w{(i * n) % 59}" for i in range(9000)) for n in (1, 7)]
    records = [{"text": text} for text in texts]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    forms = {"jsonl": path, "records": records, "texts": texts, "dataset": datasets.Dataset.from_list(records)}
    counting = Counting()
    made = tlpd.token_batches(forms[form], counting, length=10, bos=False, shuffle=0)
    made.first_rows(2)
    assert sum(counting.given) <= 4000, "few rows need few pieces"
    counting.given.clear()
    found = torch.cat([batch.tokens for batch in made])
    assert max(counting.given) <= 1000 and sum(counting.given) == sum(map(len, texts))
    ids = [t for text in texts for t in (*(int(word[1:]) for word in text.split()), 60)]
    assert torch.equal(found.flatten(), torch.tensor(ids[: len(ids) // 10 * 10]))
    source, again = made.source(3), made.source(3)
    for step in range(100):
        source.batch(step)
    again.restore(json.loads(json.dumps(source.state())))
    assert torch.equal(again.batch(100).tokens, source.batch(100).tokens)


def test_pieces_end_with_a_line_a_word_or_where_they_are_full(monkeypatch):

    from tl_paramdecomp.data import files
    from tl_paramdecomp.data.documents import pieces_of

    monkeypatch.setattr(files, "PIECE", 10)
    pieces = [piece for text in ("ab\ncd ef ghij kl", "x" * 25, "short") for piece in pieces_of(text)]
    assert [p.text for p in pieces] == [
        "ab\n", "cd ef", " ghij kl", "x" * 10, "x" * 10, "x" * 5, "short",
    ]  # fmt: skip
    assert [p.ends for p in pieces[:6]] == [False, False, True, False, False, True]
    assert [p.begins for p in pieces[:6]] == [True, False, False, True, False, False]


# --- rows to measure on ------------------------------------------------------------------------------------------------
def evaluated(data: Any, **more: Any) -> Any:
    model = gpt2(torch.float32)
    made = tlpd.decompose(model, "blocks.0.mlp.W_in", METHOD, ROWS, 1, 4, progress=False)
    protocol = tlpd.EvaluationConfig(ladder=(), ablated=0, by_site=False, samples=1)
    return tlpd.evaluate(model, made, data, protocol=protocol, progress=False, **more)


def test_a_tokenizers_rows_are_measured_on_with_their_mask():
    mask = torch.ones_like(ROWS)
    mask[:, 5:] = 0
    wanted = evaluated(ROWS, attention_mask=mask)
    found = evaluated(encoding(ROWS, attention_mask=mask))
    assert found.positions == 60 and found.masks == wanted.masks


@pytest.mark.parametrize("fault", BAD)
def test_rows_that_the_model_cannot_read_are_not_measured_on(fault: str, tmp_path):
    rows, words = BAD[fault]
    method = {"a": tlpd.SPD(n_components=2)}
    protocol = tlpd.ComparisonProtocol(sites="blocks.0.mlp.W_in", steps=1)
    for call in (
        lambda: evaluated(rows),
        lambda: evaluated({"tokens": rows}),
        lambda: tlpd.compare(gpt2(), method, protocol, ROWS, rows, run_dir=tmp_path / "x", progress=False),
        lambda: tlpd.estimate_run(gpt2(), "blocks.0.mlp.W_in", METHOD, rows, 2),
    ):
        with pytest.raises(tlpd.errors.TLParamDecompError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "x").exists()


# --- masks and forms that would be read as something else ---------------------------------------------------------------
@pytest.mark.parametrize("values", ["labels", "twos", "negative"])
def test_a_mask_of_anything_but_0_and_1_is_refused_everywhere(values: str):
    mask = {"labels": ROWS + 2, "twos": torch.full_like(ROWS, 2), "negative": -torch.ones_like(ROWS)}[values]
    model = gpt2()
    dec = tlpd.decompose(model, "blocks.0.mlp.W_in", METHOD, ROWS, 1, 4, progress=False)
    for data in ({"tokens": ROWS, "attention_mask": mask}, [(ROWS, mask)], [[ROWS, mask]], lambda step: (ROWS, mask)):
        with pytest.raises(DataError, match="holds 1 where a position counts"):
            tlpd.decompose(model, "blocks.0.mlp.W_in", METHOD, data, 1, 4, progress=False)
    for question in (
        tlpd.component_acts,
        tlpd.causal_importances,
        tlpd.activation_means,
        tlpd.top_contexts,
        tlpd.evaluate,
    ):
        with pytest.raises(DataError, match="holds 1 where a position counts"):
            question(model, dec, ROWS, attention_mask=mask)


def test_rows_with_one_label_each_are_no_rows_with_a_mask():
    with pytest.raises(DataError, match=r"mask is \[12\].*\[12, 7\]"):
        batch_source([[ROWS, ROWS[:, 0]]], 4, 0, model=gpt2()).check()


def test_a_pair_of_rows_and_mask_is_not_two_batches():
    mask = torch.ones_like(ROWS)
    for pair in ((ROWS, mask), (ROWS, mask.bool())):
        with pytest.raises(DataError, match="read as two batches"):
            batch_source(pair, 4, 0, model=gpt2())
    assert torch.equal(batch_source((ROWS, ROWS.flip(0)), 4, 0, model=gpt2()).batch(1).tokens, ROWS.flip(0))
    assert torch.equal(batch_source([(ROWS, mask)], 4, 0, model=gpt2()).batch(0).attention_mask, mask)


@pytest.mark.parametrize("kind", ["meta", "sparse", "uint8", "int16", "no rows"])
def test_rows_without_values_and_small_integers_are_named_in_questions(kind: str):
    rows = {
        "meta": ROWS.to("meta"), "sparse": ROWS.to_sparse(), "uint8": ROWS.to(torch.uint8), "int16": ROWS.short(),
        "no rows": ROWS[:0],
    }[kind]  # fmt: skip
    model = gpt2()
    dec = tlpd.decompose(model, "blocks.0.mlp.W_in", METHOD, ROWS, 1, 4, progress=False)
    for question in (tlpd.component_acts, tlpd.importance_masks, tlpd.activation_means, tlpd.top_contexts):
        if kind == "no rows" and question is tlpd.top_contexts:
            continue
        with pytest.raises(DataError, match="dense|tokens.long|one row|no rows"):
            question(model, dec, rows)
    for data in (rows, [rows]):
        if kind in ("uint8", "int16"):
            assert batch_source(data, 4, 0, model=model).batch(0).tokens.dtype == torch.long
        else:
            with pytest.raises(DataError):
                batch_source(data, 4, 0, model=model).check()


def test_masks_that_would_be_lost_are_refused():
    columns = {"input_ids": ROWS.tolist(), "attention_mask": torch.full_like(ROWS, 2).tolist()}
    for data in (np.ma.masked_array(ROWS.numpy(), ROWS.numpy() == 3), pandas_frame(columns)):
        with pytest.raises(DataError, match="would be lost|holds 1 where a position counts"):
            batch_source(data, 4, 0, model=gpt2()).check()


def test_a_batch_of_which_nothing_counts_is_not_trained_on():
    data = {"tokens": ROWS, "attention_mask": torch.zeros_like(ROWS)}
    with pytest.raises(DataError, match="No position of this batch counts"):
        tlpd.decompose(gpt2(), "blocks.0.mlp.W_in", METHOD, data, 1, 4, progress=False)


def pandas_frame(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("pandas").DataFrame(columns)
