"""The language of micro-gpt2: very short stories that contain four standard tasks.

Plain Python and seeded. A *document* is a list of words with, for every word, how much predicting it counts in
training; a *row* is a fixed number of words cut from packed documents; a *prompt* ends right before the word that
solves a task.

    ioi           "when mary and john went to the store , john gave a book to" -> "mary"
    pronoun       "so john is a great doctor , isn't" -> "he"
    greater_than  "the war lasted from the year 17 41 to the year 17" -> any of "42" ... "99"
    induction     "fox river mary 31 ... fox river mary" -> "31"

Every task instance has a key (the pair of names, the name and adjective, the noun and years, the random words), and
`split_of` sends each key to exactly one of train, validation and test. Training text holds train keys only, so a prompt
of another split asks for something that was never shown. Four names stay out of the IOI frames altogether.
"""

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tl_paramdecomp.errors import SettingError

N_CTX = 64
END_OF_TEXT = "<|endoftext|>"
TASKS = ("ioi", "pronoun", "greater_than", "induction")
SPLITS = ("train", "validation", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    "mary anna emma sarah laura julia kate alice ruth helen jane rose "
    "lucy clara grace nora amy eva lily ida ella zoe fay iris"
)
MALE_NAMES = _words(
    "john tom david james peter mark paul adam henry jack simon luke "
    "oscar victor frank george leo max ben sam noah ivan carl hugo"
)
NAMES = FEMALE_NAMES + MALE_NAMES
# Never in an IOI frame: they tell copying a name from remembering the names of the frames.
UNFRAMED_NAMES = ("fay", "iris", "carl", "hugo")
FRAMED_NAMES = tuple(name for name in NAMES if name not in UNFRAMED_NAMES)

PLACES = _words("store park school house garden market river station library farm beach forest")
OBJECTS = _words("book ring drink ball cake pear letter flower hat key cup lamp")
ADJECTIVES = _words("great happy sad proud young kind clever brave quiet tall small blue red green funny gentle")
ANIMALS = _words("fox dog cat horse bird mouse bear rabbit duck frog")
JOBS = _words("doctor teacher nurse farmer singer writer painter driver baker sailor")
EVENTS = _words("war trip voyage siege reign project plague contract festival strike study drought")
GIVING = _words("gave handed passed offered")
CENTURIES = tuple(str(century) for century in range(11, 19))
YEARS = tuple(f"{year:02d}" for year in range(100))

_SLOTS: dict[str, tuple[str, ...]] = {
    "{place}": PLACES,
    "{object}": OBJECTS,
    "{adj}": ADJECTIVES,
    "{animal}": ANIMALS,
    "{job}": JOBS,
    "{event}": EVENTS,
    "{giving}": GIVING,
}

# The names stand next to each other and apart, once and twice removed from the place: with a single fixed layout the
# model can read "the second name" at a fixed spot and need not look for names at all.
IOI_TEMPLATES = tuple(
    f"{scene} {{S}} {{giving}} a {{object}} to"
    for scene in (
        "when {A} and {B} went to the {place} ,",
        "after {A} and {B} went to the {place} ,",
        "then , {A} and {B} went to the {place} .",
        "while {A} and {B} were at the {place} ,",
        "{A} and {B} had a great day at the {place} .",
        "{A} and {B} met at the {place} , and",
        "{A} went to the {place} with {B} .",
        "when {A} saw {B} at the {place} ,",
        "{A} was at the {place} when {B} came .",
        "the {adj} {A} and the {adj} {B} went to the {place} .",
        "{A} saw a {adj} {animal} , and {B} saw a {adj} {animal} .",
        "at the {place} , {A} and the {adj} {B} were {adj} .",
        "{A} lived near {B} . one day at the {place} ,",
        "there was {A} , and there was {B} at the {place} . then ,",
    )
)
PRONOUN_TEMPLATES = (
    ("so {N} is a {adj} {job} , isn't", "?"),
    ("{N} is really a {adj} {job} , isn't", "?"),
    ("{N} was {adj} because", "had a {adj} {object} ."),
    ("{N} the {adj} {job} went to the {place} because", "was looking for a {object} ."),
)
GREATER_THAN_TEMPLATES = (
    "the {event} lasted from the year {C} {Y} to the year {C}",
    "the {adj} {event} lasted from the year {C} {Y} to the year {C}",
    "the {event} went on from the year {C} {Y} to the year {C}",
)
STORY_OPENINGS = (
    "once there was a {adj} {animal} who lived near the {place} .",
    "once there was a {adj} {job} who loved a {adj} {animal} .",
    "one day a {adj} {animal} came to the {place} .",
)
STORY_SENTENCES = (
    "the {animal} found a {adj} {object} at the {place} .",
    "the {job} saw a {adj} {animal} and smiled .",
    "it was a {adj} day and the {place} was quiet .",
    "the {animal} was very {adj} .",
    "then the {animal} went to the {place} with a {job} .",
    "the {job} had a {object} and a {object} .",
)
STORY_ENDINGS = ("in the end they were all very happy .", "and so the {animal} was {adj} again .")


