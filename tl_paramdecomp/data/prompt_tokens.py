"""How a tokenizer writes prompts and answers: what stands in front, what one more word adds, and what it cannot write."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import SettingError, TokenizerTaskError, UnsupportedModelError
from tl_paramdecomp.pretrained import grammar, micro_gpt2_tokenizer
from tl_paramdecomp.pretrained.micro_gpt2 import MICRO_GPT2_DIR

MICRO_GPT2 = "micro-gpt2"


@dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """A tokenizer as prompts need it, and what is known of the model that will read them."""

    tokenizer: Any
    """None where only the size of the vocabulary is known."""
    start: tuple[int, ...]
    """What stands before every prompt: the beginning-of-sequence token, or nothing."""
    n_vocab: int
    """Tokens that both tokenizer and model have."""
    n_ctx: int | None = None
    """Longest prompt that the model reads; None where that is not known."""
    is_micro_gpt2: bool = False

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, nothing in front.

        Raises:
            TokenizerTaskError: There is no tokenizer, or it has no token for some of the text.
        """
        if self.tokenizer is None:
            raise TokenizerTaskError(
                f"Text needs a tokenizer, and there is none to write {text[:60]!r}: give the tokenizer, or a model that has "
                "one (model.tokenizer), instead of a bare model or a vocabulary size."
            )
        try:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # a word-level tokenizer without an unknown token raises a bare Exception
            raise TokenizerTaskError(f"The tokenizer cannot write {text[:60]!r} ({error}).") from error
        if self.tokenizer.unk_token_id in ids:
            raise TokenizerTaskError(
                f"The tokenizer writes part of {text[:60]!r} as its unknown token {self.tokenizer.unk_token!r}; use words it "
                "has."
            )
        if ids and max(ids) >= self.n_vocab:
            raise TokenizerTaskError(
                f"The tokenizer writes {text[:60]!r} with token {max(ids)}, and the model has {self.n_vocab}: they do not "
                "belong together."
            )
        return ids

    def added(self, text: str, more: str) -> tuple[int, ...] | None:
        """The tokens that `more` adds behind a text; None where it changes those of the text, or cannot be written."""
        try:
            before, both = self.encode(text), self.encode(text + more)
        except TokenizerTaskError:
            return None
        return both[len(before) :] if both[: len(before)] == before else None

    def next_token(self, text: str, more: str) -> int | None:
        """The one token that `more` adds behind a text; None where that is not one token."""
        added = self.added(text, more)
        return added[0] if added is not None and len(added) == 1 else None

    def can_write(self, text: str) -> bool:
        """Whether every part of a text has a token."""
        try:
            return len(self.encode(text)) > 0
        except TokenizerTaskError:
            return False

    def plain_ids(self) -> list[int]:
        """Every token that is not special, in order."""
        if self.tokenizer is None:
            return list(range(self.n_vocab))
        special = set(self.tokenizer.all_special_ids)
        return sorted(i for i in set(self.tokenizer.get_vocab().values()) - special if i < self.n_vocab)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; their numbers where there is no tokenizer."""
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))


def prompt_tokenizer(source: Any, prepend_bos: bool | None = None) -> PromptTokenizer:
    """What writes the prompts for a tokenizer, a model, "micro-gpt2" or a vocabulary size.

    Args:
        source: A transformers tokenizer; a model on any host, which holds its tokenizer as `model.tokenizer`; "micro-gpt2"
            or micro-gpt2 itself; or the size of a vocabulary.
        prepend_bos: Whether the beginning-of-sequence token stands in front. None: as the host or tokenizer does it, that
            is, as `cfg.default_prepend_bos` says on HookedTransformer and TransformerBridge, always for micro-gpt2, and
            otherwise where the tokenizer itself puts one in front.

    Raises:
        SettingError: This is none of them, or there is no such token to put in front.
    """
    if isinstance(source, str):
        if source != MICRO_GPT2:
            raise SettingError(f"Expected a tokenizer, a model or 'micro-gpt2'; given {source!r}. Load it first.")
        return _micro_gpt2(prepend_bos)
    if isinstance(source, int) and not isinstance(source, bool):
        if source < 1:
            raise SettingError(f"A vocabulary has at least one token; given {source}.")
        if prepend_bos:
            raise SettingError("A bare vocabulary has no beginning-of-sequence token; leave prepend_bos out.")
        return PromptTokenizer(None, (), source)
    alone = _is_tokenizer(source)
    tokenizer: Any = source if alone else getattr(source, "tokenizer", None)
    model = None if alone else _adapter_of(source)
    if _speaks_micro_gpt2(tokenizer) or (model is not None and tokenizer is None and _is_micro_gpt2(model.root)):
        return _micro_gpt2(prepend_bos)
    n_vocab = len(tokenizer) if tokenizer is not None else None
    if model is not None:
        n_vocab = min(x for x in (n_vocab, _vocabulary_of(model)) if x is not None)
    assert n_vocab is not None
    return PromptTokenizer(
        tokenizer, _start(tokenizer, model, prepend_bos), n_vocab, None if model is None else context_of(model.root)
    )


def named_words(words: Iterable[str], most: int = 12) -> str:
    """Words for a message, the first of them by name."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(map(repr, words[:most])) + more


def _micro_gpt2(prepend_bos: bool | None) -> PromptTokenizer:
    start = () if prepend_bos is False else (grammar.TOKEN_IDS[grammar.END_OF_TEXT],)
    return PromptTokenizer(micro_gpt2_tokenizer(), start, len(grammar.VOCABULARY), grammar.N_CTX, is_micro_gpt2=True)


def _is_tokenizer(source: Any) -> bool:
    return callable(source) and all(hasattr(source, name) for name in ("get_vocab", "all_special_ids", "decode"))


def _adapter_of(source: Any) -> Any:
    try:
        return adapt(source)
    except UnsupportedModelError as error:
        raise SettingError(
            f"Expected a transformers tokenizer, a model, 'micro-gpt2' or a vocabulary size, not {type(source).__name__} "
            f"({error}). Wrap a tokenizers.Tokenizer as PreTrainedTokenizerFast(tokenizer_object=...)."
        ) from error


def _speaks_micro_gpt2(tokenizer: Any) -> bool:
    return tokenizer is not None and grammar.TOKEN_IDS.items() <= tokenizer.get_vocab().items()


def _is_micro_gpt2(root: Any) -> bool:
    """Whether a transformers model was loaded from the shipped folder: it holds no tokenizer to know it by."""
    config = getattr(root, "config", None)
    return str(getattr(config, "_name_or_path", "")) == str(MICRO_GPT2_DIR)


def _vocabulary_of(adapter: Any) -> int:
    found = adapter.vocabulary_size
    if found is None:
        raise SettingError(
            f"This {type(adapter.root).__name__} embeds no tokens, so there is nothing to write prompts for."
        )
    return found


def context_of(root: Any) -> int | None:
    """Positions that a host's torch module reads at most; None where its configuration does not say."""
    own = getattr(root, "original_model", root)
    for config, name in (
        (getattr(root, "cfg", None), "n_ctx"),
        (getattr(own, "config", None), "max_position_embeddings"),
    ):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return None


def _start(tokenizer: Any, model: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend_bos and bos is None:
        raise SettingError("There is no beginning-of-sequence token to put in front; leave prepend_bos out.")
    if prepend_bos is None and bos is not None:
        prepend_bos = getattr(getattr(model and model.root, "cfg", None), "default_prepend_bos", None)
        if prepend_bos is None:
            prepend_bos = tokenizer("")["input_ids"][:1] == [bos]
    return (bos,) if prepend_bos and bos is not None else ()
