"""Documents joined into one line of tokens, which is cut into rows.

Where a row begins can be written down in a few numbers: the documents' own place before the one under way, and how many of its
tokens are used.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.data import text_files
from tl_paramdecomp.data.batch import TOKEN_COLUMNS
from tl_paramdecomp.data.cursors import Cursor, Items, Place, items_of
from tl_paramdecomp.data.text_files import Piece
from tl_paramdecomp.data.vocabulary import RowRules
from tl_paramdecomp.errors import DataError

TEXT_COLUMNS = ("text", "content", "story", "document")
"""Names that a column of text has, where nobody says which it is."""


class TextRows(Items):
    """Texts joined by the end-of-text token and cut into rows, each beginning with the beginning-of-text token."""

    def __init__(
        self,
        texts: Iterable[Any],
        tokenizer: Any,
        length: int | None,
        column: str = "text",
        context: int | None = None,
    ) -> None:
        """
        Args:
            texts: Texts, or records with a column of them.
            tokenizer: The model's.
            length: Tokens of a row; None: as many as tokenizer and model take, at most 1024.
            column: Where records hold the text.
            context: Positions that the model reads.
        """
        if tokenizer is None:
            raise DataError(
                "Text needs a tokenizer: give a model that has one (model.tokenizer), or token rows instead of text."
            )
        self.texts, self.tokenizer, self.column = texts, tokenizer, column
        limits = (getattr(tokenizer, "model_max_length", 1024), 1024, 1024 if context is None else context)
        self.length = length if length is not None else int(min(limits))
        self._items = items_of(texts)
        self.replayed = self._items.replayed

    def open(self) -> Cursor:
        """A new pass from the first text on."""
        bos = self.tokenizer.bos_token_id
        pieces = PieceCursor(self._items.open(), self._text)
        return JoinedCursor(pieces, self._encode, self.length, [] if bos is None else [bos])

    def describe(self) -> dict[str, Any]:
        """What the texts are, and the rows' length."""
        return {"kind": "text rows", "texts": self._items.describe(), "length": self.length}

    def _text(self, item: Any) -> Any:
        return item.get(self.column) if isinstance(item, Mapping) else item

    def _encode(self, item: Any) -> list[int]:
        piece = item if isinstance(item, Piece) else Piece(self._text(item), True)
        text, eos = piece.text, self.tokenizer.eos_token_id
        if text is None:
            return []
        if not isinstance(text, str):
            raise DataError(f"The data holds {type(text).__name__} ({str(text)[:40]}) where text should be.")
        ends = [eos] if eos is not None and piece.ends else []
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + ends


@dataclass(frozen=True)
class JoinedRows(Items):
    """Rows of documents of any form, as a model's rules say."""

    documents: Items
    encode: "Encoder"
    """Tokens of a document, with what ends it."""
    length: int
    """Tokens of a row, the first included."""
    start: Sequence[int] = ()
    """What every row begins with."""

    @property
    def replayed(self) -> bool:  # type: ignore[override]
        """As the documents are."""
        return self.documents.replayed

    def open(self) -> Cursor:
        """A new pass from the first document on."""
        pieces = PieceCursor(self.documents.open(), self.encode.value)
        return JoinedCursor(pieces, self.encode, self.length, self.start)

    def describe(self) -> dict[str, Any]:
        """What the documents are."""
        return self.documents.describe()


class PieceCursor(Cursor):
    """Documents of which a long text comes in pieces, each to be tokenised by itself: some tokenizers take far more than
    twice as long for twice the text, and few rows are not to wait for all of a document.
    """

    def __init__(self, documents: Cursor, text_of: Callable[[Any], Any]) -> None:
        self._documents, self._text_of = documents, text_of
        self._before: Place | None = None
        self._text, self._from, self._number = "", 0, 0

    def __next__(self) -> Any:
        if self._before is None:
            before = self._documents.place()
            item = next(self._documents)
            text = None if isinstance(item, Piece) else self._text_of(item)
            if not isinstance(text, str) or len(text) <= text_files.PIECE:
                return item
            self._before, self._text, self._from, self._number = before, text, 0, 0
        begins, end = self._from == 0, self._end()
        piece = Piece(self._text[self._from : end], end == len(self._text), begins)
        self._from, self._number = end, self._number + 1
        if piece.ends:
            self._before, self._text = None, ""
        return piece

    def _end(self) -> int:
        """Where the piece ends that begins now: behind its last line, else before its last word, else where it is full."""
        full = self._from + text_files.PIECE
        if full >= len(self._text):
            return len(self._text)
        line, word = (self._text.rfind(mark, self._from + 1, full) for mark in "\n ")
        return line + 1 if line > 0 else word if word > 0 else full

    def place(self) -> Place:
        if self._before is None:
            return self._documents.place()
        return {"document": self._before, "piece": self._number}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        self._before, self._text = None, ""
        self._documents.go_to(place.get("document", place), reread)
        for _ in range(place.get("piece", 0)):
            next(self, None)


