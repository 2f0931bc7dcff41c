"""SPD with and without its adversary, and VPD, on all MLP matrices of a small language model: curves over training.

    python examples/adversary_curves.py micro-gpt2 --steps 10000 --seeds 2
    python examples/adversary_curves.py PATH/TO/stories260K --text PATH/TO/held_out.txt

1. Rows to train on: micro-gpt2's own text, or rows that the model itself writes.
2. Each method and seed is one `decompose`, stopped and resumed as any other; every so often it is measured on held-out rows:
   L0, and the KL under unmasked, rounded, stochastic and adversarial masks (20 steps of projected gradient ascent, several
   restarts). A run that is complete is not repeated.
3. What was measured goes to OUT/<model>.json, its picture to OUT/<model>.png.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from small_models import BATCH, LENGTH, SITES, open_model, record

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.activations import sparsity
from tl_paramdecomp.analysis.next_tokens import masked_kl
from tl_paramdecomp.methods.adversary import AdversarialReconstruction
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.report.plotting import figure, save, subplots
from tl_paramdecomp.settings import to_settings

RESTARTS = 4
KINDS = ("unmasked", "rounded", "stochastic", "importance", "zero")
PANELS = {
    "l0": "L0: active components per token",
    "unmasked": "KL, all components, no delta",
    "rounded": "KL, only components above 0.1",
    "stochastic": "KL, stochastic masks",
    "pgd": "KL, 20-step adversary",
}


def without_adversary() -> tlpd.SPD:
    """SPD whose whole reconstruction is stochastic."""
    full = tlpd.SPD()
    kept = [loss for loss in full.losses if not isinstance(loss, AdversarialReconstruction)]
    whole = tuple(
        replace(loss, coefficient=1.0) if isinstance(loss, StochasticReconstruction) else loss for loss in kept
    )
    return replace(full, losses=whole)


METHODS = {"SPD": tlpd.SPD, "VPD": tlpd.VPD, "SPD without adversary": without_adversary}


def measure(model, made: tlpd.Decomposition, held: torch.Tensor, restarts: int) -> dict[str, float]:
    """L0 and KLs on held-out rows; the adversary's on a quarter of them, the median and the worst of its restarts."""
    few = held[: len(held) // 4]
    worst = [
        masked_kl(model, made, few, tlpd.importance_masks(model, made, few, "adversarial", seed=seed))
        for seed in range(restarts)
    ]
    found = {kind: masked_kl(model, made, held, tlpd.importance_masks(model, made, held, kind)) for kind in KINDS}
    l0 = sum(sparsity(model, made, held).l0.values())
    return {"l0": l0, **found, "pgd": statistics.median(worst), "pgd_worst": max(worst)}


def run(args: argparse.Namespace, label: str, seed: int, opened) -> dict:
    """One method and seed: what was measured over training, by step."""
    model, rows, held = opened
    folder = args.out / Path(args.model).name / f"{label.replace(' ', '_')}-{seed}-{args.steps}"
    done = folder / "points.json"
    if done.exists():
        known = json.loads(done.read_text(encoding="utf-8"))
        if known["settings"]["method"] != json.loads(json.dumps(to_settings(METHODS[label]()))):
            sys.exit(f"{done} is of other settings; delete {folder} to run it again.")
        return known
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "points.jsonl"
    at = {max(1, round(args.steps * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}

    def look(info) -> None:
        if info.step in at:
            point = {"step": info.step, **measure(model, info.decomposition, held, 2)}
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")

    made = tlpd.decompose(
        model, SITES, METHODS[label](), rows, args.steps, BATCH, seed=seed, run_dir=folder, callbacks=[look],
        log_every=max(1, args.steps // 50), checkpoint_every=max(1, args.steps // 20), progress=args.progress,
    )  # fmt: skip
    points = {p["step"]: p for p in map(json.loads, lines.read_text(encoding="utf-8").splitlines())}
    points[args.steps] = {"step": args.steps, **measure(model, made, held, RESTARTS)}
    record = {
        "method": label,
        "seed": seed,
        "components": sum(made.n_components.values()),
        "settings": made.info["run"],
        "points": [points[step] for step in sorted(points)],
    }
    done.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


@figure
def draw_curves(records: list[dict], path: Path, title: str) -> Path:
    """One panel for each figure, one colour for each method, one line for each seed."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    methods = list(dict.fromkeys(record["method"] for record in records))
    made, panels = subplots(2, 3, (11.0, 6.2))
    for axis, (key, label) in zip(panels.flat, PANELS.items()):
        for run in records:
            steps, values = ([point[name] for point in run["points"]] for name in ("step", key))
            axis.plot(steps, values, color=f"C{methods.index(run['method'])}", marker=".", linewidth=1.2)
        if key == "pgd":
            axis.axhline(records[0]["points"][-1]["zero"], color="grey", linestyle=":", linewidth=1)
        axis.set_title(label)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    legend = panels.flat[len(PANELS)]
    for i, method in enumerate(methods):
        legend.plot([], [], color=f"C{i}", marker=".", label=method)
    legend.plot([], [], color="grey", linestyle=":", label="all components removed")
    legend.legend(loc="center", frameon=False)
    legend.axis("off")
    made.suptitle(f"{title} (KL in nats per token; one line for each seed)")
    return save(made, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="micro-gpt2, or a folder or hub name of a transformers model")
    parser.add_argument("--text", type=Path, help="held-out text, for models other than micro-gpt2")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(args.model, args.text)
    records = [run(args, label, seed, opened) for seed in range(args.seeds) for label in args.methods]
    name = Path(args.model).name
    whole = {**record(), "model": name, "rows": f"{BATCH} x {LENGTH} tokens a step", "runs": records}
    (args.out / f"{name}.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    draw_curves(records, args.out / f"{name}.png", f"{name}: all MLP matrices")


if __name__ == "__main__":
    main()
