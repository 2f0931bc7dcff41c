"""A run's folder of version 0.1.0 opens and goes on to what that version made of it: checkpoint, metrics, result.

VPD on micro-gpt2, stopped after step 2 of 6; `resumed.*` is what version 0.1.0 itself made of the other four.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import DecompositionFileError, SettingError

from .checkpoints import metadata, newest, seal

FORMAT_1 = Path(__file__).parent / "format_1"


def go_on(folder, **changes):
    method = tlpd.VPD(n_components=4, importance=ImportanceConfig("global_transformer", hidden=4, heads=2, layers=1))
    settings = {"steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 1}
    model, rows = tlpd.load_micro_gpt2("transformers"), tlpd.micro_gpt2_tokens(12, seed=1)
    return tlpd.decompose(
        model, "blocks.0.mlp.W_in", method, rows, run_dir=folder, progress=False, **(settings | changes)
    )


@pytest.fixture
def folder(tmp_path):
    """A copy, without what version 0.1.0 made of it."""
    return Path(shutil.copytree(FORMAT_1, tmp_path / "run", ignore=shutil.ignore_patterns("resumed.*")))


def logged(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_of_version_0_1_0_goes_on_to_the_same_end(folder):
    begun = safetensors.torch.load_file(newest(folder) / "decomposition" / "components.safetensors")
    before = logged(folder / "metrics.jsonl")
    made = go_on(folder, resume=True).state_dict()
    ended = safetensors.torch.load_file(FORMAT_1 / "resumed.safetensors")
    assert len(ended) == len(made) > 10
    found = logged(folder / "metrics.jsonl")
    assert found[:2] == before
    for line, expected in zip(found, logged(FORMAT_1 / "resumed.jsonl"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    own = safetensors.torch.load_file(folder / "decomposition" / "components.safetensors")
    assert own.keys() == ended.keys()
    for name, tensor in ended.items():  # another machine's arithmetic may differ in the last bits
        moved = (tensor - begun[name]).norm()
        assert (own[name] - tensor).norm() <= 1e-3 * moved + 1e-9, name
    assert sum(bool((ended[name] - begun[name]).norm() > 0) for name in ended) > 10


def test_other_settings_are_refused_as_before(folder):
    with pytest.raises(SettingError, match="steps"):
        go_on(folder, resume=True, steps=7)


def test_a_newer_format_is_refused_by_its_number(folder):
    """As version 0.1.0 would refuse what comes after it."""
    path = newest(folder) / "checkpoint.json"
    path.write_text(json.dumps(metadata(newest(folder)) | {"format": 9}))
    seal(newest(folder))
    with pytest.raises(DecompositionFileError, match="format 9"):
        go_on(folder, resume=True)


def test_its_decomposition_opens(folder):
    made = tlpd.Decomposition.load(newest(folder) / "decomposition")
    model = tlpd.load_micro_gpt2("transformers")
    tlpd.check_target(model, made)
    tokens = tlpd.micro_gpt2_tokens(2, seed=3)
    with torch.no_grad(), tlpd.patched(model, made, made.masks()):
        patched = model(tokens).logits
    assert torch.equal(patched, model(tokens).logits)
