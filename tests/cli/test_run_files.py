"""Run files: every setting is a key, what is unknown is refused with the nearest, and a resolved file is the same run."""

import dataclasses
import json
import time

import pytest
import torch
import yaml

import tl_paramdecomp as tlpd
from tl_paramdecomp.cli.methods import ALL_PRESETS
from tl_paramdecomp.cli.run_settings import DataSettings, RunSettings, resolve
from tl_paramdecomp.cli.settings_paths import parse_change, read_tree
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.settings import to_settings

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


BASE = "model: micro-gpt2\nsites: '*'\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "alias bomb": BOMB,
    "wide aliases": f"a: &a [{'x, ' * 300}]\nb: &b [{'*a, ' * 300}]\nc: [{'*b, ' * 300}]\n",
    "deep aliases": "".join(f"a{i}: &a{i} {'[' * 40}{f'*a{i - 1}' if i else 'x'}{']' * 40}\n" for i in range(60)),
    "digits": f"{BASE}steps: {'1' * 100_000}\n",
    "digits of a fraction": f"{BASE}steps: 1.{'1' * 100_000}x\n",
    "many keys": "".join(f"key{i}: {i}\n" for i in range(40_000)),
    "many values": f"[{'a,' * 1_500_000}]",
    "large": "x" * 5_000_000,
    "long key": f"{BASE}{'s' * 1_000_000}: 3\n",
    "deep lists": f"{BASE}x: {'[' * 100_000}",
    "deep mappings": f"{BASE}x: {'{a: ' * 50_000}",
    "no separator": f"{BASE}data: {{separator: ''}}\n",
    "a date": f"{BASE}steps: 2024-01-01\n",
    "anchor within itself": f"{BASE}x: &x [*x]\n",
    "all of it within itself": "&a [*a]",
    "no type": f"{BASE}method: {{type: null}}",
    "400 digits": f"{BASE}seed: {'9' * 400}\n",
    "400 digits of a float": f"{BASE}method: {{preset: spd, lr: {'9' * 400}}}\n",
    "90 digits": f"{BASE}steps: {'9' * 90}\n",
    "tag": f"{BASE}x: !!python/object:os.system 3\n",
    "set": f"{BASE}x: !!set {{a}}\n",
    "twice": f"{BASE}steps: 1\nsteps: 2\n",
    "a list as a key": f"{BASE}[a]: 3\n",
    "documents": f"{BASE}---\na: 3\n",
    "zero": "a: \0",
    "nothing": "",
    "a list": "[1]",
    "not a number": f"{BASE}method: {{preset: spd, lr: .nan}}\n",
    "no end": f"{BASE}max_seconds: .inf\n",
    "half a step": f"{BASE}steps: 1.5\n",
    "equals": f"{BASE}x: =\n",
    "merged number": f"{BASE}data: {{<<: 3}}\n",
    "json: twice": '{"model": "a", "model": "b"}',
    "json: deep": "[" * 100_000,
    "json: less deep": '{"a":' * 900 + "1" + "}" * 900,
    "json: 400 digits": f'{{"model": "micro-gpt2", "sites": "*", "steps": {"9" * 400}}}',
    "json: many": f"[{'1,' * 2_000_000}1]",
    "json: 5000 digits": f'{{"steps": {"9" * 5000}}}',
    "json: large float": '{"steps": 1e400}',
    "json: NaN": '{"steps": NaN}',
    "json: no type": '{"model": "micro-gpt2", "sites": "*", "method": {"type": null}}',
    "json: null": "null",
    "json: list as type": '{"model": "micro-gpt2", "sites": "*", "method": {"preset": "spd", "losses": {"0": {"type": []}}}}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_by_name_at_once(tmp_path, what):
    path = tmp_path / ("run.json" if what.startswith("json") else "run.yaml")
    path.write_text(HOSTILE[what], encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(SettingError) as caught:
        resolve(read_tree(path))
    assert time.process_time() - begun < 1.0 and len(str(caught.value)) < 1000


def test_anchors_and_dates_as_text_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{BASE}data: &d {{length: 16, shuffle: 0}}\nbackground: {{<<: *d, length: 8}}\nrun_dir: 2024-01-01\n"
    )
    settings = resolve(read_tree(path))
    assert settings.background == DataSettings(length=8, shuffle=0) and settings.run_dir == "2024-01-01"


def test_a_tree_of_settings_is_those_settings():
    settings = resolve(TREE, [parse_change("evaluate=5"), parse_change("wandb=project")])
    assert resolve(json.loads(json.dumps(settings.tree()))) == settings


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
