"""Circuits of micro-gpt2's four tasks: components learned by SPD beside singular vectors, and neurons with heads.

    python examples/circuits_micro_gpt2.py

1. SPD over all matrices of the blocks, three seeds; singular vectors and the neuron basis are exact and need no training.
2. For each task the smallest circuit that keeps the metric with all other components ablated to zero and the delta component
   kept, and under stochastic masks; found on validation prompts, measured on test prompts.
3. Runs are kept in OUT/ and go on where they stopped; what was found goes to OUT/circuits.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from small_models import BATCH, record

import tl_paramdecomp as tlpd

TASKS = ("ioi", "pronoun", "greater_than", "induction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument(
        "--faithfulness", type=float, default=0.95, help="wanted where it is searched; less is left elsewhere"
    )
    parser.add_argument("--stochastic", type=float, default=0.9, help="the same, under stochastic masks")
    parser.add_argument("--method", choices=("gradients", "masks"), default="gradients")
    parser.add_argument("--out", type=Path, default=Path("runs/circuits"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = tlpd.load_micro_gpt2("transformers"), tlpd.micro_gpt2_tokens(8192, seed=1)
    bases = {"singular vectors": tlpd.SVD(training=None), "neurons and heads": tlpd.NeuronBasis(training=None)}
    settings = {"steps": args.steps, "batch_size": BATCH, "prompts": args.prompts, "method": args.method,
                "faithfulness": args.faithfulness, "stochastic": args.stochastic}  # fmt: skip
    found: dict = {**record(), "settings": settings, "circuits": []}
    path = args.out / "circuits.json"
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        found["circuits"] = known["circuits"]
    args.out.mkdir(parents=True, exist_ok=True)
    for label in (*bases, *(f"SPD, seed {seed}" for seed in range(args.seeds))):
        if label in bases:
            made, seed = tlpd.decompose(model, "blocks.*", bases[label], progress=False), 0
        else:
            seed = int(label.rpartition(" ")[2])
            made = tlpd.decompose(
                model, "blocks.*", tlpd.SPD(), rows, args.steps, BATCH, seed, args.out / f"spd-{seed}",
                progress=args.progress, checkpoint_every=250,
            )  # fmt: skip
        units = tlpd.neuron_and_head_units(made) if label == "neurons and heads" else None
        for task in TASKS:
            if any(one["label"] == label and one["task"] == task for one in found["circuits"]):
                continue
            search, test = (
                tlpd.make_task(task, "micro-gpt2", args.prompts, seed, split) for split in ("validation", "test")
            )
            circuit = tlpd.find_circuit(
                model, made, search, method=args.method, units=units, faithfulness=args.faithfulness,
                stochastic=args.stochastic, held_out=test, seed=seed, progress=args.progress,
            )  # fmt: skip
            print(label, circuit, sep="\n", flush=True)
            values = dataclasses.asdict(circuit)
            del values["labels"]  # the components say it
            found["circuits"].append({"label": label, **values})
            path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
