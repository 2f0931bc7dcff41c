"""patch, attribute and circuit: what options do to the model, one JSON object, files that load, words for people."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tl_paramdecomp as tlpd
from tests.support.commands import command
from tl_paramdecomp.analysis.next_tokens import greedy_continuation
from tl_paramdecomp.analysis.tasks.metrics import mean_scores
from tl_paramdecomp.analysis.tasks.prompts import position_texts, search_and_test, task_named
from tl_paramdecomp.cli.app import app
from tl_paramdecomp.cli.causal_runs import Question
from tl_paramdecomp.cli.edits import Edits
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    DecompositionFileError,
    HeadIndexError,
    NoMatchingSiteError,
    SettingError,
    TaskError,
    TLParamDecompError,
    TokenizerTaskError,
)
from tl_paramdecomp.report.tables import ranges

PROMPT = "When Mary and John went to the store, John gave a ring to"
OTHER = "When Jane and Ben went to the store, Ivan gave a ring to"
W_O, W_OUT = "blocks.1.attn.W_O", "blocks.0.mlp.W_out"


@pytest.fixture(scope="module")
def model():
    return tlpd.load_micro_gpt2()


@pytest.fixture(scope="module")
def made(model):
    """Exact components: the delta component is rounding."""
    rows = tlpd.micro_gpt2_tokens(4, seed=1)
    return tlpd.decompose(model, [W_O, W_OUT], tlpd.SVD(training=None), rows, 0, progress=False)


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    return made.save(tmp_path_factory.mktemp("causal") / "dec")


@pytest.fixture
def ioi():
    return tlpd.make_task("ioi", "micro-gpt2", 6)


def run(*arguments, fails=None):
    """The command in this process: its output, or the error it ends with."""
    shown = CliRunner(env={"COLUMNS": "100"}).invoke(app, [*map(str, arguments)])
    if fails is not None:
        assert isinstance(shown.exception, fails), shown.output
        assert isinstance(shown.exception, TLParamDecompError)
        return str(shown.exception)
    assert shown.exit_code == 0, shown.exception or shown.output
    return shown.stdout


def one_object(*arguments):
    return json.loads(run(*arguments, "--json"))


def logits_of(model, task, hook=None, register=None):
    """Logits of all positions, with a torch hook where it is given along with a module's method that registers it."""
    handle = None if register is None else register(hook)
    try:
        with torch.no_grad():
            return model(task.clean, attention_mask=task.attention_mask).logits
    finally:
        if handle is not None:
            handle.remove()


def patched_logits(model, made, edits, task, **rows):
    with tlpd.patched_acts(model, made, edits.patches(model, made, **rows)):
        return logits_of(model, task)


def assert_same_where_real(found, wanted, task):
    real = torch.ones_like(task.clean) if task.attention_mask is None else task.attention_mask
    torch.testing.assert_close(found[real.bool()], wanted[real.bool()], rtol=0, atol=2e-4)


# --- patches ----------------------------------------------------------------------------------------------------------
def test_removing_is_what_masks_do(model, made, ioi):
    both = Edits(ablate=[f"{W_OUT}:1,3-5"], keep_only=[f"{W_O}:0-7"], positions=[2, 5])
    masks = made.masks().ablate(W_OUT, [1, 3, 4, 5], positions=[2, 5]).keep_only(W_O, range(8), positions=[2, 5])
    with tlpd.patched(model, made, masks):
        wanted = logits_of(model, ioi)
    assert_same_where_real(patched_logits(model, made, both, ioi), wanted, ioi)
    for zero in (Edits(scale=[f"{W_OUT}:1,3-5=0"]), Edits(set_to=[f"{W_OUT}:1,3-5=0"])):
        with tlpd.patched(model, made, made.masks().ablate(W_OUT, [1, 3, 4, 5])):
            wanted = logits_of(model, ioi)
        assert_same_where_real(patched_logits(model, made, zero, ioi), wanted, ioi)


