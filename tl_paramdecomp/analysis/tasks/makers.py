"""The field's standard tasks as seeded generators that write for any tokenizer, or say why they cannot.

    ioi           "When Mary and John got to the store, John handed a ring to"        " Mary", not " John"
    pronoun       "So John is a great doctor, isn't"                                  " he", not " she"
    greater_than  "The war lasted from the year 1741 to the year 17"                  "42" to "99", not "00" to "41"
    induction     random tokens, and the same again without the last                  the last
    docstring     "def load(self, size, name, path, data, key): ... :param"           " data", not another argument
    agreement     "The keys near the cabinet"                                         " are", " were", not " is", " was"

Sources: Wang et al. (arXiv 2211.00593) for indirect object identification and its ABC counterpart of three other names;
Hanna et al. (arXiv 2305.00586) for greater-than and its counterpart of year 01; Heimersheim and Janiak, "A circuit for
Python docstrings in a 4-layer attention-only transformer" (LessWrong, 2023); Marks et al. (arXiv 2403.19647) for
subject-verb agreement. Words and templates are the package's own.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tl_paramdecomp.analysis.tasks import words
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.data.tokenizer import RowTokenizer, named_words, prompt_tokenizer
from tl_paramdecomp.errors import SettingError, TokenizerTaskError
from tl_paramdecomp.pretrained import grammar, micro_gpt2_prompts
from tl_paramdecomp.pretrained.grammar import split_of
from tl_paramdecomp.settings import Seed, Whole, fit

DRAWS = 3000
"""Draws for one prompt before it is said that there is none."""
PERIOD = 20
"""Tokens that induction repeats, where the vocabulary and the model's context have room for them."""


class Instance(NamedTuple):
    """One prompt before it is tokenised; answers that are numbers are token ids already."""

    key: tuple[str, ...]
    """What makes it a different instance; its checksum decides the split."""
    clean: str
    corrupt: str
    answers: tuple[str | int, ...]
    wrong: tuple[str | int, ...]
    group: str


