"""micro-gpt2 does its tasks, with heads that do them, and is the same model on every host.

All figures are computed here from the shipped weights, on prompts of the split that neither training nor the choice of
the seed has seen.
"""

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import (
    load_micro_gpt2,
    micro_gpt2_prompts,
    micro_gpt2_tokenizer,
    micro_gpt2_tokens,
)
from tl_paramdecomp.pretrained.grammar import NAMES, TASKS, TOKEN_IDS, VOCABULARY
from tl_paramdecomp.pretrained.micro_gpt2 import MICRO_GPT2_DIR

ROOT = Path(__file__).resolve().parents[2]
TL_MAJOR = int(version("transformer-lens").split(".")[0])
HOSTS = ["transformers", "transformer_bridge", "hooked_transformer", "nnsight"]
INSTALLED = {
    "transformers": True,
    "transformer_bridge": TL_MAJOR >= 3,
    "hooked_transformer": TL_MAJOR < 4,
    "nnsight": True,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on more threads, and training repeats on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_micro_gpt2", ROOT / "examples" / "train_micro_gpt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return load_micro_gpt2()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / "micro_gpt2.json").read_text())


# the shipped files -----------------------------------------------------------------------------------------------


def test_shipped_files_are_small_and_those_of_the_record(record: dict[str, Any]) -> None:
    weights = (MICRO_GPT2_DIR / "model.safetensors").read_bytes()
    assert len(weights) == record["weights_bytes"] <= 2**20
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"]
    assert {path.suffix for path in MICRO_GPT2_DIR.iterdir()} == {".json", ".safetensors"}


def test_the_chosen_seed_is_best_on_validation_and_reaches_every_figure(record: dict[str, Any]) -> None:
    margins = {seed["seed"]: seed["margin"] for seed in record["seeds"]}
    assert len(margins) >= 3 and record["steps"] >= 3500
    assert margins[record["chosen_seed"]] == max(margins.values())
    assert all(record["test"][name] >= wanted for name, wanted in record["wanted"].items())


# tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_reach_their_figures_on_test_prompts(script: ModuleType, model: Any, record: dict[str, Any]) -> None:
    figures = script.task_figures(model, "test")
    for name, wanted in script.WANTED.items():
        assert figures[name] >= wanted, name
        # Of 1000 prompts one may turn on another processor's rounding.
        assert figures[name] == pytest.approx(record["test"][name], abs=2e-3)


@torch.no_grad()
def test_ioi_figures_agree_with_one_prompt_at_a_time(script: ModuleType, model: Any) -> None:
    prompts = micro_gpt2_prompts("ioi", 60, seed=1)
    above = first = 0
    for prompt in prompts:
        logits = model(prompt.tokens[None]).logits[0, -1]
        by_name = {name: logits[TOKEN_IDS[name]].item() for name in NAMES}
        indirect, subject = VOCABULARY[prompt.answers[0]], VOCABULARY[prompt.wrong[0]]
        above += by_name[indirect] > by_name[subject]
        first += max(by_name, key=by_name.__getitem__) == indirect
    figures = script.ioi_figures(model, prompts)
    assert figures["ioi_above_subject"] == pytest.approx(above / 60)
    assert figures["ioi_first_of_names"] == pytest.approx(first / 60)


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_corrupted_prompts_take_the_answer_away(task: str, script: ModuleType, model: Any) -> None:
    prompts = micro_gpt2_prompts(task, 100, seed=2)
    mass = []
    for ids, last in (script.padded(p.tokens for p in prompts), script.padded(p.corrupted for p in prompts)):
        probs = model(ids).logits[torch.arange(len(ids)), last].softmax(-1)
        mass.append(
            sum(row[list(p.answers)].sum().item() for row, p in zip(probs, prompts, strict=True)) / len(prompts)
        )
    # After year 01 every later year is still valid, only no longer the only ones.
    assert mass[0] > 0.85 and mass[0] - mass[1] > (0.2 if task == "greater_than" else 0.7)


@torch.no_grad()
@pytest.mark.parametrize("task", ["ioi", "pronoun"])
def test_tasks_do_not_need_the_mark_in_front(task: str, script: ModuleType, model: Any) -> None:
    prompts = micro_gpt2_prompts(task, 100, seed=3)
    ids, last = script.padded(prompt.tokens[1:] for prompt in prompts)
    logits = model(ids).logits[torch.arange(len(ids)), last]
    right = sum((row[p.answers[0]] > row[p.wrong[0]]).item() for row, p in zip(logits, prompts, strict=True))
    assert right >= 95


