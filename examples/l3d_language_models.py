"""L3D on small language models: how well subnetworks reconstruct held-out gradients, and what they are about.

    python examples/l3d_language_models.py micro-gpt2
    python examples/l3d_language_models.py PATH/TO/babyllama-tok105 --text PATH/TO/held_out.txt

1. One attention block's four matrices, as in the paper (arXiv 2504.00194, section 4), then all MLP matrices; several numbers of
   subnetworks each.
2. Held-out error with both thresholds, beside the truncated-SVD bound, random directions and the weights' leading singular
   vectors with the same share of coefficients kept.
3. How much farther moving along a subnetwork takes its top samples than all others, for all three.
4. Top samples and promoted tokens of some subnetworks.
5. What was found goes to OUT/<model>.json; runs are kept in OUT/<model>/ and go on where they stopped.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from directions import random_directions, singular_directions
from small_models import open_model, record

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt

HELD_OUT, INSPECTED = 1024, 48
"""Rows for errors; rows for impacts, moves and top samples."""
DELTAS = (0.03, 0.3, 3.0)
LIVE = 0.01
SHOWN, CONTEXTS = 8, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="micro-gpt2, or a folder or hub name of a transformers model")
    parser.add_argument("--text", type=Path, help="held-out text, for models other than micro-gpt2")
    parser.add_argument("--attention-block", type=int, default=1)
    parser.add_argument("--subnetworks", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--rank", type=int, nargs=2, default=[4, 1], help="of attention, of MLPs")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/l3d"))
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, rows, held_out = open_model(args.model, args.text, HELD_OUT)
    name = Path(args.model).name
    places = {"attention": f"blocks.{args.attention_block}.attn.W_*", "mlps": "blocks.*.mlp.*"}
    path = args.out / f"{name}.json"
    found: dict = {**record(), "model": name, "settings": settings(args), "places": {}}
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8")))["settings"] == found["settings"]:
        found["places"] = known["places"]
    for (place, sites), rank in zip(places.items(), args.rank, strict=True):
        entries = found["places"].setdefault(place, {"sites": sites, "rank": rank, "dictionaries": []})
        for n in args.subnetworks:
            if any(one["n"] == n for one in entries["dictionaries"]):
                continue
            # many directions at once overshoot: all of them are active during the warm start
            method = tlpd.L3D(n_subnetworks=n, rank=rank, lr=min(args.lr, 1.0 / n))
            made = tlpd.decompose(
                model, sites, method, rows, args.steps, args.batch_size, args.seed,
                args.out / name / f"{place}-{n}-{args.seed}", progress=args.progress, checkpoint_every=200,
            )  # fmt: skip
            middle = n == sorted(args.subnetworks)[len(args.subnetworks) // 2]
            dictionaries = {"L3D": made, "random directions": random_directions(made, args.seed)}
            if n <= sum(min(site.d_in, site.d_out) for site in made.sites.values()):
                dictionaries["singular vectors of the weights"] = singular_directions(made, adapt(model))
            for label, dictionary in dictionaries.items():
                entries["dictionaries"].append(
                    {"label": label, "n": n, **measured(model, dictionary, held_out, middle, label == "L3D")}
                )
            entries["dictionaries"].sort(key=lambda one: one["n"])
            if middle:
                entries["subnetworks"] = described(model, made, held_out[:INSPECTED], args)
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(json.dumps(entries["dictionaries"][-len(dictionaries) :], indent=1))


def settings(args: argparse.Namespace) -> dict:
    """What the runs were made with."""
    return {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "active": 0.1}


def measured(model, dictionary, held_out, moved: bool, bound: bool) -> dict:
    """Errors on held-out rows; where `moved`, the selectivity of live subnetworks as well."""
    found = tlpd.evaluate_subnetworks(model, dictionary, held_out, rows_at_once=128, bound=bound)
    active = torch.tensor(found.active)
    row = {
        "samples": found.samples, "batch_error": found.batch_error, "fixed_error": found.fixed_error, "bound": found.bound,
        "dead": found.dead, "active_min": active.min().item(), "active_median": active.median().item(),
        "active_max": active.max().item(),
    }  # fmt: skip
    if not moved:
        return row
    rows = held_out[:INSPECTED]
    impacts = tlpd.impacts(model, dictionary, rows)
    live = (active > LIVE).nonzero().flatten().tolist()
    row["selectivity"] = {}
    for delta in DELTAS:
        changed = tlpd.causal_selectivity(model, dictionary, rows, delta=delta, subnetworks=live, found=impacts)
        row["selectivity"][str(delta)] = {
            "median": statistics.median(changed.ratios),
            "quartiles": statistics.quantiles(changed.ratios, n=4)[::2],
            "share_at_least_5": sum(ratio >= 5 for ratio in changed.ratios) / len(changed.ratios),
            "median_change_of_top": statistics.median(changed.top),
        }
    return row


def described(model, made, rows, args) -> list[dict]:
    """Top samples and promoted tokens of subnetworks, spread over how often they are active."""
    from transformers import AutoTokenizer

    tokenizer = tlpd.micro_gpt2_tokenizer() if args.model == "micro-gpt2" else AutoTokenizer.from_pretrained(args.model)
    found = tlpd.evaluate_subnetworks(model, made, rows, rows_at_once=128, bound=False)
    order = sorted(range(made.n_subnetworks), key=lambda k: -found.active[k])
    picked = order[:: max(1, len(order) // SHOWN)][:SHOWN]
    impacts = tlpd.impacts(model, made, rows)
    entries = []
    for k in picked:
        tops = tlpd.top_samples(impacts, k, CONTEXTS)
        slopes = tlpd.output_derivative(model, made, k, rows[[top.row for top in tops]])
        mean = slopes[torch.arange(len(tops)), [top.position for top in tops]].mean(0)
        largest = mean.abs().topk(6).indices
        entries.append(
            {
                "subnetwork": k,
                "active": found.active[k],
                "contexts": [context(tokenizer, rows[top.row], top.position) for top in tops],
                "tokens": {tokenizer.decode([int(i)]): mean[i].item() for i in largest},
            }
        )
    return entries


def context(tokenizer, row, position: int) -> str:
    """The text up to a position, and the token that came next in brackets."""
    before = tokenizer.decode(row[max(0, position - 23) : position + 1])
    after = tokenizer.decode(row[position + 1 : position + 2])
    return f"{before} [{after}]"


if __name__ == "__main__":
    main()
