"""The command as a user runs it: output, exit status, errors without tracebacks."""

import importlib.metadata
import json
import os

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.pretrained import load_micro_gpt2

from ..support.commands import command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = load_micro_gpt2()
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: (torch.randn(s.d_in, 4, generator=generator), torch.randn(4, s.d_out, generator=generator))
        for name, s in tlpd.find_sites(model, "blocks.0.mlp.*").items()
    }
    return tlpd.from_factors(model, factors).save(tmp_path_factory.mktemp("saved") / "dec")


@pytest.mark.parametrize(
    "name", ["demo", "sites", "decompose", "evaluate", "compare", "patch", "attribute", "circuit", "reproduce"]
)
def test_help_says_what_a_command_does(name):
    shown = command(name, "--help")
    assert shown.returncode == 0 and "Usage" in shown.stdout and len(shown.stdout) > 300
    assert command("--help").stdout.count(name) >= 1


def test_sites_as_json():
    shown = command("sites", "micro-gpt2", "blocks.0.mlp.*", "--json")
    assert shown.returncode == 0, shown.stderr
    assert list(json.loads(shown.stdout)["sites"]) == ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out"]


def test_patch_shows_before_and_after(saved):
    arguments = ("patch", "micro-gpt2", saved, "--prompt", "the cat", "--ablate", "blocks.0.mlp.W_in:0,2", "--json")
    shown = command(*arguments)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["kl"] > 0 and len(found["before"]) == len(found["after"]) == 5


def test_decompose_writes_a_decomposition_that_loads(tmp_path):
    out = tmp_path / "run"
    shown = command("decompose", "micro-gpt2", "--sites", "blocks.0.mlp.W_in", "--out", out, "--steps", 3, "--components", 8,
                    "--importance", "0.01", "--batch-size", 2, "--method", "vpd")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "KL from the target" in shown.stdout and "Traceback" not in shown.stderr
    made = tlpd.Decomposition.load(out / "decomposition")
    assert made["blocks.0.mlp.W_in"].n_components == 8
    assert made.info["run"]["method"]["type"] == "VPD"
    assert made.info["run"]["method"]["losses"][-1]["coefficient"] == 0.01


