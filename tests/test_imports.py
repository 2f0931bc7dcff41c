"""Which way imports run, and how little a bare import takes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tl_paramdecomp

PACKAGE = Path(tl_paramdecomp.__file__).parent
ORDER = ["field_docs", "sites", "parallel", "settings", "adapters", "components", "data", "methods", "patching"]
ORDER += ["analysis", "training", "report", "experiments", "cli"]
"""Imports run to the left; `errors` is left of all, and `components` does not reach `adapters`."""
BESIDE = {"toy_models", "pretrained"}
"""They import errors, sites and adapters, and whatever stands right of components may import them."""
HOSTS = {"transformer_lens", "nnsight", "transformers", "datasets", "typer", "rich", "matplotlib", "sklearn"}


class Import(NamedTuple):
    """One import statement's target."""

    file: Path
    line: int
    module: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}:{self.line} imports {self.module}"


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(file: Path) -> Iterator[Import]:
    """Every import of a file, also inside functions; those for type checkers alone count for the order, not as loading."""
    package = ["tl_paramdecomp", *file.relative_to(PACKAGE).parent.parts]

    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parts = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*parts, *([child.module] if child.module else [])])
                if module == "tl_paramdecomp":
                    yield from (Import(file, child.lineno, f"{module}.{alias.name}", at_top) for alias in child.names)
                else:
                    yield Import(file, child.lineno, module, at_top)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types_alone(
                    child
                )
                yield from walk(child, at_top and not inside)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), True)


FILES = sorted(PACKAGE.rglob("*.py"))


def allowed(room: str) -> set[str]:
    """Rooms that a room may import from, itself included."""
    if room in BESIDE:
        return {"errors", "sites", "adapters", room}
    if room == "errors":
        return set()
    left = {"errors", *ORDER[: ORDER.index(room) + 1]}
    if room == "components":
        left -= {"adapters"}
    if ORDER.index(room) > ORDER.index("components"):
        left |= BESIDE
    return left


def test_every_room_has_its_place() -> None:
    rooms = {room_of(file) for file in FILES} - {"__init__", "__main__"}
    assert rooms <= {"errors", *ORDER, *BESIDE}, "give a new room its place in ORDER"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_to_the_left(file: Path) -> None:
    room = room_of(file)
    if room in ("__init__", "__main__"):
        return
    wrong = []
    for found in imports(file):
        parts = found.module.split(".")
        if parts[0] != "tl_paramdecomp":
            continue
        if len(parts) == 1 or parts[1] not in allowed(room):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_host_libraries_load_when_they_are_used(file: Path) -> None:
    if room_of(file) == "cli":
        return
    wrong = [str(found) for found in imports(file) if found.at_top and found.module.split(".")[0] in HOSTS]
    assert not wrong, "\n".join(wrong)


def _fresh(code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "JAXTYPING"))}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=PACKAGE.parent
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_bare_import_takes_no_host_library() -> None:
    """The time beyond torch's own is reported, not asserted: `pytest -s` shows it."""
    out = _fresh(
        "import time, sys, torch\n"
        "start = time.perf_counter()\n"
        "import tl_paramdecomp\n"
        "seconds = time.perf_counter() - start\n"
        f"print(*sorted({HOSTS!r} & {{name.split('.')[0] for name in sys.modules}}), sep=',')\n"
        "print(round(seconds, 2))"
    )
    loaded, seconds = out.splitlines()
    print(f"import tl_paramdecomp: {seconds} s beyond torch")
    assert loaded == "", f"import tl_paramdecomp loads {loaded}"
