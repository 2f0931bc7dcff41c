"""Opening what a user names as data: a dataset on the hub, local files, a dataset or tensor in memory."""

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_paramdecomp.components.disk import in_short
from tl_paramdecomp.data import files as local
from tl_paramdecomp.data.batch import TOKEN_COLUMNS, digest_of_rows
from tl_paramdecomp.data.documents import text_column, unknown_column
from tl_paramdecomp.data.streams import Items, items_of
from tl_paramdecomp.data.tables import Table, as_known
from tl_paramdecomp.errors import DataError

JSON, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet",)
TEXT = (".txt", ".text", ".md")
"""Suffixes that only a file has; a file of any other suffix is read as text too."""
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")
LOOKED_AT = 100
"""Records among which one is sought that holds something."""


@dataclass(frozen=True, eq=False)
class Opened:
    """Data that can be read from its beginning, and what it holds."""

    name: str
    """For messages."""
    items: Items | Tensor
    """Documents or records; or token ids, [rows, pos] or [tokens]."""
    is_text: bool
    """Whether documents are texts, rather than tokens."""
    column: str | None = None
    """Where records hold them; None: there are no records."""
    by_number: Any = None
    """The records, where any of them can be picked."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What else tells the data from other data."""

    @property
    def is_vector(self) -> bool:
        """Whether this is one long line of tokens."""
        return isinstance(self.items, Tensor) and self.items.ndim == 1

    def describe(self) -> dict[str, Any]:
        """What tells the data from other data, as values that JSON can hold."""
        if isinstance(self.items, Tensor):
            return {"kind": "tokens", "shape": list(self.items.shape), "digest": digest_of_rows(self.items)}
        return {**self.items.describe(), **self.origin}


def opened(
    data: Any, name: str | None, split: str, streaming: bool, separator: str | None, column: str | None
) -> Opened:
    """Data of any form that `token_batches` takes, whose arguments these are; DataError where nothing in it can be read."""
    data = as_known(data)
    if isinstance(data, Tensor):
        if data.ndim not in (1, 2) or data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise DataError(f"Token ids are integers [rows, pos] or [tokens]; given {data.dtype} {list(data.shape)}.")
        if not data.numel():
            raise DataError(f"The tensor of token ids is empty: {list(data.shape)}.")
        return Opened("the tensor of token ids", data, is_text=False)
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        data = Table(type(data).__name__, data) if set(TOKEN_COLUMNS) & set(data) else data
    if isinstance(data, Table):
        return _dataset(data, f"the given {data.kind}", column)
    if hasattr(data, "column_names"):
        return _dataset(data, f"the {type(data).__name__}", column)
    if isinstance(data, list | tuple) and data and all(_is_text(part) for part in data):
        return _records(data, f"the {type(data).__name__} of texts", column)
    data = [data] if isinstance(data, str | Path) else data
    if isinstance(data, list | tuple) and data and all(isinstance(path, str | Path) for path in data):
        if len(data) == 1 and not _is_local(str(data[0])):
            return _hub(str(data[0]), name, split, streaming, column)
        return _files([Path(path).expanduser() for path in data], separator, column)
    if isinstance(data, Iterator):
        raise DataError(
            f"A one-time iterator ({type(data).__name__}) cannot be read again; give an object whose __iter__ begins anew, or "
            "give it to decompose as it is."
        )
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"Expected the name of a dataset, files, a dataset, token ids or texts that can be iterated over; given "
            f"{type(data).__name__}."
        )
    return _records(data, f"the {type(data).__name__}", column)


def _dataset(data: Any, name: str, column: str | None, origin: Mapping[str, Any] | None = None) -> Opened:
    """A dataset of the `datasets` library."""
    if isinstance(data, Mapping):
        raise DataError(
            f"{name} has splits {', '.join(map(repr, data))}; give one of them, such as data[{next(iter(data), 'train')!r}]."
        )
    if hasattr(data, "__len__"):
        if not len(data):
            raise DataError(f"{name} is empty: it has no rows.")
        ends = {"digest": digest_of_rows(data, every=isinstance(data, Table)), "columns": list(data.column_names)}
        return _records(data, name, column, data, {**ends, **(origin or {})})
    return _records(data, name, column, None, origin)


def _records(
    data: Any, name: str, column: str | None, by_number: Any = None, origin: Mapping[str, Any] | None = None
) -> Opened:
    """Items of which one has to be looked at to know what they are."""
    items, empty = items_of(data), True
    for item in islice(items, LOOKED_AT):
        empty, found = False, None
        if isinstance(item, Mapping):
            found = column if column is not None else text_column(list(item), name)
            if found not in item:
                raise unknown_column(found, list(item), name)
        elif column is not None:
            raise DataError(f"{name} holds {type(item).__name__}, no records with columns; leave out {column=}.")
        value = item if found is None else item[found]
        if hasattr(value, "__len__") and len(value):
            return Opened(name, items, isinstance(value, str), found, by_number, origin or {})
        if value is not None and not hasattr(value, "__len__"):
            raise DataError(f"{name} holds {type(value).__name__} where text or a list of token ids should be.")
    what = "it has no records" if empty else f"its first {LOOKED_AT} records hold nothing"
    raise DataError(f"{name} is empty: {what}.")


