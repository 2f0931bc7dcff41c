"""`reproduce` on targets small enough for a test: one JSON object, figures of every kind, and going on after a stop."""

import fnmatch
import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tl_paramdecomp.cli.app import app
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.experiments import recipes, reproduce
from tl_paramdecomp.experiments.recipes import RECIPES
from tl_paramdecomp.methods.l3d import L3D
from tl_paramdecomp.settings import from_settings, to_settings
from tl_paramdecomp.toy_models import DigitsConfig, InductionConfig, ResidMLPConfig, TMSConfig, ToyTarget

TARGETS = {
    "tms-5-2": TMSConfig(4, 2, steps=4, batch_size=8),
    "tms-5-2-id": TMSConfig(4, 2, identity=True, steps=4, batch_size=8),
    "resid-mlp-2": ResidMLPConfig(2, n_features=4, d_resid=10, n_neurons=4, steps=4, batch_size=8, probability=0.3),
    "induction": InductionConfig(n_vocab=7, d_model=4, length=6, steps=2, batch_size=4),
}


@pytest.fixture
def tiny(monkeypatch):
    """The recipes with small targets, all of them taken for sound."""
    small = {}
    for name, target in TARGETS.items():
        recipe = RECIPES[name]
        importance = replace(recipe.method.importance, hidden=4)
        method = replace(recipe.method, n_components=6, importance=importance, warm_up_steps=2)
        small[name] = replace(recipe, target=target, method=method, steps=4, batch_size=8)
    monkeypatch.setattr(reproduce, "RECIPES", small)
    monkeypatch.setattr(reproduce, "SAMPLE", 32)
    for kind, _ in reproduce.KINDS.values():
        monkeypatch.setattr(kind, "is_sound", lambda self: True)


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


@pytest.mark.parametrize("name", TARGETS)
def test_prints_one_json_object(tiny, tmp_path, name):
    shown = run(name, "--seeds", 2, "--out", tmp_path, "--json")
    assert shown.exit_code == 0, shown.exception
    found = json.loads(shown.stdout)
    assert found["name"] == name and [s["seed"] for s in found["seeds"]] == [0, 1]
    for seed in found["seeds"]:
        assert set(seed["alive"]) == set(seed["l0"]) and seed["targets_tried"] == 1
        if name.startswith("tms"):
            assert {"mmcs", "ml2r", "identity_ci_error"} <= set(seed)
        if name == "tms-5-2-id":
            assert seed["dense_ci_error_by_site"].keys() == {"hidden_layers.0.weight"}
        if name == "resid-mlp-2":
            assert "scrubbed" in seed["scrubbed"] and "dense_ci_error" in seed
            assert seed["alive_in_all"].keys() == {"layers.*.mlp_in.weight", "layers.*.mlp_out.weight"}
        if name == "induction":
            assert set(seed["accuracy"]) >= {"target", "rounded"}
    assert {"command", "date", "versions", "settings", "machine"} <= set(found)
    assert json.loads((tmp_path / name / "result.json").read_text()) == found
    pictures = {p.name for p in (tmp_path / name / "seed-0").glob("*.png")}
    kinds = {"t": {"importances.png", "vectors.png"}, "r": {"importances.png", "neurons.png"}, "i": set()}
    assert pictures == kinds[name[0]]


