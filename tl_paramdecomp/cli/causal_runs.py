"""What the causal commands find out: each takes a question and a decomposition, and gives an object, tables and lines."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.lens import LensAdapter
from tl_paramdecomp.analysis.circuits.circuit import find_circuit
from tl_paramdecomp.analysis.effects.attribution import attribute
from tl_paramdecomp.analysis.effects.edges import dataset_graph, prompt_graph
from tl_paramdecomp.analysis.effects.sweep import sweep
from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.analysis.tasks.metrics import (
    AnswerProbability,
    AnswerRank,
    KLToClean,
    ProbabilityDifference,
    answer_logits,
    default_metric,
)
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.cli.edits import Edits, Rows
from tl_paramdecomp.cli.effects import (
    edge_table,
    effect_rows,
    effect_table,
    members_table,
    next_token_columns,
    score_table,
)
from tl_paramdecomp.cli.questions import Question, answers_in_words, position_texts, search_and_test, task_in_words
from tl_paramdecomp.cli.report import next_token_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.disk import replace_text
from tl_paramdecomp.data.prompt_tokens import context_of
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.patching.act_patches import patched_acts

if TYPE_CHECKING:
    from rich.table import Table

OVER_POSITIONS = (
    "Prompts of several lengths or templates: effects are summed over positions (--by-position keeps them)."
)


@dataclass(eq=False)
class Found:
    """The answer to a command."""

    record: dict[str, Any] = field(default_factory=dict)
    """One object that JSON can hold."""
    shown: "list[Table | str]" = field(default_factory=list)
    """For people, in this order."""
    kept: Record | None = None
    """What is written to a file in place of the object."""
    graph: Record | None = None
    """Written beside it."""

    def show(self, record: Record, tables: "Sequence[Table] | None" = None) -> None:
        """Add a record's tables and the lines below them."""
        self.shown += [*(record.tables() if tables is None else tables), *record.footnotes()]


# --- patch ------------------------------------------------------------------------------------------------------------
def run_patch(asked: Question, decomposition: Decomposition, edits: Edits, generate: int | None, top: int) -> Found:
    """Next tokens and a continuation of a prompt, and scores of a task, of the model and of the model patched.

    Raises:
        SettingError: A continuation without a prompt, or as `Edits.patches`.
    """
    if generate is not None and asked.prompt is None:
        raise SettingError("--generate continues a --prompt; give one.")
    found, model = Found(), asked.model
    task, own = asked.task_and_words(), asked.prompt_task()
    if own is not None:
        averaged = _corrupt_rows(own) if task is None else (task[0].clean, task[0].attention_mask)
        patches = edits.patches(model, decomposition, _corrupt_rows(own), averaged)
        rows = next_token_table(model, decomposition, patches, asked.tokenizer, own.clean, top)
        found.record |= {"prompt": asked.prompt, "kl": rows.kl, "before": rows.before, "after": rows.after}
        found.shown += [f"{asked.prompt} …", next_token_columns({"model": rows.before, "patched": rows.after})]
        found.shown.append(f"KL of the next token: {rows.kl:.4f} nats")
        if generate is not None:
            texts = {"before": _continued(asked, own, generate)}
            with patched_acts(model, decomposition, patches):
                texts["after"] = _continued(asked, own, generate)
            found.record["generated"] = texts
            found.shown += [f"model:    …{texts['before']}", f"patched:  …{texts['after']}"]
    if task is not None:
        _add_scores(found, model, decomposition, edits, task[0], task_in_words(*task))
    elif own is not None and asked.answers:
        _add_scores(found, model, decomposition, edits, own, answers_in_words(own, asked.tokenizer))
    return found


def _add_scores(found: Found, model: Any, decomposition: Decomposition, edits: Edits, task: Task, words: str) -> None:
    before, logits = task_scores(model, task)
    patches = edits.patches(model, decomposition, _corrupt_rows(task), (task.clean, task.attention_mask))
    with patched_acts(model, decomposition, patches):
        after, _ = task_scores(model, task, logits)
    found.record["task"] = {
        "name": task.name, "prompts": len(task), "from": words, "before": before, "after": after
    }  # fmt: skip
    found.shown.append(score_table(words, before, after))


def _corrupt_rows(task: Task) -> Rows | None:
    return None if task.corrupt is None else (task.corrupt, task.attention_mask)


def _continued(asked: Question, task: Task, n: int) -> str:
    text = asked.tokenizer.decode(greedy_continuation(asked.model, task.clean, n))
    return text if text.startswith(" ") else f" {text}"


def greedy_continuation(model: Any, tokens: Int[Tensor, "1 pos"], n: int) -> list[int]:
    """The likeliest next tokens one after the other, of the model as it stands, by the host's own `generate`, which ends
    at the end of a text.

    Raises:
        SettingError: Less than one token, or more than the model's context has room for.
    """
    adapter = adapt(model)
    room, length = context_of(adapter.root), tokens.shape[1]
    if n < 1 or (room is not None and length + n > room):
        raise SettingError(
            "--generate is at least 1" + ("" if room is None else f", and at most {room - length} behind this prompt")
            + f"; given {n}."
        )  # fmt: skip
    with torch.no_grad():
        if isinstance(adapter, LensAdapter):
            ends = adapter.model.tokenizer is not None
            quiet = {"do_sample": False, "verbose": False, "stop_at_eos": ends, "return_type": "tokens"}
            out = adapter.model.generate(tokens, max_new_tokens=n, prepend_bos=False, **quiet)
        else:
            settings = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
            out = adapter.root.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)  # type: ignore[operator]
    return out[0, length:].tolist()


