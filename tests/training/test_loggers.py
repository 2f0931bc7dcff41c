"""TensorBoard, Weights & Biases and evaluations during a run: what was logged is read back."""

import json

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.evaluation.evaluate import evaluate
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.training.loggers import QUICK

from .test_fit import fit, tiny_gpt2, tokens


def test_tensorboard_has_the_figures_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny_gpt2(), run_dir=tmp_path, callbacks=[tlpd.TensorBoard()])
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "l0", "grad_norm_components"):
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    with pytest.raises(SettingError, match="has none"):
        fit(tiny_gpt2(), callbacks=[tlpd.TensorBoard()])


def test_weights_and_biases_is_given_the_figures(tmp_path, monkeypatch):
    """With what `wandb.init` would be asked; a resumed run goes on under the same name."""
    wandb, asked, logged = pytest.importorskip("wandb"), [], []

    class Run:
        def log(self, figures, step):
            logged.append((step, figures["loss"]))

        def finish(self):
            logged.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings) or Run())
    stop = [lambda info: tlpd.STOP if info.step == 4 else None]
    fit(tiny_gpt2(), run_dir=tmp_path, callbacks=[tlpd.WandB("project", mode="offline"), *stop])
    fit(tiny_gpt2(), run_dir=tmp_path, callbacks=[tlpd.WandB("project", mode="offline")])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [(line["step"], line["loss"]) for line in lines]
    assert logged == [*told[:2], "finished", *told[2:], "finished"]
    assert [a["project"] for a in asked] == ["project"] * 2 and asked[0]["id"] == asked[1]["id"]
    assert asked[0]["config"]["method"]["type"] == "SPD" and asked[0]["mode"] == "offline"


def test_evaluations_during_a_run_change_nothing_and_are_those_of_evaluate(tmp_path):
    model, rows = tiny_gpt2(), tokens()[:8]
    plain = fit(model)
    watched = fit(model, run_dir=tmp_path, callbacks=[tlpd.EvaluateEvery(4, rows)])
    assert all(torch.equal(t, watched.state_dict()[name]) for name, t in plain.state_dict().items())
    found = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [4, 6]
    last = evaluate(model, watched, rows, protocol=QUICK, progress=False)
    assert found[-1]["evaluation_rounded"] == pytest.approx(last.headline["rounded"], rel=1e-5)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["evaluation_rounded" in line for line in logged] == [False, True, True]
    with pytest.raises(SettingError, match="at least one step"):
        tlpd.EvaluateEvery(0, rows)
