"""Tokens as people read them, in tables."""

from collections.abc import Sequence
from typing import Any


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer that is given, or the one that the host holds; None where there is none."""
    return tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)


def token_text(tokenizer: Any, token: int) -> str | None:
    """Text of one token, the space in front of it included; None without a tokenizer, or where it has no such token."""
    if tokenizer is None:
        return None
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except Exception:  # vocabularies of models are often padded beyond the tokenizer's
        return None
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"  # SentencePiece drops the space of a text's first token
    return text


def shown(token: int, text: str | None) -> str:
    """One token for a table: its text in quotes, or its number."""
    return f"#{token}" if text is None else repr(text)


def shown_context(tokens: Sequence[int], texts: Sequence[str | None], place: int) -> str:
    """Neighbouring tokens in one line, the one at a place in [brackets]."""
    named = [f"#{t}" if s is None else s.replace("\n", "\\n") for t, s in zip(tokens, texts)]
    spaced = any(text is not None and text.startswith(" ") for text in texts)
    glue = "" if spaced else " "
    named[place] = f"[{named[place]}]"
    return glue.join(named)
