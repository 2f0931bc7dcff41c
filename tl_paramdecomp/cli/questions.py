"""What a command asks about: a task by name or file, or one prompt with its answer as a task of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.next_tokens import next_token_probs
from tl_paramdecomp.analysis.tasks.makers import TASKS, make_task
from tl_paramdecomp.analysis.tasks.task import Task, load_task
from tl_paramdecomp.cli.models import EMBEDDED, tokenizer_of
from tl_paramdecomp.cli.report import prompt_tokens
from tl_paramdecomp.data.prompt_tokens import prompt_tokenizer
from tl_paramdecomp.errors import SettingError, TokenizerTaskError

SHOWN = 2
"""Different tokens that are shown of one position of a task's prompts."""


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, a task, or both, as the options name them.

    Raises:
        SettingError: Neither, or options of one beside the other alone.
    """

    model_name: str
    model: Any
    prompt: str | None = None
    task: str | None = None
    answers: Sequence[str] = ()
    wrong: Sequence[str] = ()
    corrupt_prompt: str | None = None
    prompts: int = 64
    seed: int = 0
    split: str | None = None

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
        return tokenizer_of(self.model_name, self.model)

    def prompt_task(self) -> Task | None:
        """The prompt as a task of its own."""
        if self.prompt is None:
            return None
        return prompt_as_task(
            self.prompt, self.model_name, self.model, self.answers, self.wrong, self.corrupt_prompt
        )  # fmt: skip

    def task_and_words(self) -> tuple[Task, str] | None:
        """The task, and where its prompts come from."""
        if self.task is None:
            return None
        return task_named(self.task, self.model_name, self.model, self.prompts, self.seed, self.split)

    def only(self) -> tuple[Task, str]:
        """The one task or the one prompt, and in words what it is.

        Raises:
            SettingError: Both are given.
        """
        if self.prompt is not None and self.task is not None:
            raise SettingError("Give --prompt or --task, not both.")
        found = self.task_and_words()
        if found is not None:
            return found[0], task_in_words(*found)
        task = self.prompt_task()
        assert task is not None
        whose = "" if self.answers else " (the model's own likeliest next token)"
        return task, f"{self.prompt} … {answers_in_words(task, self.tokenizer)}{whose}"


def task_in_words(task: Task, whence: str) -> str:
    """Name, size, and where the prompts come from."""
    return f"{task.name}: {count(len(task), 'prompt')}, {whence}"


def count(n: int, what: str) -> str:
    """A number of things in words."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def task_named(
    name: str, model_name: str, model: Any, n: int, seed: int = 0, split: str | None = None
) -> tuple[Task, str]:
    """A task by name or file, on the model's device, and in words where its prompts come from.

    Raises:
        SettingError: No such task, fewer than one prompt, or a split of a file.
        TaskError, DecompositionFileError: As `load_task`.
    """
    source, device = _writer_source(model_name, model), adapt(model).device
    if n < 1:
        raise SettingError(f"--prompts is at least 1; given {n}.")
    if name in TASKS or not is_file(name):
        task = make_task(name, source, n, seed, split or "test")
        return task.to(device), f"{split or 'test'} split, seed {seed}"
    if split is not None:
        raise SettingError(f"{name} is a file, and has no splits; leave --split out.")
    task = load_task(name, source)
    return task.select(slice(n)).to(device), f"of {name}"


def search_and_test(name: str, model_name: str, model: Any, n: int, seed: int) -> tuple[Task, Task, tuple[str, str]]:
    """Prompts to search on and others to measure on, and both in words: validation and test split, or a file's lines by
    turns.

    Raises:
        SettingError: A file of a single prompt.
        As `task_named`.
    """
    if name in TASKS or not is_file(name):
        found, _ = task_named(name, model_name, model, n, seed, "validation")
        held_out, _ = task_named(name, model_name, model, n, seed, "test")
        return found, held_out, (count(len(found), "validation prompt"), count(len(held_out), "test prompt"))
    task, _ = task_named(name, model_name, model, 2 * n)
    if len(task) < 2:
        raise SettingError(f"{name} holds one prompt; a circuit is searched on some prompts and measured on others.")
    found, held_out = task.select(slice(0, None, 2)), task.select(slice(1, None, 2))
    words = (count(len(found), "prompt") + " of the file (1st, 3rd ...)", f"{len(held_out)} others (2nd, 4th ...)")
    return found, held_out, words


