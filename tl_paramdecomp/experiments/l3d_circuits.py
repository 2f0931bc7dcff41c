"""Whether subnetworks are the circuits of a toy whose circuits are known.

Purity of a subnetwork: the share of its first matrix's squared norm in the rows of one circuit's inputs. From "Local Loss
Landscape Decomposition" (arXiv 2504.00194, sections 3 and 4) and its code.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import site_weight
from tl_paramdecomp.analysis.subnetworks.impacts import evaluate_subnetworks
from tl_paramdecomp.components.subnetwork_decomposition import SubnetworkDecomposition
from tl_paramdecomp.patching.subnetworks import perturbed

PURE = 0.95
DELTA = 0.3
"""How far subnetworks are moved along to see which outputs change."""


def purities(decomposition: SubnetworkDecomposition, group: int = 1) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """Each subnetwork's share of its first matrix's energy in the inputs of its own circuit, and which circuit that is.

    Args:
        decomposition: Of a toy whose first site reads the inputs.
        group: Inputs of each circuit.
    """
    first = next(iter(decomposition.decoder.values()))
    energy = torch.stack([first.matrix(k).detach().square().sum(1) for k in range(decomposition.n_subnetworks)])
    by_circuit = energy.unflatten(1, (-1, group)).sum(-1)
    return by_circuit.max(1).values / energy.sum(1).clamp(min=1e-30), by_circuit.argmax(1)


def toy_scores(
    model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]
) -> dict[str, Any]:
    """Held-out errors, dead subnetworks, and how many circuits have a live, pure subnetwork of their own.

    Args:
        model: A toy of `toy_models`: TMS, or circuits.
        decomposition: Of all its sites.
        rows: Held-out rows, a thousand or so.
    """
    group = getattr(model.config, "group", 1)
    circuits = rows.shape[1] // group
    found = evaluate_subnetworks(model, decomposition, rows, rows_at_once=len(rows))
    live = torch.tensor(found.active) > 0.01
    pure, owner = purities(decomposition, group)
    claimed = set(owner[(pure >= PURE) & live].tolist())
    scores = {
        "heldout_error": found.batch_error,
        "heldout_error_fixed_threshold": found.fixed_error,
        "bound": found.bound,
        "purity": pure[live].median().item(),
        "circuits_found": len(claimed),
        "circuits": circuits,
        "dead": found.dead,
        "active": found.active,
    }
    if getattr(model.config, "function", None) == "squared":
        shares, outputs = moved_outputs(model, decomposition, rows)
        scores |= {"moved_share": shares[live].median().item(), "moved_outputs": len(set(outputs[live].tolist()))}
    if getattr(model.config, "function", None) == "linear" and group == 1:
        scores |= read_off(model, decomposition)
    if not hasattr(model.config, "function"):
        scores |= {"cosine": min(feature_cosines(model, decomposition, owner))}
    return scores


def moved_outputs(
    model: Any, decomposition: SubnetworkDecomposition, rows: Float[Tensor, "rows inputs"]
) -> tuple[Float[Tensor, " K"], Int[Tensor, " K"]]:
    """For each subnetwork, the share of the squared change of all outputs in the one that changes most, and which it is."""
    with torch.no_grad():
        before, changes = model(rows), []
        for k in range(decomposition.n_subnetworks):
            with perturbed(model, decomposition, {k: DELTA}):
                changes.append((model(rows) - before).square().sum(0))
    energy = torch.stack(changes)
    return energy.max(1).values / energy.sum(1).clamp(min=1e-30), energy.argmax(1)


def read_off(model: Any, decomposition: SubnetworkDecomposition) -> dict[str, float]:
    """How well subnetworks of a linear toy say what each input does: their two matrices' product against the rows of A.

    Of each product the row of largest absolute sum is taken; its scale is the subnetwork's own.
    """
    estimates, truths, cosines = [], [], []
    for found, truth in products(model, decomposition):
        estimates.append(found)
        truths.append(truth)
        cosines.append(torch.nn.functional.cosine_similarity(found, truth, dim=0).item())
    pooled = torch.corrcoef(torch.stack([torch.cat(estimates), torch.cat(truths)]))[0, 1]
    return {"row_cosine": float(torch.tensor(cosines).median()), "pooled_r": pooled.item()}


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
        truth = model.A[i].detach()
        rows.append((product[i], truth))
    return rows


def feature_cosines(model: Any, decomposition: SubnetworkDecomposition, owner: Int[Tensor, " K"]) -> list[float]:
    """For TMS: |cosine| of each subnetwork's row for its feature with the target's, the smaller of both matrices."""
    (first, read), (last, write) = (
        (decomposition.decoder[name], site_weight(model, name)) for name in ("linear1.weight", "linear2.weight")
    )
    found = []
    for k, j in enumerate(owner.tolist()):
        pairs = ((first.matrix(k).detach()[j], read[j]), (last.matrix(k).detach()[:, j], write[:, j]))
        found.append(min(abs(torch.nn.functional.cosine_similarity(a, b, dim=0).item()) for a, b in pairs))
    return found
