"""`token_batches`: rows of tokens from datasets, files and tensors, as a model was trained on them.

1. Open what the name, path or object stands for, and find the column of text or tokens.
2. Decide from the model or its tokenizer how rows begin and what ends a document.
3. Join the documents and cut them into rows, or take rows as they are.
4. Shuffle: rows that can be picked by number all together, those of a stream within windows.

What can be wrong is found before a run begins: here, or by the source's `check`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.documents import Encoder, JoinedRows, no_tokenizer
from tl_paramdecomp.data.open_data import Opened, opened
from tl_paramdecomp.data.sources import BatchSource, RowSource, StreamSource
from tl_paramdecomp.data.streams import ListItems
from tl_paramdecomp.data.tokenizer import RowTokenizer, refuse_other_tokenizer, row_tokenizer
from tl_paramdecomp.errors import DataError, SettingError


def token_batches(
    data: Any,
    model: Any = None,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int = 16,
    column: str | None = None,
    name: str | None = None,
    split: str = "train",
    streaming: bool = True,
    separator: str | None = None,
    join: bool | None = None,
    bos: bool | Literal["auto"] = "auto",
    shuffle: int = 1000,
    seed: int | None = None,
    skip: int = 0,
    vocab_size: int | None = None,
    decomposition: Any = None,
) -> "TokenBatches":
    """Rows of tokens for `decompose`, `evaluate` and `tune_along`, from text or tokens wherever they are.

    Args:
        data: The name of a dataset on the hub (`"roneneldan/TinyStories"`) or a folder with one; a `datasets` Dataset or
            IterableDataset; the path of a file, a glob, or a list of them (`.parquet`, `.jsonl`, and everything else as plain
            text in UTF-8); token ids, as a tensor or array [rows, pos] or one long [tokens]; a DataFrame, Series, Arrow table
            or dict with a column of tokens or text; or a list of texts, or an iterable of texts or records that can be read
            again.
        model: Who is to read the rows, on any host; or a tokenizer. None: whoever reads them says how they begin.
        tokenizer: The model's, where it holds none.
        length: Tokens of a row, the beginning token included. None: as many as model and tokenizer take, at most 1024; rows
            of tokens are then taken whole.
        batch_size: Rows of a batch, where these batches are iterated over; `decompose` says its own.
        column: Where records hold the text or tokens. None: `tokens`, `input_ids`, `text`, or another usual name.
        name: Configuration of a dataset on the hub.
        split: Its split.
        streaming: Read it while training, instead of downloading all of it first.
        separator: What parts the documents of a text file, such as a blank line ("\\n\\n") or "<|endoftext|>"; space around a
            document is dropped then. None: a file is one document.
        join: Whether documents are joined by the end token and cut into rows. None: texts and [tokens] are; rows of tokens
            are rows already, of which the first `length` tokens are taken.
        bos: Whether each row begins with the beginning-of-sequence token. `auto`: as the rows did that the decomposition was
            made on, else as the host has it, else as the tokenizer does; see `data.tokenizer`. Rows of tokens are left as
            they are.
        shuffle: Rows of a stream that are shuffled with each other; rows that can be picked by number are shuffled all
            together. 0: as they come.
        seed: Order of the rows. None: as `decompose` is given it.
        skip: Rows left out at the beginning, such as those that `first_rows` gives to measure on.
        vocab_size: Tokens that the model embeds. None: as the model says.
        decomposition: Whose rows these are to be like.

    Returns:
        Batches that can be used any number of times, each use from the beginning.

    Raises:
        DataError: There is no such data, it is empty or not UTF-8, it has no such column, it needs a tokenizer, or holds tokens
            that the model has not; the message names what was found and what to try.
        SettingError: An argument makes no sense.
    """
    for what, number, least in (("batch_size", batch_size, 1), ("shuffle", shuffle, 0), ("skip", skip, 0)):
        if number < least:
            raise SettingError(f"{what} must be at least {least}; given {number}.")
    found = opened(data, name, split, streaming, separator, column)
    known = model is not None or tokenizer is not None
    rules = row_tokenizer(model, tokenizer, bos, vocab_size, decomposition) if known else None
    made = TokenBatches(found, rules, length, batch_size, join, bos, shuffle, seed, skip, vocab_size, decomposition)
    if known:
        made.source()
    return made


UNSHUFFLED = 64
"""Rows of a window where the order stays as it is."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatches:
    """Rows of tokens that can be read any number of times; `token_batches` makes them."""

    data: Opened
    rules: RowTokenizer | None
    """None: as the model says that reads them."""
    length: int | None
    batch_size: int
    join: bool | None
    bos: bool | Literal["auto"]
    shuffle: int
    seed: int | None
    skip: int
    vocab_size: int | None
    decomposition: Any = None

    def source(
        self, batch_size: int | None = None, seed: int = 0, model: Any = None, tokenizer: Any = None, together: int = 1,
        decomposition: Any = None, shuffled: bool = True,
    ) -> BatchSource:  # fmt: skip
        """A new source that stands at the beginning; arguments as `batch_source`'s. Where the data was made for no model, this
        one and the decomposition say how rows begin; its own seed goes first.

        Raises:
            DataError, SettingError: As `token_batches`, where only the model could tell.
        """
        rules = self._rules_for(model, tokenizer, decomposition)
        size = self.batch_size if batch_size is None else batch_size
        seed = seed if self.seed is None else self.seed
        return self._source(rules, size, seed, self.shuffle if shuffled else 0, self.skip, together)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the data read once, from the beginning; the last may be smaller."""
        return self.source().one_pass()

    def batch(self, step: int) -> Batch:
        """The batch of a step, as `decompose` would get it with the same batch size and seed."""
        return self._own.batch(step)

    def first_rows(self, n: int) -> Batch:
        """The first rows in the order of the data, which `skip=n` leaves out; DataError where there are fewer."""
        found = next(self._source(self._rules_for(), n, 0, 0, 0, 1).one_pass())
        if len(found.tokens) < n:
            raise DataError(
                f"{self.data.name} gives {len(found.tokens)} rows, and {n} are needed; give more data or shorter rows "
                "(length=...)."
            )
        return found

    def check(self) -> None:
        """See that there is a first batch and that the model can read it, else DataError."""
        self._own.check()

    def state(self) -> dict[str, Any]:
        """Where `batch` stands, as values that JSON can hold."""
        return self._own.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let `batch` go on where another's stood; DataError where it was of other data."""
        self._own.restore(state)

    @property
    def info(self) -> dict[str, Any]:
        """Everything that rows and their order depend on, as values that JSON can hold."""
        return self.source().info

    def __repr__(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.info.items() if key not in ("form", "data"))
        return f"TokenBatches({self.data.name}, {told})"

    @cached_property
    def _own(self) -> BatchSource:
        return self.source()

    def _rules_for(self, model: Any = None, tokenizer: Any = None, decomposition: Any = None) -> RowTokenizer:
        """The rules that were known when this was made, or the reader's; and in any case the reader's own vocabulary."""
        if self.rules is None:
            dec = decomposition if self.decomposition is None else self.decomposition
            return row_tokenizer(model, tokenizer, self.bos, self.vocab_size, dec)
        if model is None:
            return self.rules
        reader = row_tokenizer(model, self.rules.tokenizer, False, self.vocab_size)
        n_vocab, n_ctx = (
            mine if its is None else its
            for mine, its in ((self.rules.n_vocab, reader.n_vocab), (self.rules.n_ctx, reader.n_ctx))
        )
        limits = dataclasses.replace(reader.limits, vocabulary=n_vocab)
        return refuse_other_tokenizer(dataclasses.replace(self.rules, n_ctx=n_ctx, limits=limits))

    def _source(
        self, rules: RowTokenizer, batch_size: int, seed: int, shuffle: int, skip: int, together: int
    ) -> BatchSource:
        data = self.data
        joined = data.is_text or data.is_vector or bool(self.join)  # documents, which are cut into rows
        if self.join is False and joined:
            raise SettingError(f"{data.name} has no rows of its own: join=False would leave none; leave join out.")
        if data.is_text and rules.tokenizer is None:
            raise no_tokenizer(data.name)
        if not joined and self.bos != True:  # noqa: E712
            rules = dataclasses.replace(rules, bos=None, why="rows of tokens are taken as they are")
        length = rules.length(self.length) if joined or self.length is not None else None
        info = {
            "form": "token_batches", "data": data.describe(), "column": data.column, "length": length, "joined": joined,
            **rules.describe(), "shuffle": shuffle, "seed": seed, "skip": skip, "batch_size": batch_size,
        }  # fmt: skip
        records = data.items
        if isinstance(records, Tensor):
            Limits(rules.n_vocab).refuse(records if records.ndim == 2 else records.unsqueeze(0), data.name)
        if data.is_vector and isinstance(records, Tensor):  # one long line, of which rows can be picked by number
            body, joined = (length or 0) - len(rules.start), False
            if len(records) < body:
                raise DataError(
                    f"{data.name} has {len(records)} tokens, and a row takes {body}; give more, or a smaller length."
                )
            records = records[: len(records) // body * body].view(-1, body)
        encode = Encoder(rules, None if data.is_vector else data.column, data.name)
        read = functools.partial(encode.row, length, data.is_vector)
        numbered = records if isinstance(records, Tensor) else data.by_number
        if not joined and numbered is not None:
            if skip >= len(numbered):
                raise DataError(f"{data.name} has {len(numbered)} rows, and skip={skip} leaves none of them.")
            if isinstance(records, Tensor):
                read(records[0])
            return RowSource(
                numbered, batch_size, seed, None, together, shuffle > 0, rules.limits, info, skip, read
            )  # fmt: skip
        items = ListItems(records) if isinstance(records, Tensor) else records
        if joined:
            items = JoinedRows(items, encode, length or 0)
        return StreamSource(
            items, batch_size, seed, shuffle or UNSHUFFLED, shuffle > 0, skip, together, info, rules.limits,
            rules if joined else None, None if joined else read,
        )  # fmt: skip
