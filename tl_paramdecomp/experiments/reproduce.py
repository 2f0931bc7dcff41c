"""The toy results of SPD and L3D, from training the target to the figures (`tl-paramdecomp reproduce`).

1. Train the target from the seed, and again from another where it lacks a mechanism (toy_models).
2. Decompose it (`decompose`), with checkpoints: the same command goes on where it was stopped.
3. Score it against the known mechanisms or classes (`scores`), draw the figures.

    OUT/NAME/seed-0/target/        weights and how they came about
    OUT/NAME/seed-0/run/           metrics, checkpoint, decomposition
    OUT/NAME/seed-0/result.json    settings and scores; a finished seed is not run again
    OUT/NAME/seed-0/*.png          figures, where matplotlib is installed
"""

import fnmatch
import functools
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_paramdecomp import toy_models as toys
from tl_paramdecomp.analysis.activations import sparsity
from tl_paramdecomp.analysis.subnetworks import impacts
from tl_paramdecomp.components.disk import read_json, replace_text
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.errors import CollapseWarning, MissingExtraError, SettingError
from tl_paramdecomp.experiments import figures
from tl_paramdecomp.experiments import scores as spd_scores
from tl_paramdecomp.experiments.l3d_scores import chosen_subnetworks, class_purities, digit_scores, toy_scores
from tl_paramdecomp.experiments.recipes import RECIPES, Recipe
from tl_paramdecomp.report.plotting import save
from tl_paramdecomp.report.quality import made_by
from tl_paramdecomp.settings import to_settings
from tl_paramdecomp.training.fit import decompose

KINDS: dict[str, tuple[Any, Any]] = {
    "TMSConfig": (toys.TMS, toys.train_tms),
    "ResidMLPConfig": (toys.ResidMLP, toys.train_resid_mlp),
    "InductionConfig": (toys.InductionTransformer, toys.train_induction),
    "CircuitsConfig": (toys.Circuits, toys.train_circuits),
    "DigitsConfig": (toys.Digits, toys.train_digits),
}
"""What is built from a target's configuration, and what trains it."""
SAMPLE, SAMPLE_SEED = 8192, 1_000_000  # rows that L0 and alive components are counted on, and their seed
L3D_SAMPLE = 1000  # rows that subnetworks are measured on


