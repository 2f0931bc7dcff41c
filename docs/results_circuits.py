"""Sections of the results page on circuits."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rendering import origin, table


def circuits(record: Mapping[str, Any]) -> str:
    """Circuits of each task, method by method; medians and ranges over seeds of learned components."""
    settings = record["settings"]
    order = {"gradients": "the size of gradients under random masks", "masks": "learned masks"}[settings["method"]]
    parts = [
        f"{origin(record)} SPD: {settings['steps']} steps of {settings['batch_size']} rows over all matrices of the "
        f"blocks. Circuits are ordered by {order}, pruned, and must keep {settings['faithfulness']:g} of the metric on "
        f"{settings['prompts']} prompts with everything else ablated to zero and the delta component kept, and "
        f"{settings.get('stochastic', 0.8):g} under stochastic masks. Figures are "
        f"normalised faithfulness on {settings['prompts']} others: median (least to "
        "most) over seeds."
    ]
    tasks = list(dict.fromkeys(one["task"] for one in record["circuits"]))
    for task in tasks:
        found: dict[str, list[Mapping[str, Any]]] = {}
        for one in record["circuits"]:
            if one["task"] == task:
                found.setdefault(one["label"].partition(",")[0], []).append(one)
        lines = [(label, len(runs), *figures(runs)) for label, runs in found.items()]
        columns = (
            "components", "seeds", "units", "parameters", "all else ablated", "stochastic", "random", "adversary, 20 steps",
            "random circuit, best", "complement", "CPR", "CMD",
        )  # fmt: skip
        model = statistics.median(one["model"] for one in record["circuits"] if one["task"] == task)
        title = f"{task.replace('_', ' ')} ({found['SPD' if 'SPD' in found else next(iter(found))][0]['metric']} {model:.2f}):"
        parts += [title, table(columns, lines)]
    return "\n\n".join(parts)


def figures(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line's figures."""
    kinds = list(runs[0]["faithfulness"])
    return [
        ranged([one["units"] for one in runs], "{:.0f}") + f" of {runs[0]['all_units']}",
        ranged([one["parameters"] / 1000 for one in runs], "{:.0f}k") + f" of {runs[0]['all_parameters'] / 1000:.0f}k",
        *(ranged([one["faithfulness"][kind] for one in runs], "{:.2f}") for kind in kinds),
        ranged([max(one["random_circuits"]) for one in runs], "{:.2f}"),
        ranged([one["complement"] for one in runs], "{:.2f}"),
        ranged([one["cpr"] for one in runs], "{:.2f}"),
        ranged([one["cmd"] for one in runs], "{:.2f}"),
    ]


def ranged(values: Sequence[float], form: str) -> str:
    """The median, with the range where there is one."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))} to {form.format(max(values))})"
