"""How good a decomposition is, in short: what a run prints and keeps at its end."""

import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig, evaluate
from tl_paramdecomp.analysis.evaluation.result import Evaluation, distance_name
from tl_paramdecomp.analysis.records import plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.disk import replace_text
from tl_paramdecomp.training.watch import is_watched

if TYPE_CHECKING:
    from rich.table import Table

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
"""Of evaluations during a run and at its end."""


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


def quality_tables(found: Evaluation) -> "list[Table]":
    """The two tables a user judges a decomposition by first."""
    title = "KL from the target on held-out rows, nats per token"
    title = title if found.measure == "kl" else "Mean square from the target's outputs"
    masks = plain_table(title, "masks", distance_name(found.measure))
    masks.add_column("what runs", style="dim")
    for kind, distance in kl_by_kind(found).items():
        masks.add_row(kind, f"{distance:.4f}", MEANINGS[kind])
    title = "Components that matter: importance above 0.1"
    matter = plain_table(title, "site", "L0 per token", "active anywhere", "of")
    keys = ("l0", "active_anywhere", "components")
    total = {"site": "all", **{key: sum(row[key] for row in found.sites) for key in keys}}
    for row in (*found.sites, total):
        if row is total:
            matter.add_section()
        matter.add_row(row["site"], f"{row['l0']:.1f}", str(row["active_anywhere"]), str(row["components"]))
    return [masks, matter]


def made_by() -> dict[str, str]:
    """The command that runs, and the date."""
    command, assets = shlex.join(["tl-paramdecomp", *sys.argv[1:]]), os.environ.get("TLPD_TEST_ASSETS")
    command = command.replace(assets, "$TLPD_TEST_ASSETS") if assets else command
    return {"command": command, "date": datetime.date.today().isoformat()}


def write_quality(path: Path, decomposition: Decomposition, found: Evaluation) -> None:
    """The same as JSON, with the command, versions and date, for those who keep results."""
    record = {
        **made_by(),
        "versions": decomposition.info["versions"],
        "settings": decomposition.info.get("run"),
        "components": decomposition.n_components,
        found.measure: kl_by_kind(found),
        "l0": {row["site"]: row["l0"] for row in found.sites},
        "alive": {row["site"]: row["active_anywhere"] for row in found.sites},
    }
    replace_text(path, json.dumps(record, indent=1))