class JoinedCursor(Cursor):
    """Cuts rows of `length` tokens, each beginning with `start`; what is left at the end of the pass fills no row."""

    def __init__(
        self, documents: Cursor, encode: Callable[[Any], list[int]], length: int, start: Sequence[int] = ()
    ) -> None:
        self._documents, self._encode, self._start, self._body = documents, encode, list(start), length - len(start)
        self._before = documents.place()
        self._tokens: list[int] = []
        self._used = 0
        self.read = 0
        """Tokens read, used or not."""

    def __next__(self) -> Int[Tensor, " pos"]:
        carried: list[int] = []
        while len(carried) + len(self._tokens) - self._used < self._body:
            carried += self._tokens[self._used :]
            self._tokens, self._used = [], 0
            self._before = self._documents.place()
            self._tokens = self._encode(next(self._documents))
            self.read += len(self._tokens)
        taken = self._used + self._body - len(carried)
        row = self._start + carried + self._tokens[self._used : taken]
        self._used = taken
        return torch.tensor(row)

    def place(self) -> Place:
        return {"documents": self._before, "used": self._used}

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        self._documents.go_to(place["documents"], reread)
        self._before, self._used = place["documents"], place["used"]
        self._tokens = self._encode(self._under_way()) if self._used else []

    def _under_way(self) -> Any:
        try:
            return next(self._documents)
        except StopIteration:
            raise DataError("The data ends before the place where the run stopped; it is not what it was.") from None


@dataclass(frozen=True)
class Encoder:
    """From a document of any form to its tokens, the end token included; nothing for an empty one."""

    rules: RowRules
    column: str | None
    """Where records hold the text or tokens; None: whichever of the usual names they have."""
    source: str
    """What the documents are, for messages."""

    def __call__(self, item: Any) -> list[int]:
        piece = item if isinstance(item, Piece) else None
        value = self.value(item) if piece is None else piece.text
        if value is None:
            return []
        tokens = self._written(value) if isinstance(value, str) else self._given(value)
        ends = bool(tokens)
        if piece is not None and not (piece.begins and piece.ends):
            ends = piece.ends  # a long document may end with a piece of nothing
        return [*tokens, self.rules.eos] if ends and self.rules.eos is not None else tokens

    def value(self, item: Any) -> Any:
        """The text or tokens of a document."""
        if not isinstance(item, Mapping):
            return item
        column = self.column if self.column is not None else text_column(list(item), self.source)
        if column not in item:
            raise unknown_column(column, list(item), self.source)
        return item[column]

    def _written(self, text: str) -> list[int]:
        if not text:
            return []
        if self.rules.tokenizer is None:
            raise no_tokenizer(self.source)
        try:
            tokens = list(self.rules.tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # a word-level tokenizer without an unknown token raises a bare Exception
            raise DataError(
                f"The tokenizer cannot write {text[:60]!r} of {self.source} ({error}); give text of its words, or the "
                "tokenizer that belongs to the text's model."
            ) from error
        if self.rules.n_vocab is not None and tokens and max(tokens) >= self.rules.n_vocab:
            raise DataError(
                f"The tokenizer writes {text[:60]!r} of {self.source} with token {max(tokens)}, and the model embeds "
                f"{self.rules.n_vocab}; give the tokenizer that the model was trained with."
            )
        return tokens

    def _given(self, tokens: Any) -> list[int]:
        found = given_tokens(tokens, self.source)
        Limits(self.rules.n_vocab).refuse(found.unsqueeze(0), f"A document of {self.source}")
        return found.tolist()


def given_tokens(tokens: Any, source: str) -> Int[Tensor, " pos"]:
    """Token ids that a record holds.

    Raises:
        DataError: They are no integers in a row.
    """
    try:
        found = torch.as_tensor(tokens) if len(tokens) else torch.zeros(0, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source} holds {type(tokens).__name__} where text or a list of token ids should be."
        ) from error
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise DataError(
            f"{source} holds {found.dtype} {list(found.shape)} where text or a list of token ids (integers) should be."
        )
    return found.long()


def text_column(columns: Sequence[str], source: str) -> str:
    """The column to read: tokens where there are, else text.

    Raises:
        DataError: None has such a name.
    """
    found = next((c for c in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if c in columns), None)
    if found is None and len(columns) == 1:
        return columns[0]
    if found is None:
        usual = ", ".join((*TOKEN_COLUMNS, *TEXT_COLUMNS))
        raise DataError(
            f"{source} has columns {', '.join(columns) or 'of no name'}; none is called {usual}. Say which holds the text: "
            "column=..."
        )
    return found


def unknown_column(column: str, columns: Sequence[str], source: str) -> DataError:
    """The error that names the nearest columns."""
    columns = [f"{name:.40}" for name in columns]
    near = difflib.get_close_matches(column, columns, n=3, cutoff=0.4)
    hint = f"the nearest: {', '.join(map(repr, near))}" if near else "none is near"
    known = f"{', '.join(columns[:10]) or 'none'}{' ...' * (len(columns) > 10)}"
    return DataError(f"{source} has no column {column!r}; it has {known} ({hint}).")


def no_tokenizer(source: str) -> DataError:
    """The error where text cannot be turned into tokens."""
    return DataError(
        f"{source} is text, and text needs a tokenizer: give a model that has one (model.tokenizer), the tokenizer itself "
        "(tokenizer=...), or token rows instead of text."
    )
