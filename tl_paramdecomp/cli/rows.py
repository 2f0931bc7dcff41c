"""Token rows for the command: from the embedded model's grammar, files, or a dataset."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.cli.models import EMBEDDED
from tl_paramdecomp.data.token_batches import token_batches
from tl_paramdecomp.errors import DataError
from tl_paramdecomp.pretrained import micro_gpt2_tokens

HELD_OUT = 32


class Rows(NamedTuple):
    """Rows to train on, and rows that training never sees."""

    train: Any
    held_out: Int[Tensor, "row pos"]


def open_rows(
    name: str,
    model: Any,
    text: str | Path | Sequence[str] | None,
    dataset: str | None,
    length: int | None,
    *,
    column: str | None = None,
    config: str | None = None,
    split: str = "train",
    separator: str | None = None,
    join: bool | None = None,
    bos: bool | Literal["auto"] = "auto",
    shuffle: int = 1000,
    seed: int | None = None,
    decomposition: Any = None,
) -> Rows:
    """Rows as the options ask: the first 32 are held out, the others are to train on.

    Args:
        name: The model's, as the command was given it.
        model: Opened.
        text: File, glob or several: text, JSON lines or parquet, by its suffix.
        dataset: Name of a dataset on the hub, or a folder with one.
        length: Tokens per row.
        column: Where records hold text or tokens; None: one of the usual names.
        config: Configuration of the dataset.
        split: Its split.
        separator: What parts the documents of a text file; None: a file is one document.
        join: Whether documents are joined and cut into rows; None: texts are.
        bos: Whether each row begins with the beginning-of-sequence token; auto: as the model was trained.
        shuffle: Rows that are shuffled with each other; 0: as they come.
        seed: Their order; None: the run's.
        decomposition: Rows begin as those did that it was made on.

    Raises:
        DataError: No source was named, it cannot be read, or it gives too few rows.
    """
    if text is not None and dataset is not None:
        raise DataError("Name one source: --text FILE or --dataset NAME; given both.")
    if text is None and dataset is None:
        if name != EMBEDDED:
            raise DataError("Name what to train on: --text FILE or --dataset NAME.")
        return Rows(micro_gpt2_tokens(4096, seed=1), micro_gpt2_tokens(HELD_OUT, seed=2))
    source: Any = dataset
    if text is not None:
        paths = [Path(text)] if isinstance(text, str | Path) else [Path(name) for name in text]
        for path in paths:
            if not path.is_file() and not glob.has_magic(str(path)):
                raise DataError(f"--text {path} is no file{' but a pipe; write it to one' * path.is_fifo()}.")
        source = paths[0] if isinstance(text, str | Path) else paths
    train = token_batches(
        source, model, length=length, column=column, name=config, split=split, separator=separator, join=join, bos=bos,
        shuffle=shuffle, seed=seed, skip=HELD_OUT, decomposition=decomposition,
    )  # fmt: skip
    first = train.first_rows(2 * HELD_OUT)
    if first.attention_mask is not None:
        raise DataError(
            f"The first rows differ in length ({int(first.attention_mask.sum(1).min())} to {first.tokens.shape[1]} tokens), "
            "and are measured on as they are; cut all to one with --length."
        )
    return Rows(train, first.tokens[:HELD_OUT])