class Row(NamedTuple):
    """One prompt as token ids."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    text: str
    group: str


def make_task(
    name: str,
    tokenizer_or_model: Any,
    n: int = 64,
    seed: int = 0,
    split: str = "test",
    *,
    prepend_bos: bool | None = None,
    decomposition: Any = None,
) -> Task:
    """Prompts of a standard task, the same for the same arguments; nothing is downloaded.

    Clean and corrupt prompts have as many tokens, answers are single tokens, and both are seen with the tokenizer at
    hand: words it splits are left out. Prompts of different templates may differ in length; they are padded on the right.

    Corrupt prompts: three other names (ioi), a name of the other gender (pronoun), the first year 01 (greater_than), an
    unrelated first copy (induction), a signature of other arguments (docstring), the subject in the other number
    (agreement). Induction repeats 20 tokens, or as many as vocabulary and context have room for.

    A checksum of each instance's content (the pair of names, say) sends it to one of the splits: 80 % train, 10 %
    validation, 10 % test. For micro-gpt2 the prompts are `micro_gpt2_prompts`, whose test split it was not trained on.

    Args:
        name: "ioi", "pronoun", "greater_than", "induction", "docstring" or "agreement"; the first four for micro-gpt2.
        tokenizer_or_model: A transformers tokenizer, a model on any host that holds one as `model.tokenizer`, "micro-gpt2"
            or that model on any host; for induction also a model without a tokenizer, or the size of a vocabulary.
        split: "train", "validation" or "test".
        prepend_bos: Whether the beginning-of-sequence token stands in front. None: as in the rows that the decomposition was
            made on; else always for micro-gpt2, as `cfg.default_prepend_bos` of a HookedTransformer or TransformerBridge says,
            and otherwise where the tokenizer itself puts it there (Llama's does, GPT-2's does not); never for a vocabulary
            size.
        decomposition: Whose rows the prompts are to be like.

    Raises:
        SettingError: There is no such task or split, n is below 1, or this is neither a tokenizer nor a model.
        TokenizerTaskError: The task cannot be written with this tokenizer; the message names the words. Or the prompts are
            longer than the model's context.
    """
    if name not in _WRITTEN and name != "induction":
        raise SettingError(f"Unknown task {name!r}; the tasks are {', '.join(TASKS)}.")
    if split not in grammar.SPLITS:
        raise SettingError(f"Unknown split {split!r}; the splits are {', '.join(grammar.SPLITS)}.")
    n, seed = fit(n, Whole, "n"), fit(seed, Seed, "seed")
    if n < 1:
        raise SettingError(f"A task has at least one prompt; given n = {n}.")
    writer = prompt_tokenizer(tokenizer_or_model, prepend_bos, decomposition)
    if writer.is_micro_gpt2:
        rows = _micro_gpt2_rows(name, writer, n, seed, split)
    else:
        make = _induction_rows if name == "induction" else _written_rows
        rows = make(name, writer, n, random.Random(f"tasks/{name}/{split}/{seed}"), split)
    longest = max(len(row.clean) for row in rows)
    if writer.n_ctx is not None and longest > writer.n_ctx:
        raise TokenizerTaskError(
            f"The prompts of task {name!r} take up to {longest} tokens, and the model reads {writer.n_ctx}."
        )
    clean, corrupt, answers, wrong, texts, groups = zip(*rows)
    return Task.from_tokens(name, clean, answers, wrong, corrupt, texts=texts, groups=groups)


# --- rows -------------------------------------------------------------------------------------------------------------
def _written_rows(name: str, writer: RowTokenizer, n: int, rng: random.Random, split: str) -> list[Row]:
    rows = []
    instances = _WRITTEN[name](writer, rng)
    while len(rows) < n:
        drawn = (i for i in itertools.islice(instances, DRAWS) if split_of(name, *i.key) == split)
        row = next(filter(None, (_tokenised(writer, instance) for instance in drawn)), None)
        if row is None:
            raise TokenizerTaskError(
                f"Task {name!r} cannot be written with this tokenizer for the split {split!r}: of {DRAWS} drawn prompts none "
                "belongs to it and has a counterpart of as many tokens and answers of one. The tokenizer splits too many of "
                "the words; take another split or task."
            )
        rows.append(row)
    return rows


def _tokenised(writer: RowTokenizer, instance: Instance) -> Row | None:
    """An instance as token ids; None where its two prompts differ in length or an answer is not one token."""
    clean, corrupt = (writer.start + writer.encode(text) for text in (instance.clean, instance.corrupt))
    answers, wrong = (
        tuple(token if isinstance(token, int) else writer.next_token(instance.clean, token) for token in some)
        for some in (instance.answers, instance.wrong)
    )
    if len(clean) != len(corrupt) or clean == corrupt or None in answers + wrong:
        return None
    if len(set(answers + wrong)) != len(answers + wrong):
        return None
    return Row(clean, corrupt, answers, wrong, instance.clean, instance.group)  # type: ignore[arg-type]


def _induction_rows(name: str, writer: RowTokenizer, n: int, rng: random.Random, split: str) -> list[Row]:
    ids = writer.plain_ids()
    room = PERIOD if writer.n_ctx is None else (writer.n_ctx - len(writer.start) + 1) // 2
    period = min(PERIOD, len(ids) // 2, room)
    if period < 2:
        raise TokenizerTaskError(
            f"Task {name!r} repeats at least 2 of at least 4 tokens; here are {len(ids)} that are not special, and the "
            f"context is {writer.n_ctx}."
        )
    rows = []
    for _ in range(n):
        for _ in range(DRAWS):
            drawn = tuple(rng.sample(ids, 2 * period))
            copy, other = drawn[:period], drawn[period:]
            if split_of(name, *map(str, copy)) == split:
                break
        else:
            raise TokenizerTaskError(f"{len(ids)} tokens have too few orders for the split {split!r} of task {name!r}.")
        clean, corrupt = (writer.start + first + copy[:-1] for first in (copy, other))
        rows.append(Row(clean, corrupt, (copy[-1],), (), writer.decode(clean), f"period {period}"))
    return rows


def _micro_gpt2_rows(name: str, writer: RowTokenizer, n: int, seed: int, split: str) -> list[Row]:
    if name not in grammar.TASKS:
        raise TokenizerTaskError(
            f"micro-gpt2 was not trained on task {name!r} and its 275 words cannot write it; its tasks are "
            f"{', '.join(grammar.TASKS)}."
        )
    rows = []
    for prompt in micro_gpt2_prompts(name, n, seed, split):
        assert prompt.corrupted is not None
        clean, corrupt = (writer.start + tuple(tokens.tolist())[1:] for tokens in (prompt.tokens, prompt.corrupted))
        group = _micro_gpt2_group(name, prompt.text.split(), prompt.answers, clean)
        rows.append(Row(clean, corrupt, prompt.answers, prompt.wrong, prompt.text, group))
    return rows


def _micro_gpt2_group(name: str, text: list[str], answers: tuple[int, ...], clean: tuple[int, ...]) -> str:
    """The template that a prompt fills, and for IOI the order of its names."""
    if name == "induction":
        return f"period {len(text) // 2 + 1}"
    templates: Iterable[str] = {
        "ioi": grammar.IOI_TEMPLATES,
        "pronoun": tuple(template for template, _ in grammar.PRONOUN_TEMPLATES),
        "greater_than": grammar.GREATER_THAN_TEMPLATES,
    }[name]
    for template in templates:
        slots = template.split()
        if len(slots) == len(text) and all(slot.startswith("{") or slot == word for slot, word in zip(slots, text)):
            if name != "ioi":
                return template
            first = next(token for token in clean if grammar.VOCABULARY[token] in grammar.NAMES)
            return f"{'ABBA' if first in answers else 'BABA'}: {template}"
    return "other"


# --- words that a tokenizer has -----------------------------------------------------------------------------------------
def _single(writer: RowTokenizer, task: str, what: str, candidates: Iterable[Any], need: int) -> tuple[Any, ...]:
    """The words, or pairs of words, that are one token each behind a space; at least as many as needed."""
    parts = {c: (c,) if isinstance(c, str) else c for c in candidates}
    split = [w for w in dict.fromkeys(sum(parts.values(), ())) if writer.next_token("the", f" {w}") is None]
    found = tuple(c for c, some in parts.items() if not set(some) & set(split))
    if len(found) < need:
        raise TokenizerTaskError(
            f"Task {task!r} cannot be written with this tokenizer: of {len(parts)} {what} it has {len(found)} as one "
            f"token behind a space, and {need} are needed. It splits, or does not know, {named_words(split)}."
        )
    return found


def _writable(writer: RowTokenizer, task: str, what: str, candidates: Iterable[str]) -> tuple[str, ...]:
    """The words or templates of which the tokenizer can write every part, in as many tokens as it takes."""
    candidates = tuple(candidates)
    found = [text for text in candidates if writer.can_write(" " + re.sub(r"\{\w+\}", "the", text))]
    if not found:
        raise TokenizerTaskError(
            f"Task {task!r} cannot be written with this tokenizer: it has no tokens for any of its {what}, "
            f"{named_words(candidates, 4)}."
        )
    return tuple(found)


def _slots(writer: RowTokenizer, task: str, **words_of: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Words that the tokenizer can write, by the slot of a template that they fill."""
    return {slot: _writable(writer, task, "words", some) for slot, some in words_of.items()}