def test_one_head_of_what_is_removed(model, made, ioi):
    with tlpd.patched(model, made, made.masks().ablate(W_O, [0, 2], head=1)):
        wanted = logits_of(model, ioi)
    assert_same_where_real(patched_logits(model, made, Edits(ablate=[f"{W_O}:0,2"], head=1), ioi), wanted, ioi)


def test_set_puts_a_value_in(model, made, ioi):
    """At one position of one prompt, twice the activation as a value and as a factor."""
    one = ioi.select([0])
    h = tlpd.component_acts(model, made, one.clean)[W_OUT][0, 4, 1].item()
    as_value = patched_logits(model, made, Edits(set_to=[f"{W_OUT}:1={2 * h}"], positions=[4]), one)
    as_factor = patched_logits(model, made, Edits(scale=[f"{W_OUT}:1=2"], positions=[4]), one)
    assert (as_value - logits_of(model, one)).abs().max() > 1e-3
    assert_same_where_real(as_value, as_factor, one)


def test_corrupt_components_and_delta_are_the_corrupt_output(model, made, ioi):
    module = model.transformer.h[0].mlp.c_proj
    kept = []
    with torch.no_grad():
        handle = module.register_forward_hook(lambda _, __, y: kept.append(y))
        model(ioi.corrupt, attention_mask=ioi.attention_mask)
        handle.remove()
    wanted = logits_of(model, ioi, lambda _, __, y: kept[0], module.register_forward_hook)
    corrupt = (ioi.corrupt, ioi.attention_mask)
    found = patched_logits(model, made, Edits(corrupt=[f"{W_OUT}:*"]), ioi, corrupt=corrupt)
    assert_same_where_real(found, wanted, ioi)


def test_mean_of_a_head_is_the_mean_of_what_it_hands_over(model, made, ioi):
    module, real = model.transformer.h[1].attn.c_proj, ioi.attention_mask.bool()
    width = 64 // model.config.n_head
    part = slice(2 * width, 3 * width)

    def averaged(_, args):
        x = args[0].clone()
        x[..., part] = x[..., part][real].mean(0)
        return (x,)

    wanted = logits_of(model, ioi, averaged, module.register_forward_pre_hook)
    rows = (ioi.clean, ioi.attention_mask)
    assert_same_where_real(
        patched_logits(model, made, Edits(mean=[f"{W_O}:*"], head=2), ioi, averaged=rows), wanted, ioi
    )
    whole = patched_logits(model, made, Edits(mean=[f"{W_O}:*"]), ioi, averaged=rows)
    part = slice(0, 64)
    assert_same_where_real(whole, logits_of(model, ioi, averaged, module.register_forward_pre_hook), ioi)


def test_delta_is_multiplied(model, ioi):
    """Without its only component and its delta component a site writes its bias."""
    site = tlpd.find_sites(model, W_OUT)[W_OUT]
    rough = tlpd.from_factors(model, {W_OUT: (torch.ones(site.d_in, 1), torch.ones(1, site.d_out))})
    module = model.transformer.h[0].mlp.c_proj
    wanted = logits_of(model, ioi, lambda _, __, y: module.bias.expand_as(y), module.register_forward_hook)
    found = patched_logits(model, rough, Edits(ablate=[f"{W_OUT}:0"], delta=[f"{W_OUT}=0"]), ioi)
    assert_same_where_real(found, wanted, ioi)
    with tlpd.patched(model, rough, rough.masks().keep_only(W_OUT, [0])):
        wanted = logits_of(model, ioi)
    assert_same_where_real(patched_logits(model, rough, Edits(keep_only=[f"{W_OUT}:0"]), ioi), wanted, ioi)


