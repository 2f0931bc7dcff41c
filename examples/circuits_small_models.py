"""Circuits of what small pretrained models do: gpt-nano-sort sorts six digits, babyllama-tok105 goes on with names it has read.

    python examples/circuits_small_models.py sort PATH/TO/gpt-nano-sort
    python examples/circuits_small_models.py copy PATH/TO/babyllama-tok105

Singular vectors, neurons with heads, and components learned by SPD; circuits are found on some prompts and measured on others,
as in circuits_micro_gpt2.py. What was found goes to OUT/<model>.json.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import torch
from small_models import BATCH, record

import tl_paramdecomp as tlpd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sort", "copy"))
    parser.add_argument("model", help="a folder or hub name of a transformers model")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--faithfulness", type=float, default=0.95)
    parser.add_argument("--out", type=Path, default=Path("runs/circuits"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    make = sorting if args.task == "sort" else copying
    search, test = make(model, args.prompts, seed=0), make(model, args.prompts, seed=1)
    rows = torch.cat([make(model, 512, seed=2 + i).clean for i in range(4)])
    settings = {"steps": args.steps, "batch_size": 4 * BATCH, "prompts": args.prompts, "method": "gradients",
                "faithfulness": args.faithfulness}  # fmt: skip
    found: dict = {**record(), "settings": settings, "circuits": []}
    methods: dict = {"singular vectors": tlpd.SVD(training=None), "neurons and heads": tlpd.NeuronBasis(training=None)}
    methods |= {f"SPD, seed {seed}": tlpd.SPD() for seed in range(args.seeds)}
    for label, method in methods.items():
        steps = args.steps if label.startswith("SPD") else None
        seed = int(label.rpartition(" ")[2]) if steps else 0
        made = tlpd.decompose(model, "blocks.*", method, rows, steps, 4 * BATCH, seed, progress=args.progress)
        units = tlpd.neuron_and_head_units(made) if label == "neurons and heads" else None
        circuit = tlpd.find_circuit(
            model,
            made,
            search,
            units=units,
            faithfulness=args.faithfulness,
            held_out=test,
            seed=seed,
            progress=args.progress,
        )
        print(label, circuit, sep="\n", flush=True)
        values = dataclasses.asdict(circuit)
        del values["labels"]  # the components say it
        found["circuits"].append({"label": label, **values})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{Path(args.model).name}.json").write_text(json.dumps(found), encoding="utf-8")


def sorting(model, n: int, seed: int) -> tlpd.Task:
    """Six digits of {0, 1, 2}, some of them sorted already: the next of the sorted ones."""
    generator = torch.Generator().manual_seed(seed)
    prompts, answers, wrong = [], [], []
    for i in range(n):
        digits = torch.randint(0, 3, (6,), generator=generator).tolist()
        done = i % 6
        prompts.append([*digits, *sorted(digits)[:done], *[0] * (5 - done)])
        answers.append(sorted(digits)[done])
        wrong.append([d for d in range(3) if d != answers[-1]])
    mask = torch.tensor([[1] * (6 + i % 6) + [0] * (5 - i % 6) for i in range(n)])
    return tlpd.Task.from_tokens("sort", torch.tensor(prompts), answers, wrong, attention_mask=mask)


NAMES = ("Tim Tom", "Ben Bob", "Sam Sue", "Lily Lucy", "Anna Amy", "Max Mia", "Jack Joe", "Dan Dora")
"""Pairs that begin with the same letter."""
SCENES = (
    "Once upon a time, there was a child named {}. One day, {}",
    "One day, {} went to the park. The sun was hot and {}",
    "There was a big red ball in the box. {} saw the ball. {}",
    "{} had a toy car. It was very fast. {}",
)


def copying(model, n: int, seed: int) -> tlpd.Task:
    """A story up to the first letter of a name that it has told: the second letter, against that of another such name."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(model.config.name_or_path), random.Random(seed)
    fields: dict = {"clean": [], "corrupt": [], "answers": [], "wrong": [], "texts": [], "groups": []}
    while len(fields["clean"]) < n:
        names = rng.sample(rng.choice(NAMES).split(), 2)
        scene = rng.choice(SCENES)
        texts = [scene.replace("{}", name, 1).replace("{}", name[0]) for name in names]
        clean, corrupt = (tokenizer(text)["input_ids"] for text in texts)
        if len(clean) != len(corrupt):
            continue
        answer, wrong = (tokenizer(name[1], add_special_tokens=False)["input_ids"][-1] for name in names)
        values = (clean, corrupt, answer, wrong, texts[0], scene)
        for field, value in zip(fields, values, strict=True):
            fields[field].append(value)
    return tlpd.Task.from_tokens("copy a name", **fields)


if __name__ == "__main__":
    main()
