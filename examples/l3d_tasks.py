"""Which L3D subnetworks of micro-gpt2 serve one task, and does switching one off hurt just that task?

    python examples/l3d_tasks.py

1. L3D over all matrices of the blocks.
2. On validation prompts of the four tasks and on rows of text: each sample's impacts as shares of their sum; a subnetwork
   serves the task where its mean share is most above its share anywhere else.
3. Switching off is moving along it: of a ladder of deltas of both signs, the smallest that halves the probability of that
   task's answers on validation prompts, or else the one that takes most of it.
4. On test prompts: what is left of every task's probability of a right answer, and how far the text's predictions go (KL).
5. The control is the same with random subnetworks in place of the chosen ones. The table goes to OUT/tasks.json.
"""

import argparse
import json
from pathlib import Path

import torch
from directions import random_directions
from small_models import record

import tl_paramdecomp as tlpd

TASKS = ("ioi", "pronoun", "greater_than", "induction")
LADDER = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
PROMPTS = 128


class Asked:
    """Prompts of one task, padded to one length."""

    def __init__(self, task: str, split: str) -> None:
        prompts = tlpd.micro_gpt2_prompts(task, PROMPTS, seed=0, split=split)
        longest = max(len(prompt.tokens) for prompt in prompts)
        self.tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask = torch.zeros_like(self.tokens)
        self.right = torch.zeros(len(prompts), 275)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt.tokens)], self.mask[row, : len(prompt.tokens)] = prompt.tokens, 1
            self.right[row, list(prompt.answers)] = 1.0
        self.last = self.mask.sum(1) - 1

    def at_last(self, values: torch.Tensor) -> torch.Tensor:
        """The last position of each prompt."""
        return values[torch.arange(len(values)), self.last]

    @torch.no_grad()
    def score(self, model) -> float:
        """Mean probability of the right answers."""
        p = self.at_last(model(self.tokens, attention_mask=self.mask).logits).softmax(-1)
        return (p * self.right).sum(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subnetworks", type=int, default=100)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/l3d"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tlpd.load_micro_gpt2("transformers")
    method = tlpd.L3D(n_subnetworks=args.subnetworks, rank=args.rank)
    made = tlpd.decompose(
        model, "blocks.*", method, tlpd.micro_gpt2_tokens(8192, seed=1), args.steps, 64, args.seed,
        args.out / f"tasks-{args.subnetworks}-{args.rank}-{args.seed}", progress=args.progress, checkpoint_every=200,
    )  # fmt: skip
    text = tlpd.micro_gpt2_tokens(64, seed=2)
    validation, test = ({task: Asked(task, split) for task in TASKS} for split in ("validation", "test"))
    error = tlpd.evaluate_subnetworks(model, made, tlpd.micro_gpt2_tokens(512, seed=3), rows_at_once=128, bound=False)
    found = {
        **record(),
        "settings": {"subnetworks": args.subnetworks, "rank": args.rank, "steps": args.steps, "seed": args.seed},
        "batch_error": error.batch_error,
        "before": {task: asked.score(model) for task, asked in test.items()},
        "found": table(model, made, serving(model, made, validation, text), validation, test, text),
    }
    control = random_directions(made, args.seed)
    picked = {task: [(i, None)] for i, task in enumerate(TASKS)}
    found["random"] = table(model, control, picked, validation, test, text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tasks.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def serving(model, made, asked, text, n: int = 2) -> dict[str, list[tuple[int, float | None]]]:
    """The subnetworks that stand out most on each task, with how far their share of the impacts is above that elsewhere."""
    shares = []
    for prompts in asked.values():
        impacts = prompts.at_last(tlpd.impacts(model, made, prompts.tokens, attention_mask=prompts.mask))
        shares.append((impacts / impacts.sum(-1, keepdim=True)).mean(0))
    impacts = tlpd.impacts(model, made, text).flatten(0, 1)
    shares.append((impacts / impacts.sum(-1, keepdim=True)).mean(0))
    together = torch.stack(shares)
    picked = {}
    for i, task in enumerate(asked):
        others = torch.cat([together[:i], together[i + 1 :]]).max(0).values
        best = (together[i] - others).topk(n)
        picked[task] = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return picked


def table(model, made, picked, validation, test, text) -> list[dict]:
    """What switching each picked subnetwork off leaves of every task."""
    with torch.no_grad():
        log_p = model(text).logits.log_softmax(-1)
    before = {task: prompts.score(model) for task, prompts in test.items()}
    rows = []
    for task, chosen in picked.items():
        for k, margin in chosen:
            delta = switching_off(model, made, k, validation[task])
            with tlpd.perturbed(model, made, {k: delta}), torch.no_grad():
                left = {other: prompts.score(model) / before[other] for other, prompts in test.items()}
                log_q = model(text).logits.log_softmax(-1)
            rows.append(
                {
                    "task": task, "subnetwork": k, "margin": margin, "delta": delta, "left": left,
                    "text_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
                    "hurts_its_own_most": left[task] == min(left.values()),
                }
            )  # fmt: skip
    return rows


def switching_off(model, made, k: int, asked: Asked) -> float:
    """The smallest step of the ladder that halves the probability of right answers, or the one that takes most of it."""
    before, scores = asked.score(model), {}
    for size in LADDER:
        for delta in (size, -size):
            with tlpd.perturbed(model, made, {k: delta}):
                scores[delta] = asked.score(model)
        best = min((size, -size), key=scores.__getitem__)
        if scores[best] <= 0.5 * before:
            return best
    return min(scores, key=scores.__getitem__)


if __name__ == "__main__":
    main()
