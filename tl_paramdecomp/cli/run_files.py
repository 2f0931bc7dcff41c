"""Runs of `decompose` from settings: estimated, or done, with a resolved file beside what they leave behind.

1. Settings come from a run file or from the command's options (`run_settings`).
2. The model is opened, and held to the fingerprints of the file where it has some.
3. A dry run prints what the run will need. A run trains, and writes `resolved.yaml` before its first step: every setting,
   versions and fingerprints, so that the same run can be done again.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.fingerprint import differs
from tl_paramdecomp.analysis.subnetworks import evaluate_subnetworks
from tl_paramdecomp.cli.models import open_model
from tl_paramdecomp.cli.options import console, print_record
from tl_paramdecomp.cli.rows import Rows, open_rows
from tl_paramdecomp.cli.run_settings import DataSettings, RunSettings, resolve
from tl_paramdecomp.cli.settings_paths import SUFFIXES, parse_change, read_tree, write_tree
from tl_paramdecomp.components.disk import replace_text
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.errors import SettingError, TargetMismatchError
from tl_paramdecomp.methods.from_factors import versions
from tl_paramdecomp.report.quality import measure_quality, quality_tables, write_quality
from tl_paramdecomp.settings import hints_of
from tl_paramdecomp.training.callbacks import Callback, RunInfo
from tl_paramdecomp.training.config import RunConfig
from tl_paramdecomp.training.distributed import leads, own_device
from tl_paramdecomp.training.estimate import estimate_run
from tl_paramdecomp.training.fit import decompose
from tl_paramdecomp.training.loggers import EvaluateEvery, TensorBoard, WandB

RESOLVED = "resolved.yaml"
HEADER = """\
# A run in full: every setting, the versions it was made with, and the fingerprints of the weights it is of.
# It can be done again with: tl-paramdecomp decompose {name} --out ANOTHER_FOLDER
"""


def is_run_file(argument: str) -> bool:
    """Whether the command's argument is a run file rather than a model; SettingError where it is called so, and is none."""
    path = Path(argument)
    if path.suffix not in SUFFIXES:
        return False
    if not path.is_file():
        raise SettingError(f"There is no run file {argument}; a model is a folder, or a name without {path.suffix}.")
    return True


def settings_of_file(path: Path, changes: Sequence[str], out: Path | None) -> RunSettings:
    """Settings of a run file, with `key=value` changes; its folder is `runs/NAME` where neither says another."""
    return settings_of({"run_dir": str(Path("runs", path.stem)), **read_tree(path)}, changes, out)


def settings_of(tree: Mapping[str, Any], changes: Sequence[str], out: Path | None) -> RunSettings:
    """Settings of a tree, with `key=value` changes and another folder."""
    settings = resolve(tree, [parse_change(text) for text in changes])
    return settings if out is None else replace(settings, run_dir=str(out))


def run(settings: RunSettings, dry_run: bool = False) -> None:
    """Do a run, or estimate it; TargetMismatchError where the model's weights are not those of a resolved file."""
    model = open_model(settings.model, settings.host, own_device(settings.device), settings.dtype)
    _check_target(settings, model)
    rows, background = _rows(settings, model, settings.data), None
    if settings.background is not None:
        background = _rows(settings, model, settings.background).train
    if dry_run:
        found = estimate_run(
            model, settings.sites, settings.method, rows.train, settings.steps, settings.batch_size, settings.seed,
            background=background, checkpoint_every=settings.checkpoint_every, keep_checkpoints=settings.keep_checkpoints,
            keep_best=settings.keep_best is not None, on_nonfinite=settings.on_nonfinite, accumulate=settings.accumulate,
        )  # fmt: skip
        print_record(found)
        return
    made = decompose(
        model, settings.sites, settings.method, rows.train, background=background,
        callbacks=_callbacks(settings, model, rows), **{name: getattr(settings, name) for name in hints_of(RunConfig)},
    )  # fmt: skip
    if not leads():
        return  # one process writes and talks
    _write_resolved(settings, made)
    if "stopped_after" in made.info:
        done = made.info["stopped_after"]
        console.print(f"Stopped after step {done} of {settings.steps}; the same command goes on.", highlight=False)
    _report(settings, model, made, rows)
    console.print(f"Saved to [bold]{Path(settings.run_dir) / 'decomposition'}[/].", highlight=False)


def _rows(settings: RunSettings, model: Any, data: DataSettings) -> Rows:
    told = dict(vars(data))
    return open_rows(settings.model, model, name=told.pop("config"), seed=told.pop("shuffle_seed"), **told)


def _callbacks(settings: RunSettings, model: Any, rows: Rows) -> list[Callback]:
    found: list[Callback] = [_Resolved(settings)]
    if settings.evaluate is not None:
        held_out = rows.held_out[: settings.evaluate.rows].to(settings.device)
        found.append(EvaluateEvery(settings.evaluate.every, held_out, settings.evaluate.protocol))
    if settings.tensorboard:
        found.append(TensorBoard(None if settings.tensorboard is True else settings.tensorboard))
    if settings.wandb is not None:
        found.append(WandB(settings.wandb.project, **(settings.wandb.settings or {})))
    return found


class _Resolved:
    """Writes the resolved file once a run is about to take its first step."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    def begin(self, run: RunInfo) -> None:
        _write_resolved(self.settings, run.decomposition)

    def __call__(self, info: Any) -> None:
        pass


def _write_resolved(settings: RunSettings, made: Any) -> None:
    """Every setting, with versions and the fingerprints of the weights."""
    tree = replace(settings, versions=versions(), target=made.fingerprints).tree()
    replace_text(Path(settings.run_dir) / RESOLVED, HEADER.format(name=RESOLVED) + write_tree(tree))


def _check_target(settings: RunSettings, model: Any) -> None:
    """Hold a model to the fingerprints of a resolved file, and say where versions differ."""
    for package, known in (settings.versions or {}).items():
        if versions().get(package) != known:
            now = versions().get(package, "nothing")
            print(f"Made with {package} {known}, here is {now}: figures may differ in the last bits.", file=sys.stderr)
    if settings.target is None:
        return
    adapter = adapt(model)
    for name, known in settings.target.items():
        try:
            difference = differs(known, adapter.fingerprint(name))
        except KeyError:
            difference = "it has no such site"
        except AttributeError as error:
            raise SettingError(
                f"target.{name}.dtype: {known.dtype!r} is no number type; copy the file again."
            ) from error
        if difference:
            raise TargetMismatchError(
                f"{settings.model} has other weights than this run was of ({name}: {difference}); open the model it was of, or "
                "leave target out of the file to run it on this one."
            )


def _report(settings: RunSettings, model: Any, made: Any, rows: Rows) -> None:
    """How good the result is on held-out rows."""
    held_out = rows.held_out.to(settings.device)
    if isinstance(made, SubnetworkDecomposition):
        found = evaluate_subnetworks(model, made, held_out, bound=False)
        console.print(
            f"Of held-out gradients {found.fixed_error:.1%} is not reconstructed with the learned threshold, "
            f"{found.batch_error:.1%} with the batch's own; {found.dead} of {made.n_subnetworks} subnetworks are never active.",
            highlight=False,
        )
    elif not made.gives_importances:
        console.print("No importances to measure by: see [bold]tl-paramdecomp evaluate --oracle K[/].", highlight=False)
    else:
        quality = measure_quality(model, made, held_out)
        for table in quality_tables(quality):
            console.print(table)
        write_quality(Path(settings.run_dir) / "quality.json", made, quality)
