"""Documents joined into one line of tokens, which is cut into rows.

Where a row begins can be written down in a few numbers: the documents' own place before the one under way, and how many of its
tokens are used.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.data import files
from tl_paramdecomp.data.batch import TOKEN_COLUMNS, Row
from tl_paramdecomp.data.files import Piece
from tl_paramdecomp.data.streams import Items, Place, items_of
from tl_paramdecomp.data.tokenizer import RowTokenizer, row_tokenizer
from tl_paramdecomp.errors import DataError

TEXT_COLUMNS = ("text", "content", "story", "document")
"""Names that a column of text has, where nobody says which it is."""


class JoinedRows(Items):
    """Rows of documents of any form, as a model's rules say; what is left at the end of a pass fills no row."""

    def __init__(self, documents: Items, encode: "Encoder", length: int) -> None:
        """`encode` gives the tokens of a document and what ends it; a row has `length` tokens, the first included."""
        self.documents, self.encode, self.length = documents, encode, length
        self.replayed, self.strays = documents.replayed, documents.strays

    def read(self, place: Mapping[str, Any] | None = None, reread: bool = False) -> Iterator[tuple[Any, Place]]:
        before, used = (place["documents"], place["used"]) if place else (None, 0)
        start = self.encode.rules.start
        body, carried = self.length - len(start), list[int]()
        for document, after in self._pieces(before, reread):
            tokens = self.encode(document)
            while len(carried) + len(tokens) - used >= body:
                begun, used = used, used + body - len(carried)
                yield torch.tensor([*start, *carried, *tokens[begun:used]]), {"documents": before, "used": used}
                carried = []
            carried += tokens[used:]
            before, used = after, 0

    def _pieces(self, place: Mapping[str, Any] | None, reread: bool) -> Iterator[tuple[Any, Place]]:
        """Documents, long texts in pieces, each with the place behind it."""
        before, done = (place.get("document", place), place.get("piece", 0)) if place else (None, 0)
        for item, after in self.documents.read(before, reread):
            text = None if isinstance(item, Piece) else self.encode.value(item)
            if isinstance(text, str) and len(text) > files.PIECE:
                for number, piece in enumerate(pieces_of(text), 1):
                    if number > done:
                        yield piece, after if piece.ends else {"document": before, "piece": number}
            else:
                yield item, after
            before, done = after, 0

    def n_tokens(self) -> int:
        """Tokens of one pass."""
        return sum(len(self.encode(piece)) for piece, _ in self._pieces(None, False))

    def describe(self) -> dict[str, Any]:
        return self.documents.describe()


class TextRows(JoinedRows):
    """Texts joined by the end-of-text token and cut into rows, which begin as the model's rows do."""

    def __init__(
        self,
        texts: Iterable[Any],
        tokenizer: Any,
        length: int | None,
        column: str = "text",
        context: int | None = None,
        bos: bool | Literal["auto"] = "auto",
    ) -> None:
        """
        Args:
            texts: Texts, or records with a column of them.
            tokenizer: The model's, or what `row_tokenizer` made of it.
            length: Tokens of a row; None: as many as tokenizer and model take, at most 1024.
            column: Where records hold the text.
            context: Positions that the model reads.
            bos: Whether rows begin with the beginning-of-sequence token; `auto`: by the rule of `data.tokenizer`.
        """
        rules = tokenizer if isinstance(tokenizer, RowTokenizer) else row_tokenizer(tokenizer=tokenizer, bos=bos)
        if rules.tokenizer is None:
            raise no_tokenizer("The data")
        rules = dataclasses.replace(rules, n_ctx=rules.n_ctx if context is None else context)
        super().__init__(items_of(texts), Encoder(rules, column, "The data"), rules.length(length))

    def describe(self) -> dict[str, Any]:
        """What the texts are, and the rows' length and beginning."""
        told = {"kind": "text rows", "texts": self.documents.describe(), "length": self.length}
        return {**told, "bos": self.encode.rules.bos}


def pieces_of(text: str) -> Iterator[Piece]:
    """A long text in pieces that end behind a line, else before a word, else where they are full; each is tokenised by itself,
    as some tokenizers take far more than twice as long for twice the text, and few rows are not to wait for all of it.
    """
    begin, end = 0, 0
    while end < len(text):
        begin, full = end, end + files.PIECE
        end = len(text)
        if full < len(text):
            line, word = (text.rfind(mark, begin + 1, full) for mark in "\n ")
            end = line + 1 if line > 0 else word if word > 0 else full
        yield Piece(text[begin:end], end == len(text), begin == 0)


@dataclass(frozen=True)
class Encoder:
    """From a document of any form to its tokens, the end token included; nothing for an empty one."""

    rules: RowTokenizer
    column: str | None
    """Where records hold the text or tokens; None: whichever of the usual names they have."""
    source: str
    """What the documents are, for messages."""

    def __call__(self, item: Any) -> list[int]:
        piece = item if isinstance(item, Piece) else None
        value = self.value(item) if piece is None else piece.text
        if value is None:
            return []
        if isinstance(value, str):
            tokens = self.rules.tokens(value, f" of {self.source}") if value else []
        else:
            given = given_tokens(value, self.source)
            Limits(self.rules.n_vocab).refuse(given.unsqueeze(0), f"A document of {self.source}")
            tokens = given.tolist()
        ends = bool(tokens)
        if piece is not None and not (piece.begins and piece.ends):
            ends = piece.ends  # a long document may end with a piece of nothing
        return [*tokens, self.rules.eos] if ends and self.rules.eos is not None else tokens

    def row(self, length: int | None, cut: bool, item: Any) -> Row:
        """So many tokens (None: all) of a record of ids, or of the ids themselves, with its attention mask, where it has one;
        they may begin with the row's first token, unless they are `cut` out of more."""
        tokens = given_tokens(self.value(item), self.source)
        begins = not cut and len(tokens) > 0 and self.rules.start == (int(tokens[0]),)
        start = () if begins else self.rules.start
        row = torch.cat([torch.tensor(start, dtype=torch.long), tokens])
        if len(row) < (length or 1):
            raise DataError(
                f"{self.source} has a row of {len(row)} tokens, and {length=} are needed; give a smaller length, or "
                "join=True to join rows and cut them anew."
            )
        mask = item.get("attention_mask") if isinstance(item, Mapping) and self.column in TOKEN_COLUMNS else None
        if mask is not None:
            mask = torch.cat([torch.ones(len(start), dtype=torch.long), torch.as_tensor(mask).long()])[:length]
        return Row(row[:length], mask)

    def value(self, item: Any) -> Any:
        """The text or tokens of a document."""
        if not isinstance(item, Mapping):
            return item
        column = self.column if self.column is not None else text_column(list(item), self.source)
        if column not in item:
            raise unknown_column(column, list(item), self.source)
        return item[column]


def given_tokens(tokens: Any, source: str) -> Int[Tensor, " pos"]:
    """Token ids that a record holds; DataError where they are no integers in a row."""
    if not hasattr(tokens, "__len__"):
        raise DataError(
            f"{source} holds {type(tokens).__name__} ({str(tokens)[:40]}) where text should be, or a list of token ids."
        )
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
    """The column to read: tokens where there are, else text; DataError where none has such a name."""
    usual = (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    found = next((c for c in usual if c in columns), columns[0] if len(columns) == 1 else None)
    if found is None:
        raise DataError(
            f"{source} has columns {', '.join(columns) or 'of no name'}; none is called {', '.join(usual)}. Say which holds "
            "the text: column=..."
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
