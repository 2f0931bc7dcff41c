"""Figures of the published toys, and of digits.

SPD's: vectors, importances, neurons, after "Stochastic Parameter Decomposition" (arXiv 2506.20790, figures 2 to 7). L3D's:
subnetworks, coefficients, effects, images, after "Local Loss Landscape Decomposition" (arXiv 2504.00194, figures 4 to 9). All
raise MissingExtraError where matplotlib is not installed.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import site_weight
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.experiments.l3d_scores import products
from tl_paramdecomp.experiments.scores import TOLERANCE, importance_matrices, lined_up, neuron_contributions
from tl_paramdecomp.patching.subnetworks import perturbed
from tl_paramdecomp.report.plotting import figure as styled
from tl_paramdecomp.report.plotting import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DELTAS = (-1.0, -0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5, 1.0)


# --- SPD --------------------------------------------------------------------------------------------------------------
@styled
def vector_figure(model: Any, decomposition: Decomposition) -> "Figure":
    """What the target, and each component that matters, writes or reads for every feature of a two-dimensional TMS.

    One row of panels for each site that has features on one side, one colour for each feature.
    """
    from matplotlib.lines import Line2D

    n = model.config.n_features
    matrices, rows = importance_matrices(model, decomposition, n), {}
    for name in ("linear1.weight", "linear2.weight"):
        V, U = decomposition[name].V.detach(), decomposition[name].U.detach()
        live = [c for c in lined_up(matrices[name]).tolist() if matrices[name][:, c].max() > TOLERANCE]
        panels = {"target": site_weight(model, name), **{f"component {c}": torch.outer(V[:, c], U[c]) for c in live}}
        rows[name] = {title: W.T if name == "linear2.weight" else W for title, W in panels.items()}
    width = max(map(len, rows.values()))
    figure, axes = subplots(len(rows), width, (1.55 * width, 1.75 * len(rows) + 0.5), sharex=True, sharey=True)
    reach = 1.15 * max(vectors.norm(dim=1).max().item() for panels in rows.values() for vectors in panels.values())
    for row, (name, panels) in zip(axes, rows.items(), strict=True):
        for ax in row[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, vectors) in zip(row, panels.items()):
            for j, (x, y) in enumerate(vectors.tolist()):
                ax.plot([0.0, x], [0.0, y], color=f"C{j % 10}", linewidth=1.4)
                ax.plot([x], [y], "o", color=f"C{j % 10}", markersize=3.5)
            ax.axhline(0.0, color="0.85", linewidth=0.6, zorder=0)
            ax.axvline(0.0, color="0.85", linewidth=0.6, zorder=0)
            ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name)
    style = {"marker": "o", "markersize": 3.5}
    handles = [Line2D([], [], color=f"C{j % 10}", label=f"feature {j}", **style) for j in range(n)]
    figure.legend(handles=handles, loc="outside lower center", ncols=n, frameon=False)
    return figure


@styled
def importance_figure(
    matrices: Mapping[str, Float[Tensor, "features C"]], spare: float = 0.5, dense: Container[str] = ()
) -> "Figure":
    """Importances of components when a single feature is active, by site, from `importance_matrices`.

    Components stand in the order of features, with a share of `spare` more than there are features; at `dense` sites, where
    they are not one per feature, in the order of their mean importance.
    """
    n, shown = len(next(iter(matrices.values()))), {}
    for name, matrix in matrices.items():
        order = matrix.mean(0).argsort(descending=True) if name in dense else lined_up(matrix)
        shown[name] = matrix[:, order[: round((1.0 + spare) * n) + 1]]
    widths = [m.shape[1] for m in shown.values()]
    size = sum(1.2 + 2.6 * w / max(widths) for w in widths) + 0.8, 3.1
    figure, axes = subplots(1, len(shown), size, width_ratios=widths)
    style, image = {"cmap": "Blues", "aspect": "equal", "interpolation": "nearest"}, None
    for ax, (name, matrix) in zip(axes[0], shown.items(), strict=True):
        image = ax.imshow(matrix.cpu().numpy(), vmin=0.0, vmax=1.0, **style)
        C = matrices[name].shape[1]
        ax.set(title=name, xlabel=f"component (first {matrix.shape[1]} of {C})" if matrix.shape[1] < C else "component")
    axes[0][0].set_ylabel("feature")
    assert image is not None
    figure.colorbar(image, ax=list(axes[0]), label="causal importance", shrink=0.85)
    return figure


@styled
def neuron_figure(model: Any, decomposition: Decomposition, n_features: int = 10) -> "Figure":
    """How much each neuron of a residual MLP adds to each of the first features: the target beside the components."""
    sides = {
        "target": neuron_contributions(model),
        "component of the feature": neuron_contributions(model, decomposition),
    }
    n, neurons = min(n_features, model.config.n_features), sides["target"].shape[1]
    figure, axes = subplots(2, 1, (7.2, 4.8), sharex=True, sharey=True)
    x, dots = torch.arange(n).unsqueeze(1) + torch.linspace(-0.3, 0.3, neurons), None
    for ax, (title, values) in zip(axes[:, 0], sides.items(), strict=True):
        shown = (x, values[:n], torch.arange(neurons).expand(n, -1))
        places, heights, colours = (part.flatten().cpu().numpy() for part in shown)
        dots = ax.scatter(places, heights, c=colours, cmap="viridis", s=9, linewidths=0)
        ax.axhline(0.0, color="0.7", linewidth=0.6, zorder=0)
        ax.set(title=title, ylabel="contribution")
    axes[1, 0].set(xlabel="feature", xticks=range(n))
    assert dots is not None
    figure.colorbar(dots, ax=list(axes[:, 0]), label="neuron")
    return figure


# --- L3D --------------------------------------------------------------------------------------------------------------
@styled
def subnetwork_figure(model: Any, decomposition: SubnetworkDecomposition) -> "Figure":
    """The target's matrices in the first column, every subnetwork's in the others; red is positive."""
    names, K = list(decomposition.sites), decomposition.n_subnetworks
    made, panels = subplots(len(names), K + 1, (1.2 * K + 2.0, 1.5 * len(names)))
    style = {"cmap": "RdBu_r", "aspect": "auto", "interpolation": "nearest"}
    for row, name in zip(panels, names):
        matrices = {"target": site_weight(model, name)}
        matrices |= {str(k): decomposition.subnetwork(k)[name].weight for k in range(K)}
        for panel, (title, matrix) in zip(row, matrices.items()):
            size = matrix.abs().max().item()
            panel.imshow(matrix.cpu().numpy(), vmin=-size, vmax=size, **style)
            panel.set(xticks=[], yticks=[], title=title if name == names[0] else "")
        row[0].set_ylabel(name.removesuffix(".weight"), fontsize=7)
    made.suptitle("Subnetworks beside the target: rows read, columns write; each on its own scale")
    return made


@styled
def coefficient_figure(model: Any, decomposition: SubnetworkDecomposition) -> "Figure":
    """What subnetworks of a linear toy say of A, against A: one colour for each subnetwork."""
    made, panels = subplots(1, 1, (4.5, 4.0))
    panel = panels[0, 0]
    for k, (found, truth) in enumerate(products(model, decomposition)):
        panel.scatter(truth.tolist(), found.tolist(), s=12, color=f"C{k % 10}")
    panel.set(
        xlabel="A, as the target was trained on", ylabel="product of the subnetwork's matrices",
        title="One row of A for each subnetwork",
    )  # fmt: skip
    panel.grid(alpha=0.3)
    return made


@styled
def effect_figure(model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]) -> "Figure":
    """How far each output changes as the model is moved along each subnetwork: medians over rows."""
    K, columns = decomposition.n_subnetworks, min(5, decomposition.n_subnetworks)
    lines = -(-K // columns)
    made, panels = subplots(lines, columns, (2.3 * columns, 2.1 * lines), sharey=True, sharex=True)
    with torch.no_grad():
        before = model(rows)
        for k, panel in zip(range(K), panels.flat):
            medians = []
            for delta in DELTAS:
                with perturbed(model, decomposition, {k: delta}):
                    medians.append((model(rows) - before).median(0).values)
            changes = torch.stack(medians).cpu()
            top = int(changes.abs().amax(0).argmax())
            for output, change in enumerate(changes.T):
                style = {"color": "C3", "linewidth": 1.6} if output == top else {"color": "grey", "linewidth": 0.7}
                panel.plot(DELTAS, change.tolist(), **style)
            panel.set_title(f"subnetwork {k}: output {top}")
            panel.grid(alpha=0.3)
    for panel in panels.flat[K:]:
        panel.axis("off")
    for panel in panels[-1]:
        panel.set_xlabel("moved by")
    for panel in panels[:, 0]:
        panel.set_ylabel("median change")
    return made


@styled
def image_figure(
    impacts: Float[Tensor, "images K"],
    images: Float[Tensor, "images 1 height width"],
    labels: Int[Tensor, " images"],
    titles: Mapping[int, str],
    heading: str,
    top: int = 5,
) -> "Figure":
    """The images in [0, 1] on which each subnetwork that has a title has the largest impact (`tlpd.impacts`), in a column."""
    made, panels = subplots(top, len(titles), (0.95 * len(titles) + 0.3, 0.9 * top + 0.8))
    for column, (k, title) in zip(panels.T, titles.items()):
        for panel, n in zip(column, impacts[:, k].topk(top).indices.tolist()):
            panel.imshow(images[n, 0].cpu().numpy(), cmap="Greys", vmin=0.0, vmax=1.0, interpolation="nearest")
            panel.text(0.02, 0.97, str(labels[n].item()), transform=panel.transAxes, va="top", color="C3")
            panel.axis("off")
        column[0].set_title(title, fontsize=7.5)
    made.suptitle(heading)
    return made
