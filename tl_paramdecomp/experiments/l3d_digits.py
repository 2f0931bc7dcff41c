"""Whether subnetworks of a network that reads digits are each about a class.

Purity of a subnetwork: the share of its impact on held-out images that falls on the class where it has most of it. Ten classes
give a tenth at least, and a little more by chance: the control deals the classes anew among the images.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.analysis.subnetworks.impacts import evaluate_subnetworks, impacts
from tl_paramdecomp.components.subnetwork_decomposition import SubnetworkDecomposition

CONTROLS = 20
"""Times that the classes are dealt anew."""


def class_purities(
    impacts: Float[Tensor, "images K"], labels: Int[Tensor, " images"], classes: int = 10
) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """Each subnetwork's share of impact on its own top class, and which class that is.

    Args:
        impacts: From `tlpd.impacts`, not negative.
        labels: Classes of the images.
        classes: How many there are.
    """
    by_class = impacts.new_zeros(classes, impacts.shape[1]).index_add_(0, labels.to(impacts.device), impacts)
    share = by_class / by_class.sum(0).clamp(min=1e-30)
    return share.max(0).values, share.argmax(0)


def digit_scores(
    model: Any,
    decomposition: SubnetworkDecomposition,
    images: Float[Tensor, "images 1 height width"],
    labels: Int[Tensor, " images"],
) -> dict[str, Any]:
    """Held-out errors, dead subnetworks, how often they are active, and their purities with a control.

    Args:
        model: A network that gives logits of classes.
        decomposition: Of its sites, from `L3D`.
        images: Held-out images, a few hundred.
        labels: Their classes.
    """
    found = evaluate_subnetworks(model, decomposition, images, rows_at_once=len(images))
    active = torch.tensor(found.active)
    live = active > 0
    impact = impacts(model, decomposition, images)
    pure, owner = class_purities(impact, labels)
    generator = torch.Generator().manual_seed(0)
    dealt = [
        class_purities(impact, labels[torch.randperm(len(labels), generator=generator)])[0][live].median()
        for _ in range(CONTROLS)
    ]
    return {
        "heldout_error": found.batch_error,
        "heldout_error_fixed_threshold": found.fixed_error,
        "bound": found.bound,
        "dead": found.dead,
        "p_act": {
            "least": active[live].min().item(),
            "median": active[live].median().item(),
            "most": active.max().item(),
        },
        "purity": pure[live].median().item(),
        "purity_largest": pure[live].max().item(),
        "purity_shuffled": torch.stack(dealt).mean().item(),
        "classes_owned": len(set(owner[live].tolist())),
        "accuracy": (model(images).argmax(-1) == labels.to(images.device)).float().mean().item(),
        "active": found.active,
    }


def chosen_subnetworks(
    impacts: Float[Tensor, "images K"], labels: Int[Tensor, " images"], active: list[float], classes: int = 10
) -> dict[int, int]:
    """For each class the live subnetwork that is purest for it, if it is any's own: from subnetwork to class."""
    pure, owner = class_purities(impacts, labels, classes)
    pure = torch.where(torch.tensor(active, device=pure.device) > 0, pure, torch.zeros_like(pure))
    found = {}
    for c in range(classes):
        shares = torch.where(owner == c, pure, torch.zeros_like(pure))
        if bool(shares.max() > 0):
            found[int(shares.argmax())] = c
    return found
