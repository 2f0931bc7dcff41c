"""Small tokenizers for writing tasks: byte-level BPE spaced as GPT-2's, and whole words."""

import re
from collections.abc import Iterable
from typing import Any

from tl_paramdecomp.analysis.tasks import words

SPLIT_YEARS = tuple(f" {century}" for century in words.CENTURIES)


def _spaced_words() -> list[str]:
    """Every word of the lists and templates, behind a space."""
    pairs = [word for pair in (*words.PEOPLE_PAIRS, *words.THING_PAIRS) for word in pair]
    plain = [*words.NAMES, *words.PLACES, *words.OBJECTS, *words.ADJECTIVES, *words.JOBS, *words.EVENTS, *pairs,
             *words.FUNCTIONS, *words.ARGUMENTS, *words.DESCRIPTIONS, *words.THINGS]  # fmt: skip
    templates = [*words.IOI_TEMPLATES, *words.PRONOUN_TEMPLATES, *words.GREATER_THAN_TEMPLATES,
                 *words.DOCSTRING_TEMPLATES, *words.AGREEMENT_TEMPLATES, "he she is are was were has have"]  # fmt: skip
    for template in templates:
        plain += re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", template))
    return [f" {word}" for word in dict.fromkeys(plain)]


def bpe(without: Iterable[str] = (), whole_years: bool = False, bos_by_itself: bool = False) -> Any:
    """Byte-level BPE in which every word of the tasks is one token behind a space, as in GPT-2's.

    Merges are prefix by prefix, so that no word gets into another's way. Years split as " 17" and "41".

    Args:
        without: Words (" John") that are left split.
        whole_years: Years are one token each instead.
        bos_by_itself: It puts its <s> in front, as Llama's does; <s> exists either way.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    spaced = [*SPLIT_YEARS, *(word for word in _spaced_words() if word not in set(without))]
    vocab = {symbol: i for i, symbol in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges: dict[tuple[str, str], None] = {}

    def merge(text: str) -> None:
        symbols = text.replace(" ", "Ġ")
        for end in range(1, len(symbols)):
            merges.setdefault((symbols[:end], symbols[end]))
            vocab.setdefault(symbols[: end + 1], len(vocab))

    if whole_years:
        spaced += [f" {century}{year}" for century in words.CENTURIES for year in words.YEARS]
    for word in spaced:
        merge(word)
    for year in words.YEARS:
        merge(year)
    made = Tokenizer(models.BPE(vocab, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos_by_itself:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def whole_words(without: Iterable[str] = ()) -> Any:
    """One token for each word, mark and pair of digits, and an unknown token for everything else."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    listed = [word[1:] for word in _spaced_words() if word not in set(without)]
    vocab = [
        "[UNK]",
        *listed,
        *words.CENTURIES,
        *(y for y in words.YEARS if y not in words.CENTURIES),
        *".,:?'()\"",
        '"""',
    ]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocab))}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
