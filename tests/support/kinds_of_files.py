"""Every kind of file that the package reads, as a table: a good one, how it is read, and how a forged one is made to fit."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.cli.methods import method_in
from tl_paramdecomp.cli.run_files import settings_of_file
from tl_paramdecomp.errors import DecompositionFileError
from tl_paramdecomp.training.callbacks import STOP
from tl_paramdecomp.training.checkpoint import read_checkpoint, restore

from ..analysis.small_records import RECORDS
from ..training.checkpoints import metadata, seal, state_of, steps, stopped_run
from .models import tokenizer
from .saved_folders import TENSORS, forge, sealed_lines, tensors_in, values_of

FORMATS = Path(__file__).parents[1]
LOADERS: dict[str, Callable[[Path], Any]] = {
    "components": tlpd.Decomposition.load,
    "subnetworks": tlpd.SubnetworkDecomposition.load,
}
TASK = Task.from_tokens("t", [[1, 2, 3], [4, 5]], [[1], [2, 3]], [[2], [4]], [[1, 2, 4], [4, 6]], groups=("x", "y"))
RUN = {
    "model": "micro-gpt2", "sites": ["blocks.0.mlp.*", "unembed.W_U"], "steps": 5, "batch_size": 2, "keep_best": "loss",
    "method": {"preset": "vpd", "n_components": {"blocks.*": 8}, "lr": 1e-3, "losses": {"faithfulness": {"rows": 4}}},
    "data": {"text": "x.txt", "length": 16, "bos": True}, "evaluate": {"every": 5, "rows": 4}, "max_seconds": 1.5,
}  # fmt: skip
"""A run file with settings of every type."""


@dataclass(frozen=True)
class Kind:
    """One kind of files: those of one folder that are read together."""

    make: Callable[[Path], Any]
    """Writes good ones into a folder."""
    load: Callable[[Path], Any]
    values: Callable[[Path], Any] | None = None
    """The JSON values that may be forged."""
    forge: Callable[[Path, Any], Any] | None = None
    """Writes forged values, with checksums that fit."""
    tensors: tuple[str, ...] = ()
    """Files of tensors."""
    put: Callable[[Path, str, bytes], Any] | None = None
    """Writes other content for one of them, with checksums that fit."""
    told: Callable[[Any, Any, Path], None] = lambda made, forged, scratch: None
    """Asserts that what loaded from forged values says all that they said."""
    folder: str = "files"
    """What the folder must be called."""
    sealed: bool = True
    """Whether a checksum notices every change."""
    twin: Callable[[Path], Any] | None = None
    """Writes another good one, whose files go with none of this one's."""


# --- decompositions ---------------------------------------------------------------------------------------------------
def decomposition(kind: str) -> Kind:
    load = LOADERS[kind]

    def other(folder: Path) -> None:
        made = load(FORMATS / "components" / "format_1" / kind)
        made.info["method"] = "by another hand"
        next(made.parameters()).data += 1
        made.save(folder)

    def told(made: Any, forged: Any, scratch: Path) -> None:
        """Saved again, it says all that the file said, its tensors are those read by hand."""
        folder = made.save(scratch)
        content = (folder / TENSORS).read_bytes()
        if isinstance(forged, bytes):
            found, expected = tensors_in(content), tensors_in(forged)
            assert found.keys() == expected.keys()
            assert all((found[key] == expected[key]).all() for key in found)
        else:
            assert is_in({key: value for key, value in forged.items() if key != "checksum"}, values_of(folder))

    return Kind(
        make=lambda folder: load(FORMATS / "components" / "format_1" / kind).save(folder), load=load,
        values=values_of, forge=forge, tensors=(TENSORS,),
        put=lambda folder, name, content: forge(folder, values_of(folder), content), told=told, twin=other,
    )  # fmt: skip


def is_in(known: Any, found: Any) -> bool:
    """Whether all of some JSON is in other JSON, of the same types; objects may have more there (later defaults)."""
    if type(known) is not type(found):
        return False
    if isinstance(known, dict):
        return all(key in found and is_in(value, found[key]) for key, value in known.items())
    if isinstance(known, list):
        return len(known) == len(found) and all(map(is_in, known, found))
    return known == found


