"""Tasks: what they hold, the standard ones for several tokenizers, their files, and what is refused."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.tasks import words
from tl_paramdecomp.analysis.tasks.makers import TASKS, make_task
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.errors import (
    DecompositionFileError,
    DtypeError,
    SettingError,
    ShapeError,
    TaskError,
    TokenizerTaskError,
)
from tl_paramdecomp.pretrained import grammar

from ..support import models
from ..support.hosts import assets
from ..support.task_tokenizers import bpe, whole_words

spaced = functools.cache(bpe)
MICRO_HOSTS = ["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]


@functools.cache
def micro(host: str) -> Any:
    try:
        return tlpd.load_micro_gpt2(host)
    except tlpd.errors.UnsupportedModelError as error:
        pytest.skip(str(error))


def same(one: Task, other: Task) -> bool:
    tensors = all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((getattr(one, f), getattr(other, f)) for f in ("clean", "corrupt", "attention_mask"))
    )
    return tensors and all(
        getattr(one, f) == getattr(other, f) for f in ("name", "answers", "wrong", "texts", "groups")
    )


def rows(task: Task, which: str = "clean") -> list[list[int]]:
    """Prompts without their padding."""
    tokens = getattr(task, which).tolist()
    if task.attention_mask is None:
        return tokens
    return [row[: sum(mask)] for row, mask in zip(tokens, task.attention_mask.tolist())]


# --- the task itself ----------------------------------------------------------------------------------------------------
def three() -> Task:
    return Task.from_tokens(
        "t", [[5, 6, 7], [8, 9], [1, 2, 3, 4]], [1, [2, 3], (4,)], [[7], [8], [9, 1]], [[5, 6, 1], [8, 2], [1, 2, 9, 4]],
        texts=["a", "b", "c"], groups=["x", "y", "x"], pad_token=60,
    )  # fmt: skip


def test_prompts_are_padded_on_the_right_and_answer_at_their_last_token() -> None:
    task = three()
    assert len(task) == 3
    assert task.clean.tolist() == [[5, 6, 7, 60], [8, 9, 60, 60], [1, 2, 3, 4]]
    assert task.corrupt is not None and task.corrupt.tolist() == [[5, 6, 1, 60], [8, 2, 60, 60], [1, 2, 9, 4]]
    assert task.attention_mask is not None and task.attention_mask.tolist() == [
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
    ]
    assert task.last.tolist() == [2, 1, 3]
    assert task.answers == ((1,), (2, 3), (4,)) and task.wrong == ((7,), (8,), (9, 1))
    values = torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    assert task.at_answer(values).tolist() == [[4.0, 5.0], [10.0, 11.0], [22.0, 23.0]]


def test_unpadded_prompts_have_no_mask() -> None:
    task = Task.from_tokens("t", torch.tensor([[1, 2], [3, 4]]), [[5], [6]])
    assert task.attention_mask is None and task.corrupt is None and task.wrong == ()
    assert task.last.tolist() == [1, 1]
    full = torch.ones(2, 2, dtype=torch.long)
    assert Task.from_tokens("t", torch.tensor([[1, 2], [3, 4]]), [[5], [6]], attention_mask=full).attention_mask is None


@pytest.mark.parametrize("picked", [[2, 0], slice(0, 3, 2), torch.tensor([True, False, True]), torch.tensor([0, 2])])
def test_some_of_the_prompts_keep_their_positions(picked: Any) -> None:
    task = three()
    some = task.select(picked)
    order = [2, 0] if picked == [2, 0] else [0, 2]
    assert some.clean.tolist() == task.clean[order].tolist() and some.corrupt.tolist() == task.corrupt[order].tolist()
    assert some.last.tolist() == task.last[order].tolist()
    assert some.answers == tuple(task.answers[i] for i in order) and some.wrong == tuple(task.wrong[i] for i in order)
    assert some.texts == tuple("abc"[i] for i in order) and some.groups == ("x", "x")


def test_a_selection_of_full_prompts_has_no_mask() -> None:
    assert three().select([2]).attention_mask is None


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"corrupt": [[5, 6, 1], [8], [1, 2, 9, 4]]}, TaskError, "prompt 1: 2 tokens clean and 1 corrupt"),
        ({"corrupt": [[5, 6, 1]]}, TaskError, "3 clean prompts and 1 corrupt"),
        ({"answers": [1, 2]}, TaskError, "3 prompts, 2 sets of answers"),
        ({"answers": [1, [], 4]}, TaskError, "Prompt 1 of task 't' has no answer"),
        ({"answers": [1, "x", 4]}, TaskError, "answers are token ids"),
        ({"answers": [1, 2.0, 4]}, TaskError, "answers are token ids"),
        ({"answers": [1, -2, 4]}, TaskError, "-2 is no token id"),
        ({"answers": [7, 2, 4]}, TaskError, "Prompt 0 of task 't' names a token twice"),
        ({"wrong": [[7], [], [9]]}, TaskError, "Prompt 1 of task 't' has no wrong tokens"),
        ({"wrong": [[7]]}, TaskError, "1 of wrong"),
        ({"groups": ["x"]}, TaskError, "3 prompts and 1 groups"),
        ({"clean": [[5, 6, 7], [], [1]], "corrupt": None}, TaskError, "at least one token"),
        ({"clean": [], "corrupt": None}, TaskError, "given 0 rows"),
        ({"clean": [[5.0], [6], [7]], "corrupt": None}, DtypeError, "integers"),
        ({"clean": [[5], [-6], [7]], "corrupt": None}, TaskError, "clean prompts hold -6"),
    ],
)
def test_what_makes_no_task_is_refused(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {
        "clean": [[5, 6, 7], [8, 9], [1, 2, 3, 4]], "answers": [1, 2, 4], "wrong": [7, 8, 9],
        "corrupt": [[5, 6, 1], [8, 2], [1, 2, 9, 4]],
    }  # fmt: skip
    Task.from_tokens("t", **given)
    with pytest.raises(error, match=match):
        Task.from_tokens("t", **(given | change))


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    clean = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ShapeError, match=r"\[2, 3\] and \[2, 2\]"):
        Task.from_tokens("t", clean, [7, 8], corrupt=clean[:, :2])
    with pytest.raises(DtypeError, match=r"float"):
        Task.from_tokens("t", clean.double(), [7, 8])
    with pytest.raises(TaskError, match="padded on the right"):
        Task.from_tokens("t", clean, [7, 8], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with pytest.raises(TaskError, match="leave attention_mask out"):
        Task.from_tokens("t", [[1, 2], [3]], [7, 8], attention_mask=torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match="attention mask"):
        Task.from_tokens("t", clean, [7, 8], attention_mask=torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"select\(rows\)"):
        three().at_answer(torch.zeros(2, 4, 5))
    for picked in ([3], [], "x"):
        with pytest.raises(TaskError, match="3"):
            three().select(picked)


# --- standard tasks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TASKS)
def test_standard_tasks_are_what_their_seed_makes_them(name: str) -> None:
    task = make_task(name, spaced(), n=12, seed=3)
    assert same(task, make_task(name, bpe(), n=12, seed=3))
    assert not same(task, make_task(name, spaced(), n=12, seed=4))
    assert task.name == name and len(task) == len(task.texts) == len(task.groups) == 12
    assert task.corrupt is not None and task.corrupt.shape == task.clean.shape
    assert bool((task.clean != task.corrupt).any(1).all())
    assert all(row[0] != 0 for row in rows(task)), "this tokenizer puts nothing in front"


@pytest.mark.parametrize("name", [name for name in TASKS if name != "induction"])
@pytest.mark.parametrize("tokenizer", ["bpe", "words"])
def test_texts_and_answers_are_those_of_the_tokenizer(name: str, tokenizer: str) -> None:
    """Clean text and each answer, tokenised together, are the prompt and that one token."""
    if (name, tokenizer) == ("docstring", "words"):
        pytest.skip("its marks are no words")
    made = spaced() if tokenizer == "bpe" else whole_words()
    task = make_task(name, made, n=10)
    unspaced = name == "greater_than" and tokenizer == "bpe"
    for text, prompt, answers, wrong in zip(task.texts, rows(task), task.answers, task.wrong):
        assert made(text)["input_ids"] == prompt
        for token in (*answers, *wrong):
            word = made.decode([token]).strip()
            assert made(text + ("" if unspaced else " ") + word)["input_ids"] == [*prompt, token]


def differing(task: Task, i: int, decode: Any) -> list[tuple[str, str]]:
    """Tokens at which prompt i and its counterpart differ."""
    pairs = zip(rows(task)[i], rows(task, "corrupt")[i])
    return [(decode([a]).strip(), decode([b]).strip()) for a, b in pairs if a != b]


def test_ioi_names_are_swapped_for_three_others() -> None:
    made, task = spaced(), make_task("ioi", spaced(), n=80)
    for i, text in enumerate(task.texts):
        indirect, subject = (made.decode(list(of[i])).strip() for of in (task.answers, task.wrong))
        assert text.count(f" {indirect}") == 1 and text.count(f" {subject}") == 2
        first = "ABBA" if text.index(indirect) < text.index(subject) else "BABA"
        assert task.groups[i].startswith(first)
        swapped = differing(task, i, made.decode)
        assert len(swapped) == 3 and len({new for _, new in swapped} | {subject, indirect}) == 5
        assert {new for _, new in swapped} <= set(words.NAMES)
        assert grammar.split_of("ioi", *sorted((indirect, subject))) == "test"
    orders = [group[:4] for group in task.groups]
    assert 20 < orders.count("ABBA") < 60 and len(set(task.groups)) > 10


def test_pronouns_follow_the_name() -> None:
    made, task = spaced(), make_task("pronoun", spaced(), n=40)
    for i in range(40):
        ((name, other),) = differing(task, i, made.decode)
        right, wrong = made.decode(list(task.answers[i])), made.decode(list(task.wrong[i]))
        assert (right, wrong) == ((" she", " he") if name in words.FEMALE_NAMES else (" he", " she"))
        assert (other in words.FEMALE_NAMES) != (name in words.FEMALE_NAMES)


@pytest.mark.parametrize("tokenizer", ["bpe", "words"])
def test_greater_than_asks_for_every_later_year(tokenizer: str) -> None:
    made = spaced() if tokenizer == "bpe" else whole_words()
    task = make_task("greater_than", made, n=40)
    for i in range(40):
        ((year, corrupt),) = differing(task, i, made.decode)
        assert corrupt == "01" and 2 <= int(year) <= 98
        assert [made.decode([t]) for t in task.answers[i]] == [f"{y:02d}" for y in range(int(year) + 1, 100)]
        assert [made.decode([t]) for t in task.wrong[i]] == [f"{y:02d}" for y in range(int(year) + 1)]
        century = made.decode(rows(task)[i][-1:]).strip()
        assert f"{century}{year}" in task.texts[i].replace(f"{century} ", century) and century in words.CENTURIES


@pytest.mark.parametrize("source", [100, "bpe", "model"])
def test_induction_repeats_random_tokens_of_any_vocabulary(source: Any) -> None:
    given = spaced() if source == "bpe" else models.build("gpt2") if source == "model" else source
    task = make_task("induction", given, n=20)
    period = 16 if source == "model" else 20  # a context of 32
    vocabulary = {"bpe": len(spaced()), "model": models.VOCAB}.get(source, 100)
    assert task.wrong == () and task.attention_mask is None
    for row, corrupt, answers in zip(task.clean.tolist(), task.corrupt.tolist(), task.answers):
        first, second = row[:period], row[period:]
        assert len(row) == 2 * period - 1 and second == first[:-1] and answers == (first[-1],)
        assert corrupt[period:] == second and len({*first, *corrupt[:period]}) == 2 * period
        assert grammar.split_of("induction", *map(str, first)) == "test"
        assert max(row) < vocabulary and (source != "bpe" or min(row) > 0)
    assert len({token for row in task.clean.tolist() for token in row}) > min(vocabulary, 200) / 2


def test_docstring_asks_for_the_next_argument() -> None:
    made, task = spaced(), make_task("docstring", spaced(), n=20)
    for i, text in enumerate(task.texts):
        arguments = text[text.index("self, ") + 6 : text.index(")")].split(", ")
        described = [line.split()[1].rstrip(":") for line in text.splitlines() if ":param " in line]
        assert described == arguments[1:3] and text.endswith(":param")
        assert made.decode(list(task.answers[i])) == f" {arguments[3]}"
        assert [made.decode([t])[1:] for t in task.wrong[i]] == [*arguments[:3], arguments[4]]
        swapped = differing(task, i, made.decode)
        assert [old for old, _ in swapped] == arguments and not {new for _, new in swapped} & set(arguments)


def test_agreement_flips_the_number_of_the_subject() -> None:
    made, task = spaced(), make_task("agreement", spaced(), n=40)
    pairs = {*words.PEOPLE_PAIRS, *words.THING_PAIRS}
    for i in range(40):
        (swap,) = differing(task, i, made.decode)
        plural = swap[::-1] in pairs
        assert plural or swap in pairs
        assert sum(word in swap for word in task.texts[i].split()) == 1, "the other noun is another one"
        right, wrong = ([made.decode([t]).strip() for t in of[i]] for of in (task.answers, task.wrong))
        assert right == (["are", "were", "have"] if plural else ["is", "was", "has"])
        assert wrong == (["is", "was", "has"] if plural else ["are", "were", "have"])
    assert len({text for text in task.texts if " near " in text or " from " in text}) > 5


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt(name: str) -> None:
    texts = [set(make_task(name, spaced(), n=40, split=split).texts) for split in grammar.SPLITS]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_words_that_a_tokenizer_splits_are_left_out() -> None:
    gone = [f" {name}" for name in words.NAMES[:20]]
    made = bpe(without=gone)
    task = make_task("ioi", made, n=60)
    assert not any(name in f"{text} " for text in task.texts for name in (f"{name} " for name in gone))
    assert any(" Mary " in text for text in make_task("ioi", spaced(), n=200, split="train").texts)


@pytest.mark.parametrize(
    "name, without, whole_years, match",
    [
        ("ioi", words.NAMES[:55], False, r"of 60 names it has 5 .* 'Mary', 'Anna'"),
        ("pronoun", ["she"], False, r"of 2 pronouns it has 1 .* 'she'"),
        ("pronoun", words.MALE_NAMES[:27], False, r"of 30 names of he it has 3 .*'John'"),
        ("greater_than", (), True, r"years as two tokens.*'00', '01'.* 86 more"),
        ("docstring", words.ARGUMENTS[:40], False, r"names of arguments .*'size'"),
        ("agreement", [word for pair in words.PEOPLE_PAIRS + words.THING_PAIRS[:12] for word in pair], False, "nouns"),
        ("agreement", ["are", "were", "has"], False, r"of 3 verbs .* 'are', 'were', 'has'"),
    ],
)
def test_a_task_that_cannot_be_written_is_refused_with_the_words(
    name: str, without: Any, whole_years: bool, match: str
) -> None:
    made = bpe([f" {word}" for word in without], whole_years)
    with pytest.raises(TokenizerTaskError, match=f"{name!r} cannot be written with this tokenizer.*{match}"):
        make_task(name, made, n=4)


def test_unknown_words_are_never_passed_off_as_tokens() -> None:
    with pytest.raises(TokenizerTaskError, match="templates"):
        make_task("docstring", whole_words(), n=4)
    task = make_task("ioi", whole_words([f" {word}" for word in ("When", "store", "book")]), n=60)
    assert not any({"When", "store", "book"} & set(text.replace(",", "").split()) for text in task.texts)
    unknown = whole_words().unk_token_id
    assert not any(unknown in row for row in rows(task))


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_real_tokenizers_that_split_words(name: str) -> None:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(assets() / "models" / name)
    for task in ("ioi", "pronoun", "greater_than", "docstring", "agreement"):
        with pytest.raises(TokenizerTaskError, match="cannot be written with this tokenizer"):
            make_task(task, made)
    task = make_task("induction", made, n=6)
    assert bool((task.clean[:, 0] == made.bos_token_id).all()), "this tokenizer puts <s> in front"
    assert not {made.bos_token_id, made.eos_token_id, made.unk_token_id} & set(task.clean[:, 1:].flatten().tolist())


def test_what_stands_in_front() -> None:
    itself, silent = bpe(bos_by_itself=True), spaced()
    assert all(row[0] == 0 for row in rows(make_task("ioi", itself, n=4)))
    assert all(row[0] == 0 for row in rows(make_task("ioi", silent, n=4, prepend_bos=True)))
    assert all(row[0] != 0 for row in rows(make_task("ioi", itself, n=4, prepend_bos=False)))
    model = models.hooked(d_vocab=len(silent))
    for default in (True, False):
        model.tokenizer, model.cfg.default_prepend_bos = silent, default
        assert all((row[0] == 0) == default for row in rows(make_task("ioi", model, n=4)))
    with pytest.raises(SettingError, match="no beginning-of-sequence"):
        make_task("ioi", whole_words(), prepend_bos=True)
    with pytest.raises(SettingError, match="bare vocabulary"):
        make_task("induction", 50, prepend_bos=True)


def test_a_model_must_have_the_tokens_and_the_room() -> None:
    model = models.hooked(d_vocab=300)
    model.tokenizer = spaced()
    with pytest.raises(TokenizerTaskError, match="of 60 names"):
        make_task("ioi", model)
    assert int(make_task("induction", model).clean.max()) < 300
    model = models.hooked(d_vocab=len(spaced()), n_ctx=10)
    model.tokenizer = spaced()
    with pytest.raises(TokenizerTaskError, match="and the model reads 10"):
        make_task("ioi", model)


@pytest.mark.parametrize(
    "args, match",
    [
        (("iio", 50), "Unknown task 'iio'; the tasks are ioi, pronoun"),
        (("induction", 50, 4, 0, "dev"), "Unknown split 'dev'; the splits are train"),
        (("induction", 50, 0), "n = 0"),
        (("induction", "gpt2"), "'micro-gpt2'; given 'gpt2'"),
        (("induction", 0), "at least one token; given 0"),
        (("induction", torch.nn.Linear(2, 2)), "embeds no tokens"),
        (("induction", object()), "not object"),
    ],
)
def test_settings_that_make_no_sense(args: tuple[Any, ...], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        make_task(*args)


def test_a_vocabulary_is_no_tokenizer_and_may_be_too_small() -> None:
    with pytest.raises(TokenizerTaskError, match="Text needs a tokenizer|'ioi' cannot be written"):
        make_task("ioi", 1000)
    with pytest.raises(TokenizerTaskError, match="here are 3"):
        make_task("induction", 3)


# --- micro-gpt2 ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", grammar.TASKS)
def test_micro_gpt2_has_its_own_prompts(name: str) -> None:
    task, prompts = make_task(name, "micro-gpt2", n=30, seed=5), tlpd.micro_gpt2_prompts(name, 30, seed=5)
    assert rows(task) == [prompt.tokens.tolist() for prompt in prompts]
    assert rows(task, "corrupt") == [prompt.corrupted.tolist() for prompt in prompts]
    assert task.answers == tuple(prompt.answers for prompt in prompts) and task.texts == tuple(p.text for p in prompts)
    assert task.wrong == (() if name == "induction" else tuple(prompt.wrong for prompt in prompts))
    assert "other" not in task.groups
    for text, group in zip(task.texts, task.groups):
        if name == "ioi":
            names = [word for word in text.split() if word in grammar.NAMES]
            assert group[:4] == ("BABA" if names[0] == names[2] else "ABBA")
            assert text.startswith(group[6:].split("{")[0])


@pytest.mark.parametrize("host", [*MICRO_HOSTS, "tokenizer"])
def test_micro_gpt2_is_known_on_every_host(host: str) -> None:
    model = tlpd.micro_gpt2_tokenizer() if host == "tokenizer" else micro(host)
    task = make_task("ioi", model, n=8)
    assert same(task, make_task("ioi", "micro-gpt2", n=8)) and bool((task.clean[:, 0] == 0).all())
    for name in ("docstring", "agreement"):
        with pytest.raises(TokenizerTaskError, match=f"micro-gpt2 was not trained on task '{name}'"):
            make_task(name, model)


def test_micro_gpt2_without_the_mark() -> None:
    with_mark, without = (make_task("greater_than", "micro-gpt2", n=5, prepend_bos=b) for b in (None, False))
    assert without.clean.tolist() == with_mark.clean[:, 1:].tolist()


# --- files --------------------------------------------------------------------------------------------------------------
def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("name", ["ioi", "induction", "greater_than"])
def test_a_saved_task_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    task = make_task(name, "micro-gpt2", n=9)
    assert same(load_task(task.save(tmp_path / "task.jsonl")), task)
    assert same(load_task(tmp_path / "task.jsonl", micro("transformers")), task)
    plain = Task.from_tokens("plain", [[1, 2], [3]], [4, 5])
    assert same(load_task(plain.save(tmp_path / "plain.jsonl")), plain)


def test_a_task_from_texts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"clean": "So John is", "corrupt": "So Mary is", "answer": " he", "wrong": [" she"], "group": "a"},
        "",
        {"clean": "Then John left", "corrupt": "Then Mary left", "answer": [" is", 7], "wrong": " was", "group": "b"},
    )
    made = spaced()
    task = load_task(path, made)
    assert task.name == "mine" and task.texts == ("So John is", "Then John left") and task.groups == ("a", "b")
    assert rows(task) == [made(text)["input_ids"] for text in task.texts]
    assert rows(task, "corrupt") == [made(text)["input_ids"] for text in ("So Mary is", "Then Mary left")]
    one = made.convert_tokens_to_ids
    assert task.answers == ((one("Ġhe"),), (one("Ġis"), 7)) and task.wrong == ((one("Ġshe"),), (one("Ġwas"),))
    assert all(row[0] == 0 for row in rows(load_task(path, bpe(bos_by_itself=True), name="other")))
    assert load_task(path, made, name="other").name == "other"


def test_a_task_from_texts_for_micro_gpt2_has_its_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"clean": "so john is a great doctor , isn't", "answer": " he", "wrong": " she"})
    task = load_task(path, micro("transformers"))
    assert task.clean[0].tolist() == [0, *tlpd.micro_gpt2_tokenizer()("so john is a great doctor , isn't")["input_ids"]]


GOOD = {"clean": "So John is", "corrupt": "So Mary is", "answer": " he", "wrong": " she"}


@pytest.mark.parametrize(
    "lines, error, match",
    [
        ([], TaskError, "is empty"),
        (["", " "], TaskError, "is empty"),
        ([GOOD, "{"], TaskError, "line 2 is not JSON"),
        ([[1]], TaskError, "line 1 is no JSON object"),
        ([{"clean": "So John is"}], TaskError, r"line 1 lacks \['answer'\]"),
        ([GOOD | {"right": 1}], TaskError, r"line 1 has unknown fields \['right'\]"),
        ([GOOD | {"corrupt": "So John Mary is"}], TaskError, "4 tokens clean and 5 corrupt"),
        ([GOOD, {"clean": "So John is", "answer": " he"}], TaskError, "line 2 has no 'corrupt'"),
        ([GOOD | {"answer": " zebra"}], TokenizerTaskError, r"answer ' zebra' adds \d tokens, and must add one"),
        ([GOOD | {"wrong": [" she", " he he"]}], TokenizerTaskError, "wrong ' he he' adds 2 tokens"),
        ([GOOD | {"answer": "he"}], TokenizerTaskError, "'he' adds 2 tokens, .* begin it with a space"),
        ([GOOD | {"answer": "n"}], TokenizerTaskError, "'n' changes the prompt's last token"),
        ([GOOD | {"answer": []}], TaskError, "no answer"),
        ([GOOD | {"answer": 2.5}], TaskError, "'answer' is a text"),
        ([GOOD | {"clean": 3}], TaskError, "a text or a list of token ids"),
        ([GOOD | {"clean": [1, 2, 3, 4], "answer": " he"}], TaskError, "a text behind a text"),
        ([GOOD | {"task": "a"}, GOOD | {"task": "b"}], TaskError, r"several tasks \(a, b\)"),
    ],
)
def test_files_that_hold_no_task(tmp_path: Path, lines: list[Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        load_task(write(tmp_path / "x.jsonl", *lines), spaced())


def test_texts_need_a_tokenizer_and_files_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(TaskError, match="give load_task a tokenizer"):
        load_task(path)
    with pytest.raises(TokenizerTaskError, match="Text needs a tokenizer"):
        load_task(path, models.build("gpt2"))
    with pytest.raises(TokenizerTaskError, match="unknown token"):
        load_task(write(tmp_path / "y.jsonl", GOOD | {"clean": "So Zebra is"}), whole_words())
    with pytest.raises(TokenizerTaskError, match="cannot write"):
        load_task(tmp_path / "y.jsonl", "micro-gpt2")
    with pytest.raises(DecompositionFileError, match="nothing"):
        load_task(tmp_path / "nothing.jsonl", spaced())
    with pytest.raises(DecompositionFileError, match="write"):
        three().save(tmp_path / "no" / "folder.jsonl")
