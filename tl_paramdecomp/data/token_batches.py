"""`token_batches`: rows of tokens from datasets, files and tensors, as a model was trained on them.

1. Open what the name, path or object stands for, and find the column of text or tokens.
2. Decide from the model or its tokenizer how rows begin and what ends a document.
3. Join the documents and cut them into rows, or take rows as they are.
4. Shuffle: rows that can be picked by number all together, those of a stream within windows.

What can be wrong is found before a run begins: here, or by the source's `check`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.data.batch import TOKEN_COLUMNS, Batch
from tl_paramdecomp.data.cursors import Cursor, Items, ListItems, Place
from tl_paramdecomp.data.openings import Opened, opened
from tl_paramdecomp.data.sources import BatchMaker, BatchSource, RowSource
from tl_paramdecomp.data.text import Encoder, JoinedRows, given_tokens, no_tokenizer
from tl_paramdecomp.data.vocabulary import RowRules, refuse_other_tokenizer, row_rules
from tl_paramdecomp.data.windows import WindowSource
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
        bos: Whether each row begins with the beginning-of-sequence token. `auto`: as the model was trained, see
            `training.data.vocabulary.row_rules`; rows of tokens are left as they are.
        shuffle: Rows of a stream that are shuffled with each other; rows that can be picked by number are shuffled all
            together. 0: as they come.
        seed: Order of the rows. None: as `decompose` is given it.
        skip: Rows left out at the beginning, such as those that `first_rows` gives to measure on.
        vocab_size: Tokens that the model embeds. None: as the model says.

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
    rules = row_rules(model, tokenizer, bos, vocab_size) if known else None
    made = TokenBatches(found, rules, length, batch_size, join, bos, shuffle, seed, skip, vocab_size)
    if known:
        made.source()
    return made


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatches(BatchMaker):
    """Rows of tokens that can be read any number of times; `token_batches` makes them."""

    data: Opened
    rules: RowRules | None
    """None: as the model says that reads them."""
    length: int | None
    batch_size: int
    join: bool | None
    bos: bool | Literal["auto"]
    shuffle: int
    seed: int | None
    skip: int
    vocab_size: int | None
    _used: list[BatchSource] = field(default_factory=list)

    def source(
        self, batch_size: int | None = None, seed: int = 0, model: Any = None, tokenizer: Any = None, together: int = 1
    ) -> RowSource | WindowSource:
        """A new source that stands at the beginning; see `BatchMaker.source`.

        Raises:
            DataError, SettingError: As `token_batches`, where only the model could tell.
        """
        rules = self._rules_for(model, tokenizer)
        size = self.batch_size if batch_size is None else batch_size
        return self._source(rules, size, seed if self.seed is None else self.seed, self.shuffle, self.skip, together)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the data read once, from the beginning; the last may be smaller."""
        return self.source().one_pass()

    def batch(self, step: int) -> Batch:
        """The batch of a step, as `decompose` would get it with the same batch size and seed."""
        return self._own.batch(step)

    def first_rows(self, n: int) -> Batch:
        """The first rows in the order of the data, which `skip=n` leaves out.

        Raises:
            DataError: There are fewer.
        """
        found = next(self._source(self._rules_for(), n, 0, 0, 0, 1).one_pass())
        if len(found.tokens) < n:
            raise DataError(
                f"{self.data.name} gives {len(found.tokens)} rows, and {n} are needed; give more data or shorter rows "
                "(length=...)."
            )
        return found

    def check(self) -> None:
        """See that there is a first batch and that the model can read it.

        Raises:
            DataError: There is none, or it cannot.
        """
        self._own.check()

    def state(self) -> dict[str, Any]:
        """Where `batch` stands, as values that JSON can hold."""
        return self._own.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let `batch` go on where another's stood.

        Raises:
            DataError: It was of other data.
        """
        self._own.restore(state)

    @property
    def info(self) -> dict[str, Any]:
        """Everything that rows and their order depend on, as values that JSON can hold."""
        return self.source().info

    def __repr__(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.info.items() if key not in ("form", "data"))
        return f"TokenBatches({self.data.name}, {told})"

    @property
    def _own(self) -> BatchSource:
        if not self._used:
            self._used.append(self.source())
        return self._used[0]

    def _rules_for(self, model: Any = None, tokenizer: Any = None) -> RowRules:
        """The rules that were known when this was made, or the reader's; and in any case the reader's own vocabulary."""
        if self.rules is None:
            return row_rules(model, tokenizer, self.bos, self.vocab_size)
        if model is None:
            return self.rules
        reader = row_rules(model, self.rules.tokenizer, False, self.vocab_size)
        n_vocab = self.rules.n_vocab if reader.n_vocab is None else reader.n_vocab
        rules = dataclasses.replace(
            self.rules,
            n_vocab=n_vocab,
            n_ctx=self.rules.n_ctx if reader.n_ctx is None else reader.n_ctx,
            limits=dataclasses.replace(reader.limits, vocabulary=n_vocab),
        )
        refuse_other_tokenizer(rules)
        return rules

    def _source(
        self, rules: RowRules, batch_size: int, seed: int, shuffle: int, skip: int, together: int
    ) -> RowSource | WindowSource:
        joined = self.joined
        if self.join is False and joined:
            raise SettingError(f"{self.data.name} has no rows of its own: join=False would leave none; leave join out.")
        if self.data.is_text and rules.tokenizer is None:
            raise no_tokenizer(self.data.name)
        if not joined and self.bos != True:  # noqa: E712
            rules = dataclasses.replace(rules, bos=None, why="rows of tokens are taken as they are")
        length = rules.length(self.length) if joined or self.length is not None else None
        info = {
            "form": "token_batches", "data": self.data.describe(), "column": self.data.column, "length": length,
            "joined": joined, **rules.describe(), "shuffle": shuffle, "seed": seed, "skip": skip, "batch_size": batch_size,
        }  # fmt: skip
        rows = self._rows(rules, length)
        if isinstance(rows, Items):
            return WindowSource(rows, batch_size, seed, shuffle, skip, together, info, rules.limits)
        if skip >= len(rows):
            raise DataError(f"{self.data.name} has {len(rows)} rows, and skip={skip} leaves none of them.")
        kept = NumberedRows(rows.items, rows.read, rows.first + skip, len(rows) - skip)
        return RowSource(
            kept, batch_size, seed, together=together, shuffled=shuffle > 0, limits=rules.limits, info=info, first=skip
        )

    def _rows(self, rules: RowRules, length: int | None) -> "Items | NumberedRows":
        """Rows as the rules say, picked by number where they can be."""
        data, items = self.data, self.data.items
        if isinstance(items, Tensor):
            rows = items if items.ndim == 2 else items.unsqueeze(0)
            Limits(rules.n_vocab).refuse(rows, data.name)
        if isinstance(items, Tensor) and data.is_vector:
            assert length is not None
            body = length - len(rules.start)
            if len(items) < body:
                raise DataError(
                    f"{data.name} has {len(items)} tokens, and a row takes {body}; give more, or a smaller length."
                )
            parts = items[: len(items) // body * body].view(-1, body)
            return NumberedRows(parts, RowReader(rules, None, length, data.name))
        if self.joined:
            documents = ListItems(items) if isinstance(items, Tensor) else items
            return JoinedRows(documents, Encoder(rules, data.column, data.name), length or 0, rules.start)
        reader = RowReader(rules, data.column, length, data.name)
        if isinstance(items, Tensor):
            reader(items[0])
            return NumberedRows(items, reader)
        return ReadRows(items, reader) if data.by_number is None else NumberedRows(data.by_number, reader)

    @property
    def joined(self) -> bool:
        """Whether documents are joined and cut into rows."""
        return self.data.is_text or self.data.is_vector or bool(self.join)


@dataclass(frozen=True)
class RowReader:
    """From a record of token ids, or the ids themselves, to a row."""

    rules: RowRules
    column: str | None
    length: int | None
    """Tokens of a row; None: as many as there are."""
    source: str
    """What the records are, for messages."""

    def __call__(self, item: Any) -> Any:
        """The row; with `attention_mask`, where the record has one."""
        tokens = given_tokens(Encoder(self.rules, self.column, self.source).value(item), self.source)
        start = self.rules.start if not len(tokens) or self.rules.start != tokens[:1].tolist() else []
        row = torch.cat([torch.tensor(start, dtype=torch.long), tokens])
        if len(row) < (self.length or 1):
            raise DataError(
                f"{self.source} has a row of {len(row)} tokens, and length={self.length} are needed; give a smaller length, or "
                "join=True to join rows and cut them anew."
            )
        mask = item.get("attention_mask") if isinstance(item, Mapping) and self.column in TOKEN_COLUMNS else None
        if mask is None:
            return row[: self.length]
        mask = torch.cat([torch.ones(len(start), dtype=torch.long), torch.as_tensor(mask).long()])
        return {"tokens": row[: self.length], "attention_mask": mask[: self.length]}


class NumberedRows:
    """Rows of records that can be picked by number."""

    def __init__(self, items: Any, read: RowReader, first: int = 0, n: int | None = None) -> None:
        self.items, self.read, self.first = items, read, first
        self._n = len(items) if n is None else n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        return self.read(self.items[self.first + i])


@dataclass(frozen=True)
class ReadRows(Items):
    """Rows of records that come one after another."""

    records: Items
    read: RowReader

    def open(self) -> Cursor:
        """A new pass from the first record on."""
        return _RowCursor(self.records.open(), self.read)


class _RowCursor(Cursor):
    def __init__(self, records: Cursor, read: RowReader) -> None:
        self._records, self._read = records, read

    def __next__(self) -> Any:
        return self._read(next(self._records))

    def place(self) -> Place:
        return self._records.place()

    def go_to(self, place: Mapping[str, Any], reread: bool = False) -> None:
        self._records.go_to(place, reread)
