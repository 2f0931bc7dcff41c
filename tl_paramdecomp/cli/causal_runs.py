"""What the causal commands ask: each takes a question and a decomposition, and gives an object, tables and lines."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_paramdecomp.analysis.circuits.circuit import find_circuit
from tl_paramdecomp.analysis.effects.attribution import attribute
from tl_paramdecomp.analysis.effects.edges import dataset_graph, prompt_graph
from tl_paramdecomp.analysis.effects.sweep import sweep
from tl_paramdecomp.analysis.next_tokens import greedy_continuation, next_token_kl, next_token_probs, top_tokens
from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.analysis.tasks import prompts as asking
from tl_paramdecomp.analysis.tasks.metrics import default_metric, mean_scores
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.cli.edits import Edits, Rows
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.disk import replace_text
from tl_paramdecomp.data.tokenizer import prompt_tokenizer
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.patching.act_patches import patched_acts
from tl_paramdecomp.report.tables import members_table, next_token_table, score_table

if TYPE_CHECKING:
    from rich.table import Table

SUMMED = "Prompts of several lengths or templates: effects are summed over positions (--by-position keeps them)."


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, a task, or both, as the options name them (else SettingError)."""

    model: Any
    prompt: str | None = None
    task: str | None = None
    answers: Sequence[str] = ()
    wrong: Sequence[str] = ()
    corrupt_prompt: str | None = None
    prompts: int = 64
    seed: int = 0
    split: str | None = None
    decomposition: Any = None  # prompts begin as the rows did that it was made on

    def __post_init__(self) -> None:
        if self.prompt is None and self.task is None:
            raise SettingError("Nothing to ask about: give --prompt TEXT, or --task NAME.")
        if self.prompt is None and (self.answers or self.wrong or self.corrupt_prompt is not None):
            raise SettingError("--answer, --wrong and --corrupt-prompt belong to a --prompt; a task brings its own.")
        if self.task is None and self.split is not None:
            raise SettingError("--split belongs to a --task.")

    @property
    def tokenizer(self) -> Any:
        """The model's; None where it has none."""
        return prompt_tokenizer(self.model).tokenizer

    def prompt_task(self) -> Task | None:
        """The prompt as a task of its own."""
        told = (self.model, self.answers, self.wrong, self.corrupt_prompt, self.decomposition)
        return None if self.prompt is None else asking.prompt_task(self.prompt, *told)

    def named_task(self) -> tuple[Task, str] | None:
        """The task, and in words what it is."""
        if self.task is None:
            return None
        task, whence = asking.task_named(self.task, self.model, self.prompts, self.seed, self.split, self.decomposition)
        return task, asking.task_in_words(task, whence)

    def only(self) -> tuple[Task, str]:
        """The one task or the one prompt (else SettingError), and in words what it is."""
        if self.prompt is not None and self.task is not None:
            raise SettingError("Give --prompt or --task, not both.")
        task = self.prompt_task()
        if task is None:
            found = self.named_task()
            assert found is not None
            return found
        whose = "" if self.answers else " (the model's own likeliest next token)"
        return task, f"{self.prompt} … {asking.answers_in_words(task, self.tokenizer)}{whose}"


@dataclass(eq=False)
class Found:
    """The answer to a command."""

    record: dict[str, Any] = field(default_factory=dict)  # one object that JSON can hold
    shown: "list[Table | str]" = field(default_factory=list)  # for people, in this order
    kept: Record | None = None  # what is written to a file in place of the object
    graph: Record | None = None  # written beside it

    def write(self, path: Path) -> list[Path]:
        """The files that are written."""
        if self.kept is None:
            replace_text(path, json.dumps(self.record, indent=1))
            return [path]
        files = [self.kept.save(path)]
        if self.graph is not None:
            files.append(self.graph.save(path.with_suffix(f".graph{path.suffix}")))
        return files


# --- patch ------------------------------------------------------------------------------------------------------------
def run_patch(asked: Question, decomposition: Decomposition, edits: Edits, generate: int | None, top: int) -> Found:
    """Next tokens and a continuation of a prompt, and scores of a task, of the model and of the model patched."""
    if generate is not None and asked.prompt is None:
        raise SettingError("--generate continues a --prompt; give one.")
    found, model = Found(), asked.model
    named, own = asked.named_task(), asked.prompt_task()
    if own is not None:
        averaged = _corrupt_rows(own) if named is None else (named[0].clean, named[0].attention_mask)
        patches = edits.patches(model, decomposition, _corrupt_rows(own), averaged)
        probs, texts = [], []
        for context in (contextlib.nullcontext(), patched_acts(model, decomposition, patches)):
            with context:
                probs.append(next_token_probs(model, own.clean))
                texts += [] if generate is None else [_continued(asked, own, generate)]
        before, after = (top_tokens(p, asked.tokenizer, top) for p in probs)
        kl = next_token_kl(*probs)
        found.record |= {"prompt": asked.prompt, "kl": kl, "before": before, "after": after}
        found.shown += [f"{asked.prompt} …", next_token_table({"model": before, "patched": after})]
        found.shown.append(f"KL of the next token: {kl:.4f} nats")
        if texts:
            found.record["generated"] = dict(zip(("before", "after"), texts))
            found.shown += [f"model:    …{texts[0]}", f"patched:  …{texts[1]}"]
    if named is not None:
        _add_scores(found, model, decomposition, edits, *named)
    elif own is not None and asked.answers:
        _add_scores(found, model, decomposition, edits, own, asking.answers_in_words(own, asked.tokenizer))
    return found


