"""Whatever is in a file, it loads as it was written or raises a named error, at once and in little memory; nothing is run.

2,000 files with something wrong, drawn from a seed, of all kinds that the package reads (`support/kinds_of_files.py`), and
tables of what chance seldom finds: every kind of foreign file, files cut anywhere, pipes, devices, links to nowhere, bombs.
"""

import json
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tl_paramdecomp.cli.run_files import settings_of_file
from tl_paramdecomp.errors import DecompositionFileError, SettingError, TLParamDecompError

from .support import hostile
from .support.hostile import Chance, refusal, tried, watched
from .support.kinds_of_files import KINDS, Kind
from .support.saved_folders import contents, join_safetensors, put, split_safetensors

pytestmark = pytest.mark.timeout(300)  # a pipe that is waited for never ends
SEEDS = 2000
SHARES = {
    "components": 4,
    "subnetworks": 4,
    "checkpoint": 5,
    "task": 3,
    "run file": 4,
    "run file of JSON": 2,
    "method": 2,
}
"""Of the seeds, by kind; 1 where it is not said."""
BY_KIND = pytest.mark.parametrize("what", list(KINDS))


class Good(NamedTuple):
    """Whole files of a kind."""

    kind: Kind
    files: dict[str, bytes]
    twin: dict[str, bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kind, made when they are first asked for."""
    made: dict[str, Good] = {}

    def of(what: str) -> Good:
        if what not in made:
            kind = KINDS[what]()
            folders = [tmp_path_factory.mktemp(name) / kind.folder for name in ("good", "twin")]
            for folder, make in zip(folders, (kind.make, kind.twin or (lambda folder: None))):
                folder.mkdir()
                make(folder)
            kind.load(folders[0])  # whatever is imported at the first time is
            made[what] = Good(kind, *map(contents, folders))
        return made[what]

    return of


@pytest.fixture(autouse=True)
def random_numbers_as_before() -> Iterator[None]:
    """Going on from a checkpoint sets the global sources of random numbers."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@BY_KIND
def test_what_is_tried_here_loads_when_it_is_left_alone(good: Any, what: str, tmp_path: Path) -> None:
    """Also forged with what it holds already: the checksums that tests write are those of the package."""
    kind, files, _ = good(what)
    folder = put(tmp_path / kind.folder, files)
    with watched():
        kind.load(folder)
    if kind.forge is not None and kind.values is not None:
        kind.forge(folder, kind.values(folder))
        kind.load(folder)
    for name in kind.tensors:
        kind.put(folder, name, files[name])
        kind.load(folder)
    if what in ("components", "subnetworks"):
        assert contents(folder) == files


# --- chance -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [pytest.param(0, id="few"), pytest.param(40_000, id="many", marks=pytest.mark.slow)])
@BY_KIND
def test_a_file_with_something_wrong(good: Any, what: str, more: int, tmp_path: Path) -> None:
    """Its seed is shown where it is not refused by name."""
    share = SHARES.get(what, 1) / sum(SHARES.get(kind, 1) for kind in KINDS)
    first = 100_000 * list(KINDS).index(what)
    for seed in range(first, first + round((more or SEEDS) * share) + 1):
        print("seed", seed)
        try_one(good(what), Chance(seed), tmp_path)


def try_one(one: Good, chance: Chance, place: Path) -> None:
    kind, files, twin = one
    folder = put(place / kind.folder, files)
    sentinel = place / "sentinel"
    ways = ["edit"] * 3 + ["foreign"] + ["values"] * 5 * (kind.forge is not None)
    ways += ["header", "header", "bytes", "foreign bytes"] * bool(kind.tensors) + ["twin"] * bool(twin)
    way, name = chance.choice(ways), chance.choice(sorted(files))
    forged: Any = None
    if way == "edit":
        (folder / name).write_bytes(chance.edited(files[name]))
    elif way == "foreign":
        (folder / name).write_bytes(chance.choice(list(hostile.foreign(sentinel).values())))
    elif way == "twin":
        (folder / name).write_bytes(twin[name])
    elif way == "values":
        forged = chance.forged(kind.values(folder), lambda path: path[0] not in ("checksum", "sha256", "files"))
        kind.forge(folder, forged)
    else:
        name = chance.choice(kind.tensors)
        header, data = split_safetensors(files[name])
        if way == "header":
            forged = join_safetensors(chance.header(header), data)
        elif way == "bytes":
            forged = files[name][: -len(data)] + chance.edited(data) if data else chance.edited(files[name])
        else:
            forged = chance.choice(list(hostile.foreign(sentinel).values()))
        kind.put(folder, name, forged)
    print(way, name)
    found = tried(kind.load, folder)
    refused = isinstance(found, TLParamDecompError)
    assert refused or way not in ("edit", "foreign", "twin") or not kind.sealed or same_json(folder, name, files)
    if not refused and forged is not None and way != "bytes":
        kind.told(found, forged, place / "again")
    assert not sentinel.exists()


def same_json(folder: Path, name: str, files: dict[str, bytes]) -> bool:
    """Only a checkpoint's JSON has its checksum from values, so that it may stand there in other words."""
    return name == "checkpoint.json" and json.loads((folder / name).read_bytes()) == json.loads(files[name])


# --- tables -----------------------------------------------------------------------------------------------------------
LENGTHS = (0, 1, 7, 8, 9, 100, -100, -2, -1)


@BY_KIND
@pytest.mark.parametrize("every", [pytest.param(40, id="some"), pytest.param(0, id="all", marks=pytest.mark.slow)])
def test_cut_files_and_flipped_bits(good: Any, what: str, every: int, tmp_path: Path) -> None:
    """Bits all over every file; each single one among the slow tests."""
    kind, files, twin = good(what)
    folder = put(tmp_path / kind.folder, files)
    for name, content in files.items():
        step = max(1, len(content) // every) if every else 1
        damaged = [content[:length] for length in LENGTHS if len(content) > abs(length)]
        for i in range(0, len(content), step):
            bits = [i // step % 8] if every else range(8)
            damaged += [content[:i] + bytes([content[i] ^ (1 << bit)]) + content[i + 1 :] for bit in bits]
        damaged += [twin[name]] if twin else []
        for changed in damaged:
            (folder / name).write_bytes(changed)
            if kind.sealed:
                assert Path(name).name in str(refusal(kind.load, folder)) or changed not in damaged[: len(LENGTHS)]
            else:
                tried(kind.load, folder)
        (folder / name).write_bytes(content)
    kind.load(folder)


@BY_KIND
def test_foreign_files_are_refused_and_never_run(good: Any, what: str, tmp_path: Path) -> None:
    kind, files, _ = good(what)
    sentinel, folder = tmp_path / "sentinel", tmp_path / kind.folder
    for foreign, content in hostile.foreign(sentinel).items():
        print(foreign)
        for name in files:
            put(folder, {**files, name: content})
            found = tried(kind.load, folder)
            assert isinstance(found, TLParamDecompError) or not kind.sealed
            if kind.tensors and name in kind.tensors:
                kind.put(folder, name, content)  # it is said to be its file, checksum and all
                found = tried(kind.load, folder)
                empty = foreign == "no tensors" and name in ("memory.safetensors", "optimiser.safetensors")
                assert isinstance(found, TLParamDecompError) or empty, name
    assert not sentinel.exists()


@BY_KIND
@pytest.mark.parametrize(
    "there",
    ["folder", "pipe", "zero", "null", "nowhere", "itself", "pipe behind a link", "root", "missing", "terabyte"],
)
def test_what_is_no_file(good: Any, what: str, there: str, tmp_path: Path) -> None:
    kind, files, _ = good(what)
    if what.startswith("x.") and there in ("terabyte", "folder", "root"):
        return  # data may be as large, or in a folder
    if there == "terabyte" and what == "checkpoint":
        return  # all of it is read for its digest
    for number, name in enumerate(files):
        folder = put(tmp_path / str(number) / kind.folder, files)
        path = folder / name
        path.unlink()
        if there == "folder":
            path.mkdir()
        elif there == "pipe":
            os.mkfifo(path)
        elif there == "pipe behind a link":
            os.mkfifo(folder / "pipe")
            path.symlink_to(folder / "pipe")
        elif there == "terabyte":
            path.touch()
            with suppress(OSError):
                os.truncate(path, 1 << 40)
            with pytest.raises(TLParamDecompError):
                kind.load(folder)  # not watched, as it may take the address space to look into it
            continue
        elif there != "missing":
            leads = {"zero": "/dev/zero", "null": "/dev/null", "nowhere": "x", "itself": path.name, "root": "/"}
            path.symlink_to(leads[there])
        found = tried(kind.load, folder)
        assert isinstance(found, TLParamDecompError)
        assert not kind.sealed or isinstance(found, DecompositionFileError)


def test_the_bombs_go_off_where_they_are_opened_as_what_they_are(tmp_path: Path) -> None:
    made = hostile.foreign(tmp_path / "sentinel")
    for what in ("pickle", "pickle, protocol 0"):
        pickle.loads(made[what])
        (tmp_path / "sentinel").rmdir()
    path = tmp_path / "file"
    path.write_bytes(made["torch.save"])
    torch.load(path, weights_only=False)
    (tmp_path / "sentinel").rmdir()
    with pytest.raises(AssertionError, match="find_class"), watched():
        pickle.loads(made["pickle"])


# --- run files that are small and grow --------------------------------------------------------------------------------
def _bomb(depth: int = 9, width: int = 9) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


HEAD = "model: micro-gpt2\nsites: blocks.0.*\n"
RUN_FILES = {
    "aliases of aliases": _bomb(),
    "aliases of mappings": "a: &a {x: 1, y: 2}\n" + "".join(f"b{i}: &b{i} {{<<: *a, z: [*a, *a]}}\n" for i in range(9)),
    "merged with itself": HEAD + "data: &d\n  <<: *d\n  text: x\n",
    "an anchor within itself": HEAD + "data: &d [*d]\n",
    "digits": HEAD + "steps: " + "9" * 100_000,
    "digits and an exponent": HEAD + "steps: " + "1" * 100_000 + "e",
    "digits with underscores": HEAD + "steps: " + "1_" * 50_000,
    "400 digits": HEAD + "steps: " + "9" * 400,
    "keys": HEAD + "".join(f"k{i}: 1\n" for i in range(40_000)),
    "a key twice": HEAD + "steps: 1\nsteps: 2\n",
    "deep lists": HEAD + "sites: " + "[" * 50_000,
    "deep mappings": HEAD + "data: " + "{a: " * 5_000,
    "deep and closed": HEAD + "sites: " + "[" * 2_000 + "]" * 2_000,
    "a date": HEAD + "steps: 2020-01-01",
    "an impossible date": HEAD + "steps: 2020-13-45",
    "sexagesimal": HEAD + "steps: 190:20:30" + ":59" * 5000,
    "binary": HEAD + "steps: !!binary aaaa",
    "a Python object": HEAD + "steps: !!python/object/apply:os.getcwd []",
    "a set": HEAD + "steps: !!set {a, b}",
    "no type": HEAD + "method: {type: null}",
    "a type that is a list": HEAD + "method: {type: [SPD]}",
    "nan": HEAD + "steps: .nan",
    "infinity": HEAD + "max_seconds: .inf\nsteps: .inf",
    "half a step": HEAD + "steps: 1.5",
    "no separator": HEAD + 'data: {text: x, separator: ""}',
    "a list as key": HEAD + "? [a, b]\n: 1\n",
    "several documents": HEAD + "---\n" + HEAD,
    "tabs": HEAD + "data:\n\ttext: x\n",
    "directives": "%YAML 9.9\n---\n" + HEAD,
    "long text": HEAD + "keep_best: " + "x" * 5_000_000,
    "nothing": "",
    "a list": "- a\n- b\n",
}


@pytest.mark.parametrize("which", list(RUN_FILES))
def test_run_files_that_are_small_and_grow(which: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILES[which])
    assert isinstance(tried(lambda path: settings_of_file(path, [], None), tmp_path / "run.yaml"), SettingError)


JSON_FILES = {
    "a key twice": '{"model": "a", "sites": "b", "sites": "c"}',
    "digits": '{"model": "a", "sites": "b", "steps": ' + "9" * 100_000 + "}",
    "400 digits": '{"model": "a", "sites": "b", "steps": ' + "9" * 400 + "}",
    "nan": '{"model": "a", "sites": "b", "steps": NaN}',
    "exponent": '{"model": "a", "sites": "b", "steps": 1e999}',
    "deep": '{"model": "a", "sites": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "keys": '{"model": "a", "sites": "b", ' + ", ".join(f'"k{i}": 1' for i in range(40_000)) + "}",
    "no type": '{"model": "a", "sites": "b", "method": {"type": null}}',
}


@pytest.mark.parametrize("which", list(JSON_FILES))
def test_json_run_files(which: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(JSON_FILES[which])
    assert isinstance(tried(lambda path: settings_of_file(path, [], None), tmp_path / "run.json"), SettingError)