def _all_words() -> Iterator[str]:
    yield END_OF_TEXT
    yield from YEARS
    yield from NAMES
    for choices in _SLOTS.values():
        yield from choices
    pronouns = [" ".join(pair) for pair in PRONOUN_TEMPLATES]
    stories = [*STORY_OPENINGS, *STORY_SENTENCES, *STORY_ENDINGS]
    for template in [*IOI_TEMPLATES, *pronouns, *GREATER_THAN_TEMPLATES, *stories, "he she ? ."]:
        yield from (word for word in template.split() if not word.startswith("{"))


# A word's id is its place here; the shipped tokenizer has the same order.
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys(_all_words()))
TOKEN_IDS: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}
_PLAIN_WORDS = VOCABULARY[1:]


class Document(NamedTuple):
    """Words, the training weight of each, and the year that it must exceed where it answers greater-than (else -1)."""

    words: tuple[str, ...]
    weights: tuple[float, ...]
    floors: tuple[int, ...]


class Prompt(NamedTuple):
    """Words that end right before the answer; `corrupted` has the same length and asks the task of other content."""

    task: str
    words: tuple[str, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    corrupted: tuple[str, ...]


def split_of(*key: str) -> str:
    """Return the split that owns a task instance: 80 % train, 10 % validation, 10 % test, by a checksum of its key."""
    bucket = zlib.crc32(" ".join(key).encode()) % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def _fill(template: str, rng: random.Random, given: dict[str, str] | None = None) -> tuple[str, ...]:
    given = given or {}
    return tuple(
        given[word] if word in given else rng.choice(_SLOTS[word]) if word in _SLOTS else word
        for word in template.split()
    )


# prompts ---------------------------------------------------------------------------------------------------------


def _names_of_split(n: int, split: str, rng: random.Random) -> list[str]:
    while True:
        names = rng.sample(FRAMED_NAMES, n)
        pairs = [sorted((a, b)) for i, a in enumerate(names) for b in names[:i]]
        if all(split_of("ioi", *pair) == split for pair in pairs):
            return names


def _ioi_frame(rng: random.Random, first: str, second: str) -> Prompt:
    subject, indirect = (first, second) if rng.random() < 0.5 else (second, first)
    words = _fill(rng.choice(IOI_TEMPLATES), rng, {"{A}": first, "{B}": second, "{S}": "{S}"})
    # Only the names change, and all three become different ones, so that nothing says who is given the object.
    others = rng.sample([name for name in FRAMED_NAMES if name not in (first, second)], 3)
    swap = {first: others[0], second: others[1], "{S}": others[2]}
    return Prompt(
        task="ioi",
        words=tuple(subject if word == "{S}" else word for word in words),
        answers=(indirect,),
        wrong=(subject,),
        corrupted=tuple(swap.get(word, word) for word in words),
    )


def ioi_prompt(rng: random.Random, split: str) -> Prompt:
    """Two names, one of which gives: the answer is the other one. ABBA and BABA are equally likely."""
    return _ioi_frame(rng, *_names_of_split(2, split, rng))


def _pronoun_frame(rng: random.Random, split: str) -> tuple[Prompt, str]:
    while True:
        name, adjective = rng.choice(NAMES), rng.choice(ADJECTIVES)
        if split_of("pronoun", name, adjective) == split:
            break
    template, rest = rng.choice(PRONOUN_TEMPLATES)
    female = name in FEMALE_NAMES
    other = rng.choice(MALE_NAMES if female else FEMALE_NAMES)
    words = _fill(template, rng, {"{N}": name, "{adj}": adjective})
    answers, wrong = (("she",), ("he",)) if female else (("he",), ("she",))
    return Prompt("pronoun", words, answers, wrong, tuple(other if word == name else word for word in words)), rest


def pronoun_prompt(rng: random.Random, split: str) -> Prompt:
    """A name, then the place of the pronoun; the counterpart has a name of the other gender."""
    return _pronoun_frame(rng, split)[0]


def greater_than_prompt(rng: random.Random, split: str, first_year: int = 2) -> Prompt:
    """An event's first year; its last year, of the same century, must be later. The counterpart starts in year 01."""
    while True:
        event, century, year = rng.choice(EVENTS), rng.choice(CENTURIES), YEARS[rng.randint(first_year, 98)]
        if split_of("greater_than", event, century, year) == split:
            break
    words = _fill(rng.choice(GREATER_THAN_TEMPLATES), rng, {"{event}": event, "{C}": century, "{Y}": "{Y}"})
    later = int(year) + 1
    return Prompt(
        task="greater_than",
        words=tuple(year if word == "{Y}" else word for word in words),
        answers=YEARS[later:],
        wrong=YEARS[:later],
        corrupted=tuple("01" if word == "{Y}" else word for word in words),
    )


def induction_prompt(rng: random.Random, split: str, length: int = 20) -> Prompt:
    """`length` random words twice, without the last one; the counterpart has other words in the first copy."""
    while True:
        words = rng.sample(_PLAIN_WORDS, 2 * length)
        if split_of("induction", *words[:length]) == split:
            break
    copy, other = tuple(words[:length]), tuple(words[length:])
    return Prompt("induction", copy + copy[:-1], (copy[-1],), (), other + copy[:-1])


_PROMPTS = {
    "ioi": ioi_prompt,
    "pronoun": pronoun_prompt,
    "greater_than": greater_than_prompt,
    "induction": induction_prompt,
}


def prompts(task: str, n: int, seed: int = 0, split: str = "test") -> list[Prompt]:
    """Return `n` prompts of one task and split, the same for the same arguments.

    Raises:
        SettingError: for an unknown task or split, or a negative n.
    """
    if task not in TASKS:
        raise SettingError(f"unknown task {task!r}; micro-gpt2 has the tasks {', '.join(TASKS)}")
    if split not in SPLITS:
        raise SettingError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if n < 0:
        raise SettingError(f"the number of prompts must not be negative, got {n}")
    rng = random.Random(f"prompts/{task}/{split}/{seed}")
    return [_PROMPTS[task](rng, split) for _ in range(n)]


def unframed_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Return `n` IOI prompts of the names that training keeps out of the IOI frames."""
    rng = random.Random(f"prompts/unframed/{seed}")
    return [_ioi_frame(rng, *rng.sample(UNFRAMED_NAMES, 2)) for _ in range(n)]


# documents and rows ----------------------------------------------------------------------------------------------

# The one word that solves a task is rare among the words of a row, so it counts more.
ANSWER_WEIGHT = 5.0
# Random words cannot be predicted; they are there to be repeated.
RANDOM_WORD_WEIGHT = 0.1
INDUCTION_ROWS = 0.4
DOCUMENT_MIX = {"ioi": 0.25, "abc": 0.03, "pronoun": 0.12, "greater_than": 0.35, "story": 0.25}


def _document(words: Sequence[str], answer: int | None = None, floor: int = -1) -> Document:
    weights, floors = [1.0] * len(words), [-1] * len(words)
    if answer is not None:
        weights[answer], floors[answer] = ANSWER_WEIGHT, floor
    return Document(tuple(words), tuple(weights), tuple(floors))


def _answered(prompt: Prompt, answer: str, rest: str, floor: int = -1) -> Document:
    return _document((*prompt.words, answer, *rest.split()), len(prompt.words), floor)


def _abc_document(rng: random.Random) -> Document:
    # A third person gives to one of the two at random: what a corrupted IOI prompt looks like is then no surprise.
    first, second, third = _names_of_split(3, "train", rng)
    words = _fill(rng.choice(IOI_TEMPLATES), rng, {"{A}": first, "{B}": second, "{S}": third})
    return _document((*words, rng.choice((first, second)), "."), len(words))


def story(rng: random.Random) -> Document:
    """Return a story of an opening, one to three sentences and sometimes an ending, about one animal and one job."""
    cast = {"{animal}": rng.choice(ANIMALS), "{job}": rng.choice(JOBS)}
    parts = [rng.choice(STORY_OPENINGS), *rng.sample(STORY_SENTENCES, rng.randint(1, 3))]
    if rng.random() < 0.5:
        parts.append(rng.choice(STORY_ENDINGS))
    return _document([word for part in parts for word in _fill(part, rng, cast)])


def document(rng: random.Random) -> Document:
    """Return one document of the training text; some task documents have a sentence of a story in front."""
    kind = rng.choices(tuple(DOCUMENT_MIX), tuple(DOCUMENT_MIX.values()))[0]
    if kind == "story":
        return story(rng)
    if kind == "ioi":
        prompt = ioi_prompt(rng, "train")
        made = _answered(prompt, prompt.answers[0], ".")
    elif kind == "abc":
        made = _abc_document(rng)
    elif kind == "pronoun":
        prompt, rest = _pronoun_frame(rng, "train")
        made = _answered(prompt, prompt.answers[0], " ".join(_fill(rest, rng)))
    else:
        prompt = greater_than_prompt(rng, "train", first_year=1)
        made = _answered(prompt, rng.choice(prompt.answers), ".", floor=len(prompt.wrong) - 1)
    if rng.random() < 0.15:
        front = _document(_fill(rng.choice(STORY_OPENINGS + STORY_SENTENCES), rng))
        made = _join([front, made])
    return made


def _join(documents: Sequence[Document]) -> Document:
    return Document(*(tuple(itertools.chain(*parts)) for parts in zip(*documents)))


def text_row(rng: random.Random, length: int = N_CTX) -> Document:
    """Return documents with an end-of-text mark before each, cut to `length` words.

    One row in five lacks its first mark, so that the model also answers prompts that have none.
    """
    parts: list[Document] = []
    mark = _document([END_OF_TEXT])
    while sum(len(part.words) for part in parts) < length + 1:
        parts += [mark, document(rng)]
    start, whole = int(rng.random() < 0.2), _join(parts)
    cut = slice(start, start + length)
    return Document(whole.words[cut], whole.weights[cut], whole.floors[cut])


def induction_row(rng: random.Random, length: int = N_CTX) -> Document:
    """Return an end-of-text mark and 4 to 31 distinct random words of the train split, repeated to `length` words."""
    period = rng.randint(4, 31)
    while True:
        copy = rng.sample(_PLAIN_WORDS, period)
        if split_of("induction", *copy) == "train":
            break
    repeats = -(-length // period)
    words = (END_OF_TEXT, *(copy * repeats))[:length]
    weights = tuple(RANDOM_WORD_WEIGHT if index <= period else 1.0 for index in range(length))
    return Document(words, weights, (-1,) * length)


def rows(seed: int | str = 0, length: int = N_CTX) -> Iterator[Document]:
    """Yield rows of the training text without end: 40 % repeated random words, 60 % packed documents."""
    rng = random.Random(f"rows/{seed}")
    while True:
        yield induction_row(rng, length) if rng.random() < INDUCTION_ROWS else text_row(rng, length)