# --- files ----------------------------------------------------------------------------------------------------------
def _is_text(part: Any) -> bool:
    """Whether this is text itself, rather than the name of a file or dataset: it has a space, and no file has that name."""
    if not isinstance(part, str) or not any(letter.isspace() for letter in part):
        return False
    try:
        return Path(part).suffix.lower() not in (*TEXT, *JSON, *PARQUET, *PACKED) and not Path(part).exists()
    except (OSError, ValueError):  # too long for a name, or holds what none may
        return True


def _is_local(path: str) -> bool:
    """Whether this names files, rather than a dataset by its name or folder."""
    place = Path(path).expanduser()
    if place.is_dir():
        return False
    looks = place.suffix.lower() in (*TEXT, *JSON, *PARQUET, *PACKED) or path.startswith(("/", "./", "../", "~"))
    return looks or glob.has_magic(path) or place.is_file()


def _files(paths: Sequence[Path], separator: str | None, column: str | None) -> Opened:
    files = local.find_files(paths)
    name = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise DataError(f"Files of one kind can be read together; given {', '.join(sorted(kinds))} ({name}).")
    kind = kinds.pop()
    if separator is not None and kind != "text":
        raise DataError(
            f"A separator parts documents of text files; {name} is {kind}, where each record is a document."
        )
    if kind == "packed":
        raise DataError(f"{name} is packed; unpack it first.")
    for file in files if kind == "JSON array" else ():
        _check_array(file)
    if kind in ("parquet", "JSON array"):
        from datasets import load_dataset

        builder, local_paths = kind.split()[0].lower(), [glob.escape(str(file.resolve())) for file in files]
        try:
            stream = load_dataset(builder, data_files=local_paths, split="train", streaming=True)
        except Exception as error:
            raise DataError(f"{name} cannot be read as {builder} ({in_short(error)}).") from error
        return _dataset(stream, name, column, {"kind": builder, **local.names_and_sizes(files)})
    local.refuse_bad_bytes(files)
    if kind == "JSON lines":
        return _records(local.JsonLineFiles(files), name, column)
    if column is not None:
        raise DataError(
            f"{name} is plain text and has no columns; leave out column={column!r}, or give .jsonl or .parquet."
        )
    return Opened(name, local.TextFiles(files, separator), is_text=True)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in PACKED:
        return "packed"
    if suffix in PARQUET:
        return "parquet"
    if suffix not in JSON:
        return "text"
    try:
        with file.open("rb") as opened_file:
            return "JSON array" if opened_file.read(64).lstrip()[:1] == b"[" else "JSON lines"
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def _check_array(file: Path) -> None:
    """See that a file holds objects or texts alone; what else JSON can hold ends the whole process within `datasets`."""
    try:
        records = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as json ({in_short(error)}).") from error
    kinds = {type(record) for record in records}
    if kinds not in ({dict}, {str}):
        told = " and ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise DataError(f'{file} holds a list of {told}; expected objects, such as {{"text": "..."}}, or texts.')


# --- the hub --------------------------------------------------------------------------------------------------------
def _hub(path: str, name: str | None, split: str, streaming: bool, column: str | None) -> Opened:
    """A dataset by its name on the hub, or by a folder that holds one."""
    from datasets import load_dataset, load_from_disk

    told = f"the dataset {path!r}" + (f" ({name})" if name else "")
    saved = [file for file in ("state.json", "dataset_dict.json") if (Path(path).expanduser() / file).is_file()]
    try:
        if saved:
            data = load_from_disk(str(Path(path).expanduser()))
            data = data[split] if isinstance(data, Mapping) and split in data else data
        else:
            data = load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(_why_not(path, name, split, error)) from error
    return _dataset(data, told, column, {"dataset": path, "name": name, "split": split})


def _why_not(path: str, name: str | None, split: str, error: Exception) -> str:
    """What stood in the way of a dataset, and what to try."""
    begun = f"The dataset {path!r} cannot be opened: {in_short(error).rstrip('.')}."
    words = f"{type(error).__name__} {error}".lower()
    if "split" in words and "notfound" not in words:
        return f"{begun} Asked for split={split!r}."
    if "builderconfig" in words or "config name is missing" in words:
        return f"{begun} Asked for the configuration name={name!r}."
    return (
        f"{begun} There is no file or folder of that name here; for a dataset on the hub, see that its name is right "
        f"(https://huggingface.co/datasets/{path}), that the network is there and HF_HUB_OFFLINE is not set, and that you are "
        "logged in where it is gated. Without a network, give local files ('text/*.txt', .jsonl, .parquet), or "
        "streaming=False for a dataset that was downloaded before."
    )