def test_prints_a_table(tiny, tmp_path):
    shown = run("tms-5-2", "--out", tmp_path, "--steps", 2, "--batch-size", 4)
    assert "mmcs" in shown.stdout and "published" in shown.stdout and "alive: linear1.weight" in shown.stdout
    kept = json.loads((tmp_path / "tms-5-2" / "result.json").read_text())["settings"]
    assert (kept["steps"], kept["batch_size"]) == (2, 4)


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_run_again(tiny, tmp_path, monkeypatch):
    whole = json.loads(run("tms-5-2", "--out", tmp_path / "whole", "--json").stdout)
    fit = reproduce.decompose

    def stop(info):
        if info.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "decompose", lambda *a: fit(*a, callbacks=[stop], log_every=1))
    assert run("tms-5-2", "--out", tmp_path / "stopped", "--json").exit_code == 130
    monkeypatch.setattr(reproduce, "decompose", fit)
    monkeypatch.setattr(reproduce.toys, "train_until_sound", lambda *_: pytest.fail("the target was there"))
    resumed = json.loads(run("tms-5-2", "--out", tmp_path / "stopped", "--json").stdout)
    for figure in ("mmcs", "ml2r", "alive", "l0", "identity_ci_error"):
        assert resumed["seeds"][0][figure] == whole["seeds"][0][figure]
    ours, theirs = (
        Decomposition.load(tmp_path / where / "tms-5-2" / "seed-0" / "run" / "decomposition").state_dict()
        for where in ("stopped", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    monkeypatch.setattr(reproduce, "decompose", lambda *_: pytest.fail("the seed was finished"))
    again = json.loads(run("tms-5-2", "--out", tmp_path / "stopped", "--json").stdout)
    assert again["seeds"] == resumed["seeds"]


def test_figures_are_left_out_without_matplotlib(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = run("tms-5-2", "--out", tmp_path, "--json")
    assert shown.exit_code == 0 and "tl-paramdecomp[plots]" in " ".join(shown.stderr.split())
    assert not list(tmp_path.rglob("*.png")) and json.loads(shown.stdout)["seeds"]


@pytest.mark.parametrize("arguments, words", [(("tms-6-2",), "tms-5-2"), (("tms-5-2", "--seeds", 0), "--seeds")])
def test_wrong_arguments_are_named(arguments, words, tmp_path):
    shown = run(*arguments, "--out", tmp_path)
    assert words in str(shown.exception) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_sites_that_their_targets_have(name):
    recipe = RECIPES[name]
    build, _ = reproduce.KINDS[type(recipe.target).__name__]
    import tl_paramdecomp as tlpd

    model = build(recipe.target)
    assert isinstance(model, ToyTarget)
    sites = tlpd.find_sites(model, list(recipe.sites))
    assert all(fnmatch.filter(sites, glob) for glob in (*recipe.one_per_feature, *recipe.dense))
    assert recipe.method.ranks(sites) if isinstance(recipe.method, L3D) else recipe.method.counts(sites)
    assert from_settings(json.loads(json.dumps(to_settings(recipe.method)))) == recipe.method
    assert isinstance(recipe.method, L3D) or isinstance(recipe.method.importance, ImportanceConfig)
    assert recipes.Recipe is type(recipe)


def test_l3d_finds_the_circuits(tmp_path):
    """A short run: every input has a subnetwork of its own, whose two matrices multiply to its row of A."""
    record = reproduce.reproduce("l3d-circuits", 1, tmp_path, lambda text: None, steps=1500)
    (found,) = record["seeds"]
    assert found["circuits_found"] == 10 and found["purity"] > 0.98 and found["dead"] == 0
    assert found["bound"] < found["heldout_error"] < 0.08 and found["row_cosine"] > 0.95 and found["pooled_r"] > 0.88
    assert abs(found["heldout_error_fixed_threshold"] - found["heldout_error"]) < 0.02
    pictures = {path.name for path in (tmp_path / "l3d-circuits" / "seed-0").glob("*.png")}
    assert pictures == {"subnetworks.png", "effects.png", "coefficients.png"}


def test_l3d_on_digits(tmp_path, monkeypatch):
    """A short run on a small network."""
    recipe = RECIPES["l3d-digits"]
    small = replace(
        recipe, target=DigitsConfig((3, 4), steps=4, batch_size=8), method=replace(recipe.method, n_subnetworks=8)
    )
    monkeypatch.setattr(reproduce, "RECIPES", {"l3d-digits": small})
    monkeypatch.setattr(reproduce.toys.Digits, "is_sound", lambda self: True)
    record = reproduce.reproduce("l3d-digits", 1, tmp_path, lambda text: None, steps=4, batch_size=8)
    (found,) = record["seeds"]
    assert {"heldout_error", "heldout_error_fixed_threshold", "bound", "purity", "purity_shuffled", "dead"} <= set(
        found
    )
    assert set(found["p_act"]) == {"least", "median", "most"} and len(found["active"]) == 8
    assert (tmp_path / "l3d-digits" / "seed-0" / "images.png").stat().st_size > 0
