"""Arguments and options that several sub-commands share, and the console they print to."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleDimensions
from typer import Argument, Option


class _Console(Console):
    """As wide as its terminal; where there is none, as wide as what it prints, so that no name is cut."""

    @property
    def size(self) -> ConsoleDimensions:  # type: ignore[override]
        if self.is_terminal:
            return super().size
        columns = os.environ.get("COLUMNS", "")  # rich itself reads it once, when the console is made
        return ConsoleDimensions(int(columns) if columns.isdigit() and int(columns) else 1000, 25)


console = _Console()


def print_record(found: Any, as_json: bool = False) -> None:
    """A result's tables and the lines below them, or all of it as one JSON object."""
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    for table in found.tables():
        console.print(table)
    for line in found.footnotes():
        console.print(line, highlight=False)


def _path(given: Any) -> Path:
    if str(given) == "":  # Path("") is the current folder
        raise typer.BadParameter("an empty name; give a file or folder.")
    return Path(given)


def path_option(*names: str, help: str) -> Any:
    """An option that names a file or folder."""
    return Option(*names, help=help, parser=_path, metavar="PATH")


MODEL = "[bold]micro-gpt2[/] (embedded), a folder with a transformers model, or a name on the hub"
ModelName = Annotated[str, Argument(help=f"{MODEL}.")]
ModelOrFile = Annotated[
    str,
    Argument(metavar="MODEL|RUN.yaml", help=f"{MODEL}; or a run file (.yaml, .yml, .json), which says everything."),
]
DecompositionFolder = Annotated[Path, Argument(help="Folder that Decomposition.save (or decompose) wrote.")]
HostName = Annotated[
    str,
    Option("--host", help="Library that opens it: transformers, transformer_bridge, hooked_transformer, nnsight."),
]
DeviceName = Annotated[str, Option("--device", help="cpu or cuda.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object instead of a table.")]
OutFile = Annotated[Path | None, path_option("--out", help="Also write the whole result here, as JSON.")]
Seed = Annotated[int, Option("--seed", help="Seed of all that is drawn: the start, rows, masks, prompts.")]
SiteGlobs = Annotated[list[str], Option("--sites", help="Glob over site names; may be given several times.")]
SomeSites = Annotated[list[str] | None, Option("--sites", help="Only these: glob; may be given several times.")]

# --- rows, training and evaluation ------------------------------------------------------------------------------------
Text = Annotated[Path | None, path_option("--text", help="Text file; left out for micro-gpt2: its own text.")]
Dataset = Annotated[
    str | None, Option("--dataset", help="Dataset on the hub, or a folder, with a text or tokens column.")
]
Length = Annotated[int, Option("--length", help="Tokens per row, for text.")]
HeldOutRows = Annotated[int, Option("--rows", min=1, help="Held-out rows to measure on, 32 at most.")]
Restarts = Annotated[int, Option("--restarts", help="Starts of the adversary.")]
Steps = Annotated[int, Option("--steps", help="Training steps.")]
BatchSize = Annotated[int, Option("--batch-size", help="Token rows per step.")]
Seeds = Annotated[int, Option("--seeds", help="Run seeds 0 to N - 1.")]

# --- tasks and prompts ------------------------------------------------------------------------------------------------
TASK_HELP = "ioi, pronoun, greater_than, induction, docstring, agreement; or a file of JSON lines (see load_task)."
TaskName = Annotated[str | None, Option("--task", help=TASK_HELP)]
PromptText = Annotated[str | None, Option("--prompt", help="Text whose next token is looked at.")]
CorruptPrompt = Annotated[
    str | None, Option("--corrupt-prompt", help="The prompt asked of other content, of as many tokens.")
]
Answer = Annotated[
    list[str] | None,
    Option("--answer", help="Right next token of the prompt (' Mary'); left out: the model's own likeliest."),
]
Wrong = Annotated[list[str] | None, Option("--wrong", help="Next token to contrast it with.")]
Prompts = Annotated[int, Option("--prompts", help="Prompts of the task.")]
Split = Annotated[str | None, Option("--split", help="train, validation or test (the default).")]
