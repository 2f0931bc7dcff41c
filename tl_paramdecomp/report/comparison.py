"""Curves of a comparison: KL against how sparse a method is, one colour for each method."""

import statistics
from pathlib import Path

from tl_paramdecomp.analysis.evaluation.comparison import Axis, Comparison, Metric
from tl_paramdecomp.report.plotting import figure, save, subplots

AXES: dict[Axis, str] = {"l0": "L0: active components per token", "active_parameters": "active parameters per token"}
METRICS: dict[Metric, str] = {
    "rounded": "only components above 0.1",
    "stochastic": "stochastic masks",
    "adversarial": "adversary",
}


@figure
def draw_comparison(found: Comparison, path: Path, title: str) -> Path:
    """One panel for each KL and each meaning of sparsity; a dot for each run, a line through the medians over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    made, panels = subplots(len(AXES), len(found.measured), (11.5, 7.0), sharey="col")
    zero, kl = found.points[0]["zero"], found.measure == "kl"
    what = "KL" if kl else "Mean square"
    for row, (axis_name, axis_label) in enumerate(AXES.items()):
        for column, metric in enumerate(found.measured):
            panel = panels[row, column]
            for i, method in enumerate(found.methods):
                points = [p for p in found.points if p["method"] == method and p[axis_name] > 0]
                style = {"color": f"C{i}", "label": method}
                panel.scatter([p[axis_name] for p in points], [p[metric] for p in points], s=9, color=style["color"])
                by_sparsity = {s: [p for p in points if p["sparsity"] == s] for s in {p["sparsity"] for p in points}}
                keys = (axis_name, metric)
                line = sorted([statistics.median(p[k] for p in same) for k in keys] for same in by_sparsity.values())
                panel.plot([x for x, _ in line], [y for _, y in line], linewidth=1.3, **style)
            panel.axhline(zero, color="grey", linestyle=":", linewidth=1, label="all components removed")
            whole = found.ranks if axis_name == "l0" else found.parameters
            panel.axvline(
                whole / 4, color="grey", linestyle="--", linewidth=0.8, label="a quarter of the dense matrices"
            )
            panel.set_xscale("log")
            panel.set_yscale("log")
            for side in (panel.xaxis, panel.yaxis):
                side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                side.set_major_formatter(StrMethodFormatter("{x:g}"))
                side.set_minor_formatter(NullFormatter())
            if axis_name == "active_parameters":
                panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
                panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            panel.grid(alpha=0.3)
            if not row:
                steps = f" of {adversary_steps(found)} steps" if metric == "adversarial" else ""
                panel.set_title(f"{what}, {METRICS[metric]}{steps}")
            panel.set_xlabel(axis_label)
    for panel in panels[:, 0]:
        panel.set_ylabel("nats per token" if kl else "mean square")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    made.suptitle(title)
    return save(made, path)


def adversary_steps(found: Comparison) -> int:
    """Of the adversary whose KL a comparison keeps."""
    ladder = found.protocol["evaluation"]["ladder"]
    return 20 if 20 in ladder else max(ladder)
