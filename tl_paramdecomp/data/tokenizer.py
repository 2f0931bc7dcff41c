"""A tokenizer as the rows and prompts of one model need it: how rows begin, what ends a document, which tokens there are.

Whether rows begin with the beginning-of-sequence token (BOS) is decided by the first of these that says so:

1. the caller (`bos=` of `token_batches`, `prepend_bos=` of `make_task` and `load_task`);
2. the decomposition at hand, which recorded it of the rows it was made on (`info["row_start"]`);
3. the host: micro-gpt2 was trained with it; HookedTransformer and TransformerBridge have `cfg.default_prepend_bos`;
4. the tokenizer: Llama's puts the token in front by itself, GPT-2's does not.

Rows of tokens are taken as they are; whether they begin with the token is observed, and recorded.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Shaped
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.limits import UNLIMITED, Limits
from tl_paramdecomp.errors import DataError, RowStartWarning, SettingError, TokenizerTaskError, UnsupportedModelError
from tl_paramdecomp.pretrained import grammar, micro_gpt2_tokenizer
from tl_paramdecomp.pretrained.micro_gpt2 import MICRO_GPT2_DIR

MICRO_GPT2 = "micro-gpt2"
LONGEST = 1024
"""Tokens of a row where neither the caller says how many nor model and tokenizer set a lower limit."""
ROW_START = "row_start"
"""Where a decomposition's `info` holds how its rows began."""


@dataclass(frozen=True, eq=False)
class RowTokenizer:
    """How one model's rows of tokens are written and what they must keep to; `row_tokenizer` makes it."""

    tokenizer: Any = None
    """None where only tokens, and no texts, can be read."""
    bos: int | None = None
    """The token that every row begins with, where one does."""
    why: str = "nothing is known of the model"
    """How `bos` was decided."""
    eos: int | None = None
    """The token after every document, where the tokenizer has one."""
    limits: Limits = UNLIMITED
    """What rows must keep to, for the model to read them at all."""
    n_ctx: int | None = None
    """Positions that the model was made for; None where that is not known."""

    @property
    def is_micro_gpt2(self) -> bool:
        """Whether texts are of micro-gpt2's own grammar."""
        return _speaks_micro_gpt2(self.tokenizer)

    @property
    def start(self) -> tuple[int, ...]:
        """What every row begins with."""
        return () if self.bos is None else (self.bos,)

    @property
    def n_vocab(self) -> int | None:
        """Tokens that the model embeds; None where that is not known."""
        return self.limits.vocabulary

    def length(self, asked: int | None) -> int:
        """Tokens of a row, the first included: as asked, or as many as model and tokenizer take, at most 1024; SettingError
        where no row can have so many."""
        limits = [self.n_ctx, getattr(self.tokenizer, "model_max_length", None), LONGEST]
        length = int(min(limit for limit in limits if limit is not None)) if asked is None else asked
        if length < 1 + len(self.start):
            raise SettingError(f"A row needs at least {1 + len(self.start)} tokens; given length={length}.")
        if self.n_ctx is not None and length > self.n_ctx:
            raise SettingError(f"The model reads {self.n_ctx} positions; given length={length}.")
        return length

    def describe(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"bos": self.bos, "bos_because": self.why, "eos": self.eos, "tokenizer": _name_of(self.tokenizer)}

    # --- writing ----------------------------------------------------------------------------------------------------
    def tokens(self, text: str, whose: str = "", error: type[Exception] = DataError) -> list[int]:
        """Token ids of a text, nothing in front; an `error` where there is no tokenizer, or it has no token for some of the
        text; `whose` (" of ...") says in messages where it is from."""
        told = f"{text[:60]!r}{whose}"
        if self.tokenizer is None:
            raise error(
                f"Text needs a tokenizer, and there is none to write {told}: give the tokenizer, a model that has one "
                "(model.tokenizer), or tokens instead of text."
            )
        try:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as failure:  # a word-level tokenizer without an unknown token raises a bare Exception
            raise error(
                f"The tokenizer cannot write {told} ({failure}); give text of its words, or the tokenizer that belongs to the "
                "text's model."
            ) from failure
        if self.n_vocab is not None and ids and max(ids) >= self.n_vocab:
            raise error(
                f"The tokenizer writes {told} with token {max(ids)}, and the model embeds {self.n_vocab}: they do not belong "
                "together. Give the tokenizer that the model was trained with."
            )
        return ids

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt or part of one, nothing in front; TokenizerTaskError as in `tokens`."""
        ids = tuple(self.tokens(text, error=TokenizerTaskError))
        if self.tokenizer.unk_token_id in ids:
            raise TokenizerTaskError(
                f"The tokenizer writes part of {text[:60]!r} as its unknown token {self.tokenizer.unk_token!r}; use words it "
                "has."
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
        return bool(self.added("", text))

    def plain_ids(self) -> list[int]:
        """Every token that is not special, in order."""
        if self.tokenizer is None:
            return list(range(self.n_vocab or 0))
        special = set(self.tokenizer.all_special_ids)
        most = len(self.tokenizer) if self.n_vocab is None else min(len(self.tokenizer), self.n_vocab)
        return sorted(i for i in set(self.tokenizer.get_vocab().values()) - special if i < most)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; their numbers where there is no tokenizer."""
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(list(ids))


