"""Tasks as a user names them: a task of `makers`, a file of one, or a prompt with its answer as a task of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.next_tokens import next_token_probs
from tl_paramdecomp.analysis.tasks.makers import TASKS, make_task
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.data.tokenizer import RowTokenizer, prompt_tokenizer
from tl_paramdecomp.errors import DataError, SettingError, TokenizerTaskError

SHOWN = 2
"""Different tokens that are shown of one position of a task's prompts."""


def task_named(
    name: str, model: Any, n: int, seed: int = 0, split: str | None = None, decomposition: Any = None
) -> tuple[Task, str]:
    """A task by name, or by its file of JSON lines, on the model's device; and in words where its prompts come from."""
    device = adapt(model).device
    if n < 1:
        raise SettingError(f"--prompts is at least 1; given {n}.")
    if not is_file(name):
        task = make_task(name, model, n, seed, split or "test", decomposition=decomposition)
        return task.to(device), f"{split or 'test'} split, seed {seed}"
    if split is not None:
        raise SettingError(f"{name} is a file, and has no splits; leave --split out.")
    return load_task(name, model, decomposition=decomposition).select(slice(n)).to(device), f"of {name}"


def search_and_test(
    name: str, model: Any, n: int, seed: int, decomposition: Any = None
) -> tuple[Task, Task, tuple[str, str]]:
    """Prompts to search on and others to measure on, and both in words: validation and test, or a file's lines by turns."""
    if not is_file(name):
        (found, _), (held_out, _) = (
            task_named(name, model, n, seed, split, decomposition) for split in ("validation", "test")
        )
        return found, held_out, (count(len(found), "validation prompt"), count(len(held_out), "test prompt"))
    task, _ = task_named(name, model, 2 * n, decomposition=decomposition)
    if len(task) < 2:
        raise SettingError(f"{name} holds one prompt; a circuit is searched on some prompts and measured on others.")
    found, held_out = task.select(slice(0, None, 2)), task.select(slice(1, None, 2))
    words = (count(len(found), "prompt") + " of the file (1st, 3rd ...)", f"{len(held_out)} others (2nd, 4th ...)")
    return found, held_out, words


def is_file(name: str) -> bool:
    """Whether a task's name is meant as a file."""
    path = Path(name)
    return name not in TASKS and (path.is_file() or path.suffix != "" or len(path.parts) > 1)


def prompt_task(
    prompt: str,
    model: Any,
    answers: Sequence[str] = (),
    wrong: Sequence[str] = (),
    corrupt: str | None = None,
    decomposition: Any = None,
) -> Task:
    """One prompt as a task on the model's device; without an answer, the model's likeliest next token is it."""
    writer, device = prompt_tokenizer(model, decomposition=decomposition), adapt(model).device
    tokens = _row(writer, prompt)
    if answers:
        right = [_next_token(writer, prompt, text) for text in answers]
    else:
        right = [int(next_token_probs(model, tokens.unsqueeze(0).to(device)).argmax())]
    contrasts = [[_next_token(writer, prompt, text) for text in wrong]] if wrong else None
    others = None if corrupt is None else [_row(writer, corrupt)]
    return Task.from_tokens("prompt", [tokens], [right], contrasts, others, texts=[prompt]).to(device)


def _row(writer: RowTokenizer, prompt: str) -> Int[Tensor, " pos"]:
    """A prompt's tokens, behind what rows begin with."""
    ids = writer.tokens(prompt)
    if not ids:
        raise DataError("The prompt is empty.")
    start = list(writer.start)
    return torch.tensor(ids if ids[: len(start)] == start else start + ids)


def _next_token(writer: RowTokenizer, prompt: str, text: str) -> int:
    """The token that a text adds behind a prompt; with a blank in front where it needs one."""
    for tried in (text, f" {text}"):
        if (token := writer.next_token(prompt, tried)) is not None:
            return token
    raise TokenizerTaskError(
        f"{text!r} is not one token behind the prompt; it is taken as it stands, so begin it with a blank (' John') where "
        "the tokenizer's words have one, or choose another."
    )


# --- words ------------------------------------------------------------------------------------------------------------
def count(n: int, what: str) -> str:
    """A number of things in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def task_in_words(task: Task, whence: str) -> str:
    """Name, size, and where the prompts come from."""
    return f"{task.name}: {count(len(task), 'prompt')}, {whence}"


def answers_in_words(task: Task, tokenizer: Any) -> str:
    """Answer and wrong tokens of a task's first prompt."""
    right, wrong = (
        " or ".join([_text(token, tokenizer) for token in of[:3]] + ["…"] * (len(of) > 3))
        for of in (task.answers[0], task.wrong[0] if task.wrong else ())
    )
    return f"answer {right}" + (f", not {wrong}" if wrong else "")


def position_texts(task: Task, tokenizer: Any) -> list[str]:
    """What stands at each position: its token, or some of the tokens that prompts have there."""
    mask = torch.ones_like(task.clean) if task.attention_mask is None else task.attention_mask
    texts = []
    for column, real in zip(task.clean.T, mask.T.bool()):
        different = list(dict.fromkeys(column[real].tolist()))
        words = [_text(token, tokenizer) for token in different[:SHOWN]]
        texts.append(", ".join([*words, "…"] if len(different) > SHOWN else words))
    return texts


def _text(token: int, tokenizer: Any) -> str:
    """One token for people: in quotes where blanks would be lost; its number where there is no tokenizer."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token])
    return text if text and text == text.strip() and text.isprintable() else repr(text)
