"""The grammar of micro-gpt2: what a prompt is, and that training text never holds what the other splits ask."""

import random
from itertools import islice

import pytest

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.pretrained import grammar
from tl_paramdecomp.pretrained.grammar import END_OF_TEXT, FEMALE_NAMES, NAMES, SPLITS, TASKS, TOKEN_IDS, VOCABULARY

GIVING = {f"{verb} a {thing} to" for verb in grammar.GIVING for thing in grammar.OBJECTS}


def training_documents(n_rows: int = 3000) -> list[list[str]]:
    """Return the whole documents of the packed rows of training text, cut apart at their marks."""
    documents = []
    for row in islice(grammar.rows(0), n_rows):
        if row.weights[1] < 1:
            continue  # random words
        pieces = " ".join(row.words).split(END_OF_TEXT)
        documents += [piece.split() for piece in pieces[1:-1]]
    return documents


def test_vocabulary_is_distinct_words_after_the_mark() -> None:
    assert VOCABULARY[0] == END_OF_TEXT
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert all(word == word.lower() and " " not in word for word in VOCABULARY)
    assert len(NAMES) == 48 and not any("{" in word for word in VOCABULARY)


def test_rows_are_known_words_of_one_length() -> None:
    for row in islice(grammar.rows(3), 500):
        assert len(row.words) == len(row.weights) == len(row.floors) == grammar.N_CTX
        assert all(word in TOKEN_IDS for word in row.words)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_repeat_and_stay_aligned(task: str, split: str) -> None:
    made = grammar.prompts(task, 100, seed=5, split=split)
    assert made == grammar.prompts(task, 100, seed=5, split=split)
    assert made != grammar.prompts(task, 100, seed=6, split=split)
    for prompt in made:
        assert len(prompt.words) == len(prompt.corrupted) < grammar.N_CTX
        assert prompt.answers and not set(prompt.answers) & set(prompt.wrong)


def test_ioi_has_both_orders_and_a_counterpart_of_three_names() -> None:
    made = grammar.prompts("ioi", 1000)
    abba = 0
    for prompt in made:
        names = [word for word in prompt.words if word in NAMES]
        (indirect,), (subject,) = prompt.answers, prompt.wrong
        assert sorted(names) == sorted([indirect, subject, subject]) and names[-1] == subject
        abba += names[0] == indirect
        others = [word for word in prompt.corrupted if word in NAMES]
        assert len(set(others)) == 3 and not set(others) & set(names)
        changed = [i for i, (a, b) in enumerate(zip(prompt.words, prompt.corrupted, strict=True)) if a != b]
        assert all(prompt.words[i] in NAMES for i in changed)
    assert 440 < abba < 560  # four standard deviations of 1000 fair draws are 63


def test_pronoun_counterpart_has_the_other_gender() -> None:
    for prompt in grammar.prompts("pronoun", 200):
        name = next(word for word in prompt.words if word in NAMES)
        other = next(word for word in prompt.corrupted if word in NAMES)
        assert prompt.answers == (("she",) if name in FEMALE_NAMES else ("he",))
        assert (name in FEMALE_NAMES) != (other in FEMALE_NAMES)


def test_greater_than_answers_are_all_later_years() -> None:
    for prompt in grammar.prompts("greater_than", 200):
        where = prompt.words.index("year")
        century, first = prompt.words[where + 1], int(prompt.words[where + 2])
        assert prompt.words[-1] == century
        assert [int(year) for year in prompt.answers] == list(range(first + 1, 100))
        assert [int(year) for year in prompt.wrong] == list(range(first + 1))
        assert prompt.corrupted[where + 2] == "01"


def test_induction_repeats_distinct_words_and_its_counterpart_does_not() -> None:
    for prompt in grammar.prompts("induction", 100):
        copy, again = prompt.words[:20], prompt.words[20:]
        assert len(set(copy)) == 20 and copy == (*again, *prompt.answers) and END_OF_TEXT not in copy
        assert prompt.corrupted[20:] == again and not set(prompt.corrupted[:20]) & set(copy)


def test_training_text_never_holds_what_other_splits_ask() -> None:
    documents = training_documents()
    assert len(documents) > 4000
    pairs, years, descriptions = set(), set(), set()
    for words in documents:
        text = " ".join(words)
        if any(frame in text for frame in GIVING):
            pairs.add(frozenset(word for word in words if word in NAMES))
        elif " year " in text:
            event = next(word for word in words if word in grammar.EVENTS)
            where = words.index("year")
            years.add((event, words[where + 1], words[where + 2]))
        elif "isn't" in words or "because" in words:
            descriptions.add((next(word for word in words if word in NAMES), " ".join(words)))
    assert min(len(pairs), len(years), len(descriptions)) > 500
    framed = {name for pair in pairs for name in pair}
    assert framed == set(grammar.FRAMED_NAMES)
    for split in ("validation", "test"):
        for prompt in grammar.prompts("ioi", 300, split=split):
            asked = {prompt.answers[0], prompt.wrong[0]}
            assert not any(asked <= pair for pair in pairs)
        for prompt in grammar.prompts("greater_than", 300, split=split):
            event = next(word for word in prompt.words if word in grammar.EVENTS)
            where = prompt.words.index("year")
            assert (event, prompt.words[where + 1], prompt.words[where + 2]) not in years
        for prompt in grammar.prompts("pronoun", 300, split=split):
            name, asked = next(word for word in prompt.words if word in NAMES), " ".join(prompt.words)
            assert not any(name == known and text.startswith(asked) for known, text in descriptions)


def test_answers_weigh_more_and_years_carry_what_they_exceed() -> None:
    rng = random.Random(0)
    for _ in range(500):
        made = grammar.document(rng)
        for word, weight, floor in zip(made.words, made.weights, made.floors, strict=True):
            assert (weight == grammar.ANSWER_WEIGHT) or floor == -1
            assert floor == -1 or int(word) > floor
        assert sum(weight == grammar.ANSWER_WEIGHT for weight in made.weights) <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("sorting", 1), "greater_than"), (("ioi", 1, 0, "held-out"), "validation"), (("ioi", -1), "negative")],
)
def test_wrong_arguments_are_named(arguments: tuple, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        grammar.prompts(*arguments)