def _add_scores(found: Found, model: Any, decomposition: Decomposition, edits: Edits, task: Task, words: str) -> None:
    before, logits = mean_scores(model, task)
    patches = edits.patches(model, decomposition, _corrupt_rows(task), (task.clean, task.attention_mask))
    with patched_acts(model, decomposition, patches):
        after, _ = mean_scores(model, task, logits)
    found.record["task"] = {"name": task.name, "prompts": len(task), "from": words, "before": before, "after": after}
    found.shown.append(score_table(words, before, after))


def _corrupt_rows(task: Task) -> Rows | None:
    return None if task.corrupt is None else (task.corrupt, task.attention_mask)


def _continued(asked: Question, task: Task, n: int) -> str:
    text = asked.tokenizer.decode(greedy_continuation(asked.model, task.clean, n))
    return text if text.startswith(" ") else f" {text}"


def run_sweep(asked: Question, decomposition: Decomposition, value: str | None, top: int, **settings: Any) -> Found:
    """The effect of each component by itself, with it minus without it. Settings and errors as `sweep`'s."""
    task, words = asked.only()
    put: Any = value
    with contextlib.suppress(ValueError, TypeError):
        put = float(value)  # type: ignore[arg-type]
    made = sweep(asked.model, decomposition, task, default_metric(task), value=put, seed=asked.seed, **settings)
    shown = [words, *made.tables(top), *made.footnotes()]
    return Found({"question": words, **dataclasses.asdict(made)}, shown, made)


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
    """The components and positions that do most for an answer, and the direct effects between them."""
    task, words = asked.only()
    texts = asking.position_texts(task, asked.tokenizer)
    if direction == "removal":
        task = dataclasses.replace(task, corrupt=None)
    alike = task.attention_mask is None and len(set(task.groups)) < 2
    by_position = alike if by_position is None else by_position
    towards: Any = "noising" if direction in (None, "removal") else direction
    model, metric = asked.model, default_metric(task)
    made = attribute(
        model, decomposition, task, metric, method=method, direction=towards, sites=sites, by_position=by_position
    )
    strongest = [
        {
            "site": e.site, "component": e.component, "position": e.position,
            "token": None if e.position is None else texts[e.position], "effect": e.value,
        }
        for e in made.top(top, delta=True)
    ]  # fmt: skip
    of_sites = {
        site: {"components": values.mean(0).sum().item(), "delta": made.delta[site].mean(0).sum().item()}
        for site, values in made.values.items()
    }
    found = Found(kept=made, shown=[words])
    found.record = {
        "question": words, "method": made.method, "metric": made.metric, "direction": made.direction,
        "prompts": len(task), "clean": made.clean, "corrupt": made.corrupt, "top": strongest, "sites": of_sites,
    }  # fmt: skip
    found.shown += [*made.tables(top, texts if by_position else ()), *made.footnotes()]
    if not by_position and not alike:
        found.shown.append(SUMMED)
    if nodes is not None:
        graph_of = prompt_graph if len(task) == 1 else dataset_graph
        found.graph = graph = graph_of(model, decomposition, task, metric, nodes=nodes, sites=sites)
        found.record["graph"] = dataclasses.asdict(graph)
        found.shown += [*graph.tables(top, texts)[1:], *graph.footnotes()]
    return found


def run_circuit(asked: Question, decomposition: Decomposition, faithfulness: float, **settings: Any) -> Found:
    """A task's circuit, searched and measured on different prompts. Settings and errors as `find_circuit`'s."""
    assert asked.task is not None
    model, seed = asked.model, asked.seed
    task, held_out, (searched, measured) = asking.search_and_test(asked.task, model, asked.prompts, seed, decomposition)
    settings |= {"faithfulness": faithfulness, "held_out": held_out, "seed": seed}
    made = find_circuit(model, decomposition, task, **settings)
    stochastic = settings["stochastic"]
    wanted = f"faithfulness {faithfulness:g}" + ("" if stochastic is None else f" (stochastic {stochastic:g})")
    words = f"Searched for {wanted} on {searched}, measured on {measured}."
    sizes = {name: components.n_components for name, components in decomposition.items()}
    shown = [*made.tables(), members_table(made.components, sizes), *made.footnotes(), words]
    return Found(dataclasses.asdict(made) | {"question": words}, shown, made)
