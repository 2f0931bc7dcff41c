"""Runs that stop and go on: bit for bit what they would have been, whatever the method remembers and the data come from."""

import json
from dataclasses import replace

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.disk import read_tensors
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import TargetMismatchError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.settings import from_settings

from .checkpoints import metadata, newest, seal
from .test_fit import fit, same, tiny_gpt2, tokens

SMALL = ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1)


def stop_once(at):
    """A callback that ends the run after a step, the first time."""
    seen = []

    def callback(info):
        if info.step == at and not seen:
            seen.append(at)
            raise KeyboardInterrupt

    return callback


def cut_and_whole(tmp_path, at=3, steps=6, **changes):
    """The same run stopped and resumed, and never stopped; with what each remembered."""
    model, made, memories = tiny_gpt2(), [], []
    for name in ("cut", "whole"):
        settings = {"steps": steps, "run_dir": tmp_path / name, "log_every": 1} | changes
        if name == "cut":
            with pytest.raises(KeyboardInterrupt):
                fit(model, callbacks=[stop_once(at)], **settings)
            assert metadata(newest(tmp_path / "cut"))["step"] == at
        made.append(fit(model, **settings))
        memories.append(read_tensors(newest(tmp_path / name) / "memory.safetensors"))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cut", "whole")
    ]
    assert len(losses[0]) == steps and losses[0] == losses[1]
    return made, memories


@pytest.mark.parametrize("settings", [
    {}, {"scope": "single_source", "optimiser": "sign"}, {"scope": "repeat_across_batch", "repeats": 2},
    {"scope": "broadcast_across_batch", "parametrisation": "sigmoid", "sites": "subset"},
], ids=lambda s: s.get("scope", "default"))  # fmt: skip
def test_an_adversarys_sources_outlive_the_run(tmp_path, settings):
    """N steps, saved and loaded, and N more are 2 N steps: components, optimiser, sources, moments and their count."""
    losses = (Faithfulness(10.0), PersistentAdversarialReconstruction(0.5, **settings), ImportanceMinimality(1e-3))
    made, memories = cut_and_whole(tmp_path, method=tlpd.SPD(n_components=12, losses=losses, importance=SMALL))
    assert same(*made)
    assert memories[0].keys() == memories[1].keys() and len(memories[0]) == 2 * 3 + 1
    assert all(torch.equal(memories[0][key], t) for key, t in memories[1].items())
    assert memories[0]["persistent_adversarial//moves"].item() == 6 * 3


def test_vpd(tmp_path):
    made, memories = cut_and_whole(tmp_path, method=tlpd.VPD(n_components=12, importance=SMALL))
    assert same(*made) and any("source" in key for key in memories[0])


def test_without_its_sources_a_run_would_go_on_otherwise(tmp_path):
    """What is remembered matters: the same checkpoint with sources of its start gives another result."""
    from tl_paramdecomp.components.disk import write_tensors

    method, model = tlpd.VPD(n_components=12, importance=SMALL), tiny_gpt2()
    settings = {"steps": 6, "method": method, "run_dir": tmp_path, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[stop_once(3)], **settings)
    path = newest(tmp_path) / "memory.safetensors"
    write_tensors(path, {key: torch.zeros_like(t) for key, t in read_tensors(path).items()})
    seal(path.parent)
    assert not same(fit(model, **settings), fit(model, **(settings | {"run_dir": tmp_path / "other"})))


def made_rows(step):
    """Rows that are a function of the step's number."""
    return torch.randint(0, 31, (4, 8), generator=torch.Generator().manual_seed(1000 + step))


def made_padded(step):
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": made_rows(step), "attention_mask": mask}


@pytest.mark.parametrize("data", [made_rows, made_padded])
def test_data_from_a_function_of_the_steps_number(tmp_path, data):
    """The function is asked for each step once, in order, and from where it stopped."""
    asked = []

    def make(step):
        asked.append(step)
        return data(step)

    method = tlpd.SPD(n_components=12)
    made, _ = cut_and_whole(tmp_path, data=make, method=method)
    assert same(*made) and asked == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    same_rows = torch.cat([made_rows(step) for step in range(6)])
    if data is made_rows:
        listed = fit(tiny_gpt2(), steps=6, data=list(same_rows.split(4)), method=method)
        assert same(made[0], listed)


@pytest.mark.parametrize("form", ["list", "rows", "dict"])
def test_every_form_of_data_resumes(tmp_path, form):
    rows = tokens()
    data = {
        "list": list(rows.split(4)),
        "rows": list(rows),
        "dict": {"tokens": rows, "attention_mask": torch.ones_like(rows)},
    }
    made, _ = cut_and_whole(
        tmp_path, data=data[form], method=tlpd.SPD(n_components=12, losses=(StochasticReconstruction(),))
    )
    assert same(*made)


@pytest.mark.parametrize("method", [
    tlpd.SPD(n_components=12, losses=(
        Faithfulness(5.0, rows=4), StochasticReconstruction(0.5, sites="layerwise"),
        StochasticReconstruction(0.5, sampling="binomial"), AdversarialReconstruction(0.3, sites="subset"),
        ImportanceMinimality(1e-3, penalty="smooth_l0", frequency=0.1),
    )),
    tlpd.SPD(n_components=12, kl_chunk=5), tlpd.SPD(n_components=12, autocast="bfloat16"),
    tlpd.SPD.paper(n_components=12),
], ids=["many-losses", "chunks", "autocast", "paper"])  # fmt: skip
def test_other_methods(tmp_path, method):
    made, memories = cut_and_whole(tmp_path, method=method)
    assert same(*made) and memories == [{}, {}]


def test_the_settings_of_a_run_make_its_method_again(tmp_path):
    method = tlpd.VPD(n_components=12, importance=SMALL)
    fit(tiny_gpt2(), steps=1, run_dir=tmp_path, method=method)
    settings = metadata(newest(tmp_path))["settings"]
    assert from_settings(settings["method"]) == method
    assert from_settings(settings["method"]) != replace(method, lr=1.0)


def test_the_coefficient_of_an_adversary_may_change_with_its_sources_kept(tmp_path):
    """Other settings are another run, also where only a coefficient differs."""
    from tl_paramdecomp.errors import SettingError

    model = tiny_gpt2()
    fit(model, steps=2, run_dir=tmp_path, method=tlpd.VPD(n_components=12, importance=SMALL))
    losses = tuple(replace(loss, coefficient=0.1) for loss in tlpd.VPD().losses)
    with pytest.raises(SettingError, match="other method"):
        fit(model, steps=2, run_dir=tmp_path, method=tlpd.VPD(n_components=12, importance=SMALL, losses=losses))


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    model = tiny_gpt2()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[stop_once(2)], steps=4, run_dir=tmp_path, log_every=1)
    with tlpd.shuffled_weights(model), pytest.raises(TargetMismatchError, match="other weights"):
        fit(model, steps=4, run_dir=tmp_path)
    fit(model, steps=4, run_dir=tmp_path)