# heads -----------------------------------------------------------------------------------------------------------


def test_heads_do_induction(script: ModuleType, model: Any) -> None:
    figures = script.induction_heads(model, "test", n=200, seed=0)
    previous, repeating = figures["previous_token_heads"], figures["induction_heads"]
    assert previous and len(repeating) >= 2
    # Looking back comes before repeating, in the layers.
    assert max(layer for layer, _ in previous) < min(layer for layer, _ in repeating)
    assert figures["accuracy"] > 0.9
    assert figures["accuracy_without_previous_token_heads"] < 0.1
    assert figures["accuracy_without_induction_heads"] < 0.1


def test_heads_lift_both_names_and_push_the_subject_down(script: ModuleType, model: Any) -> None:
    figures = script.ioi_heads(model, "test", n=200, seed=0)
    assert len(figures["name_heads"]) >= 2 and {layer for layer, _ in figures["name_heads"]} == {1}
    assert len(figures["subject_heads"]) >= 2 and {layer for layer, _ in figures["subject_heads"]} == {2}
    whole = figures["logits"]
    assert whole["over_subject"] > 2 and whole["over_absent_names"] > 2
    # Without the two name heads the names lose nearly half their lead; without their layer most of it.
    assert figures["logits_without_name_heads"]["over_absent_names"] < 0.7 * whole["over_absent_names"]
    assert figures["logits_without_name_heads"]["first_of_names"] < 0.8
    assert figures["logits_without_name_head_layer"]["over_absent_names"] < 0.3 * whole["over_absent_names"]
    assert figures["logits_without_name_head_layer"]["first_of_names"] < 0.2
    # Which of the two names it is comes from the subject heads.
    assert figures["logits_without_subject_heads"]["over_subject"] < 0.5 * whole["over_subject"]
    assert figures["logits_without_subject_heads"]["over_absent_names"] > 0.8 * whole["over_absent_names"]


@torch.no_grad()
def test_name_heads_look_at_both_names_by_position(model: Any) -> None:
    prompts = micro_gpt2_prompts("ioi", 50, seed=4)
    seen = []
    for prompt in prompts:
        tokens = prompt.tokens.tolist()
        pattern = model(prompt.tokens[None], output_attentions=True).attentions[1][0, :, -1]
        seen.append(pattern[:, tokens.index(prompt.answers[0])] + pattern[:, tokens.index(prompt.wrong[0])])
    assert (torch.stack(seen).mean(0) > 0.9).sum() >= 2


def test_mean_ablation_of_no_heads_and_after_its_end_is_the_model(script: ModuleType, model: Any) -> None:
    ids = micro_gpt2_tokens(2)
    with torch.no_grad():
        before = model(ids).logits
        with script.mean_ablated(model, [], ids):
            assert torch.equal(model(ids).logits, before)
        with script.mean_ablated(model, [(0, 1)], ids):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


# hosts -----------------------------------------------------------------------------------------------------------


def host_logits(host: str, tokens: torch.Tensor) -> torch.Tensor:
    hosted = load_micro_gpt2(host)
    assert not hosted._module.training if host == "nnsight" else not hosted.training
    if host == "nnsight":
        with hosted.trace(tokens):
            logits = hosted.output.logits.save()
        return logits
    output = hosted(tokens)
    return output.logits if host == "transformers" else output


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_hosts_give_the_same_logits(host: str, model: Any) -> None:
    if not INSTALLED[host]:
        with pytest.raises(UnsupportedModelError, match=r"loads on transformers"):
            load_micro_gpt2(host)
        pytest.skip(f"transformer-lens {version('transformer-lens')} has no such host, and the loader says so")
    tokens = micro_gpt2_tokens(8, seed=7)
    logits = host_logits(host, tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("host", HOSTS[1:])
def test_hosts_hold_the_tokenizer(host: str) -> None:
    if not INSTALLED[host]:
        pytest.skip(f"transformer-lens {version('transformer-lens')} has no such host")
    hosted = load_micro_gpt2(host)
    prompt = micro_gpt2_prompts("ioi", 1)[0]
    # TransformerLens loads the tokenizer once more, as one that adds the mark.
    assert hosted.tokenizer(prompt.text, add_special_tokens=False)["input_ids"] == prompt.tokens[1:].tolist()
    if host != "nnsight":
        assert hosted.to_tokens(prompt.text)[0].tolist() == prompt.tokens.tolist()
        assert hosted.to_tokens(prompt.text, prepend_bos=False)[0].tolist() == prompt.tokens[1:].tolist()
        assert hosted.to_single_token(prompt.text.split()[-1]) == prompt.tokens[-1]


def test_loading_leaves_the_random_state_alone() -> None:
    for host in (name for name in HOSTS if INSTALLED[name]):
        torch.manual_seed(0)
        load_micro_gpt2(host)
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1)), host


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'jax'.*transformer_bridge"):
        load_micro_gpt2("jax")