@pytest.mark.parametrize("edits, error", [
    (Edits(ablate=[W_OUT]), SettingError),
    (Edits(ablate=[f"{W_OUT}:x"]), SettingError),
    (Edits(ablate=[f"{W_OUT}:1-"]), SettingError),
    (Edits(ablate=[f"{W_OUT}:99"]), ComponentIndexError),
    (Edits(set_to=[f"{W_OUT}:1"]), SettingError),
    (Edits(scale=[f"{W_OUT}:1=much"]), SettingError),
    (Edits(delta=[W_OUT]), SettingError),
    (Edits(mean=[f"{W_OUT}:1"]), SettingError),
    (Edits(corrupt=[f"{W_OUT}:1"]), SettingError),
    (Edits(keep_only=[f"{W_O}:1"], head=0), SettingError),
    (Edits(ablate=[f"{W_OUT}:1"], head=0), HeadIndexError),
    (Edits(corrupt=["blocks.9.mlp.W_in:1"]), SettingError),
    (Edits(ablate=["blocks.9.mlp.W_in:1"]), NoMatchingSiteError),
])  # fmt: skip
def test_options_that_say_nothing_are_refused(model, made, edits, error):
    with pytest.raises(error):
        edits.patches(model, made)


def test_scores_are_those_of_the_logits(model, ioi):
    found, logits = mean_scores(model, ioi)
    last = logits_of(model, ioi)[torch.arange(6), ioi.last]
    torch.testing.assert_close(logits, last, rtol=0, atol=1e-4)
    right, wrong = ([ids[0] for ids in of] for of in (ioi.answers, ioi.wrong))
    rows = torch.arange(6)
    assert found["logit difference"] == pytest.approx((last[rows, right] - last[rows, wrong]).mean().item(), abs=1e-4)
    assert found["accuracy: answer likeliest"] == (last.argmax(-1) == torch.tensor(right)).double().mean().item()
    shifted, _ = mean_scores(model, ioi, logits.roll(1, 0))
    p, q = torch.softmax(last.roll(1, 0), -1), torch.log_softmax(last, -1)
    assert shifted["KL of the next token"] == pytest.approx((p * (p.log() - q)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("host", ["transformers", "transformer_bridge", "nnsight"])
def test_a_continuation_is_greedy(model, host):
    rows = tlpd.micro_gpt2_tokens(1, seed=2)[:, :8]
    wanted = rows
    with torch.no_grad():
        for _ in range(5):
            wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    assert greedy_continuation(tlpd.load_micro_gpt2(host), rows, 5) == wanted[0, 8:].tolist()
    with pytest.raises(SettingError, match="at most 56"):
        greedy_continuation(model, rows, 57)


def test_patch_of_a_prompt_and_a_task(saved, tmp_path):
    arguments = ("patch", "micro-gpt2", saved, "--prompt", PROMPT, "--task", "ioi", "--prompts", 4, "--set",
                 f"{W_O}:0=-8", "--generate", 3)  # fmt: skip
    found = one_object(*arguments, "--out", tmp_path / "new" / "found.json")
    assert found["before"][0][0] == "mary" != found["after"][0][0]
    assert found["generated"]["before"].split()[0] == "mary" != found["generated"]["after"].split()[0]
    scores = found["task"]
    assert scores["before"]["logit difference"] > scores["after"]["logit difference"]
    assert json.loads((tmp_path / "new" / "found.json").read_text())["task"] == scores
    shown = run(*arguments)
    assert (
        "4 prompts, test split" in shown and "KL of the next token" in shown and max(map(len, shown.split("\n"))) <= 100
    )


def test_corrupt_prompt_turns_the_answer(saved):
    what = ("--corrupt-prompt", OTHER, "--corrupt", f"{W_O}:*", "--corrupt", f"{W_OUT}:*", "--answer", "Mary")
    found = one_object("patch", "micro-gpt2", saved, "--prompt", PROMPT, *what)
    assert found["after"][0][0] != "mary" and found["task"]["after"]["answer probability"] < 0.5
    longer = run("patch", "micro-gpt2", saved, "--prompt", PROMPT, *what[:1], OTHER + " a", *what[2:], fails=TaskError)
    assert "15 tokens clean and 16 corrupt" in longer


def test_sweep_is_the_librarys(saved, made, model):
    what = ("--sweep", "--task", "ioi", "--prompts", 3, "--sites", W_O, "--direction", "denoising")
    found = one_object("patch", "micro-gpt2", saved, *what)
    task = tlpd.make_task("ioi", "micro-gpt2", 3)
    wanted = tlpd.sweep(model, made, task, tlpd.LogitDifference(), sites=W_O, direction="denoising", progress=False)
    assert list(found["effects"]) == [W_O] and found["value"] == "clean"
    assert found["effects"][W_O] == pytest.approx(wanted.effects[W_O], abs=1e-4)
    shown = run("patch", "micro-gpt2", saved, *what[:-2], "--top", 3, "--value", "0.5")
    assert "value 0.5" in shown and shown.split("By site")[0].count(f"│ {W_O} │") == 3


# --- attribute --------------------------------------------------------------------------------------------------------
def test_attribution_of_a_prompt_names_tokens(saved, made, model, tmp_path):
    what = ("attribute", "micro-gpt2", saved, "--prompt", PROMPT, "--answer", " Mary", "--wrong", "John", "--graph", 5)
    found = one_object(*what, "--out", tmp_path / "a.json", "--top", 4)
    asked = Question(model, PROMPT, answers=["mary"], wrong=["john"])
    wanted = tlpd.attribute(model, made, asked.only()[0], tlpd.LogitDifference())
    kept = tlpd.Attribution.load(tmp_path / "a.json")
    assert found["direction"] == "removal" and len(found["top"]) == 4
    for site in wanted.values:
        torch.testing.assert_close(kept.values[site], wanted.values[site], rtol=1e-3, atol=1e-5)
    words = ["<|endoftext|>", *PROMPT.lower().replace(",", " ,").split()]
    assert all(row["token"] == words[row["position"]] for row in found["top"])
    assert found["top"][0]["effect"] == pytest.approx(max((e.value for e in wanted.top(1)), key=abs), rel=1e-3)
    graph = tlpd.Graph.load(tmp_path / "a.graph.json")
    assert len(graph.nodes) == 5 and found["graph"]["kind"] == "prompt"
    shown = run(*what)
    assert "answer mary, not john" in shown and " to " in shown and max(map(len, shown.split("\n"))) <= 100


def test_attribution_of_a_task(saved):
    what = ("attribute", "micro-gpt2", saved, "--task", "ioi", "--prompts", 4, "--sites", W_O)
    summed = one_object(*what)
    assert summed["direction"] == "noising" and summed["top"][0]["position"] is None
    removed = one_object(*what, "--direction", "removal", "--graph", 2)
    assert removed["direction"] == "removal" and removed["graph"]["kind"] == "dataset"
    apart = one_object(*what, "--by-position", "--top", 1000000)
    total = sum(row["effect"] for row in apart["top"] if row["component"] is not None)
    assert total == pytest.approx(summed["sites"][W_O]["components"], abs=1e-3)
    assert "summed over positions" in run(*what)
    exact = one_object(
        "attribute", "micro-gpt2", saved, "--prompt", PROMPT, "--sites", W_O, "--method", "ablation", "--over-positions"
    )
    assert exact["method"] == "ablation" and "likeliest" in exact["question"]


def test_position_texts(ioi):
    tokenizer = tlpd.micro_gpt2_tokenizer()
    task = tlpd.Task.from_tokens("own", [[0, 9], [0, 5, 6], [0, 5, 7], [0, 5, 8]], [1] * 4)
    zero, five, six, seven, nine = (tokenizer.decode([t]) for t in (0, 5, 6, 7, 9))
    assert position_texts(task, tokenizer) == [zero, f"{nine}, {five}", f"{six}, {seven}, …"]
    assert position_texts(ioi, None)[0] == str(ioi.clean[0, 0].item())


# --- circuit and tasks ------------------------------------------------------------------------------------------------
def test_circuit_is_searched_and_measured_on_different_prompts(saved, tmp_path):
    what = ("circuit", "micro-gpt2", saved, "--task", "ioi", "--prompts", 4, "--faithfulness", 0.5, "--stochastic", 0)
    found = one_object(*what, "--out", tmp_path / "c.json")
    kept = tlpd.Circuit.load(tmp_path / "c.json")
    assert kept.components == found["components"] and "4 validation prompts" in found["question"]
    model = tlpd.load_micro_gpt2()
    again = tlpd.evaluate_circuit(
        model, tlpd.Decomposition.load(saved), tlpd.make_task("ioi", "micro-gpt2", 4), kept.components
    )
    assert again.faithfulness["ablated"] == pytest.approx(kept.faithfulness["ablated"], abs=1e-4)


def test_tasks_from_a_file(saved, model, tmp_path):
    path = tlpd.make_task("ioi", "micro-gpt2", 6, split="train").save(tmp_path / "own.jsonl")
    task, words = task_named(str(path), model, 4)
    assert (task.name, len(task)) == ("ioi", 4) and str(path) in words
    what = ("circuit", "micro-gpt2", saved, "--task", path, "--faithfulness", 0.5, "--stochastic", 0, "--prompts", 2)
    shown = run(*what)
    assert "2 prompts of the file" in shown and "Components of the circuit" in shown
    some, others, _ = search_and_test(str(path), model, 2, 0)
    assert torch.equal(torch.stack([some.clean, others.clean], 1).flatten(0, 1), task.clean)
    with pytest.raises(SettingError, match="no splits"):
        task_named(str(path), model, 4, split="test")
    with pytest.raises(DecompositionFileError):
        task_named(str(tmp_path / "none.jsonl"), model, 4)
    with pytest.raises(SettingError, match="Unknown task"):
        task_named("oio", model, 4)


@pytest.mark.parametrize("arguments, words", [
    (("patch", "--ablate", f"{W_O}:0"), "Nothing to ask about"),
    (("patch", "--prompt", PROMPT), "Nothing to patch"),
    (("patch", "--task", "ioi", "--answer", "mary", "--ablate", f"{W_O}:0"), "belong to a --prompt"),
    (("patch", "--task", "ioi", "--generate", 3, "--ablate", f"{W_O}:0"), "continues a --prompt"),
    (("patch", "--task", "ioi", "--sweep", "--ablate", f"{W_O}:0"), "leave other patches"),
    (("patch", "--task", "ioi", "--value", "mean", "--ablate", f"{W_O}:0"), "for a --sweep"),
    (("attribute", "--task", "ioi", "--prompt", PROMPT), "not both"),
    (("attribute", "--task", "ioi", "--prompts", 0), "at least 1"),
])  # fmt: skip
def test_options_that_do_not_go_together(saved, arguments, words):
    first, *rest = arguments
    assert words in run(first, "micro-gpt2", saved, *rest, fails=SettingError)


def test_an_answer_is_one_token(saved):
    assert "not one token" in run(
        "attribute", "micro-gpt2", saved, "--prompt", PROMPT, "--answer", "store to", fails=TokenizerTaskError
    )


def test_a_prompt_of_unknown_words(saved):
    assert "the qat" in run("attribute", "micro-gpt2", saved, "--prompt", "the qat", fails=DataError)


def test_ranges():
    assert ranges([7, 0, 1, 2, 9, 10]) == "0-2, 7, 9-10"


def test_what_a_host_prints_goes_to_standard_error(saved, monkeypatch):
    def loud(host):
        print("Moving model to device: cpu")
        return tlpd.load_micro_gpt2(host)

    monkeypatch.setattr("tl_paramdecomp.cli.models.load_micro_gpt2", loud)
    assert "prompt" in one_object("patch", "micro-gpt2", saved, "--prompt", PROMPT, "--ablate", f"{W_O}:0")


def test_as_a_user_runs_it(saved):
    """Bars are on standard error; errors are one line."""
    shown = command("patch", "micro-gpt2", saved, "--task", "ioi", "--prompts", 2, "--sweep", "--sites", W_O, "--json",
                    "--host", "hooked_transformer")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["prompts"] == 2 and "sweep" in shown.stderr
    refused = command("circuit", "micro-gpt2", saved, "--task", "ioi", "--prompts", 2, "--value", "median")
    assert refused.returncode == 1 and "expected one of 'zero'" in refused.stderr and "Traceback" not in refused.stderr
