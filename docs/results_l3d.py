"""Sections of the results page on Local Loss Landscape Decomposition."""

import statistics
from collections.abc import Mapping
from typing import Any

from rendering import origin, table


def subnetworks(record: Mapping[str, Any]) -> str:
    """A toy of L3D: a row for each seed, and the published error."""
    first = record["seeds"][0]
    keys = [key for key in L3D_KEYS if key in first]
    rows = [
        (seed["seed"], *(f"{seed[key]:.3f}" if isinstance(seed[key], float) else seed[key] for key in keys))
        for seed in record["seeds"]
    ]
    published = ("published", *(record["expected"].get(key, "") for key in keys))
    text = f"{record['settings']['steps']} steps of {record['settings']['batch_size']} rows; the published code's variants."
    return f"{origin(record)} {text}\n\n{table(('seed', *(L3D_KEYS[key] for key in keys)), [*rows, published])}"


L3D_KEYS = {
    "heldout_error": "held-out error",
    "heldout_error_fixed_threshold": "with the learned threshold",
    "bound": "truncated SVD",
    "circuits_found": "circuits found",
    "circuits": "of",
    "purity": "purity, median",
    "dead": "dead",
    "cosine": "least cosine with the target's rows",
    "row_cosine": "cosine with rows of A, median",
    "pooled_r": "pooled r with A",
    "moved_share": "share of change in one output, median",
    "moved_outputs": "outputs moved",
}


DIGITS_KEYS = {
    "accuracy": "network's accuracy",
    "heldout_error": "held-out error",
    "heldout_error_fixed_threshold": "with the learned threshold",
    "bound": "truncated SVD",
    "dead": "dead",
    "purity": "purity, median",
    "purity_shuffled": "the same, classes shuffled",
    "purity_largest": "purity, largest",
    "classes_owned": "classes",
}
DIGITS = (
    "Purity: the share of a live subnetwork's impact on held-out images that falls on its own top class, of ten; classes: how "
    "many are some subnetwork's top class. The paper's convolutional network is a mobilenet on CIFAR (error .23, 40 % of the "
    "subnetworks dead). Network, images and settings are others here, so that its figures do not compare with these."
)


def digits(record: Mapping[str, Any]) -> str:
    """L3D on the network that reads digits: a row for each seed."""
    rows = []
    for seed in record["seeds"]:
        figures = (f"{seed[key]:.3f}" if isinstance(seed[key], float) else seed[key] for key in DIGITS_KEYS)
        spread_of = " / ".join(f"{seed['p_act'][key]:.3f}" for key in ("least", "median", "most"))
        rows.append((seed["seed"], *figures, spread_of))
    settings = record["settings"]
    method = settings["method"]
    text = (
        f"{settings['steps']} steps of {settings['batch_size']} images, {method['n_subnetworks']} subnetworks of rank "
        f"{method['rank']} over all weights; {settings['target']['held_out']} held-out images."
    )
    columns = ("seed", *DIGITS_KEYS.values(), "active, of the live: least / median / most")
    picture = f"![top images of ten subnetworks](results/images_{record['name']}.png)"
    return "\n\n".join((f"{origin(record)} {text}", table(columns, rows), DIGITS, picture))


def sweeps(record: Mapping[str, Any]) -> str:
    """Held-out errors of the toys as the number of subnetworks or their rank changes."""
    parts = [origin(record)]
    titles = {"squares": "Five squares, rank 1", "ranks": "Six groups of inputs, 10 subnetworks"}
    for label, rows in record["sweeps"].items():
        lines = [
            (
                row["n_subnetworks"], row["rank"], f"**{statistics.median(row['errors']):.3f}**",
                ", ".join(f"{error:.3f}" for error in row["errors"]), f"{statistics.median(row['bounds']):.3f}",
            )
            for row in rows
        ]  # fmt: skip
        columns = ("subnetworks", "rank", "held-out error, median", "by seed", "truncated SVD, median")
        parts.append(f"{titles[label]}:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)


def language_model(record: Mapping[str, Any]) -> str:
    """Errors beside their controls, selectivity, and what some subnetworks are about."""
    settings = record["settings"]
    parts = [
        f"{origin(record)} {settings['steps']} steps of {settings['batch_size']} rows, a tenth of the coefficients kept, seed "
        f"{settings['seed']}; one random position of each row is a sample, compared with another's output (KL)."
    ]
    for found in record["places"].values():
        rows, moved = [], []
        for one in found["dictionaries"]:
            bound = "" if one["bound"] is None else f"{one['bound']:.3f}"
            active = " / ".join(f"{one[key]:.3f}" for key in ("active_min", "active_median", "active_max"))
            figures = (f"{one['batch_error']:.3f}", f"{one['fixed_error']:.3f}", bound, one["dead"], active)
            rows.append((one["label"], one["n"], *figures))
            for delta, change in one.get("selectivity", {}).items():
                low, high = change["quartiles"]
                moved.append(
                    (
                        one["label"], delta, f"**{change['median']:.1f}**", f"{low:.1f} to {high:.1f}",
                        f"{change['share_at_least_5']:.0%}", f"{change['median_change_of_top']:.2g}",
                    )
                )  # fmt: skip
        columns = ("directions", "number", "held-out error", "with their threshold", "truncated SVD", "dead")
        parts.append(
            f"`{found['sites']}`, rank {found['rank']}; {found['dictionaries'][0]['samples']} held-out samples:"
        )
        parts.append(table((*columns, "active: least / median / most"), rows))
        if moved:
            parts.append(
                "Moved by delta both ways, how much farther the ten top samples' outputs go than all others' (KL, live "
                "directions):"
            )
            columns = (
                "directions",
                "delta",
                "ratio, median",
                "quartiles",
                "ratio of 5 or more",
                "KL of top samples, nats",
            )
            parts.append(table(columns, moved))
        parts += [shown(one) for one in found.get("subnetworks", ())]
    return "\n\n".join(parts)


def shown(one: Mapping[str, Any]) -> str:
    """One subnetwork's top samples and the tokens it moves."""
    tokens = ", ".join(f"`{token or ' '}` {slope:+.2f}" for token, slope in one["tokens"].items())
    contexts = "\n".join(f"- `{text}`".replace("\n", " ") for text in one["contexts"])
    return f"Subnetwork {one['subnetwork']}, active on {one['active']:.0%}; logits move most: {tokens}\n\n{contexts}"


def tasks(record: Mapping[str, Any]) -> str:
    """What switching a task's subnetworks off leaves of every task."""
    settings, names = record["settings"], list(record["before"])
    parts = [
        f"{origin(record)} {settings['subnetworks']} subnetworks of rank {settings['rank']} over all matrices of the blocks, "
        f"{settings['steps']} steps, seed {settings['seed']}; held-out error {record['batch_error']:.3f}. What is left of the "
        "probability of right answers on test prompts when the model is moved along one subnetwork, by the delta that halves "
        "its own task's on validation prompts:"
    ]
    columns = ("chosen for", "subnetwork", "delta", *names, "KL on text", "hurts its own most")
    for label, rows in (
        ("found by impacts", record["found"]),
        ("random subnetworks, for comparison", record["random"]),
    ):
        lines = [
            (
                row["task"], row["subnetwork"], row["delta"], *(f"{row['left'][name]:.2f}" for name in names),
                f"{row['text_kl']:.2f}", "yes" if row["hurts_its_own_most"] else "no",
            )
            for row in rows
        ]  # fmt: skip
        parts.append(f"{label[0].upper()}{label[1:]}:\n\n{table(columns, lines)}")
    return "\n\n".join(parts)