@pytest.mark.parametrize("host", ["transformer_bridge", "hooked_transformer"])
def test_a_missing_host_is_refused_naming_those_there_are(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    monkeypatch.delitem(sys.modules, "transformer_lens.model_bridge", raising=False)
    with pytest.raises(UnsupportedModelError, match=r"loads on transformers, nnsight$"):
        load_micro_gpt2(host)


def test_importing_loads_no_host() -> None:
    code = (
        "import sys, tl_paramdecomp.pretrained; "
        "sys.exit(any(n in sys.modules for n in ('transformers', 'transformer_lens', 'nnsight')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# text ------------------------------------------------------------------------------------------------------------


def test_tokenizer_knows_the_grammar_and_refuses_other_words() -> None:
    tokenizer = micro_gpt2_tokenizer()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == list(VOCABULARY)
    text = "When Mary and John went to the store, John gave a book to"
    assert (
        tokenizer.decode(tokenizer(text)["input_ids"]) == "when mary and john went to the store , john gave a book to"
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer("isn't she? 1741")["input_ids"]) == [
        "isn't",
        "she",
        "?",
        "17",
        "41",
    ]
    assert tokenizer("<|endoftext|> so")["input_ids"] == [0, TOKEN_IDS["so"]]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("a xylophone")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompts_are_their_text_behind_the_mark(task: str, split: str) -> None:
    tokenizer = micro_gpt2_tokenizer()
    for prompt in micro_gpt2_prompts(task, 30, seed=1, split=split):
        assert prompt.tokens.dtype == torch.long
        assert prompt.tokens.tolist() == [0, *tokenizer(prompt.text)["input_ids"]]
        assert prompt.corrupted is not None and prompt.corrupted.shape == prompt.tokens.shape
        assert not torch.equal(prompt.corrupted, prompt.tokens)


@torch.no_grad()
def test_token_rows_are_seeded_and_the_model_predicts_them(model: Any) -> None:
    rows = micro_gpt2_tokens(64)
    assert rows.shape == (64, 64) and rows.dtype == torch.long
    assert torch.equal(rows, micro_gpt2_tokens(64)) and not torch.equal(rows, micro_gpt2_tokens(64, seed=1))
    assert torch.equal(rows[:5], micro_gpt2_tokens(5)) and micro_gpt2_tokens(0).shape == (0, 64)
    logits = model(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss < 0.5 * math.log(len(VOCABULARY))
    with pytest.raises(SettingError, match="negative"):
        micro_gpt2_tokens(-1)


# training --------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_cross_entropy_with_all_later_years_as_target(script: ModuleType) -> None:
    ids, weights, floors = next(script.batches(0))
    logits = torch.randn(*ids.shape, len(VOCABULARY), dtype=torch.float64)
    got = script.batch_loss(logits, ids, weights.double(), floors, script.years_after().double())
    log_probs, total, norm = logits.log_softmax(-1), 0.0, 0.0
    for row in range(len(ids)):
        for pos in range(1, ids.shape[1]):
            weight, floor = weights[row, pos].item(), int(floors[row, pos])
            now = log_probs[row, pos - 1]
            later = [now[TOKEN_IDS[f"{year:02d}"]].item() for year in range(floor + 1, 100)]
            total -= weight * (now[ids[row, pos]].item() if floor < 0 else sum(later) / len(later))
            norm += weight
    assert (floors >= 0).any()
    assert got.item() == pytest.approx(total / norm, rel=1e-6)  # the years' shares are stored in float32


def test_training_repeats_bit_for_bit_and_saves_what_it_trained(script: ModuleType, tmp_path: Path) -> None:
    first, second = script.train(seed=3, steps=4), script.train(seed=3, steps=4)
    ids = micro_gpt2_tokens(2)
    with torch.no_grad():
        trained = first(ids).logits
    digests = [script.save(made, tmp_path / name) for made, name in ((first, "a"), (second, "b"))]
    assert digests[0] == digests[1]
    with torch.no_grad():
        # The saved configuration names the other form of the same activation function.
        torch.testing.assert_close(script.load(tmp_path / "a")(ids).logits, trained, atol=1e-4, rtol=0)