def _filled(template: str, rng: random.Random, **slots: Sequence[str]) -> str:
    """A template with a word drawn for each of these slots; the others stay."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(slots[slot[1]]) if slot[1] in slots else slot[0], template)


# --- the tasks ----------------------------------------------------------------------------------------------------------
def _ioi(writer: RowTokenizer, rng: random.Random) -> Iterator[Instance]:
    names = _single(writer, "ioi", "names", words.NAMES, 8)
    slots = _slots(writer, "ioi", place=words.PLACES, object=words.OBJECTS)
    templates = _writable(writer, "ioi", "templates", words.IOI_TEMPLATES)
    while True:
        template = rng.choice(templates)
        frame = _filled(template, rng, **slots)
        first, second, *others = rng.sample(names, 5)
        order = rng.choice(("ABBA", "BABA"))
        subject, indirect = (second, first) if order == "ABBA" else (first, second)
        yield Instance(
            tuple(sorted((first, second))),
            frame.format(A=first, B=second, S=subject),
            frame.format(A=others[0], B=others[1], S=others[2]),
            (f" {indirect}",),
            (f" {subject}",),
            f"{order}: {template}",
        )


def _pronoun(writer: RowTokenizer, rng: random.Random) -> Iterator[Instance]:
    names = {
        pronoun: _single(writer, "pronoun", f"names of {pronoun}", some, 4)
        for pronoun, some in (("she", words.FEMALE_NAMES), ("he", words.MALE_NAMES))
    }
    _single(writer, "pronoun", "pronouns", names, 2)
    slots = _slots(writer, "pronoun", adj=words.ADJECTIVES, job=words.JOBS, place=words.PLACES)
    templates = _writable(writer, "pronoun", "templates", words.PRONOUN_TEMPLATES)
    while True:
        template = rng.choice(templates)
        right, wrong = rng.sample(("he", "she"), 2)
        name, other = rng.choice(names[right]), rng.choice(names[wrong])
        frame = _filled(template, rng, **slots)
        clean, corrupt = frame.format(N=name), frame.format(N=other)
        yield Instance((name, frame), clean, corrupt, (f" {right}",), (f" {wrong}",), template)


def _years(writer: RowTokenizer) -> tuple[str, tuple[int, ...], dict[str, tuple[str, ...]]]:
    """What stands between a century's token and that of two digits, those of 00 to 99, and first years by century."""
    missing: tuple[str, ...] = words.YEARS
    for between in ("", " "):
        ids: dict[str, int] = {}
        split: dict[str, list[str]] = {}
        for century in words.CENTURIES:
            token = writer.next_token("the year", f" {century}")
            for year in words.YEARS if token is not None else ():
                added = writer.added("the year", f" {century}{between}{year}") or ()
                if len(added) == 2 and added[0] == token and ids.setdefault(year, added[1]) == added[1]:
                    split.setdefault(century, []).append(year)
        missing = tuple(year for year in words.YEARS if year not in ids)
        usable = {c: tuple(y for y in years if "02" <= y <= "98") for c, years in split.items() if "01" in years}
        if not missing and any(usable.values()):
            return between, tuple(ids[y] for y in words.YEARS), {c: y for c, y in usable.items() if y}
    raise TokenizerTaskError(
        "Task 'greater_than' cannot be written with this tokenizer: it needs years as two tokens, of the century and of two "
        f"digits (' 17' and '41', or ' 17' and ' 41'), and this one does not write {named_words(missing, 6)} of any century "
        "so."
    )