def reproduce(
    name: str,
    seeds: int,
    out: Path,
    say: Callable[[str], None],
    steps: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Run one result for seeds 0 to seeds - 1, and return its record; MissingExtraError without scipy, or scikit-learn."""
    if name not in RECIPES:
        raise SettingError(f"{name!r} is none of {', '.join(RECIPES)}.")
    if seeds < 1:
        raise SettingError(f"--seeds must be at least 1; given {seeds}.")
    recipe = RECIPES[name]
    recipe = replace(recipe, steps=steps or recipe.steps, batch_size=batch_size or recipe.batch_size)
    if recipe.one_per_feature:
        spd_scores.need_scipy()
    folder, versions, results = out / name, {}, []
    for seed in range(seeds):
        say(f"{name}, seed {seed}")
        results.append(run_seed(recipe, seed, folder / f"seed-{seed}", say))
        versions = results[-1].pop("versions")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    record = {
        "name": name, "seeds": results, "expected": dict(recipe.expected), **made_by(), "versions": versions,
        "settings": settings_of(recipe), "machine": machine,
    }  # fmt: skip
    replace_text(folder / "result.json", json.dumps(record, indent=1))
    return record


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a seed's result depends on, as JSON values."""
    settings = {
        "target": {"type": type(recipe.target).__name__, **asdict(recipe.target)},
        "sites": list(recipe.sites),
        "method": to_settings(recipe.method),
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
    }
    return json.loads(json.dumps(settings))


def run_seed(recipe: Recipe, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Target, decomposition and scores of one seed; what is there already is used."""
    settings, path = settings_of(recipe), folder / "result.json"
    if path.is_file():
        known = read_json(path, "settings")
        if known.pop("settings") == settings:
            return known
    begun = time.perf_counter()
    trained = find_target(recipe, seed, folder / "target", say)
    found = time.perf_counter()
    data = data_of(recipe, recipe.batch_size, seed)
    method: Any = recipe.method  # of one kind or the other
    with warnings.catch_warnings():  # of settings that are published so
        warnings.filterwarnings("ignore", "Importance minimality goes down", CollapseWarning)
        made = decompose(
            trained.model, list(recipe.sites), method, data, recipe.steps, recipe.batch_size, seed, folder / "run"
        )
    result = {
        "seed": seed,
        **score(recipe, trained.model, made),
        "target_seed": trained.seed,
        "targets_tried": trained.tried,
        "seconds": {"target": found - begun, "decomposition": seconds_of(folder / "run" / "metrics.jsonl")},
        "versions": made.info["versions"],
    }
    try:
        for name, figure in figures_of(recipe, trained.model, made, result):
            save(figure, folder / f"{name}.png")
    except MissingExtraError as error:
        say(f"No figures: {error}")
    replace_text(path, json.dumps({**result, "settings": settings}, indent=1))
    return result


def find_target(recipe: Recipe, seed: int, folder: Path, say: Callable[[str], None]) -> toys.Trained[Any]:
    """The target in the folder, or a new one that has all its mechanisms."""
    build, train = KINDS[type(recipe.target).__name__]
    trained = toys.load_target(toys.fresh(build, recipe.target), folder)
    if trained is None:
        bar = functools.partial(tqdm, leave=False)
        trained = toys.train_until_sound(train, recipe.target, seed, lambda what, n: bar(range(n), desc=what), say)
        toys.save_target(trained, folder)
    return trained


def score(recipe: Recipe, model: Any, made: Any) -> dict[str, Any]:
    """All scores that a target of this kind has."""
    if isinstance(model, toys.Digits):
        return digit_scores(model, made, *toys.load_digits("held_out", model.config.held_out))
    if isinstance(made, SubnetworkDecomposition):
        return toy_scores(model, made, heldout_rows(recipe))
    sample = recipe.target.data(SAMPLE, SAMPLE_SEED)
    rows = sample(0)
    scores: dict[str, Any] = {}
    if isinstance(model, toys.TMS):
        scores |= spd_scores.tms_scores(model, made)
    if isinstance(model, toys.ResidMLP):
        scores["scrubbed"] = spd_scores.scrubbed_errors(model, made, rows)
    if isinstance(sample, toys.InductionRows):
        scores |= spd_scores.induction_scores(model, made, rows, sample.answers(rows))
    else:
        scores["mean_active_features"] = (rows != 0).sum(1).float().mean().item()
        matrices = spd_scores.importance_matrices(model, made, rows.shape[1])
        identity, dense = spd_scores.pattern_errors(matrices, recipe.one_per_feature, recipe.dense)
        scores |= {"identity_ci_error": sum(identity.values()), "identity_ci_error_by_site": identity}
        scores |= {"dense_ci_error": sum(dense.values()), "dense_ci_error_by_site": dense} if dense else {}
        layers = [name for glob in recipe.one_per_feature for name in fnmatch.filter(matrices, glob)]
        if len(layers) > len(recipe.one_per_feature):
            scores["identity_ci_error_by_layer"] = spd_scores.pattern_errors(matrices, layers, {})[0]
    found = sparsity(model, made, rows, spd_scores.TOLERANCE)
    several = [glob for glob in (*recipe.one_per_feature, *recipe.dense) if glob not in found.alive]
    in_all = {glob: sum(found.alive[name] for name in fnmatch.filter(found.alive, glob)) for glob in several}
    return {**scores, "alive": found.alive, **({"alive_in_all": in_all} if in_all else {}), "l0": found.l0}


def data_of(recipe: Recipe, batch_size: int, seed: int) -> Any:
    """Rows as a function of the step, none of them empty."""
    data = recipe.target.data(batch_size, seed)
    return replace(data, without_empty=True) if isinstance(data, toys.SparseFeatures) else data


def heldout_rows(recipe: Recipe) -> Any:
    """Rows that subnetworks are measured on."""
    return data_of(recipe, L3D_SAMPLE, SAMPLE_SEED)(0)


def figures_of(recipe: Recipe, model: Any, made: Any, scores: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The figures that a target of this kind has, by name."""
    if isinstance(model, toys.InductionTransformer):
        return
    if isinstance(model, toys.Digits):
        images, labels = toys.load_digits("held_out", model.config.held_out)
        impact = impacts(model, made, images)
        pure, _ = class_purities(impact, labels)
        chosen = chosen_subnetworks(impact, labels, scores["active"])
        titles = {k: f"subnetwork {k}\n{pure[k].item():.0%} on {c}" for k, c in chosen.items()}
        heading = (
            "Each class's purest subnetwork: its share of impact there, its top held-out images, their classes in red"
        )
        yield "images", figures.image_figure(impact, images, labels, titles, heading)
    elif isinstance(made, SubnetworkDecomposition):
        yield "subnetworks", figures.subnetwork_figure(model, made)
        yield "effects", figures.effect_figure(model, made, heldout_rows(recipe))
        if isinstance(model, toys.Circuits) and model.config.function == "linear" and model.config.group == 1:
            yield "coefficients", figures.coefficient_figure(model, made)
    else:
        matrices = spd_scores.importance_matrices(model, made, model.config.n_features)
        dense = {name for glob in recipe.dense for name in fnmatch.filter(matrices, glob)}
        yield "importances", figures.importance_figure(matrices, dense=dense)
        if isinstance(model, toys.TMS) and model.config.n_hidden == 2:
            yield "vectors", figures.vector_figure(model, made)
        if isinstance(model, toys.ResidMLP):
            yield "neurons", figures.neuron_figure(model, made)


def seconds_of(log: Path) -> float:
    """Seconds that all sessions of a run took: each line has the seconds since its own session began."""
    total = last = 0.0
    for line in log.read_text(encoding="utf-8").splitlines():
        seconds = json.loads(line)["seconds"]
        total += seconds - last if seconds >= last else seconds
        last = seconds
    return total
