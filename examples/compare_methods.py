"""SPD, VPD and exact bases on all MLP matrices of a small language model, compared where they are equally sparse.

    python examples/compare_methods.py micro-gpt2
    python examples/compare_methods.py PATH/TO/stories260K --text PATH/TO/held_out.txt

1. The protocol (sites, steps, seeds, sparsities, rows, adversary) is written to OUT/<model>/ before the first run.
2. Bases train their importances as SPD does. Two processes may share the work: `--methods SPD VPD` beside `--methods SVD ...`;
   a call without it then collects what both did.
3. `--shuffled` does the same to the model with its weights shuffled: a control in which there is nothing to find.
4. What was found goes to OUT/<model>.json, its picture to OUT/<model>.png.
"""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from small_models import BATCH, SITES, open_model, record

import tl_paramdecomp as tlpd
from tl_paramdecomp.report.comparison import draw_comparison

METHODS = {
    "SPD": tlpd.SPD(),
    "VPD": tlpd.VPD(),
    "SVD": tlpd.SVD(),
    "whitened SVD": tlpd.WhitenedSVD(),
    "neurons": tlpd.NeuronBasis(),
    "random": tlpd.RandomBasis(),
}
SPARSITIES = (0.5, 1.5, 4.0, 10.0, 25.0)
HELD_OUT = 16
"""Rows to measure on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="micro-gpt2, or a folder or hub name of a transformers model")
    parser.add_argument("--text", type=Path, help="held-out text, for models other than micro-gpt2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--capacities", type=float, nargs="+", default=[])
    parser.add_argument("--shuffled", action="store_true", help="a control: the model with its weights shuffled")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = tlpd.ComparisonProtocol(
        (SITES,), args.steps, BATCH, tuple(range(args.seeds)), tuple(args.sparsities), capacities=tuple(args.capacities),
        evaluation=tlpd.EvaluationConfig(ladder=(20,), ablated=0, by_site=False),
    )  # fmt: skip
    model, rows, held_out = open_model(args.model, args.text)
    name = Path(args.model).name + ("-shuffled" if args.shuffled else "")
    with tlpd.shuffled_weights(model) if args.shuffled else contextlib.nullcontext():
        found = tlpd.compare(
            model, {label: METHODS[label] for label in args.methods}, protocol, rows, held_out[:HELD_OUT],
            run_dir=args.out / name, progress=args.progress,
        )  # fmt: skip
    whole = {**record(), "model": name, **dataclasses.asdict(found)}
    (args.out / f"{name}.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    draw_comparison(found, args.out / f"{name}.png", f"{name}: all MLP matrices, {args.steps} steps")
    print(found)


if __name__ == "__main__":
    main()
