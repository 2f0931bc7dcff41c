"""One rule for how rows begin, on every host, for rows of text and prompts alike; what was recorded goes before it."""

import json
import tempfile
import warnings

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.tasks.prompts import prompt_task
from tl_paramdecomp.data.rows import batch_source
from tl_paramdecomp.data.tokenizer import ROW_START, prompt_tokenizer, row_tokenizer
from tl_paramdecomp.errors import DataError, RowStartWarning, SettingError

from ..support.hosts import on_host
from ..support.models import gpt2, hooked
from .texts import documents, rows_by_hand

BOS, EOS, LENGTH = 1, 2, 8
RECORDS = [{"text": text} for text in documents()]
HOSTS = ("hooked_transformer", "bridge", "nnsight", "transformers")
METHOD = tlpd.SPD(n_components=3, warm_up_steps=0)
FOLDERS = []


def words(adds: bool, has: bool = True):
    """Words w0 to w60; w1 is the beginning-of-sequence token where it has one, and it puts that in front where it adds."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds:
        made.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", BOS)])
    special = {"unk_token": "w0", "eos_token": "w2", "pad_token": "w60"} | ({"bos_token": "w1"} if has else {})
    FOLDERS.append(tempfile.TemporaryDirectory())  # that stays: TransformerBridge loads it from there again
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(FOLDERS[-1].name)
    return PreTrainedTokenizerFast.from_pretrained(FOLDERS[-1].name)


TOKENIZERS = {
    "adds": lambda: words(True), "adds none": lambda: words(False), "has none": lambda: words(False, has=False),
    "none": lambda: None,
}  # fmt: skip


def model_on(host, own=None):
    model = hooked(d_vocab=61) if host == "hooked_transformer" else on_host(gpt2(torch.float32), host)
    if host in ("hooked_transformer", "bridge"):
        model.tokenizer = own
    return model


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("host", HOSTS)
def test_rows_and_prompts_begin_alike_on_every_host(host, kind, tmp_path):
    own, model = TOKENIZERS[kind](), model_on(host)
    lens = host in ("hooked_transformer", "bridge")
    for default in (True, False) if lens else (None,):
        if lens:
            model.tokenizer, model.cfg.default_prepend_bos = own, default
        token = getattr(own, "bos_token_id", None)  # TransformerBridge takes the end token where there is none
        first = token if (kind == "adds" if default is None else default) else None
        given = {} if lens else {"tokenizer": own}
        if own is None:
            for asked in (
                lambda: tlpd.token_batches(RECORDS, model),
                lambda: batch_source(RECORDS, 4, 0, model=adapt(model)),
            ):
                with pytest.raises(DataError, match="needs a tokenizer"):
                    asked()
            continue
        wanted = rows_by_hand(documents(), own, LENGTH, first, EOS)
        rows = tlpd.token_batches(RECORDS, model, length=LENGTH, shuffle=0, **given)
        assert torch.cat([batch.tokens for batch in rows]).tolist() == wanted
        source = batch_source(RECORDS, 4, 0, own, LENGTH, model=adapt(model))
        assert torch.cat([source.batch(step).tokens for step in range(9)]).tolist() == wanted[:36]
        path = tmp_path / f"{default}.jsonl"
        path.write_text(
            json.dumps({"clean": "w5 w6", "answer": 7}) + "\n" + json.dumps({"clean": [9, 8, 7], "answer": 7})
        )
        task = tlpd.load_task(path, model if lens else own)
        text = [5, 6] if first is None else [first, 5, 6]
        assert task.clean[0, : len(text)].tolist() == text and task.clean[1].tolist() == [9, 8, 7]
        for asked in (True, False):
            if token is None and asked:
                with pytest.raises(SettingError, match="bos=True needs.*no beginning-of-sequence"):
                    tlpd.token_batches(RECORDS, model, bos=True, **given)
                continue
            made = tlpd.token_batches(RECORDS, model, length=LENGTH, shuffle=0, bos=asked, **given)
            assert (
                made.first_rows(9).tokens.tolist()
                == rows_by_hand(documents(), own, LENGTH, token if asked else None, EOS)[:9]
            )


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_a_decomposition_records_how_its_rows_began_and_is_followed(host, begins, tmp_path):
    """Against what host and tokenizer would do; also after it was saved, on another host."""
    own = words(adds=not begins)
    model = model_on(host, own)
    if host in ("hooked_transformer", "bridge"):
        model.cfg.default_prepend_bos = not begins
    site = "blocks.0.mlp.W_in"
    data = tlpd.token_batches(RECORDS, model, tokenizer=own, length=LENGTH, bos=begins)
    made = tlpd.decompose(model, site, METHOD, data, 1, 2, progress=False)
    assert made.info[ROW_START] == {"token": BOS, "begins": begins}
    made.save(tmp_path / "made")
    made = tlpd.Decomposition.load(tmp_path / "made")
    first = BOS if begins else None
    wanted = rows_by_hand(documents(), own, LENGTH, first, EOS)
    late = tlpd.token_batches(RECORDS, length=LENGTH, shuffle=0)
    for rows in (
        tlpd.token_batches(RECORDS, model, tokenizer=own, length=LENGTH, shuffle=0, decomposition=made).source(9),
        late.source(9, model=model, tokenizer=own, decomposition=made),
    ):
        assert rows.batch(0).tokens.tolist() == wanted[:9] and "made on" in rows.info["bos_because"]
    for writer in (prompt_tokenizer(own, None, made), row_tokenizer(own, decomposition=made)):
        assert writer.bos == first
    assert prompt_tokenizer(own, not begins, made).bos == (None if begins else BOS), "the caller goes first"
    if host != "nnsight":
        model.tokenizer = own
        task = prompt_task("w5 w6", model, ["w7"], corrupt="w8 w6", decomposition=made)
        assert task.clean.tolist() == [[BOS, 5, 6] if begins else [5, 6]] and task.corrupt.shape == task.clean.shape
    good, other = (
        torch.tensor(rows_by_hand(documents(), own, LENGTH, bos, EOS)[:2]) for bos in (first, None if begins else BOS)
    )
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), good[:, :-1]], 1)
    mask = torch.ones_like(padded)
    mask[:, 0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tlpd.component_acts(model, made, good)
        tlpd.component_acts(model, made, padded, mask)
        tlpd.component_acts(model, made, torch.cat([good, other]))  # some do
    config = tlpd.EvaluationConfig(restarts=1, ladder=(1,), ablated=0, by_site=False, samples=1)
    for use in (
        lambda: tlpd.component_acts(model, made, other),
        lambda: tlpd.evaluate(model, made, other, protocol=config, progress=False),
        lambda: tlpd.attribute(model, made, other, lambda logits: logits[:, -1, 5]),
        lambda: tlpd.top_contexts(model, made, other),
        lambda: tlpd.activation_means(model, made, other),
    ):
        with pytest.warns(RowStartWarning, match=rf"begin {'without' if begins else 'with'} .*\({BOS}\)"):
            use()


@pytest.mark.parametrize("data, begins", [
    (torch.tensor([[1, 5, 6], [1, 7, 8]]), True), (torch.tensor([[5, 1, 6], [3, 7, 8]]), False),
    (torch.tensor([[1, 5, 6], [3, 7, 8]]), None),
    ({"input_ids": torch.tensor([[0, 1, 5], [1, 7, 8]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, True),
    ([torch.tensor([[1, 5, 6], [1, 7, 8]])], True), (iter([torch.tensor([[1, 5, 6], [3, 7, 8]])]), None),
])  # fmt: skip
def test_rows_of_tokens_are_taken_as_they_are_and_observed(data, begins):
    model = model_on("hooked_transformer", words(False))
    made = tlpd.decompose(model, "blocks.0.mlp.W_in", METHOD, data, 1, 2, progress=False)
    assert made.info[ROW_START] == {"token": BOS, "begins": begins}
    if begins is None:
        assert prompt_tokenizer(model, None, made).why.startswith("the host's")


def test_where_no_such_token_is_known_nothing_is_recorded():
    rows = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    assert (
        ROW_START
        not in tlpd.decompose(gpt2(bos_token_id=None), "blocks.0.mlp.W_in", METHOD, rows, 1, 2, progress=False).info
    )
    own = gpt2(bos_token_id=1)
    assert (
        tlpd.decompose(own, "blocks.0.mlp.W_in", METHOD, rows, 1, 2, progress=False).info[ROW_START]["begins"] is False
    )
    function = tlpd.decompose(own, "blocks.0.mlp.W_in", METHOD, lambda step: rows, 1, 2, progress=False)
    assert ROW_START not in function.info, "a function is asked for each step once"


@pytest.mark.parametrize("host", ["hooked_transformer", "transformer_bridge", "transformers", "nnsight"])
def test_micro_gpt2_gets_one_on_every_host(host):
    try:
        model = tlpd.load_micro_gpt2(host)
    except tlpd.errors.UnsupportedModelError:
        pytest.skip("no such host here")
    text = ["the cat saw mary . then mary went to the store ."] * 9
    made = tlpd.token_batches(text, model, length=12)
    assert made.info["bos"] == 0 and made.info["bos_because"] == "micro-gpt2 was trained so"
    assert prompt_tokenizer(model).bos == 0


@pytest.mark.parametrize("bos", [BOS, None])
def test_decompositions_of_0_1_0_tell_it_of_their_text(bos):
    own = words(adds=bos is None)
    made = tlpd.decompose(gpt2(), "blocks.0.mlp.W_in", tlpd.SVD(training=None))
    made.info["run"] = {"data": {"form": "token_batches", "joined": True, "bos": bos, "eos": EOS}}
    assert prompt_tokenizer(own, None, made).bos == bos
    rows = torch.tensor([[BOS, 5, 6]])
    if bos is None:
        tlpd.component_acts(gpt2(), made, rows)  # which token it would have been is not known
    else:
        with pytest.warns(RowStartWarning):
            tlpd.component_acts(gpt2(), made, rows[:, 1:])
