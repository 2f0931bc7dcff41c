"""What a model and its tokenizer say of token rows: how they begin, what ends a document, which token ids there are."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.limits import UNLIMITED, Limits
from tl_paramdecomp.data.prompt_tokens import context_of
from tl_paramdecomp.errors import DataError, SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import grammar, micro_gpt2_tokenizer
from tl_paramdecomp.pretrained.micro_gpt2 import MICRO_GPT2_DIR

LONGEST = 1024
"""Tokens of a row where neither the caller says how many nor model and tokenizer set a lower limit."""


@dataclass(frozen=True, eq=False)
class RowRules:
    """How rows of tokens look to one model."""

    tokenizer: Any = None
    """None where only tokens, and no texts, can be read."""
    bos: int | None = None
    """The token that every row begins with, where one does."""
    why: str = "nothing is known of the model"
    """How `bos` was decided."""
    eos: int | None = None
    """The token after every document, where the tokenizer has one."""
    n_vocab: int | None = None
    """Tokens that the model embeds; None where that is not known."""
    n_ctx: int | None = None
    """Positions that the model was made for; None where that is not known."""
    limits: Limits = UNLIMITED
    """What rows must keep to, for the model to read them at all."""

    @property
    def start(self) -> list[int]:
        """What every row begins with."""
        return [] if self.bos is None else [self.bos]

    def length(self, asked: int | None) -> int:
        """Tokens of a row, the first included: as asked, or as many as model and tokenizer take, at most 1024.

        Raises:
            SettingError: No row can have so many.
        """
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


def row_rules(
    model: Any = None, tokenizer: Any = None, bos: bool | Literal["auto"] = "auto", n_vocab: int | None = None
) -> RowRules:
    """How rows look to a model, or to whatever model a tokenizer belongs to.

    Args:
        model: On any host, a model's adapter, or a tokenizer; None: nothing is known of it.
        tokenizer: The model's, where it holds none; else it is taken instead of that.
        bos: Whether rows begin with the beginning-of-sequence token. `auto`: always for micro-gpt2, which was trained so; as
            `cfg.default_prepend_bos` of a HookedTransformer or TransformerBridge says; otherwise where the tokenizer puts
            that token in front by itself, as Llama's does and GPT-2's does not.
        n_vocab: Tokens that the model embeds; None: as the model says.

    Raises:
        SettingError: `bos` is none of these, or the tokenizer has no such token.
        DataError: The tokenizer is one of another model, or none at all.
    """
    if bos not in (True, False, "auto"):
        raise SettingError(f"bos must be True, False or 'auto'; given {bos!r}.")
    if tokenizer is None and _is_tokenizer(model):
        model, tokenizer = None, model
    adapter = None if model is None else _adapter_of(model)
    held = None if adapter is None else getattr(adapter.model, "tokenizer", None)
    tokenizer = held if tokenizer is None else tokenizer
    if tokenizer is None and adapter is not None and _is_micro_gpt2(adapter.root):
        tokenizer = micro_gpt2_tokenizer()
    if tokenizer is not None and not _is_tokenizer(tokenizer):
        raise DataError(
            f"Expected a tokenizer of transformers, given {type(tokenizer).__name__}; load one with AutoTokenizer, or wrap a "
            "tokenizers.Tokenizer as PreTrainedTokenizerFast(tokenizer_object=...)."
        )
    limits = limits_of(adapter)
    if n_vocab is not None:
        own = n_vocab if limits.vocabulary is None else min(n_vocab, limits.vocabulary)
        limits = dataclasses.replace(limits, vocabulary=own)
    put, why = _decide(adapter, tokenizer, bos)
    first = getattr(tokenizer, "bos_token_id", None) if put else None
    n_ctx = None if adapter is None else context_of(adapter.root)
    n_ctx = min((n for n in (n_ctx, limits.context) if n is not None), default=None)
    rules = RowRules(tokenizer, first, why, getattr(tokenizer, "eos_token_id", None), limits.vocabulary, n_ctx, limits)
    refuse_other_tokenizer(rules)
    return rules


def limits_of(model: Any) -> Limits:
    """What rows must keep to for a model on any host, or its adapter; nothing where it is None."""
    if model is None:
        return UNLIMITED
    return Limits.of(model if isinstance(model, ModelAdapter) else adapt(model))


def refuse_other_tokenizer(rules: RowRules) -> None:
    """See that a tokenizer gives no tokens which the model has not.

    Tokens that were added to a tokenizer, for padding or chat, may lie beyond the embedding: plain text never gives them, and
    one that turns up all the same is refused where it does.

    Raises:
        DataError: Its own vocabulary, or what begins and ends documents, goes beyond the embedding.
    """
    if rules.n_vocab is None or rules.tokenizer is None:
        return
    few = hasattr(rules.tokenizer, "__len__") and len(rules.tokenizer) <= rules.n_vocab
    largest = None if few else _largest_plain_id(rules.tokenizer)
    for what, token in (("tokens up to", largest), ("an end token", rules.eos), ("a beginning token", rules.bos)):
        if token is not None and token >= rules.n_vocab:
            raise DataError(
                f"The tokenizer ({_name_of(rules.tokenizer)}) has {what} {token}, and the model embeds {rules.n_vocab} tokens, "
                f"0 to {rules.n_vocab - 1}: they do not belong together. Give the tokenizer that the model was trained with."
            )


def _decide(adapter: ModelAdapter | None, tokenizer: Any, bos: bool | str) -> tuple[bool, str]:
    known = getattr(tokenizer, "bos_token_id", None) is not None
    if bos != "auto":
        if bos and not known:
            raise SettingError(
                "bos=True needs a tokenizer that has a beginning-of-sequence token; give one, or leave bos to 'auto'."
            )
        return bool(bos), "asked for" if bos else "asked for none"
    if tokenizer is None:
        return False, "there is no tokenizer"
    if not known:
        return False, "the tokenizer has no such token"
    if _speaks_micro_gpt2(tokenizer):
        return True, "micro-gpt2 was trained so"
    default = None if adapter is None else getattr(getattr(adapter.root, "cfg", None), "default_prepend_bos", None)
    if default is not None:
        return bool(default), f"the host's cfg.default_prepend_bos is {default}"
    try:
        adds = list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
    except (TypeError, KeyError):  # a tokenizer with an interface of its own
        return True, "the tokenizer has such a token"
    return adds, "the tokenizer puts it in front" if adds else "the tokenizer puts none in front"


def _adapter_of(model: Any) -> ModelAdapter:
    if isinstance(model, ModelAdapter):
        return model
    try:
        return adapt(model)
    except UnsupportedModelError as error:
        raise DataError(f"Expected a model or a tokenizer, given {type(model).__name__} ({error}).") from error


def _is_tokenizer(thing: Any) -> bool:
    """Whether texts can be handed to it; models are callable too, but have no such tokens."""
    return callable(thing) and hasattr(thing, "bos_token_id") and not hasattr(thing, "parameters")


def _is_micro_gpt2(root: Any) -> bool:
    return str(getattr(getattr(root, "config", None), "_name_or_path", "")) == str(MICRO_GPT2_DIR)


def _speaks_micro_gpt2(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "get_vocab") and grammar.TOKEN_IDS.items() <= tokenizer.get_vocab().items()


def _largest_plain_id(tokenizer: Any) -> int | None:
    if not hasattr(tokenizer, "get_vocab"):
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {})  # a property that is made anew each time it is asked for
    return max((token for token in tokenizer.get_vocab().values() if token not in added), default=None)


def _name_of(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    size = f", {len(tokenizer)} tokens" if hasattr(tokenizer, "__len__") else ""
    return f"{type(tokenizer).__name__}{size}"