def prompt_as_task(
    prompt: str,
    model_name: str,
    model: Any,
    answers: Sequence[str] = (),
    wrong: Sequence[str] = (),
    corrupt: str | None = None,
) -> Task:
    """One prompt as a task, on the model's device; without an answer, the model's likeliest next token is it.

    Raises:
        DataError: There is no tokenizer, or it cannot read the prompt.
        TaskError: Prompt and corrupt prompt differ in their number of tokens, or answers contradict the wrong ones.
        TokenizerTaskError: An answer is not one token.
    """
    tokenizer, adapter = tokenizer_of(model_name, model), adapt(model)
    tokens = prompt_tokens(tokenizer, prompt)
    if answers:
        right = [_next_token(model_name, model, prompt, text) for text in answers]
    else:
        right = [int(next_token_probs(model, tokens.to(adapter.device)).argmax())]
    task = Task.from_tokens(
        "prompt",
        [tokens[0]],
        [right],
        [[_next_token(model_name, model, prompt, text) for text in wrong]] if wrong else None,
        None if corrupt is None else [prompt_tokens(tokenizer, corrupt)[0]],
        texts=[prompt],
    )
    return task.to(adapter.device)


def is_file(name: str) -> bool:
    """Whether a task's name is meant as a file."""
    return Path(name).is_file() or Path(name).suffix != "" or len(Path(name).parts) > 1


def answers_in_words(task: Task, tokenizer: Any) -> str:
    """Answer and wrong tokens of a task's first prompt."""
    right, wrong = (_decoded(of, tokenizer) for of in (task.answers[0], task.wrong[0] if task.wrong else ()))
    return f"answer {right}" + (f", not {wrong}" if wrong else "")


def position_texts(task: Task, tokenizer: Any) -> list[str]:
    """What stands at each position: its token, or some of the tokens that prompts have there."""
    texts = []
    for p in range(task.clean.shape[1]):
        column = task.clean[:, p]
        if task.attention_mask is not None:
            column = column[task.attention_mask[:, p].bool()]
        different = list(dict.fromkeys(column.tolist()))
        words = ", ".join(token_text(token, tokenizer) for token in different[:SHOWN])
        texts.append(words + (", …" if len(different) > SHOWN else ""))
    return texts


def token_text(token: int, tokenizer: Any) -> str:
    """One token for people: in quotes where blanks would be lost; its number where there is no tokenizer."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.decode([token])
    return text if text and text == text.strip() and text.isprintable() else repr(text)


def _decoded(tokens: Sequence[int], tokenizer: Any) -> str:
    words = " or ".join(token_text(token, tokenizer) for token in islice(tokens, 3))
    return words + (" or …" if len(tokens) > 3 else "")


def _writer_source(model_name: str, model: Any) -> Any:
    """What tokenises a task's prompts: the model where it holds its tokenizer."""
    if model_name == EMBEDDED:
        return EMBEDDED
    return model if getattr(model, "tokenizer", None) is not None else tokenizer_of(model_name, model) or model


def _next_token(model_name: str, model: Any, prompt: str, text: str) -> int:
    """The token that a text adds behind a prompt; with a blank in front where it needs one."""
    writer = prompt_tokenizer(_writer_source(model_name, model))
    for tried in (text, f" {text}"):
        token = writer.next_token(prompt, tried)
        if token is not None:
            return token
    raise TokenizerTaskError(
        f"{text!r} is not one token behind the prompt; it is taken as it stands, so begin it with a blank (' John') where "
        "the tokenizer's words have one, or choose another."
    )
