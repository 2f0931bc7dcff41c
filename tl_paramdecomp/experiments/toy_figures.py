"""Figures of the toy targets as the papers show them: vectors, importances, neurons.

After "Stochastic Parameter Decomposition" (arXiv 2506.20790), figures 2 to 7.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import site_weight
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.experiments.scores import TOLERANCE, importance_matrices, lined_up, neuron_contributions
from tl_paramdecomp.report.plotting import figure as styled
from tl_paramdecomp.report.plotting import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def vector_figure(model: Any, decomposition: Decomposition) -> "Figure":
    """What the target, and each component that matters, writes or reads for every feature of a two-dimensional TMS.

    One row of panels for each site that has features on one side, one colour for each feature.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    n = model.config.n_features
    matrices = importance_matrices(model, decomposition, n)
    rows = []
    for name in ("linear1.weight", "linear2.weight"):
        V, U = decomposition[name].V.detach(), decomposition[name].U.detach()
        live = [c for c in lined_up(matrices[name]).tolist() if matrices[name][:, c].max() > TOLERANCE]
        W = site_weight(model, name)
        transposed = name == "linear2.weight"
        panels = [("target", W.T if transposed else W)]
        for c in live:
            part = torch.outer(V[:, c], U[c])
            panels.append((f"component {c}", part.T if transposed else part))
        rows.append((name, panels))
    width = max(len(panels) for _, panels in rows)
    figure, axes = subplots(len(rows), width, (1.55 * width, 1.75 * len(rows) + 0.5), sharex=True, sharey=True)
    reach = 1.15 * max(vectors.norm(dim=1).max().item() for _, panels in rows for _, vectors in panels)
    for row, (name, panels) in zip(axes, rows, strict=True):
        for ax in row[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, vectors) in zip(row, panels):
            _arrows(ax, vectors)
            ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name)
    _legend(figure, n)
    return figure


@styled
def importance_figure(
    matrices: Mapping[str, Float[Tensor, "features C"]], spare: float = 0.5, dense: Container[str] = ()
) -> "Figure":
    """Importances of components when a single feature is active, by site; components in the order of features.

    Args:
        matrices: From `importance_matrices`.
        spare: How many components to show beyond one per feature, as a share of the features.
        dense: Sites whose components are not one per feature; they stand in the order of their mean importance.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    n = len(next(iter(matrices.values())))
    orders = {
        name: matrix.mean(0).argsort(descending=True) if name in dense else lined_up(matrix)
        for name, matrix in matrices.items()
    }
    shown = {name: matrix[:, orders[name][: round((1.0 + spare) * n) + 1]] for name, matrix in matrices.items()}
    widths = [m.shape[1] for m in shown.values()]
    figure, axes = subplots(
        1, len(shown), (sum(1.2 + 2.6 * w / max(widths) for w in widths) + 0.8, 3.1), width_ratios=widths
    )
    image = None
    for ax, (name, matrix) in zip(axes[0], shown.items(), strict=True):
        image = ax.imshow(
            matrix.cpu().numpy(), vmin=0.0, vmax=1.0, cmap="Blues", aspect="equal", interpolation="nearest"
        )
        C = matrices[name].shape[1]
        ax.set(title=name, xlabel=f"component (first {matrix.shape[1]} of {C})" if matrix.shape[1] < C else "component")
    axes[0][0].set_ylabel("feature")
    assert image is not None
    figure.colorbar(image, ax=list(axes[0]), label="causal importance", shrink=0.85)
    return figure


@styled
def neuron_figure(model: Any, decomposition: Decomposition, n_features: int = 10) -> "Figure":
    """How much each neuron of a residual MLP adds to each of the first features: the target beside the components.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sides = {
        "target": neuron_contributions(model),
        "component of the feature": neuron_contributions(model, decomposition),
    }
    n, neurons = min(n_features, model.config.n_features), sides["target"].shape[1]
    figure, axes = subplots(2, 1, (7.2, 4.8), sharex=True, sharey=True)
    dots = None
    for ax, (title, values) in zip(axes[:, 0], sides.items(), strict=True):
        x = torch.arange(n).unsqueeze(1) + torch.linspace(-0.3, 0.3, neurons)
        neuron = torch.arange(neurons).expand(n, -1)
        places, heights, colours = (t.flatten().cpu().numpy() for t in (x, values[:n], neuron))
        dots = ax.scatter(places, heights, c=colours, cmap="viridis", s=9, linewidths=0)
        ax.axhline(0.0, color="0.7", linewidth=0.6, zorder=0)
        ax.set(title=title, ylabel="contribution")
    axes[1, 0].set(xlabel="feature", xticks=range(n))
    assert dots is not None
    figure.colorbar(dots, ax=list(axes[:, 0]), label="neuron")
    return figure


def _arrows(ax: Any, vectors: Float[Tensor, "features 2"]) -> None:
    for j, (x, y) in enumerate(vectors.tolist()):
        ax.plot([0.0, x], [0.0, y], color=_colour(j), linewidth=1.4)
        ax.plot([x], [y], "o", color=_colour(j), markersize=3.5)
    ax.axhline(0.0, color="0.85", linewidth=0.6, zorder=0)
    ax.axvline(0.0, color="0.85", linewidth=0.6, zorder=0)


def _legend(figure: Any, n: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(j), marker="o", markersize=3.5, label=f"feature {j}") for j in range(n)]
    figure.legend(handles=handles, loc="outside lower center", ncols=n, frameon=False)


def _colour(feature: int) -> str:
    return f"C{feature % 10}"
