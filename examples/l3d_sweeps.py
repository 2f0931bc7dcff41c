"""L3D's toys as their number of subnetworks and their rank change (arXiv 2504.00194, figures S5 and S11).

    python examples/l3d_sweeps.py

Five squares with 3, 5, 10 and 15 subnetworks of rank 1; six groups of inputs with 10 subnetworks of ranks 1 to 6. Held-out
errors of three targets and seeds go to OUT/sweeps.json, with the truncated-SVD bound.
"""

import argparse
import json
from pathlib import Path

import torch
from small_models import record

import tl_paramdecomp as tlpd
from tl_paramdecomp.experiments.recipes import RECIPES
from tl_paramdecomp.experiments.reproduce import data_of, find_target, heldout_rows

SWEEPS = {
    "squares": ("l3d-squared", [{"n_subnetworks": n, "rank": 1, "warm_start": 0.1} for n in (3, 5, 10, 15)], 4000),
    "ranks": ("l3d-high-rank", [{"n_subnetworks": 10, "rank": rank} for rank in range(1, 7)], 3000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/l3d"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {**record(), "sweeps": {}}
    for label, (name, changes, steps) in SWEEPS.items():
        recipe, rows = RECIPES[name], found["sweeps"].setdefault(label, [])
        for change in changes:
            errors, bounds = [], []
            for seed in range(args.seeds):
                target = args.out / "targets" / name / f"seed-{seed}"
                model = find_target(recipe, seed, target, lambda text: None).model
                made = tlpd.decompose(
                    model, "*", tlpd.L3D.paper_code(**change), data_of(recipe, recipe.batch_size, seed), steps,
                    recipe.batch_size, seed, progress=args.progress,
                )  # fmt: skip
                held_out = tlpd.evaluate_subnetworks(model, made, heldout_rows(recipe), rows_at_once=1000)
                errors.append(held_out.batch_error)
                bounds.append(held_out.bound)
            rows.append({**change, "steps": steps, "errors": errors, "bounds": bounds})
            print(label, change, [round(error, 3) for error in errors])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweeps.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
