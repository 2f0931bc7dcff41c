"""Token rows for the command: from the embedded model's grammar, files, or a dataset."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    model_name: str,
    model: Any,
    text: str | Path | Sequence[str] | None,
    dataset: str | None,
    length: int | None,
    **settings: Any,
) -> Rows:
    """Rows as the options ask: the first 32 are held out, the others are to train on.

    `settings` are those of `token_batches`. DataError where no source is named, it cannot be read, or it gives too few rows.
    """
    if text is not None and dataset is not None:
        raise DataError("Name one source: --text FILE or --dataset NAME; given both.")
    if text is None and dataset is None:
        if model_name != EMBEDDED:
            raise DataError("Name what to train on: --text FILE or --dataset NAME.")
        return Rows(micro_gpt2_tokens(4096, seed=1), micro_gpt2_tokens(HELD_OUT, seed=2))
    source: Any = dataset
    if text is not None:
        paths = [Path(text)] if isinstance(text, str | Path) else [Path(name) for name in text]
        for path in paths:
            if not path.is_file() and not glob.has_magic(str(path)):
                raise DataError(f"--text {path} is no file{' but a pipe; write it to one' * path.is_fifo()}.")
        source = paths[0] if isinstance(text, str | Path) else paths
    train = token_batches(source, model, length=length, skip=HELD_OUT, **settings)
    first = train.first_rows(2 * HELD_OUT)
    if first.attention_mask is not None:
        raise DataError(
            f"The first rows differ in length ({int(first.attention_mask.sum(1).min())} to {first.tokens.shape[1]} tokens), "
            "and are measured on as they are; cut all to one with --length."
        )
    return Rows(train, first.tokens[:HELD_OUT])
