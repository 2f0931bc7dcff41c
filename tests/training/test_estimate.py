"""Estimates of runs: counts against the decomposition that is made, and memory against the peak of the real run."""

import json
import subprocess
import sys

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig

from .test_fit import tiny_gpt2, tokens

METHODS = {
    "SPD": tlpd.SPD(n_components=12),
    "VPD": tlpd.VPD(n_components=12, importance=ImportanceConfig("global_transformer", hidden=8, heads=2, layers=1)),
    "L3D": tlpd.L3D(n_subnetworks=6),
    "SVD": tlpd.SVD(),
}


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_what_is_made(name, tmp_path):
    model, method = tiny_gpt2(), METHODS[name]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    found = tlpd.estimate_run(model, "blocks.0.mlp.*", method, tokens(), 20, 4)
    assert all((t == before[key]).all() for key, t in model.state_dict().items())
    made = tlpd.decompose(model, "blocks.0.mlp.*", method, tokens(), 1, 4, run_dir=tmp_path, progress=False)
    parameters = sum(p.numel() for p in made.parameters())
    memory = found.memory
    assert memory["components"] + memory["importance"] == 4 * parameters
    trained = sum(p.numel() for group in method.parameter_groups(made) for p in group.parameters)
    assert memory["gradients"] == 4 * trained and memory["optimiser"] == 8 * trained
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    on_disk = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    print(f"checkpoint: {found.disk['checkpoint']} foretold, {on_disk} written")
    assert abs(found.disk["checkpoint"] - on_disk) < 0.05 * on_disk + 64_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["spd", "vpd"])
def test_memory_is_foretold_within_15_percent(method):
    """Peak resident memory of a run of some hundred MB, each in a process of its own."""
    found = {}
    for what in ("predict", "measure"):
        command = [sys.executable, "-m", "tests.benchmarks.run_memory", what, "middling", method]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = found["predict"]["memory"]["peak"], found["measure"]["peak"]
    print(f"{method}: {predicted / 2**20:.0f} MB foretold, {measured / 2**20:.0f} MB measured")
    assert abs(predicted / measured - 1.0) < 0.15
