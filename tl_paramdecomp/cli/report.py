"""What the command prints: how good a decomposition is, and next tokens before and after a patch."""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig, evaluate
from tl_paramdecomp.analysis.evaluation.result import Evaluation, distance_name
from tl_paramdecomp.analysis.next_tokens import next_token_probs
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.disk import replace_text
from tl_paramdecomp.errors import DataError
from tl_paramdecomp.patching.act_patches import ActPatches, patched_acts
from tl_paramdecomp.training.progress import is_watched

MEANINGS = {
    "unmasked": "all components whole, no delta",
    "stochastic": "m = g + (1 - g) r",
    "importance": "m = g",
    "rounded": "only components with g > 0.1",
    "adversarial": "worst r, 20 gradient steps",
    "random": "m = r, whatever the importance",
    "zero": "all components removed",
}

SHORT = EvaluationConfig(ladder=(20,), restarts=1, samples=1, ablated=0, by_site=False)

NextTokens = Sequence[tuple[str, float]]


class BeforeAndAfter(NamedTuple):
    """Likeliest next tokens with their probabilities."""

    before: NextTokens
    after: NextTokens
    kl: float
    """KL of the patched next-token distribution from the model's, in nats."""


def measure_quality(model: Any, decomposition: Decomposition, tokens: Int[Tensor, "row pos"]) -> Evaluation:
    """The short evaluation that a run ends with; `tl-paramdecomp evaluate` is the whole one."""
    return evaluate(model, decomposition, tokens, protocol=SHORT, progress=is_watched())


def kl_by_kind(found: Evaluation) -> dict[str, float]:
    """KL, or mean square, under the kinds of masks that `MEANINGS` explains."""
    kinds = {"stochastic": ("stochastic", "masked"), "rounded": ("rounded 0.1", "absent")}
    return {
        kind: found.headline["adversarial"] if kind == "adversarial" else found.distance(*kinds.get(kind, (kind,)))
        for kind in MEANINGS
    }


def print_quality(console: Console, found: Evaluation) -> None:
    """The two tables a user judges a decomposition by first."""
    kl = found.measure == "kl"
    title = "KL from the target on held-out rows, nats per token" if kl else "Mean square from the target's outputs"
    table = Table(title=title, title_justify="left")
    table.add_column("masks")
    table.add_column(distance_name(found.measure), justify="right")
    table.add_column("what runs", style="dim")
    for kind, kl in kl_by_kind(found).items():
        table.add_row(kind, f"{kl:.4f}", MEANINGS[kind])
    console.print(table)
    table = Table(title="Components that matter: importance above 0.1", title_justify="left")
    for column in ("site", "L0 per token", "active anywhere", "of"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for row in found.sites:
        table.add_row(row["site"], f"{row['l0']:.1f}", str(row["active_anywhere"]), str(row["components"]))
    table.add_section()
    l0, active, every = (sum(row[key] for row in found.sites) for key in ("l0", "active_anywhere", "components"))
    table.add_row("all", f"{l0:.1f}", str(active), str(every))
    console.print(table)


def write_quality(path: Path, decomposition: Decomposition, found: Evaluation) -> None:
    """The same as JSON, with the command, versions and date, for those who keep results."""
    command = " ".join(["tl-paramdecomp", *(shlex.quote(word) for word in sys.argv[1:])])
    assets = os.environ.get("TLPD_TEST_ASSETS")
    record = {
        "command": command.replace(assets, "$TLPD_TEST_ASSETS") if assets else command,
        "date": datetime.date.today().isoformat(),
        "versions": decomposition.info["versions"],
        "settings": decomposition.info.get("run"),
        "components": decomposition.n_components,
        found.measure: kl_by_kind(found),
        "l0": {row["site"]: row["l0"] for row in found.sites},
        "alive": {row["site"]: row["active_anywhere"] for row in found.sites},
    }
    replace_text(path, json.dumps(record, indent=1))


def next_token_table(
    model: Any,
    decomposition: Decomposition,
    patches: ActPatches,
    tokenizer: Any,
    tokens: Int[Tensor, "1 pos"],
    top: int,
) -> BeforeAndAfter:
    """Likeliest next tokens of a prompt, of the model and with component activations patched."""
    before = next_token_probs(model, tokens)
    with patched_acts(model, decomposition, patches):
        after = next_token_probs(model, tokens)
    kl = (before * (before.clamp(min=1e-30).log() - after.clamp(min=1e-30).log())).sum().item()
    return BeforeAndAfter(top_tokens(before, tokenizer, top), top_tokens(after, tokenizer, top), kl)


def prompt_tokens(tokenizer: Any, prompt: str) -> Int[Tensor, "1 pos"]:
    """A prompt as one token row that begins with the beginning-of-text token, where there is one."""
    if tokenizer is None:
        raise DataError("This model has no tokenizer, so a prompt cannot be read; use the library with token rows.")
    try:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    except Exception as error:
        raise DataError(f"The tokenizer cannot read the prompt {prompt!r}: {error}") from error
    if not ids:
        raise DataError("The prompt is empty.")
    bos = tokenizer.bos_token_id
    return torch.tensor([([bos] if bos is not None and ids[0] != bos else []) + list(ids)])


def top_tokens(probs: Tensor, tokenizer: Any, n: int) -> NextTokens:
    """The n likeliest tokens as text, with their probabilities."""
    values, indices = probs.topk(min(n, len(probs)))
    return [(tokenizer.decode([i]), p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]


def print_next_tokens(
    console: Console, prompt: str, columns: Mapping[str, NextTokens], kl: float | None = None
) -> None:
    """Next tokens side by side, one column for each way of running the model."""
    console.print(f"[italic]{escape(prompt)} …[/]", highlight=False)
    table = Table()
    for name in columns:
        table.add_column(name)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(f"{p:6.1%} {token.strip() or repr(token)}" for token, p in row))
    console.print(table)
    if kl is not None:
        console.print(f"KL of the next token: {kl:.4f} nats", highlight=False)