def test_a_baseline_is_trained_and_evaluated(tmp_path):
    out = tmp_path / "run"
    shown = command("decompose", "micro-gpt2", "--sites", "blocks.0.mlp.W_in", "--out", out, "--steps", 3, "--importance",
                    "0.01", "--batch-size", 2, "--method", "neurons")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    made = tlpd.Decomposition.load(out / "decomposition")
    assert made["blocks.0.mlp.W_in"].n_components == 256 and made.info["run"]["method"]["type"] == "NeuronBasis"
    assert made.info["run"]["method"]["training"]["losses"][-1]["coefficient"] == 0.01
    arguments = ("evaluate", "micro-gpt2", out / "decomposition", "--rows", 2, "--restarts", 1)
    shown = command(*arguments, "--json", "--out", tmp_path / "found.json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["rows"] == 2 and [row["steps"] for row in found["adversary"]] == [1, 4, 20, 40]
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept.keys() - found.keys() == {"checksum", "format", "record"} and kept == kept | found
    shown = command(*arguments, "--oracle", 5, "--seconds", 0)
    assert shown.returncode == 0 and "Left out" in shown.stdout
    assert "blocks.0.mlp.W_in" in shown.stdout  # whole, whatever the width of a pipe


def test_what_a_run_started_from_stands_beside(tmp_path, saved):
    out = tmp_path / "run"
    command("decompose", "micro-gpt2", "--sites", "blocks.0.mlp.W_in", "--out", out, "--steps", 2, "--seed", 3)
    few = ("--rows", 2, "--restarts", 1, "--untrained", "--json")
    shown = command("evaluate", "micro-gpt2", out / "decomposition", *few)
    assert shown.returncode == 0, shown.stderr
    model = load_micro_gpt2("transformers")
    start = tlpd.decompose(
        model, "blocks.0.mlp.W_in", tlpd.SPD(), tlpd.micro_gpt2_tokens(8, seed=1), 0, seed=3, progress=False
    )
    held_out = tlpd.micro_gpt2_tokens(32, seed=2)[:2]
    alone = tlpd.evaluate(model, start, held_out, protocol=tlpd.EvaluationConfig(restarts=1, ablated=0), progress=False)
    assert json.loads(shown.stdout)["controls"]["untrained"] == pytest.approx(alone.headline, rel=1e-5)
    refused = command("evaluate", "micro-gpt2", saved, "--oracle", 3, *few)
    assert refused.returncode == 1 and "No run is stored" in refused.stderr


def test_a_decomposition_without_importances_says_how_to_measure_it(tmp_path):
    what = ("--sites", "blocks.0.mlp.W_in", "--method", "svd-oracle")
    shown = command("decompose", "micro-gpt2", "--out", tmp_path, *what)
    assert shown.returncode == 0 and "--oracle" in shown.stdout and not (tmp_path / "quality.json").exists()


def test_compare_draws_curves_and_goes_on(tmp_path):
    what = ("--sites", "blocks.0.mlp.W_in", "--method", "neurons", "--method", "svd-oracle", "--sparsity", 1)
    small = ("--steps", 2, "--batch-size", 2, "--seeds", 1, "--rows", 2, "--restarts", 1)
    arguments = ("compare", "micro-gpt2", "--out", tmp_path, *what, *small)
    shown = command(*arguments, "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert [p["method"] for p in found["points"]] == ["neurons"] + 5 * ["svd-oracle"] and found["ranks"] == 64
    assert (tmp_path / "comparison.png").exists() and tlpd.Comparison.load(tmp_path / "comparison.json").ranks == 64
    shown = command(*arguments)
    assert shown.returncode == 0 and "at equal L0" in shown.stdout and "neurons" in shown.stdout
    refused = command(*arguments[:-1], 2)
    assert refused.returncode == 1 and "other evaluation" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("arguments, words", [
    (("sites", "micro-gpt2", "blocks.0.mpl.*"), "NoMatchingSiteError"),
    (("sites", "no/such-model"), "UnsupportedModelError"),
    (("sites", "micro-gpt2", "--host", "jax"), "SettingError"),
    (("patch", "micro-gpt2", "nowhere", "--prompt", "the", "--ablate", "a:0"), "DecompositionFileError"),
    (("decompose", "micro-gpt2", "--sites", "embed.*", "--out", "x", "--steps", "-1"), "SettingError"),
    (("decompose", "micro-gpt2", "--sites", "embed.*", "--out", "x", "--method", "sdp"), "SettingError"),
    (("decompose", "micro-gpt2", "--sites", "*", "--out", "x", "--method", "svd", "--components", "3"), "SettingError"),
    (("compare", "micro-gpt2", "--sites", "*", "--out", "x", "--method", "spd-oracle"), "SettingError"),
    (("circuit", "micro-gpt2", "nowhere", "--task", "ioi", "--device", "tpus"), "SettingError"),
    (("decompose", "micro-gpt2", "--sites", "*", "--out", "x", "--settings", "s.json", "--importance", "1"), "SettingError"),
])  # fmt: skip
def test_errors_are_one_line_and_status_1(arguments, words, tmp_path):
    shown = command(*arguments, cwd=tmp_path)
    assert shown.returncode == 1 and words in shown.stderr and "Traceback" not in shown.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", ["blocks.0.mlp.W_in", "blocks.0.mlp.W_in:x", "blocks.0.mlp.W_in:99"])
def test_bad_components_are_refused(saved, bad):
    shown = command("patch", "micro-gpt2", saved, "--prompt", "the cat", "--ablate", bad)
    assert shown.returncode == 1 and "Traceback" not in shown.stderr and "Error" in shown.stderr


def test_wrong_usage_is_status_2():
    shown = command("decompose", "micro-gpt2")
    assert shown.returncode == 2 and "--sites" in shown.stderr


def test_the_version():
    assert command("--version").stdout.strip() == tlpd.__version__ == importlib.metadata.version("tl-paramdecomp")


@pytest.mark.parametrize("arguments", [
    ("evaluate", "micro-gpt2", ".", "--rows", -1), ("patch", "micro-gpt2", ".", "--top", 0),
    ("reproduce", "tms-5-2", "--threads", 0), ("decompose", "micro-gpt2", "--sites", "*", "--out", ""),
    ("decompose", "micro-gpt2", "--sites", "*", "--out", "x", "--text", ""),
], ids=lambda a: a[-2])  # fmt: skip
def test_values_that_make_no_sense_are_wrong_usage(arguments, tmp_path):
    shown = command(*arguments, cwd=tmp_path)
    assert shown.returncode == 2 and arguments[-2] in shown.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "pipe"])
def test_a_text_that_is_no_file_is_named(kind, tmp_path):
    if kind == "pipe":
        os.mkfifo(tmp_path / "stories")
    what = ("--sites", "blocks.0.mlp.W_in", "--out", "x", "--text", "stories")
    shown = command("decompose", "micro-gpt2", *what, cwd=tmp_path)
    assert shown.returncode == 1 and "--text stories is no file" in shown.stderr
