"""Token rows for the command: from the embedded model's grammar, a text file, or a hub dataset."""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.cli.models import EMBEDDED, tokenizer_of
from tl_paramdecomp.errors import DataError
from tl_paramdecomp.pretrained import micro_gpt2_tokens
from tl_paramdecomp.training.data import TextRows

HELD_OUT = 32


class Rows(NamedTuple):
    """Rows to train on, and rows that training never sees."""

    train: Any
    held_out: Int[Tensor, "row pos"]


def open_rows(name: str, model: Any, text: Path | None, dataset: str | None, length: int) -> Rows:
    """Rows as the options ask.

    Raises:
        DataError: No source was named, or it gives too few rows.
    """
    if text is None and dataset is None:
        if name != EMBEDDED:
            raise DataError("Name what to train on: --text FILE or --dataset NAME.")
        return Rows(micro_gpt2_tokens(4096, seed=1), micro_gpt2_tokens(HELD_OUT, seed=2))
    tokenizer = tokenizer_of(name, model)
    if text is not None:
        try:
            rows = list(TextRows([text.read_text(encoding="utf-8")], tokenizer, length))
        except OSError as error:
            raise DataError(f"{text} cannot be read: {error}") from error
        if len(rows) < 2 * HELD_OUT:
            raise DataError(f"{text} gives {len(rows)} rows of {length} tokens; at least {2 * HELD_OUT} are needed.")
        return Rows(torch.stack(rows[HELD_OUT:]), torch.stack(rows[:HELD_OUT]))
    from datasets import load_dataset

    stream = load_dataset(str(dataset), split="train", streaming=True)
    held_out = list(islice(TextRows(stream, tokenizer, length), HELD_OUT))
    return Rows(TextRows(stream.skip(HELD_OUT * 4), tokenizer, length), torch.stack(held_out))
