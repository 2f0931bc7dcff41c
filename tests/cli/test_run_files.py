"""Run files: every setting is a key, what is unknown is refused with the nearest, and a resolved file is the same run."""

import dataclasses
import json

import pytest
import torch
import yaml

import tl_paramdecomp as tlpd
from tl_paramdecomp.cli.methods import ALL_PRESETS
from tl_paramdecomp.cli.run_settings import RunSettings, resolve, tree_of
from tl_paramdecomp.cli.settings_paths import parse_change, read_tree
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.settings import to_settings

from ..support.commands import command

TREE = {"model": "micro-gpt2", "sites": "blocks.0.mlp.W_in", "method": {"preset": "spd", "n_components": 8}, "steps": 2,
        "batch_size": 2, "log_every": 1}  # fmt: skip


def written(tmp_path, name="run.yaml", **changes):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(TREE | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_every_field_of_every_method_is_a_key(preset):
    """Each, set by its path to the value that it has, gives the method again; and all of them together in a tree."""
    method = ALL_PRESETS[preset]()
    tree = to_settings(method, complete=True)
    assert {"type", *(field.name for field in dataclasses.fields(method))} == tree.keys()
    base = TREE | {"method": {"preset": preset}}
    for key, value in tree.items():
        if key != "type":
            assert resolve(base, [(("method", key), value)]).method == method, key
    assert resolve(TREE | {"method": tree}).method == method


def test_every_argument_of_a_run_is_a_key():
    """Whatever `decompose` takes, besides what a file cannot hold."""
    import inspect

    taken = set(inspect.signature(tlpd.decompose).parameters) - {"callbacks", "progress"}
    assert taken <= {field.name for field in dataclasses.fields(RunSettings)}


@pytest.mark.parametrize("text, found", [
    ("method.lr=1e-3", lambda s: s.method.lr == 1e-3),
    ("method.losses.importance_minimality.coefficient=2e-4", lambda s: s.method.losses[3].coefficient == 2e-4),
    ("method.losses.0.relative=false", lambda s: s.method.losses[0].relative is False),
    ("method.importance.kind=global_mlp", lambda s: s.method.importance.kind == "global_mlp"),
    ("method.preset=vpd", lambda s: isinstance(s.method, tlpd.VPD)),
    ("steps=7", lambda s: s.steps == 7), ("keep_best=loss", lambda s: s.keep_best == "loss"),
    ("sites=[blocks.0.*, unembed.W_U]", lambda s: s.sites == ("blocks.0.*", "unembed.W_U")),
    ("data.shuffle=0", lambda s: s.data.shuffle == 0),
    ("evaluate=50", lambda s: s.evaluate is not None and s.evaluate.every == 50),
    ("accumulate=2", lambda s: s.accumulate == 2), ("max_seconds=1e2", lambda s: s.max_seconds == 100.0),
])  # fmt: skip
def test_set_changes_one_setting(text, found):
    before, after = resolve(TREE), resolve(TREE, [parse_change(text)])
    assert not found(before) and found(after)


@pytest.mark.parametrize("text, words", [
    ("stepz=3", "stepz is not a setting of a run. Nearest: steps"),
    ("out=there", "out is not a setting of a run; it is run_dir."),
    ("lr=1", "lr is not a setting of a run; it is method.lr."),
    ("text=file", "text is not a setting of a run; it is data.text."),
    ("method.lrr=1", "method.lrr is not a setting of SPD. Nearest: lr"),
    ("method.importance.hiden=1", "method.importance.hiden is not a setting of ImportanceConfig. Nearest: hidden"),
    ("steps=many", "steps: expected a whole number; given the text 'many'"), ("method.lr=fast", "method.lr: expected a number"),
    ("method.preset=sdp", "method.preset"), ("device=cpu,", None), ("method.lr=-1", "lr must be positive"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_path(text, words):
    if words is None:
        assert resolve(TREE, [parse_change(text)]).device == "cpu,"  # found out when the model is opened
        return
    with pytest.raises(SettingError) as caught:
        resolve(TREE, [parse_change(text)])
    assert words in str(caught.value)


def test_numbers_that_yaml_takes_for_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: micro-gpt2\nsites: blocks.0.*\nmethod: {preset: spd, lr: 1e-3}\n", encoding="utf-8")
    assert yaml.safe_load(path.read_text())["method"]["lr"] == "1e-3"
    assert resolve(read_tree(path)).method.lr == 1e-3


def test_a_tree_of_settings_is_those_settings():
    settings = resolve(TREE, [parse_change("evaluate=5"), parse_change("wandb=project")])
    assert resolve(json.loads(json.dumps(tree_of(settings)))) == settings


def test_a_resolved_file_is_the_same_run(tmp_path):
    """Bit for bit, with every setting, versions and fingerprints in it; and no run of a model with other weights."""
    path = written(tmp_path)
    first = command("decompose", path, "--out", tmp_path / "first", "--set", "method.lr=1e-3")
    assert first.returncode == 0, first.stderr
    resolved = tmp_path / "first" / "resolved.yaml"
    tree = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    assert tree.keys() == {field.name for field in dataclasses.fields(RunSettings)}
    assert tree["versions"]["torch"] and tree["target"].keys() == {"blocks.0.mlp.W_in"}
    again = command("decompose", resolved, "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    one, two = (tlpd.Decomposition.load(tmp_path / name / "decomposition") for name in ("first", "again"))
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())
    other = command("decompose", path, "--out", tmp_path / "other")
    assert other.returncode == 0, other.stderr
    three = tlpd.Decomposition.load(tmp_path / "other" / "decomposition")
    assert not all(torch.equal(t, three.state_dict()[name]) for name, t in one.state_dict().items())
    tree["target"]["blocks.0.mlp.W_in"]["norm"] *= 1.01
    resolved.write_text(yaml.safe_dump(tree), encoding="utf-8")
    changed = command("decompose", resolved, "--out", tmp_path / "changed")
    assert changed.returncode == 1 and "TargetMismatchError" in changed.stderr and not (tmp_path / "changed").exists()


def test_a_dry_run_touches_no_file(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    shown = command("decompose", path, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    for words in ("blocks.0.mlp.W_in", "importance function", "peak of the run", "a checkpoint"):
        assert words in shown.stdout


def test_options_of_the_other_form_are_refused(tmp_path):
    shown = command("decompose", written(tmp_path), "--steps", "3")
    assert shown.returncode == 1 and "--set KEY=VALUE" in shown.stderr
    missing = command("decompose", tmp_path / "none.yaml")
    assert missing.returncode == 1 and "There is no run file" in missing.stderr