def _greater_than(writer: RowTokenizer, rng: random.Random) -> Iterator[Instance]:
    between, ids, first_years = _years(writer)
    events = _writable(writer, "greater_than", "words", words.EVENTS)
    templates = _writable(writer, "greater_than", "templates", words.GREATER_THAN_TEMPLATES)
    centuries = tuple(first_years)
    while True:
        template, event, century = rng.choice(templates), rng.choice(events), rng.choice(centuries)
        year = rng.choice(first_years[century])
        clean, corrupt = (
            template.format(event=event, first=f"{century}{between}{digits}", C=century) for digits in (year, "01")
        )
        later = int(year) + 1
        yield Instance((event, century, year), clean, corrupt, ids[later:], ids[:later], template)


def _docstring(writer: RowTokenizer, rng: random.Random) -> Iterator[Instance]:
    arguments = _single(writer, "docstring", "names of arguments", words.ARGUMENTS, 14)
    slots = _slots(writer, "docstring", function=words.FUNCTIONS, w=words.DESCRIPTIONS, t=words.THINGS)
    templates = _writable(writer, "docstring", "templates", words.DOCSTRING_TEMPLATES)
    while True:
        number = rng.randrange(len(templates))
        frame = _filled(templates[number], rng, **slots)
        signature, text = frame.split("\n", 1)
        drawn = rng.sample(arguments, 10)
        own, others = (dict(zip("abcde", some)) for some in (drawn[:5], drawn[5:]))
        described = text.format(**own)
        yield Instance(
            tuple(own[letter] for letter in "bcd"),
            f"{signature.format(**own)}\n{described}",
            f"{signature.format(**others)}\n{described}",
            (f" {own['d']}",),
            tuple(f" {own[letter]}" for letter in "abce"),
            f"docstring {number + 1}",
        )


def _agreement(writer: RowTokenizer, rng: random.Random) -> Iterator[Instance]:
    people, things = words.PEOPLE_PAIRS, words.THING_PAIRS
    nouns = _single(writer, "agreement", "nouns in both numbers", [*people, *things], 8)
    verbs = _single(writer, "agreement", "verbs in both numbers", words.VERB_PAIRS, 1)
    templates = _writable(writer, "agreement", "templates", words.AGREEMENT_TEMPLATES)
    between = _slots(writer, "agreement", thing=sum(things, ()), person=sum(people, ()))
    while True:
        template, noun = rng.choice(templates), rng.choice(nouns)
        others = {slot: [word for word in some if word not in noun] for slot, some in between.items()}
        frame = _filled(template, rng, **others)
        number = rng.randrange(2)
        clean, corrupt = frame.format(noun=noun[number]), frame.format(noun=noun[1 - number])
        right, wrong = (tuple(f" {pair[of]}" for pair in verbs) for of in (number, 1 - number))
        yield Instance((noun[0], frame), clean, corrupt, right, wrong, f"{('singular', 'plural')[number]}: {template}")


_WRITTEN = {
    "ioi": _ioi,
    "pronoun": _pronoun,
    "greater_than": _greater_than,
    "docstring": _docstring,
    "agreement": _agreement,
}
"""Endless prompts of each task."""
TASKS = ("ioi", "pronoun", "greater_than", "induction", "docstring", "agreement")
"""The standard tasks by name."""
