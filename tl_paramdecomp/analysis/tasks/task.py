"""A task: prompts that end right before the token that solves them, with right and wrong tokens and corrupt counterparts.

The pairing of clean and corrupt prompts, token by token, is what activation patching and its gradient approximations work
on (Zhang and Nanda, "Towards best practices of activation patching in language models", arXiv 2309.16042).
"""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_paramdecomp.components.disk import parse_json, read_text, replace_text
from tl_paramdecomp.data.batch import SMALL_INTEGERS
from tl_paramdecomp.data.tokenizer import RowTokenizer, prompt_tokenizer
from tl_paramdecomp.errors import DecompositionFileError, DtypeError, ShapeError, TaskError, TokenizerTaskError
from tl_paramdecomp.sites import check_rows

LARGEST = 1 << 27
"""Bytes of a task's file that are written or read at most: 128 MiB."""
CHECKSUM = '{"checksum": '
"""How the last line of a saved task begins; a file written by hand has none."""
TENSORS = ("clean", "corrupt", "attention_mask")
FIELDS = ("clean", "answer", "corrupt", "wrong", "text", "group", "task")
"""What a line of a task's file may hold; the first two are needed."""


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts of one task. Everything is checked when it is made.

    Raises:
        DtypeError, ShapeError: Prompts are no token rows, or those that belong together differ in shape.
        TaskError: Answers are missing, contradict the wrong tokens or are no token ids, or padding is not on the right.
    """

    name: str
    """In results."""
    clean: Int[Tensor, "n pos"]
    """Prompts, padded on the right to one length."""
    corrupt: Int[Tensor, "n pos"] | None
    """The same task asked of other content, aligned token by token with `clean`."""
    attention_mask: Int[Tensor, "n pos"] | None
    """1 at tokens, 0 at padding; of clean and corrupt alike. None where no prompt is padded."""
    answers: tuple[tuple[int, ...], ...]
    """Right next tokens of each prompt."""
    wrong: tuple[tuple[int, ...], ...] = ()
    """Tokens to contrast them with, for every prompt; () where the task has none."""
    texts: tuple[str, ...] = ()
    """The clean prompts, for people."""
    groups: tuple[str, ...] = ()
    """Template of each prompt, to give results as a spread over them."""

    def __post_init__(self) -> None:
        _check_prompts(self.name, self.clean, self.corrupt, self.attention_mask)
        self._check_answers()
        for what, listed in (("texts", self.texts), ("groups", self.groups)):
            if len(listed) not in (0, len(self)):
                raise TaskError(
                    f"Task {self.name!r} has {len(self)} prompts and {len(listed)} {what}; give one for each."
                )

    @classmethod
    def from_tokens(
        cls,
        name: str,
        clean: Any,
        answers: Sequence[Any],
        wrong: Sequence[Any] | None = None,
        corrupt: Any = None,
        *,
        attention_mask: Any = None,
        texts: Sequence[str] = (),
        groups: Sequence[str] = (),
        pad_token: int = 0,
    ) -> "Task":
        """A task from token ids.

        Args:
            clean: Prompts: a tensor [n, pos], or a list of rows (lists or tensors) that may differ in length.
            answers: Right next tokens of each prompt: a token, or several.
            wrong: Tokens to contrast them with, likewise; None: none.
            corrupt: A counterpart of each prompt, of the same length; None: none.
            attention_mask: [n, pos], 1 at tokens and 0 at padding on the right, for a tensor of padded prompts.
            texts: The prompts, for people.
            groups: The template of each prompt.
            pad_token: Token that stands at padding; a causal model never sees it.

        Raises:
            DtypeError, ShapeError: Prompts are no token rows, or those that belong together differ in shape.
            TaskError: A prompt and its counterpart differ in length, or as `Task`.
        """
        given_for = {"prompts": clean, "answers": answers, "wrong tokens": wrong, "corrupt prompts": corrupt}
        for what, given in given_for.items():
            if not hasattr(given, "__len__") and not (given is None and what.startswith(("wrong", "corrupt"))):
                raise TaskError(f"Task {name!r}: {what} are one entry for each prompt; given {given!r}.")
        rows, mask = _padded(name, clean, pad_token)
        if attention_mask is not None:
            if mask is not None:
                raise TaskError(f"Task {name!r}: rows of different lengths are padded here; leave attention_mask out.")
            check_rows(rows, attention_mask)
            mask = None if bool(attention_mask.bool().all()) else attention_mask.long()
        others = None
        if corrupt is not None:
            _check_lengths(name, clean, corrupt)
            others, _ = _padded(name, corrupt, pad_token)
        _check_prompts(name, rows, others, mask)
        some = tuple(_ids(name, "wrong tokens", of) for of in wrong or ())
        return cls(
            name=name,
            clean=rows,
            corrupt=others,
            attention_mask=mask,
            answers=tuple(_ids(name, "answers", of) for of in answers),
            wrong=some if any(some) else (),
            texts=tuple(texts),
            groups=tuple(groups),
        )

    def _check_answers(self) -> None:
        if len(self.answers) != len(self) or len(self.wrong) not in (0, len(self)):
            raise TaskError(
                f"Task {self.name!r} has {len(self)} prompts, {len(self.answers)} sets of answers and {len(self.wrong)} of "
                "wrong tokens; give one set for each prompt (wrong ones may be left out for all)."
            )
        for i, (answers, wrong) in enumerate(zip(self.answers, self.wrong or ((),) * len(self))):
            both = answers + wrong
            if not answers:
                problem = "has no answer"
            elif self.wrong and not wrong:
                problem = "has no wrong tokens, and others have; give all some or none"
            elif min(both) < 0:
                problem = f"names {min(both)}, and {min(both)} is no token id"
            elif len(set(both)) != len(both):
                problem = f"names a token twice among its answers {[*answers][:8]} and wrong tokens {[*wrong][:8]}"
            else:
                continue
            raise TaskError(f"Prompt {i} of task {self.name!r} {problem}.")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def last(self) -> Int[Tensor, " n"]:
        """Position of each prompt whose logits answer: its last token's."""
        if self.attention_mask is None:
            return torch.full((len(self),), self.clean.shape[1] - 1, device=self.clean.device)
        return self.attention_mask.sum(1) - 1

    def at_answer(self, rows: Float[Tensor, "n pos width"]) -> Float[Tensor, "n width"]:
        """What stands at the answering positions, of logits or other values [n, pos, width].

        Raises:
            ShapeError: These are not the task's rows.
        """
        if rows.shape[:2] != self.clean.shape:
            raise ShapeError(
                f"Task {self.name!r} has prompts {list(self.clean.shape)}; given values {list(rows.shape)}. For some of the "
                "prompts: task.select(rows).at_answer(...)."
            )
        return rows[torch.arange(len(self), device=rows.device), self.last.to(rows.device)]

    def select(self, rows: Any) -> "Task":
        """Some of the prompts, at their positions: the padded length stays.

        Args:
            rows: A slice, a list of indices, or a tensor of indices or booleans.

        Raises:
            TaskError: No prompt is left, or there is no such prompt.
        """
        everything = torch.arange(len(self))
        try:
            index = everything[rows if isinstance(rows, slice) else torch.as_tensor(rows).cpu()].reshape(-1)
            if not len(index):
                raise IndexError("no prompt is left")
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise TaskError(
                f"Task {self.name!r} has {len(self)} prompts; {rows!r} selects none of them ({error})."
            ) from error
        places = index.tolist()
        index = index.to(self.clean.device)
        kept: dict[str, Any] = {f: None if getattr(self, f) is None else getattr(self, f)[index] for f in TENSORS}
        if kept["attention_mask"] is not None and bool(kept["attention_mask"].bool().all()):
            kept["attention_mask"] = None
        lists = ("answers", "wrong", "texts", "groups")
        kept |= {f: tuple(of[i] for i in places) if (of := getattr(self, f)) else () for f in lists}
        return dataclasses.replace(self, **kept)

    def to(self, device: torch.device | str) -> "Task":
        """The task with its tensors on a device."""
        moved = {f: None if getattr(self, f) is None else getattr(self, f).to(device) for f in TENSORS}
        return dataclasses.replace(self, **moved)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON lines of token ids, one for each prompt, that `load_task` reads back; whole or not at all. The last
        line holds the sha256 of those before.

        Raises:
            DecompositionFileError: It cannot be written there, or is larger than is read again.
            DiskSpaceError: There is no room.
        """
        path, lines, others = Path(path), [], {"wrong": self.wrong, "text": self.texts, "group": self.groups}
        for i, length in enumerate((self.last + 1).tolist()):
            line = {"task": self.name, "clean": self.clean[i, :length].tolist()}
            line |= {} if self.corrupt is None else {"corrupt": self.corrupt[i, :length].tolist()}
            line |= {"answer": self.answers[i]} | {field: of[i] for field, of in others.items() if of}
            lines.append(json.dumps(line, ensure_ascii=False))
        text = _sealed("\n".join(lines) + "\n")
        if len(text.encode("utf-8", errors="replace")) > LARGEST:
            raise DecompositionFileError(
                f"{path} would have more than {LARGEST} bytes, which are not read again; save less."
            )
        replace_text(path, text)
        return path


def load_task(
    path: str | Path,
    tokenizer_or_model: Any = None,
    *,
    name: str | None = None,
    prepend_bos: bool | None = None,
    decomposition: Any = None,
) -> Task:
    """A task from a file of JSON lines.

    A line is `{"clean": ..., "corrupt": ..., "answer": ..., "wrong": ...}`, of which "corrupt" and "wrong" may be left out,
    and perhaps "text", "group" and "task" (its name). Prompts are texts, or lists of token ids, which are taken as they
    are. Answers and wrong tokens are a text or a token id, or a list of them; a text is what follows the prompt letter by
    letter, so that for most tokenizers it begins with a space (" John"), and it must add exactly one token. A file that
    `Task.save` wrote ends with its checksum; take that line away to edit the file.

    Args:
        tokenizer_or_model: What tokenises: a tokenizer, a model that holds one, or "micro-gpt2". None where the file holds
            token ids alone.
        name: The task's name; None: the file's "task", or the file's own name.
        prepend_bos: Whether texts get the beginning-of-sequence token in front. None: as the rows did that the decomposition
            was made on; else always for micro-gpt2, as HookedTransformer's and TransformerBridge's `cfg.default_prepend_bos`
            says, and otherwise where the tokenizer itself puts it there.
        decomposition: Whose rows the prompts are to be like.

    Raises:
        DecompositionFileError: There is no such file, or it is too large, or not as it was saved.
        TaskError: The file is empty or no JSON lines, a field is missing or unknown, a prompt and its counterpart differ in
            length, or only some of the lines have a counterpart or wrong tokens.
        TokenizerTaskError: An answer is not one token, or the tokenizer cannot write a text.
        SettingError: `tokenizer_or_model` is neither.
    """
    path = Path(path)
    lines = _read_lines(path)
    writer = None if tokenizer_or_model is None else prompt_tokenizer(tokenizer_or_model, prepend_bos, decomposition)
    for field in ("corrupt", "wrong", "text", "group"):
        having = [where for where, line in lines if field in line]
        if 0 < len(having) < len(lines):
            missing = next(where for where, line in lines if field not in line)
            raise TaskError(f"{missing} has no {field!r}, and {having[0]} has; give it on every line or on none.")
    fields = lines[0][1]
    named = {line["task"] for _, line in lines if "task" in line}
    if name is None and len(named) > 1:
        raise TaskError(
            f"{path} holds lines of several tasks ({', '.join(sorted(map(str, named)))}); load_task(name=...)."
        )
    texts = [line.get("text", line["clean"]) for _, line in lines]
    clean, corrupt, answers, wrong = (
        [read(writer, where, line, field) for where, line in lines] if field in fields else None
        for read, field in ((_prompt, "clean"), (_prompt, "corrupt"), (_next_tokens, "answer"), (_next_tokens, "wrong"))
    )
    return Task.from_tokens(
        name or (str(named.pop()) if named else path.stem),
        *(clean, answers or (), wrong, corrupt),
        texts=[str(text) for text in texts] if all(isinstance(text, str) for text in texts) else (),
        groups=[str(line["group"]) for _, line in lines] if "group" in fields else (),
    )


# --- prompts and answers as they are given ------------------------------------------------------------------------------
def _check_prompts(name: str, clean: Any, corrupt: Any, mask: Any) -> None:
    check_rows(clean, mask)
    for what, rows in (("clean", clean), ("corrupt", corrupt)):
        if rows is None:
            continue
        check_rows(rows)
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise DtypeError(f"Task {name!r}: {what} prompts are token ids (integers); given {rows.dtype}.")
        if rows.shape != clean.shape:
            raise ShapeError(
                f"Task {name!r}: clean and corrupt prompts are aligned token by token; given {list(clean.shape)} "
                f"and {list(rows.shape)}."
            )
        if rows.numel() == 0:
            raise TaskError(f"Task {name!r} has no prompts, or empty ones ({list(rows.shape)}).")
        if int(rows.min()) < 0:
            raise TaskError(f"Task {name!r}: {what} prompts hold {int(rows.min())}, which is no token id.")
    if mask is not None and not bool(mask[:, 0].eq(1).all() & (mask[:, 1:] <= mask[:, :-1]).all()):
        raise TaskError(
            f"Task {name!r}: prompts are padded on the right, so that a row of the attention mask is ones and then "
            "zeros. Give rows of different lengths to Task.from_tokens, which pads them."
        )


def _check_lengths(name: str, clean: Any, corrupt: Any) -> None:
    if isinstance(clean, Tensor) and isinstance(corrupt, Tensor):
        return
    if len(clean) != len(corrupt):
        raise TaskError(f"Task {name!r}: {len(clean)} clean prompts and {len(corrupt)} corrupt ones.")
    for i, (one, other) in enumerate(zip(clean, corrupt)):
        if len(one) != len(other):
            raise TaskError(
                f"Task {name!r}, prompt {i}: {len(one)} tokens clean and {len(other)} corrupt. They must be aligned token by "
                "token: choose words of as many tokens."
            )


def _padded(name: str, rows: Any, pad_token: int) -> tuple[Shaped[Tensor, "..."], Int[Tensor, "n pos"] | None]:
    """Rows as one tensor, and a mask where they differ in length."""
    if isinstance(rows, Tensor):
        return (rows.long() if rows.dtype in SMALL_INTEGERS else rows), None
    try:
        made = [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TaskError(f"Task {name!r}: prompts are rows of token ids, and one is not ({error}).") from error
    if not made or any(row.ndim != 1 or row.numel() == 0 for row in made):
        raise TaskError(f"Task {name!r} needs prompts, each a row of at least one token id; given {len(made)} rows.")
    if any(row.is_floating_point() or row.dtype == torch.bool for row in made):
        raise DtypeError(f"Task {name!r}: prompts are token ids (integers).")
    made = [row.long() for row in made]
    padded = pad_sequence(made, batch_first=True, padding_value=pad_token)
    mask = pad_sequence([torch.ones_like(row) for row in made], batch_first=True)
    return padded, None if bool(mask.all()) else mask


def _ids(name: str, what: str, given: Any) -> tuple[int, ...]:
    several = given.reshape(-1).tolist() if isinstance(given, Tensor) else given
    several = list(several) if isinstance(several, Iterable) else [several]
    try:
        if any(isinstance(token, bool) for token in several):
            raise TypeError("a truth value is no token")
        return tuple(map(operator.index, several))
    except TypeError as error:
        raise TaskError(f"Task {name!r}: {what} are token ids, or several of them; given {given!r}.") from error


# --- files ------------------------------------------------------------------------------------------------------------
def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines that are not blank, each with where it is; the checksum is compared and left out."""
    lines = []
    for number, line in enumerate(_unsealed(path, read_text(path, LARGEST)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            read = parse_json(where, line)
        except DecompositionFileError as error:
            raise TaskError(
                f"{where} is not JSON ({error.__cause__}); a task's file holds one JSON object on each line."
            ) from error
        if not isinstance(read, dict):
            raise TaskError(f"{where} is no JSON object with the fields {', '.join(FIELDS)}.")
        unknown, missing = sorted(set(read) - set(FIELDS)), [f for f in FIELDS[:2] if f not in read]
        if unknown or missing:
            raise TaskError(
                f"{where} {f'lacks {missing}' if missing else f'has unknown fields {unknown}'}; a line holds "
                f"{', '.join(FIELDS[:2])} and perhaps {', '.join(FIELDS[2:])}."
            )
        if not isinstance(read.get("task", ""), str):
            raise TaskError(f"{where}: 'task' is the task's name, a text; given {read['task']!r:.80}.")
        lines.append((where, read))
    if not lines:
        raise TaskError(f"{path} is empty; give one line of JSON for each prompt, with 'clean' and 'answer'.")
    return lines


def _sealed(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    return f'{text}{CHECKSUM}"{digest}"}}\n'


def _unsealed(path: Path, text: str) -> str:
    """The lines before the checksum, where there is one."""
    body, mark, _ = text.rpartition(CHECKSUM)
    if mark and text != _sealed(body):
        raise DecompositionFileError(
            f"{path} is not as it was saved: its checksum does not fit. It is damaged, or was edited; copy it again from where "
            "it was saved, or take the line with the checksum away if the change was meant."
        )
    return body if mark else text


def _prompt(writer: RowTokenizer | None, where: str, line: dict[str, Any], field: str) -> tuple[int, ...]:
    given = line[field]
    if isinstance(given, str):
        if writer is None:
            raise TaskError(f"{where} holds text; give load_task a tokenizer or a model that has one.")
        return writer.start + writer.encode(given)
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        return tuple(given)
    raise TaskError(f"{where}: a prompt is a text or a list of token ids; given {given!r}.")


def _next_tokens(writer: RowTokenizer | None, where: str, line: dict[str, Any], field: str) -> tuple[int, ...]:
    given = line[field]
    tokens = []
    for one in given if isinstance(given, list) else [given]:
        if type(one) is int:
            tokens.append(one)
            continue
        if not isinstance(one, str) or not isinstance(line["clean"], str):
            raise TaskError(f"{where}: {field!r} is a text behind a text, or a token id, or a list; given {given!r}.")
        assert writer is not None  # it has read the prompt
        added = writer.added(line["clean"], one)
        if added is None or len(added) != 1:
            found = "changes the prompt's last token" if added is None else f"adds {len(added)} tokens"
            raise TokenizerTaskError(
                f"{where}: {field} {one!r} {found}, and must add one. It is taken as it stands behind the prompt: begin it "
                f"with a space (' John') where the tokenizer's words have one, or choose a word of one token."
            )
        tokens += added
    return tuple(tokens)
