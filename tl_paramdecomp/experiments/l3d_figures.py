"""The pictures of Local Loss Landscape Decomposition's toys (arXiv 2504.00194, figures 4 to 9), and of digits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import site_weight
from tl_paramdecomp.components.subnetwork_decomposition import SubnetworkDecomposition
from tl_paramdecomp.experiments.l3d_circuits import products
from tl_paramdecomp.patching.subnetworks import perturbed
from tl_paramdecomp.report.plotting import figure, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DELTAS = (-1.0, -0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5, 1.0)


@figure
def subnetwork_figure(model: Any, decomposition: SubnetworkDecomposition) -> "Figure":
    """The target's matrices in the first column, every subnetwork's in the others; red is positive.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names, K = list(decomposition.sites), decomposition.n_subnetworks
    made, panels = subplots(len(names), K + 1, (1.2 * K + 2.0, 1.5 * len(names)))
    for row, name in enumerate(names):
        matrices = [site_weight(model, name)] + [decomposition.subnetwork(k)[name].weight for k in range(K)]
        for column, matrix in enumerate(matrices):
            panel, size = panels[row, column], matrix.abs().max().item()
            panel.imshow(
                matrix.cpu().numpy(), cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto", interpolation="nearest"
            )
            panel.set_xticks([])
            panel.set_yticks([])
            if not row:
                panel.set_title("target" if not column else f"{column - 1}")
        panels[row, 0].set_ylabel(name.removesuffix(".weight"), fontsize=7)
    made.suptitle("Subnetworks beside the target: rows read, columns write; each on its own scale")
    return made


@figure
def coefficient_figure(model: Any, decomposition: SubnetworkDecomposition) -> "Figure":
    """What subnetworks of a linear toy say of A, against A: one colour for each subnetwork.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    made, panels = subplots(1, 1, (4.5, 4.0))
    panel = panels[0, 0]
    for k, (found, truth) in enumerate(products(model, decomposition)):
        panel.scatter(truth.tolist(), found.tolist(), s=12, color=f"C{k % 10}")
    panel.set_xlabel("A, as the target was trained on")
    panel.set_ylabel("product of the subnetwork's matrices")
    panel.set_title("One row of A for each subnetwork")
    panel.grid(alpha=0.3)
    return made


@figure
def effect_figure(model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]) -> "Figure":
    """How far each output changes as the model is moved along each subnetwork: medians over rows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    K = decomposition.n_subnetworks
    columns = min(5, K)
    made, panels = subplots(
        -(-K // columns), columns, (2.3 * columns, 2.1 * -(-K // columns)), sharey=True, sharex=True
    )
    with torch.no_grad():
        before = model(rows)
        for k in range(K):
            changes = []
            for delta in DELTAS:
                with perturbed(model, decomposition, {k: delta}):
                    changes.append((model(rows) - before).median(0).values)
            lines = torch.stack(changes).cpu()
            top, panel = int(lines.abs().amax(0).argmax()), panels.flat[k]
            for output in range(lines.shape[1]):
                strong = output == top
                panel.plot(
                    DELTAS,
                    lines[:, output].tolist(),
                    color="C3" if strong else "grey",
                    linewidth=1.6 if strong else 0.7,
                )
            panel.set_title(f"subnetwork {k}: output {top}")
            panel.grid(alpha=0.3)
    for panel in panels.flat[K:]:
        panel.axis("off")
    for panel in panels[-1]:
        panel.set_xlabel("moved by")
    for panel in panels[:, 0]:
        panel.set_ylabel("median change")
    return made


@figure
def image_figure(
    impacts: Float[Tensor, "images K"],
    images: Float[Tensor, "images 1 height width"],
    labels: Int[Tensor, " images"],
    titles: Mapping[int, str],
    heading: str,
    top: int = 5,
) -> "Figure":
    """The images on which each of some subnetworks has the largest impact, one column for each subnetwork.

    Args:
        impacts: From `tlpd.impacts`.
        images: The same rows, in [0, 1].
        labels: Their classes, written into each image's corner.
        titles: By subnetwork.
        heading: Over all of them.
        top: Images for each.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    made, panels = subplots(top, len(titles), (0.95 * len(titles) + 0.3, 0.9 * top + 0.8))
    for column, (k, title) in enumerate(titles.items()):
        chosen = impacts[:, k].topk(top).indices.tolist()
        for row, n in enumerate(chosen):
            panel = panels[row, column]
            panel.imshow(images[n, 0].cpu().numpy(), cmap="Greys", vmin=0.0, vmax=1.0, interpolation="nearest")
            panel.text(0.02, 0.97, str(labels[n].item()), transform=panel.transAxes, va="top", color="C3")
            panel.axis("off")
        panels[0, column].set_title(title, fontsize=7.5)
    made.suptitle(heading)
    return made