def row_tokenizer(
    model: Any = None,
    tokenizer: Any = None,
    bos: bool | Literal["auto"] | None = "auto",
    n_vocab: int | None = None,
    decomposition: Any = None,
) -> RowTokenizer:
    """How rows look to a model, or to whatever model a tokenizer belongs to.

    Args:
        model: On any host, its adapter, or a tokenizer; None: nothing is known of it.
        tokenizer: Taken instead of the model's own.
        bos: Whether rows begin with the beginning-of-sequence token. `auto` or None: by the rule of this module.
        n_vocab: Tokens that the model embeds; None: as it says.
        decomposition: Asked how the rows began that it was made on.

    Raises:
        SettingError: `bos` is none of these, or the tokenizer has no such token.
        DataError: The tokenizer is one of another model, or none at all.
    """
    return refuse_other_tokenizer(_made(model, tokenizer, bos, n_vocab, decomposition))


def _made(model: Any, tokenizer: Any, bos: bool | str | None, n_vocab: int | None, decomposition: Any) -> RowTokenizer:
    if bos not in (True, False, None, "auto"):
        raise SettingError(f"bos must be True, False or 'auto'; given {bos!r}.")
    if tokenizer is None and _is_tokenizer(model):
        model, tokenizer = None, model
    try:
        adapter = model if model is None or isinstance(model, ModelAdapter) else adapt(model)
    except UnsupportedModelError as error:
        raise DataError(
            f"Expected a model or a tokenizer, given {type(model).__name__} ({error}). Wrap a tokenizers.Tokenizer as "
            "PreTrainedTokenizerFast(tokenizer_object=...)."
        ) from error
    tokenizer = tokenizer_of(adapter) if tokenizer is None else tokenizer
    if tokenizer is not None and not _is_tokenizer(tokenizer):
        raise DataError(
            f"Expected a tokenizer of transformers, given {type(tokenizer).__name__}; load one with AutoTokenizer, or wrap a "
            "tokenizers.Tokenizer as PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    limits = limits_of(adapter)
    if n_vocab is not None:
        own = n_vocab if limits.vocabulary is None else min(n_vocab, limits.vocabulary)
        limits = dataclasses.replace(limits, vocabulary=own)
    token, why = _start(adapter, tokenizer, None if bos in (None, "auto") else bool(bos), decomposition)
    known = (limits.context, None if adapter is None else context_of(adapter.root))
    n_ctx = min((n for n in known if n is not None), default=None)
    return RowTokenizer(tokenizer, token, why, getattr(tokenizer, "eos_token_id", None), limits, n_ctx)


def prompt_tokenizer(source: Any, prepend_bos: bool | None = None, decomposition: Any = None) -> RowTokenizer:
    """What writes the prompts for a tokenizer, a model, "micro-gpt2" or a vocabulary size; SettingError where it is none of
    them, or there is no such token to put in front."""
    if isinstance(source, str):
        if source != MICRO_GPT2:
            raise SettingError(f"Expected a tokenizer, a model or 'micro-gpt2'; given {source!r}. Load it first.")
        source = micro_gpt2_tokenizer()
    if isinstance(source, int) and not isinstance(source, bool):
        if source < 1:
            raise SettingError(f"A vocabulary has at least one token; given {source}.")
        if prepend_bos:
            raise SettingError("A bare vocabulary has no beginning-of-sequence token; leave prepend_bos out.")
        return RowTokenizer(limits=Limits(source))
    try:
        made = _made(source, None, prepend_bos, None, decomposition)
    except DataError as error:
        raise SettingError(
            f"Expected a tokenizer, a model, 'micro-gpt2' or a vocabulary size, not {type(source).__name__} ({error})."
        ) from error
    if made.tokenizer is None and made.n_vocab is None:
        raise SettingError(f"This {type(source).__name__} embeds no tokens, so there is nothing to write prompts for.")
    for name in () if made.tokenizer is None else ("get_vocab", "all_special_ids", "decode"):
        if not hasattr(made.tokenizer, name):
            raise SettingError(f"Prompts need a tokenizer of transformers; {_name_of(made.tokenizer)} has no {name}.")
    return dataclasses.replace(made, n_ctx=grammar.N_CTX) if made.is_micro_gpt2 and made.n_ctx is None else made


def named_words(words: Iterable[str], most: int = 12) -> str:
    """Words for a message, the first of them by name."""
    words = list(words)
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(map(repr, words[:most])) + more


def limits_of(model: Any) -> Limits:
    """What rows must keep to for a model on any host, or its adapter; nothing where it is None."""
    if model is None:
        return UNLIMITED
    return Limits.of(model if isinstance(model, ModelAdapter) else adapt(model))


def context_of(root: Any) -> int | None:
    """Positions that a host's torch module reads at most; None where its configuration does not say."""
    own = getattr(getattr(root, "original_model", root), "config", None)
    found = getattr(getattr(root, "cfg", None), "n_ctx", None), getattr(own, "max_position_embeddings", None)
    return next((n for n in found if isinstance(n, int)), None)


def tokenizer_of(adapter: ModelAdapter | None) -> Any:
    """The tokenizer that a model holds, or micro-gpt2's, whose transformers host holds none; None where there is none."""
    held = None if adapter is None else getattr(adapter.model, "tokenizer", None)
    if held is None and adapter is not None:
        config = getattr(adapter.root, "config", None)
        if str(getattr(config, "_name_or_path", "")) == str(MICRO_GPT2_DIR):
            return micro_gpt2_tokenizer()
    return held


def refuse_other_tokenizer(rules: RowTokenizer) -> RowTokenizer:
    """The same, where neither its own vocabulary nor what begins and ends documents goes beyond the embedding; else DataError.

    Tokens that were added to a tokenizer, for padding or chat, may lie beyond the embedding: plain text never gives them, and
    one that turns up all the same is refused where it does.
    """
    if rules.n_vocab is None or rules.tokenizer is None:
        return rules
    largest = None
    if not (hasattr(rules.tokenizer, "__len__") and len(rules.tokenizer) <= rules.n_vocab):
        added = getattr(rules.tokenizer, "added_tokens_decoder", {})  # a property that is made anew each time
        known = rules.tokenizer.get_vocab().values() if hasattr(rules.tokenizer, "get_vocab") else ()
        largest = max((token for token in known if token not in added), default=None)
    for what, token in (("tokens up to", largest), ("an end token", rules.eos), ("a beginning token", rules.bos)):
        if token is not None and token >= rules.n_vocab:
            raise DataError(
                f"The tokenizer ({_name_of(rules.tokenizer)}) has {what} {token}, and the model embeds {rules.n_vocab} tokens, "
                f"0 to {rules.n_vocab - 1}: they do not belong together. Give the tokenizer that the model was trained with."
            )
    return rules


# --- how rows begin -------------------------------------------------------------------------------------------------
def row_start(
    adapter: ModelAdapter,
    tokens: Shaped[Tensor, "rows ..."],
    attention_mask: Tensor | None,
    writer: RowTokenizer | None,
) -> dict[str, Any] | None:
    """What a decomposition records of the rows it is made on, as values that JSON can hold: the `token`, and whether rows
    begin with it, `begins`, which is None where only some do. None where no such token is known, or these are no token rows.
    `writer` wrote the rows, where they were text."""
    tokenizer = tokenizer_of(adapter) if writer is None else writer.tokenizer
    token = getattr(tokenizer, "bos_token_id", getattr(getattr(adapter.root, "config", None), "bos_token_id", None))
    if not isinstance(token, int) or token >= (adapter.vocabulary_size or 0):
        return None
    begins = _begins(token, tokens, attention_mask) if writer is None else writer.bos is not None
    return None if begins is None else {"token": token, "begins": None if begins == "some" else begins}


def warn_of_other_start(
    decomposition: Any, tokens: Shaped[Tensor, "rows ..."], attention_mask: Tensor | None = None
) -> None:
    """Warn where rows begin otherwise than those that a decomposition was made on.

    Warns:
        RowStartWarning: All of those began with the beginning-of-sequence token and none of these does, or the reverse.
    """
    known = _recorded(decomposition) or {"token": None}
    if known["token"] is None or _begins(known["token"], tokens, attention_mask) is not (not known["begins"]):
        return
    here, there = ("without", "with") if known["begins"] else ("with", "without")
    warnings.warn(
        f"These rows begin {here} the beginning-of-sequence token ({known['token']}), and the decomposition was made on rows "
        f"that begin {there} it: importances and figures are those of other rows. Make the rows by the same rule: "
        "token_batches(..., decomposition=dec), make_task(..., decomposition=dec).",
        RowStartWarning,
        stacklevel=4,
    )


def _recorded(decomposition: Any) -> dict[str, Any] | None:
    """How the rows began that a decomposition was made on; None where it does not say, or some began otherwise."""
    known = decomposition.info.get(ROW_START)
    data = (decomposition.info.get("run") or {}).get("data") or {}
    if known is None and data.get("joined"):  # of 0.1.0, made on text
        known = {"token": data["bos"], "begins": data["bos"] is not None}
    return known if known is not None and known["begins"] is not None else None


def _begins(token: int, tokens: Tensor, attention_mask: Tensor | None) -> "bool | Literal['some'] | None":
    """Whether rows begin with a token, padding left out; None where these are no token rows."""
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.is_complex():
        return None
    first = tokens[:, 0]
    if attention_mask is not None:
        first = tokens.gather(1, attention_mask.to(tokens.device).long().argmax(1, keepdim=True)).squeeze(1)
    found = first == token
    return True if bool(found.all()) else "some" if bool(found.any()) else False


def _start(
    adapter: ModelAdapter | None, tokenizer: Any, asked: bool | None, decomposition: Any
) -> tuple[int | None, str]:
    """The token that rows begin with, and who says so."""
    token = getattr(tokenizer, "bos_token_id", None)
    if asked is not None:
        if asked and token is None:
            raise SettingError(
                "bos=True needs a tokenizer, and one that has a beginning-of-sequence token: there is no beginning-of-sequence "
                "token to put in front. Give such a tokenizer, or leave it to the rule."
            )
        return (token, "asked for") if asked else (None, "asked for none")
    recorded = None if decomposition is None else _recorded(decomposition)
    if recorded is not None:
        return (recorded["token"] if recorded["begins"] else None), "the decomposition was made on such rows"
    if tokenizer is None:
        return None, "there is no tokenizer"
    if token is None:
        return None, "the tokenizer has no such token"
    if _speaks_micro_gpt2(tokenizer):
        return token, "micro-gpt2 was trained so"
    default = None if adapter is None else getattr(getattr(adapter.root, "cfg", None), "default_prepend_bos", None)
    if default is not None:
        return (token if default else None), f"the host's cfg.default_prepend_bos is {default}"
    try:
        adds = list(tokenizer("")["input_ids"])[:1] == [token]
    except (TypeError, KeyError):  # a tokenizer with an interface of its own
        return token, "the tokenizer has such a token"
    return (token, "the tokenizer puts it in front") if adds else (None, "the tokenizer puts none in front")


def _is_tokenizer(thing: Any) -> bool:
    """Whether texts can be handed to it; models are callable too, but have no such tokens."""
    return callable(thing) and hasattr(thing, "bos_token_id") and not hasattr(thing, "parameters")


def _speaks_micro_gpt2(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "get_vocab") and grammar.TOKEN_IDS.items() <= tokenizer.get_vocab().items()


def _name_of(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    size = f", {len(tokenizer)} tokens" if hasattr(tokenizer, "__len__") else ""
    return f"{type(tokenizer).__name__}{size}"
