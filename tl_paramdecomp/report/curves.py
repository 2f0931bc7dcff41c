"""Curves of several runs over training: sparsity, and KL from the target under each kind of mask."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_paramdecomp.report.plotting import figure, save, subplots

PANELS = {
    "l0": "L0: active components per token",
    "unmasked": "KL, all components, no delta",
    "rounded": "KL, only components above 0.1",
    "stochastic": "KL, stochastic masks",
    "pgd": "KL, 20-step adversary",
}


@figure
def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """One panel for each figure, one colour for each method, one line for each seed.

    Args:
        records: Runs, each {"method", "seed", "points": [{"step", "l0", "unmasked", ...}, ...]}.
        path: Where the PNG goes.
        title: Above all panels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    methods = list(dict.fromkeys(record["method"] for record in records))
    made, panels = subplots(2, 3, (11.0, 6.2))
    for axis, (key, label) in zip(panels.flat, PANELS.items()):
        for record in records:
            steps, values = ([point[name] for point in record["points"]] for name in ("step", key))
            axis.plot(steps, values, color=f"C{methods.index(record['method'])}", marker=".", linewidth=1.2)
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
