"""The sub-commands that ask what components do for an answer: patch, attribute, circuit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

from tl_paramdecomp.cli import options as opt
from tl_paramdecomp.cli.options import console
from tl_paramdecomp.errors import SettingError

if TYPE_CHECKING:
    from tl_paramdecomp.cli.causal_runs import Found

Components = list[str] | None


def patch(
    model: opt.ModelName,
    decomposition: opt.DecompositionFolder,
    prompt: opt.PromptText = None,
    task: opt.TaskName = None,
    ablate: Annotated[Components, Option(help="SITE:C[,C...] to remove.")] = None,
    keep_only: Annotated[Components, Option(help="SITE:C[,C...] to keep, all else of the site removed.")] = None,
    set_to: Annotated[Components, Option("--set", help="SITE:C[,C...]=VALUE to set to (steering).")] = None,
    scale: Annotated[Components, Option(help="SITE:C[,C...]=FACTOR to multiply by.")] = None,
    mean: Annotated[
        Components, Option(help="SITE:C[,C...] to set to the mean over the task's or corrupt prompt.")
    ] = None,
    corrupt: Annotated[Components, Option(help="SITE:C[,C...] to take from the corrupt prompt.")] = None,
    delta: Annotated[Components, Option(help="SITE=FACTOR to multiply the delta component W - VU by.")] = None,
    head: Annotated[int | None, Option(help="Only in this attention head.")] = None,
    position: Annotated[list[int] | None, Option(help="Only at this position; repeatable.")] = None,
    corrupt_prompt: opt.CorruptPrompt = None,
    answer: opt.Answer = None,
    wrong: opt.Wrong = None,
    generate: Annotated[int | None, Option(help="Also continue the prompt by so many tokens.")] = None,
    sweep: Annotated[bool, Option("--sweep", help="Rank components by the metric with each minus without it.")] = False,
    sites: opt.SomeSites = None,
    value: Annotated[
        str | None, Option(help="A sweep puts in: zero (default), mean, resample, corrupt, a number.")
    ] = None,
    direction: Annotated[str, Option(help="Of a sweep: noising (of the clean run) or denoising.")] = "noising",
    prompts: opt.Prompts = 64,
    split: opt.Split = None,
    seed: opt.Seed = 0,
    top: Annotated[int | None, Option(min=1, help="Next tokens to show (5), or effects (10).")] = None,
    out: opt.OutFile = None,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """Ask what patching components does to a prompt's next token, its continuation or a task's scores.

    SITE:C[,C...] names components of a site: blocks.0.mlp.W_in:3,17,20-25, or blocks.0.mlp.W_in:* for all.
    """
    from tl_paramdecomp.cli.causal_runs import Question, run_patch, run_sweep
    from tl_paramdecomp.cli.edits import Edits
    from tl_paramdecomp.cli.models import open_both

    given: Any = (each or () for each in (ablate, keep_only, set_to, scale, mean, corrupt, delta))
    edits = Edits(*given, head=head, positions=position)
    if sweep and (edits or head is not None or generate is not None):
        raise SettingError("--sweep patches every component by itself; leave other patches, --head and --generate out.")
    if not sweep and not edits:
        raise SettingError(
            "Nothing to patch: give --ablate SITE:C, --keep-only, --set, --scale, --mean, --corrupt, --delta, or --sweep."
        )
    if not sweep and (sites, value, direction) != (None, None, "noising"):
        raise SettingError("--sites, --value and --direction are for a --sweep.")
    opened, loaded = open_both(model, decomposition, host, device, out)
    asked = Question(opened, prompt, task, answer or (), wrong or (), corrupt_prompt, prompts, seed, split, loaded)
    if sweep:
        found = run_sweep(asked, loaded, value, top or 10, sites=sites, direction=direction, positions=position)
    else:
        found = run_patch(asked, loaded, edits, generate, top or 5)
    _deliver(found, as_json, out)


def attribute(
    model: opt.ModelName,
    decomposition: opt.DecompositionFolder,
    prompt: opt.PromptText = None,
    task: opt.TaskName = None,
    answer: opt.Answer = None,
    wrong: opt.Wrong = None,
    corrupt_prompt: opt.CorruptPrompt = None,
    method: Annotated[
        str,
        Option(
            help="gradient (one backward pass), integrated (along a path from the corrupt prompt), ablation (one run for "
            "each component and position)."
        ),
    ] = "gradient",
    direction: Annotated[
        str | None,
        Option(
            help="noising (the default with a corrupt prompt), denoising, or removal: compare with zero, whatever the "
            "corrupt prompt."
        ),
    ] = None,
    by_position: Annotated[
        bool | None,
        Option(
            "--by-position/--over-positions",
            help="Effects of each position, or their sum; left out: of each, where prompts are of one template.",
        ),
    ] = None,
    graph: Annotated[int | None, Option(help="Also effects between so many components.")] = None,
    sites: opt.SomeSites = None,
    prompts: opt.Prompts = 64,
    split: opt.Split = None,
    seed: opt.Seed = 0,
    top: Annotated[int, Option(min=1, help="Effects and edges to show.")] = 15,
    out: opt.OutFile = None,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """Ask which components, at which tokens, make up an answer: the strongest effects on the metric, with minus without."""
    from tl_paramdecomp.cli.causal_runs import Question, run_attribute
    from tl_paramdecomp.cli.models import open_both

    opened, loaded = open_both(model, decomposition, host, device, out)
    asked = Question(opened, prompt, task, answer or (), wrong or (), corrupt_prompt, prompts, seed, split, loaded)
    _deliver(run_attribute(asked, loaded, method, direction, sites, by_position, graph, top), as_json, out)


def circuit(
    model: opt.ModelName,
    decomposition: opt.DecompositionFolder,
    task: Annotated[str, Option(help=opt.TASK_HELP)],
    method: Annotated[str, Option(help="Orders components: gradients, or masks (learned, slower).")] = "gradients",
    faithfulness: Annotated[float, Option(help="Share of the metric to reach with all else ablated.")] = 0.9,
    stochastic: Annotated[float, Option(help="The same with all else masked at random; 0: any.")] = 0.8,
    value: Annotated[str, Option(help="What ablated components become: zero, mean, corrupt.")] = "zero",
    delta: Annotated[float, Option(help="Mask of the delta component W - VU.")] = 1.0,
    prompts: Annotated[int, Option(help="Prompts to search on, and as many to measure on.")] = 64,
    seed: opt.Seed = 0,
    out: opt.OutFile = None,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """Find the components that keep a task's metric, and measure what that says about the model."""
    from tl_paramdecomp.cli.causal_runs import Question, run_circuit
    from tl_paramdecomp.cli.models import open_both

    opened, loaded = open_both(model, decomposition, host, device, out)
    asked = Question(opened, task=task, prompts=prompts, seed=seed, decomposition=loaded)
    settings: dict[str, Any] = {"method": method, "stochastic": stochastic or None, "value": value, "delta": delta}
    _deliver(run_circuit(asked, loaded, faithfulness, **settings), as_json, out)


def _deliver(found: "Found", as_json: bool, out: Path | None) -> None:
    """Print an answer and write it where it is wanted."""
    paths = [] if out is None else found.write(out)  # first: the reader of what is printed may leave
    if as_json:
        print(json.dumps(found.record))
    else:
        _show(found.shown)
    for path in paths:
        Console(stderr=True).print(f"Written to {path}", markup=False, highlight=False)


def _show(parts: "list[Table | str]") -> None:
    """Tables and lines, whose brackets are no markup; a title may be wider than its table."""
    for place, part in enumerate(parts):
        if isinstance(part, str):
            console.print(part, highlight=False, markup=False)
            continue
        if part.title is not None:
            console.print(("\n" if place else "") + str(part.title), style="bold", highlight=False, markup=False)
            part.title = None
        console.print(part)
