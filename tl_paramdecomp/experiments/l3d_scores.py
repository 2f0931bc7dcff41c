"""How well subnetworks are what is known of a target: the circuits of a toy, or classes of digits.

Purity of a subnetwork of a toy: the share of its first matrix's squared norm in the rows of one circuit's inputs. From "Local
Loss Landscape Decomposition" (arXiv 2504.00194, sections 3 and 4) and its code. On digits: the share of its impact on held-out
images that falls on the class where it has most of it. Ten classes give a tenth at least, and a little more by chance: the
control deals the classes anew among the images.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tl_paramdecomp.adapters import site_weight
from tl_paramdecomp.analysis.subnetworks import evaluate_subnetworks, impacts
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
from tl_paramdecomp.patching.subnetworks import perturbed

PURE = 0.95
DELTA = 0.3  # how far subnetworks are moved along to see which outputs change
CONTROLS = 20  # times that the classes are dealt anew


# --- toys -------------------------------------------------------------------------------------------------------------
def purities(decomposition: SubnetworkDecomposition, group: int = 1) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """Each subnetwork's share of its first matrix's energy in the `group` inputs of its own circuit, and which that is."""
    first = next(iter(decomposition.decoder.values()))
    energy = torch.stack([first.matrix(k).detach().square().sum(1) for k in range(decomposition.n_subnetworks)])
    return _largest_share(energy.unflatten(1, (-1, group)).sum(-1))


def _largest_share(energy: Float[Tensor, "K parts"]) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    return energy.max(1).values / energy.sum(1).clamp(min=1e-30), energy.argmax(1)


def toy_scores(
    model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]
) -> dict[str, Any]:
    """Held-out errors, dead subnetworks, and how many circuits of a TMS or Circuits have a live, pure one of their own."""
    group, function = getattr(model.config, "group", 1), getattr(model.config, "function", None)
    scores = _held_out(model, decomposition, rows)
    live = torch.tensor(scores["active"]) > 0.01
    pure, owner = purities(decomposition, group)
    scores |= {
        "purity": pure[live].median().item(),
        "circuits_found": len(set(owner[(pure >= PURE) & live].tolist())),
        "circuits": rows.shape[1] // group,
    }
    if function == "squared":
        shares, outputs = moved_outputs(model, decomposition, rows)
        scores |= {"moved_share": shares[live].median().item(), "moved_outputs": len(set(outputs[live].tolist()))}
    if function == "linear" and group == 1:
        scores |= read_off(model, decomposition)
    if function is None:
        scores |= {"cosine": min(feature_cosines(model, decomposition, owner))}
    return scores


def _held_out(model: Any, decomposition: SubnetworkDecomposition, rows: Tensor) -> dict[str, Any]:
    found = evaluate_subnetworks(model, decomposition, rows, rows_at_once=len(rows))
    errors = {"heldout_error": found.batch_error, "heldout_error_fixed_threshold": found.fixed_error}
    return {**errors, "bound": found.bound, "dead": found.dead, "active": found.active}


def moved_outputs(
    model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]
) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """For each subnetwork, the share of the squared change of all outputs in the one that changes most, and which it is."""
    with torch.no_grad():
        before, changes = model(rows), []
        for k in range(decomposition.n_subnetworks):
            with perturbed(model, decomposition, {k: DELTA}):
                changes.append((model(rows) - before).square().sum(0))
    return _largest_share(torch.stack(changes))


def read_off(model: Any, decomposition: SubnetworkDecomposition) -> dict[str, float]:
    """How well subnetworks of a linear toy say what each input does: their two matrices' product against the rows of A.

    Of each product the row of largest absolute sum is taken; its scale is the subnetwork's own.
    """
    found, truth = map(torch.stack, zip(*products(model, decomposition)))
    cosines, pooled = cosine_similarity(found, truth, dim=1), torch.stack([found.flatten(), truth.flatten()])
    return {"row_cosine": cosines.median().item(), "pooled_r": torch.corrcoef(pooled)[0, 1].item()}


def products(
    model: Any, decomposition: SubnetworkDecomposition
) -> list[tuple[Float[Tensor, " outputs"], Float[Tensor, " outputs"]]]:
    """Each subnetwork's largest row of the product of its two matrices, and the row of A for that input; a subnetwork and its
    negative have the same product."""
    first, last = list(decomposition.decoder.values())
    rows = []
    for k in range(decomposition.n_subnetworks):
        product = first.matrix(k).detach() @ last.matrix(k).detach()
        i = int(product.abs().sum(1).argmax())
        rows.append((product[i], model.A[i].detach()))
    return rows


def feature_cosines(model: Any, decomposition: SubnetworkDecomposition, owner: Int[Tensor, " K"]) -> list[float]:
    """For TMS: |cosine| of each subnetwork's row for its feature with the target's, the smaller of both matrices."""
    (first, read), (last, write) = (
        (decomposition.decoder[name], site_weight(model, name)) for name in ("linear1.weight", "linear2.weight")
    )
    found = []
    for k, j in enumerate(owner.tolist()):
        pairs = ((first.matrix(k).detach()[j], read[j]), (last.matrix(k).detach()[:, j], write[:, j]))
        found.append(min(abs(cosine_similarity(a, b, dim=0).item()) for a, b in pairs))
    return found


# --- digits -----------------------------------------------------------------------------------------------------------
def class_purities(
    impacts: Float[Tensor, "images K"], labels: Int[Tensor, " images"], classes: int = 10
) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """Each subnetwork's share of impact (`tlpd.impacts`) on its own top class, and which class that is."""
    zeros = impacts.new_zeros(classes, impacts.shape[1])
    return _largest_share(zeros.index_add_(0, labels.to(impacts.device), impacts).T)


def digit_scores(
    model: Any,
    decomposition: SubnetworkDecomposition,
    images: Float[Tensor, "images 1 height width"],
    labels: Int[Tensor, " images"],
) -> dict[str, Any]:
    """Held-out errors, dead subnetworks, how often they are active, and their purities with a control."""
    found = _held_out(model, decomposition, images)
    active = torch.tensor(found["active"])
    live, impact = active > 0, impacts(model, decomposition, images)
    pure, owner = class_purities(impact, labels)
    generator = torch.Generator().manual_seed(0)
    dealt = [
        class_purities(impact, labels[torch.randperm(len(labels), generator=generator)])[0][live].median()
        for _ in range(CONTROLS)
    ]
    shares = (active[live].min(), active[live].median(), active.max())
    return found | {
        "p_act": dict(zip(("least", "median", "most"), (share.item() for share in shares))),
        "purity": pure[live].median().item(),
        "purity_largest": pure[live].max().item(),
        "purity_shuffled": torch.stack(dealt).mean().item(),
        "classes_owned": len(set(owner[live].tolist())),
        "accuracy": (model(images).argmax(-1) == labels.to(images.device)).float().mean().item(),
    }


def chosen_subnetworks(
    impacts: Float[Tensor, "images K"], labels: Int[Tensor, " images"], active: list[float], classes: int = 10
) -> dict[int, int]:
    """For each class the live subnetwork that is purest for it, if it is any's own: from subnetwork to class."""
    pure, owner = class_purities(impacts, labels, classes)
    pure, found = pure * (torch.tensor(active, device=pure.device) > 0), {}
    for c in range(classes):
        shares = pure * (owner == c)
        if bool(shares.max() > 0):
            found[int(shares.argmax())] = c
    return found