def task_scores(
    model: Any, task: Task, unpatched: Float[Tensor, "n vocab"] | None = None
) -> tuple[dict[str, float], Float[Tensor, "n vocab"]]:
    """Scores of a task, of the model as it stands, as means over prompts; and the logits that they are of.

    Args:
        model: On any host.
        task: On the model's device.
        unpatched: Logits of the model itself, to give the KL from them.
    """
    logits = answer_logits(model, task, batch_size=len(task))
    metric = default_metric(task)
    found = {metric.name: metric(logits, task), AnswerProbability.name: AnswerProbability()(logits, task)}
    found["accuracy: answer likeliest"] = (AnswerRank()(logits, task) == 0).double()
    if task.wrong:
        found["accuracy: answer above wrong"] = (ProbabilityDifference()(logits, task) > 0).double()
    if unpatched is not None:
        found["KL of the next token"] = KLToClean(unpatched)(logits, task)
    return {name: values.mean().item() for name, values in found.items()}, logits


def run_sweep(
    asked: Question,
    decomposition: Decomposition,
    sites: Sequence[str] | None,
    value: str | None,
    direction: Any,
    positions: Sequence[int] | None,
    top: int,
) -> Found:
    """The effect of each component by itself, with it minus without it. Arguments and errors as `sweep`'s."""
    task, words = asked.only()
    made = sweep(
        asked.model, decomposition, task, default_metric(task), sites=sites, value=_value(value), direction=direction,
        positions=positions, seed=asked.seed,
    )  # fmt: skip
    found = Found({"question": words, **dataclasses.asdict(made)}, [words], made)
    found.show(made, made.tables(top))
    return found


def _value(given: str | None) -> Any:
    """What a sweep puts in: a word, or a number."""
    try:
        return given if given is None else float(given)
    except ValueError:
        return given


# --- attribute, circuit -----------------------------------------------------------------------------------------------
def run_attribute(
    asked: Question,
    decomposition: Decomposition,
    method: Any,
    direction: str | None,
    sites: Sequence[str] | None,
    by_position: bool | None,
    nodes: int | None,
    top: int,
) -> Found:
    """The components and positions that do most for an answer, and the direct effects between them.

    Raises:
        SettingError: Nothing to compare with where a direction needs it, or as `attribute`, `prompt_graph`.
    """
    task, words = asked.only()
    texts = position_texts(task, asked.tokenizer)
    if direction == "removal":
        task = dataclasses.replace(task, corrupt=None)
    alike = task.attention_mask is None and len(set(task.groups)) < 2
    by_position = alike if by_position is None else by_position
    towards = "noising" if direction in (None, "removal") else direction
    made = attribute(
        asked.model, decomposition, task, default_metric(task), method=method, direction=towards, sites=sites,  # type: ignore[arg-type]
        by_position=by_position,
    )  # fmt: skip
    rows, sums = effect_rows(made, top, texts), made.tables()[1]
    of_sites = {
        site: {"components": values.mean(0).sum().item(), "delta": made.delta[site].mean(0).sum().item()}
        for site, values in made.values.items()
    }
    found = Found(kept=made)
    found.record = {
        "question": words, "method": made.method, "metric": made.metric, "direction": made.direction,
        "prompts": len(task), "clean": made.clean, "corrupt": made.corrupt, "top": rows, "sites": of_sites,
    }  # fmt: skip
    found.shown.append(words)
    found.show(made, [effect_table(made, rows), sums])
    if not by_position and not alike:
        found.shown.append(OVER_POSITIONS)
    if nodes is not None:
        _add_graph(found, asked.model, decomposition, task, sites, nodes, top, texts)
    return found


def _add_graph(
    found: Found,
    model: Any,
    decomposition: Decomposition,
    task: Task,
    sites: Sequence[str] | None,
    nodes: int,
    top: int,
    texts: Sequence[str],
) -> None:
    of = prompt_graph if len(task) == 1 else dataset_graph
    graph = of(model, decomposition, task, default_metric(task), nodes=nodes, sites=sites)
    found.graph = graph
    found.record["graph"] = dataclasses.asdict(graph)
    found.show(graph, [edge_table(graph, top, texts)])


def run_circuit(
    asked: Question, decomposition: Decomposition, method: Any, faithfulness: float, stochastic: float | None,
    value: Any, delta: float,
) -> Found:  # fmt: skip
    """A task's circuit, searched and measured on different prompts. Arguments and errors as `find_circuit`'s."""
    assert asked.task is not None
    task, held_out, (searched, measured) = search_and_test(
        asked.task, asked.model_name, asked.model, asked.prompts, asked.seed
    )
    made = find_circuit(
        asked.model, decomposition, task, method=method, faithfulness=faithfulness, stochastic=stochastic, value=value,
        delta=delta, held_out=held_out, seed=asked.seed,
    )  # fmt: skip
    wanted = f"faithfulness {faithfulness:g}" + ("" if stochastic is None else f" (stochastic {stochastic:g})")
    words = f"Searched for {wanted} on {searched}, measured on {measured}."
    found = Found(dataclasses.asdict(made), kept=made)
    sizes = {name: components.n_components for name, components in decomposition.items()}
    found.show(made, [*made.tables(), members_table(made.components, sizes)])
    found.shown.append(words)
    found.record["question"] = words
    return found


def written(found: Found, path: Path) -> list[Path]:
    """Write an answer; the files that were written."""
    if found.kept is None:
        replace_text(path, json.dumps(found.record, indent=1))
        return [path]
    files = [found.kept.save(path)]
    if found.graph is not None:
        files.append(found.graph.save(path.with_suffix(f".graph{path.suffix}")))
    return files
