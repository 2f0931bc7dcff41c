"""Write docs/results.md from the JSON that runs left in docs/results/: `python docs/make_results.py`.

A test holds the page and the files together, so no figure on it is typed in.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE / "results.md"

Row = Sequence[object]


def table(columns: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def origin(record: Mapping[str, Any]) -> str:
    """Command, date and versions of a run."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"```\n{record['command']}\n```\n\n{record['date']}; {versions}."


def decomposition(record: Mapping[str, Any]) -> str:
    """A run of the `decompose` or `demo` command."""
    kls = table(("masks", "KL, nats per token"), [(kind, f"{kl:.4f}") for kind, kl in record["kl"].items()])
    sites = [(name, f"{record['l0'][name]:.1f}", record["alive"][name], c) for name, c in record["components"].items()]
    total = (
        "all",
        f"{sum(record['l0'].values()):.1f}",
        sum(record["alive"].values()),
        sum(record["components"].values()),
    )
    counts = table(("site", "L0 per token", "alive", "components"), [*sites, total])
    settings = record["settings"]
    run = f"Seed {settings['seed']}, {settings['steps']} steps of {settings['batch_size']} rows."
    return f"{origin(record)} {run}\n\n{kls}\n\n{counts}"


def micro_gpt2(record: Mapping[str, Any]) -> str:
    """Figures of the embedded model by seed, and those of the shipped weights on the test prompts."""
    names = list(record["test"])
    rows = [(f"seed {s['seed']}, validation", *(s["validation"][n] for n in names)) for s in record["seeds"]]
    rows.append((f"**seed {record['chosen_seed']}, test**", *(f"**{record['test'][n]}**" for n in names)))
    rows.append(("wanted", *(record.get("wanted", {}).get(n, "") for n in names)))
    figures = table(("prompts", *(n.replace("_", " ") for n in names)), rows)
    heads = table(("heads", "figure"), _flat(record["heads"]))
    text = "Seeds are chosen on the validation prompts; the test prompts are evaluated for the chosen one."
    return f"{origin(record)}\n\n{text}\n\n{figures}\n\nHeads of the shipped weights, on test prompts:\n\n{heads}"


def benchmarks(record: Mapping[str, Any]) -> str:
    """Ratios of running times, each measured against its neighbour in one run."""
    rows = [(r["what"], f"{r['ratio']:.2f}", f"{r['slow_ms']:.1f}", f"{r['fast_ms']:.1f}") for r in record["ratios"]]
    return f"{origin(record)} {record['machine']}.\n\n{table(('what', 'ratio', 'ms', 'against ms'), rows)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[Row]:
    rows: list[Row] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        rows += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [(name, value)]
    return rows


SECTIONS = (
    ("micro_gpt2", "micro-gpt2, the embedded model", micro_gpt2),
    ("spd_stories260k", "SPD on all MLP matrices of stories260K (Llama, 260k parameters)", decomposition),
    ("demo", "The demo", decomposition),
    ("benchmarks", "What patching costs", benchmarks),
)


def page() -> str:
    """The whole page."""
    made = "Every figure the project claims, written by `python docs/make_results.py` from `docs/results/*.json`."
    parts = ["# Results", made]
    for name, title, render in SECTIONS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", render(json.loads(path.read_text(encoding="utf-8")))]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
