"""The sub-commands and their options."""

import functools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from tl_paramdecomp.cli import options as opt
from tl_paramdecomp.cli.causal import attribute, circuit, patch
from tl_paramdecomp.cli.options import console, print_record
from tl_paramdecomp.errors import SettingError

METHODS = (
    "spd (modern form), paper (SPD as published), vpd (persistent adversary), l3d (subnetworks); or exact components whose "
    "importances alone are trained, as spd trains its own: svd, whitened-svd, neurons, random; none are with -oracle after "
    "the name."
)

app = typer.Typer(
    name="tl-paramdecomp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> bool:
    if asked:
        print(sys.modules["tl_paramdecomp"].__version__)
        raise typer.Exit
    return asked


@app.callback()
def whole(
    version: Annotated[
        bool, Option("--version", help="Print the version, and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Turn a language model's weight matrices into trainable components, and patch them back."""


@app.command()
def demo(
    out: Annotated[Path, opt.path_option(help="Folder for the decomposition and its metrics.")] = Path("runs/demo"),
    steps: opt.Steps = 1000,
    seed: opt.Seed = 0,
) -> None:
    """Decompose two layers of the embedded model and ablate what matters; minutes, no network."""
    from tl_paramdecomp.experiments.demo import run_demo

    run_demo(console, out, steps, seed)


@app.command()
def sites(
    model: opt.ModelName,
    pattern: Annotated[str, Argument(help="Glob over names; * also crosses dots.")] = "*",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """List the weights that can be decomposed, and those that cannot, with the reason."""
    from tl_paramdecomp.adapters import adapt, find_sites
    from tl_paramdecomp.cli.models import open_model

    opened = open_model(model, host)
    found, refused = find_sites(opened, pattern), adapt(opened).refused
    if as_json:
        rows = {
            name: {"d_in": s.d_in, "d_out": s.d_out, "kind": s.kind, "heads": s.n_heads} for name, s in found.items()
        }
        print(json.dumps({"sites": rows, "refused": refused}, indent=1))
        return
    table = Table(title=f"Weight sites of {model} ({host})", title_justify="left")
    for column in ("site", "d_in", "d_out", "heads", "also called"):
        table.add_column(column, justify="left" if column in ("site", "also called") else "right", overflow="fold")
    for name, site in found.items():
        heads = "" if site.n_heads is None else str(site.n_heads)
        table.add_row(name, str(site.d_in), str(site.d_out), heads, site.aliases[0] if site.aliases else "")
    console.print(table)
    for name, reason in refused.items():
        console.print(f"[yellow]not exact here:[/] {name}: {reason}", highlight=False)


@app.command()
def decompose(
    context: typer.Context,
    model: opt.ModelOrFile,
    site_globs: opt.SomeSites = None,
    out: Annotated[Path | None, opt.path_option(help="Folder for metrics, checkpoints and the result.")] = None,
    changes: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Another value for any setting: method.lr=1e-3; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only say what the run needs: memory, time, disk. Touches no file.")
    ] = False,
    steps: opt.Steps = 1000,
    batch_size: opt.BatchSize = 8,
    components: Annotated[int | None, Option(help="Components per site; left out: chosen from its shape.")] = None,
    importance: Annotated[float | None, Option(help="Coefficient of importance minimality; larger is sparser.")] = None,
    method_name: Annotated[str, Option("--method", help=METHODS)] = "spd",
    settings: Annotated[
        Path | None, opt.path_option(help="JSON file with a method's settings, as a run writes them.")
    ] = None,
    text: opt.Text = None,
    dataset: opt.Dataset = None,
    length: opt.Length = 64,
    seed: opt.Seed = 0,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
) -> None:
    """Learn components of some weights. Run it again to go on after an interruption.

    Everything can also be said in a run file, a YAML or JSON file with every setting of a run and of its method: see
    docs/training.md. Each run writes one, resolved.yaml.
    """
    from tl_paramdecomp.cli.methods import ALL_PRESETS, changed, method_in, method_named
    from tl_paramdecomp.cli.run_files import is_run_file, run, settings_of, settings_of_file
    from tl_paramdecomp.settings import to_settings

    if is_run_file(model):
        _refuse_options(context, {"model", "out", "changes", "dry_run"})
        run(settings_of_file(Path(model), changes or [], out), dry_run)
        return
    if not site_globs or (out is None and not dry_run):
        raise typer.BadParameter(
            "missing; or give a run file instead of a model.", context, param_hint="--sites and --out"
        )
    if settings is not None and (components, importance) != (None, None):
        raise SettingError("--settings says everything about the method; leave out --components and --importance.")
    if settings is not None:
        method = method_in(settings)
    else:
        method = changed(method_named(method_name, presets=ALL_PRESETS), components, importance)
    tree = {
        "model": model, "sites": site_globs, "method": to_settings(method, complete=True), "host": host, "device": device,
        "data": {"text": None if text is None else str(text), "dataset": dataset, "length": length}, "steps": steps,
        "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    run(settings_of(tree, changes or [], out), dry_run)


def _refuse_options(context: typer.Context, allowed: set[str]) -> None:
    """Refuse options of the other form of a command (SettingError)."""
    for parameter in context.command.params:
        given = parameter.name is not None and context.get_parameter_source(parameter.name)
        if given and given.name == "COMMANDLINE" and parameter.name not in allowed:
            raise SettingError(f"{parameter.opts[0]} is for models; with a run file give --set KEY=VALUE instead.")


@app.command()
def evaluate(
    model: opt.ModelName,
    decomposition: opt.DecompositionFolder,
    text: opt.Text = None,
    dataset: opt.Dataset = None,
    length: opt.Length = 64,
    rows: opt.HeldOutRows = 32,
    restarts: opt.Restarts = 3,
    oracle: Annotated[
        int | None, Option(help="Importances from the model's gradients: so many components per position.")
    ] = None,
    untrained: Annotated[
        bool, Option("--untrained", help="A control: also measure what the method started from.")
    ] = False,
    seconds: Annotated[float | None, Option(help="Begin no further part after so many.")] = None,
    out: opt.OutFile = None,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """Measure a decomposition on held-out rows: masks of every kind, an adversary, sparsity, controls."""
    from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig
    from tl_paramdecomp.analysis.evaluation.evaluate import evaluate as measure
    from tl_paramdecomp.analysis.evaluation.oracle import Oracle
    from tl_paramdecomp.cli.models import open_both
    from tl_paramdecomp.cli.rows import open_rows
    from tl_paramdecomp.experiments.compare import start_of

    opened, loaded = open_both(model, decomposition, host, device, out)
    found_rows = open_rows(model, opened, text, dataset, length, decomposition=loaded)
    found = measure(
        opened, loaded, found_rows.held_out[:rows].to(device), importances=None if oracle is None else Oracle(oracle),
        untrained=start_of(opened, loaded, found_rows.train) if untrained else None,
        protocol=EvaluationConfig(restarts=restarts), seconds=seconds,
    )  # fmt: skip
    if out is not None:
        found.save(out)
    print_record(found, as_json)


@app.command()
def compare(
    model: opt.ModelName,
    site_globs: opt.SiteGlobs,
    out: Annotated[Path, opt.path_option(help="Folder for the protocol, every run, the curves and the result.")],
    method_names: Annotated[
        list[str],
        Option(
            "--method", help="As in decompose; may be given several times. With -oracle: importances from gradients."
        ),
    ] = ["spd", "vpd", "svd", "whitened-svd", "neurons", "random"],  # noqa: B006
    steps: opt.Steps = 1000,
    batch_size: opt.BatchSize = 8,
    seeds: opt.Seeds = 2,
    sparsity: Annotated[
        list[float], Option(help="Factor on each method's importance coefficient; may be given several times.")
    ] = [0.3, 1.0, 3.0, 10.0, 30.0],  # noqa: B006
    capacity: Annotated[
        list[float] | None, Option(help="Factor on the number of components, to see whether they split.")
    ] = None,
    text: opt.Text = None,
    dataset: opt.Dataset = None,
    length: opt.Length = 64,
    rows: opt.HeldOutRows = 32,
    restarts: opt.Restarts = 3,
    shuffled: Annotated[
        bool, Option("--shuffled", help="A control: the model with the entries of its weights shuffled.")
    ] = False,
    device: opt.DeviceName = "cpu",
    host: opt.HostName = "transformers",
    as_json: opt.AsJson = False,
) -> None:
    """Compare methods where they are equally sparse: curves, areas, stability. Run it again to go on."""
    import contextlib

    from tl_paramdecomp.analysis.evaluation.controls import shuffled_weights
    from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig
    from tl_paramdecomp.cli.methods import method_named
    from tl_paramdecomp.cli.models import open_model
    from tl_paramdecomp.cli.rows import open_rows
    from tl_paramdecomp.errors import MissingExtraError
    from tl_paramdecomp.experiments.compare import ComparisonProtocol
    from tl_paramdecomp.experiments.compare import compare as run
    from tl_paramdecomp.report.comparison import draw_comparison

    methods = {name: method_named(name) for name in method_names}
    protocol = ComparisonProtocol(
        tuple(site_globs), steps, batch_size, tuple(range(seeds)), tuple(sparsity), capacities=tuple(capacity or ()),
        evaluation=EvaluationConfig(ladder=(20,), restarts=restarts, ablated=0, by_site=False),
    )  # fmt: skip
    opened = open_model(model, host, device)
    found_rows = open_rows(model, opened, text, dataset, length)
    held_out = found_rows.held_out[:rows].to(device)
    with shuffled_weights(opened) if shuffled else contextlib.nullcontext():
        found = run(opened, methods, protocol, found_rows.train, held_out, run_dir=out)
    try:
        drawn = draw_comparison(found, out / "comparison.png", f"{model}: {', '.join(site_globs)}")
        words = f"Curves are in {drawn}."
    except MissingExtraError as error:
        words = f"No curves: {error}"
    (Console(stderr=True) if as_json else console).print(words, markup=False, highlight=False)
    print_record(found, as_json)


app.command()(patch)
app.command()(attribute)
app.command()(circuit)


@app.command()
def reproduce(
    name: Annotated[
        str,
        Argument(
            help="tms-5-2, tms-5-2-id, tms-40-10, tms-40-10-id, resid-mlp-1, -2, -3, induction; l3d-tms, "
            "l3d-circuits, l3d-high-rank, l3d-squared, l3d-digits."
        ),
    ],
    out: Annotated[Path, opt.path_option(help="Folder for targets, checkpoints, results and figures.")] = Path(
        "runs/reproduce"
    ),
    seeds: opt.Seeds = 1,
    steps: Annotated[int | None, Option(help="Training steps, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows per step, instead of the recipe's.")] = None,
    threads: Annotated[int, Option(min=1, help="CPU threads; the smallest toys gain nothing from a second one.")] = 1,
    as_json: opt.AsJson = False,
) -> None:
    """Redo a published toy result: train the target, decompose it, score it. Run it again to go on."""
    import torch

    from tl_paramdecomp.experiments.reproduce import reproduce as run
    from tl_paramdecomp.report.tables import reproduced_table

    torch.set_num_threads(threads)
    talk = Console(stderr=True)
    say = functools.partial(talk.print, markup=False, highlight=False)
    record = run(name, seeds, out, say, steps, batch_size)
    if as_json:
        print(json.dumps(record))
    else:
        console.print(reproduced_table(record))