# --- records and tasks ------------------------------------------------------------------------------------------------
def record(what: str) -> Kind:
    good = RECORDS[what]

    def put(folder: Path, name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        values = json.loads((folder / "r.json").read_bytes())
        digest = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (folder / "r.json").write_bytes(sealed_lines(values | {"tensors": digest}))

    def told(made: Any, forged: Any, scratch: Path) -> None:
        """Saved again, it is the same file."""
        scratch.mkdir(exist_ok=True)
        try:
            text = made.save(scratch / "again.json").read_text()
        except DecompositionFileError as error:  # beartype looks at one item of a list, another one every time
            assert "TypeCheckError" in str(error)
            return
        if not isinstance(forged, bytes):
            again = json.loads(sealed_lines(forged))  # as it was read: surrogates and numbers written out
            anew = dict.fromkeys(("checksum", "tensors") if good.arrays else ("checksum",), "")
            assert str(json.loads(text) | anew) == str(again | anew)

    return Kind(
        make=lambda folder: good.save(folder / "r.json"), load=lambda folder: type(good).load(folder / "r.json"),
        values=lambda folder: json.loads((folder / "r.json").read_bytes()),
        forge=lambda folder, values: (folder / "r.json").write_bytes(sealed_lines(values)),
        tensors=("r.safetensors",) if good.arrays else (), put=put, told=told,
    )  # fmt: skip


def task() -> Kind:
    def told(made: Any, forged: Any, scratch: Path) -> None:
        scratch.mkdir(exist_ok=True)
        again = load_task(made.save(scratch / "again.jsonl"))
        assert torch.equal(again.clean, made.clean) and again.answers == made.answers

    return Kind(
        make=lambda folder: TASK.save(folder / "t.jsonl"), load=lambda folder: load_task(folder / "t.jsonl"),
        values=lambda folder: read_lines(folder / "t.jsonl")[:-1],
        forge=lambda folder, values: write_lines(folder / "t.jsonl", values), told=told, sealed=False,
    )  # fmt: skip


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in values))


# --- checkpoints ------------------------------------------------------------------------------------------------------
def checkpoint() -> Kind:
    state = state_of()

    def make(folder: Path, step: int = 4) -> None:
        run = folder.with_name("run")
        if not run.exists():
            stopped_run(run, lambda info: STOP if info.step == 4 else None)
        shutil.copytree(steps(run)[step], folder, dirs_exist_ok=True)

    def load(folder: Path) -> Any:
        """Read, and gone on with."""
        found = read_checkpoint(folder)
        restore(found, state)
        return found

    def put(folder: Path, name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        seal(folder)

    def forged(folder: Path, values: Mapping[str, Any]) -> None:
        (folder / "checkpoint.json").write_text(json.dumps(dict(values) | {"checksum": ""}))
        seal(folder)

    return Kind(
        make=make, load=load, values=metadata, forge=forged,
        tensors=tuple(f"{name}.safetensors" for name in ("memory", "optimiser", "random", "decomposition/components")),
        put=put, folder="step-00000004", twin=lambda folder: make(folder, 2),
    )  # fmt: skip


# --- settings and data, which have no checksums -----------------------------------------------------------------------
def run_file(suffix: str) -> Kind:
    def write(folder: Path, values: Any) -> None:
        text = json.dumps(values) if suffix == "json" else yaml.safe_dump(values, allow_unicode=False)
        (folder / f"run.{suffix}").write_text(text, encoding="utf-8")

    return Kind(
        make=lambda folder: write(folder, RUN), forge=write, values=lambda folder: json.loads(json.dumps(RUN)),
        load=lambda folder: settings_of_file(folder / f"run.{suffix}", [], None), sealed=False,
    )  # fmt: skip


def method_file() -> Kind:
    from tl_paramdecomp.experiments.recipes import RECIPES

    try:
        from tl_paramdecomp.settings import to_settings
    except ImportError:
        from tl_paramdecomp.methods.settings import to_settings
    good = to_settings(RECIPES["tms-5-2-id"].method)
    return Kind(
        make=lambda folder: (folder / "m.json").write_text(json.dumps(good)),
        load=lambda folder: method_in(folder / "m.json"),
        values=lambda folder: good, forge=lambda folder, values: (folder / "m.json").write_text(json.dumps(values)),
        sealed=False,
    )  # fmt: skip


TEXTS = [f"w{i % 50} w{i % 7} w{i % 11} w3 w4 w5 w6 w7 w8 w9\n" for i in range(20)]


def data(name: str) -> Kind:
    words = tokenizer()

    def load(folder: Path) -> None:
        tlpd.token_batches(folder / name, words, length=8, batch_size=2).source().check()

    def make(folder: Path) -> None:
        if name.endswith("parquet"):
            import datasets

            datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / name)
        elif name.endswith("txt"):
            (folder / name).write_text("".join(TEXTS))
        else:
            write(folder, [{"text": text} for text in TEXTS])

    def write(folder: Path, values: list[Any]) -> None:
        if name.endswith("jsonl"):
            write_lines(folder / name, values)
        else:
            (folder / name).write_text(json.dumps(values))

    has_values = name.endswith(("jsonl", "json"))
    return Kind(
        make=make, load=load, sealed=False, forge=write if has_values else None,
        values=(lambda folder: [{"text": text} for text in TEXTS]) if has_values else None,
    )  # fmt: skip


KINDS: dict[str, Callable[[], Kind]] = {
    **{kind: lambda kind=kind: decomposition(kind) for kind in LOADERS},
    **{what: lambda what=what: record(what) for what in RECORDS},
    "task": task,
    "checkpoint": checkpoint,
    "run file": lambda: run_file("yaml"),
    "run file of JSON": lambda: run_file("json"),
    "method": method_file,
    **{f"x.{end}": lambda end=end: data(f"x.{end}") for end in ("txt", "jsonl", "json", "parquet")},
}
