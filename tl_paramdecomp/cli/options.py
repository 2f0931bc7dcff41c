"""Arguments and options that several sub-commands share, and the console they print to."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()

MODEL = typer.Argument(help="[bold]micro-gpt2[/] (embedded), a folder with a transformers model, or a name on the hub.")
ModelName = Annotated[str, MODEL]
MODEL_OR_FILE = (
    "[bold]micro-gpt2[/] (embedded), a folder with a transformers model, or a name on the hub; or a run file "
    "(.yaml, .yml, .json), which says everything."
)
DecompositionFolder = Annotated[Path, typer.Argument(help="Folder that Decomposition.save (or decompose) wrote.")]
HostName = Annotated[
    str,
    typer.Option(
        "--host", help="Library that opens it: transformers, transformer_bridge, hooked_transformer, nnsight."
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="Also write the whole result here, as JSON.")]

TASK_HELP = "ioi, pronoun, greater_than, induction, docstring, agreement; or a file of JSON lines (see load_task)."
TaskName = Annotated[str | None, typer.Option("--task", help=TASK_HELP)]
PromptText = Annotated[str | None, typer.Option("--prompt", help="Text whose next token is looked at.")]
CorruptPrompt = Annotated[
    str | None, typer.Option("--corrupt-prompt", help="The prompt asked of other content, of as many tokens.")
]
Answer = Annotated[
    list[str] | None,
    typer.Option("--answer", help="Right next token of the prompt (' Mary'); left out: the model's own likeliest."),
]
Wrong = Annotated[list[str] | None, typer.Option("--wrong", help="Next token to contrast it with.")]
Prompts = Annotated[int, typer.Option("--prompts", help="Prompts of the task.")]
Split = Annotated[str | None, typer.Option("--split", help="train, validation or test (the default).")]
Seed = Annotated[int, typer.Option("--seed", help="Selects the prompts, and draws what is random.")]
SiteGlobs = Annotated[list[str] | None, typer.Option("--sites", help="Only these: glob; may be given several times.")]
