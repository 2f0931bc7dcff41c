"""How well a decomposition finds mechanisms that are known: the published scores of the toy targets.

- MMCS and ML2R: direction and length of what components write for one feature, against the target's own. From
  "Attribution-based Parameter Decomposition" (arXiv 2501.14926, section 3.1), reported for SPD in "Stochastic Parameter
  Decomposition" (arXiv 2506.20790, table 1). MMCS alone says little: in two dimensions 20 random components score 0.98.
- Importance matrices of single features at 0.75, and their distance from one component per feature, or from a given number
  of components that are active throughout: SPD, figures 3 to 8 and its published code.
- L0 and alive components: importance above 0.1, per row and at any row of a sample.
- Scrubbed and anti-scrubbed errors (APD, section 3.2): half of the components removed, sparing the active features' own,
  or not.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt, site_weight
from tl_paramdecomp.analysis.activations import causal_importances
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.errors import MissingExtraError, ShapeError
from tl_paramdecomp.methods.divergence import kl as kl_of
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.patching.interventions import importance_masks

TOLERANCE = 0.1  # importances below this count as 0, those above 1 minus this as 1
PROBE = 0.75  # value of the one active feature in importance matrices


class FeatureScores(NamedTuple):
    """How one site's components match the target's feature directions."""

    cosines: Float[Tensor, " features"]  # largest cosine of any component with each feature's direction
    ratios: Float[Tensor, " features"]  # length of that component for the feature over the target's
    best: Int[Tensor, " features"]  # which component it is

    def figures(self, end: str = "") -> dict[str, float]:
        """Means over features (MMCS, ML2R), with their standard deviations over features; `end` is of their names."""
        parts = (("mmcs", self.cosines), ("ml2r", self.ratios))
        return {f"{k}{sd}{end}": of(v).item() for k, v in parts for sd, of in (("", torch.mean), ("_sd", torch.std))}


def feature_scores(
    amounts: Float[Tensor, "features C"],
    vectors: Float[Tensor, "C hidden"],
    target: Float[Tensor, "features hidden"],
    among: Bool[Tensor, " C"] | None = None,
) -> FeatureScores:
    """MMCS and ML2R, feature by feature: component c has `amounts[j, c] vectors[c]` where the target has `target[j]`.

    They are V, U and W for a matrix that reads features; U, V and W transposed for one that writes them. None: all components
    count, as published.
    """
    lengths = amounts.abs() * vectors.norm(dim=1)
    directions = torch.nn.functional.normalize(target, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    cosines = amounts.sign() * directions
    if among is not None:
        cosines = cosines.masked_fill(~among, -1.0)
    values, best = cosines.max(1)
    return FeatureScores(values, lengths.gather(1, best[:, None]).squeeze(1) / target.norm(dim=1), best)


def importance_matrices(
    model: Any, decomposition: Decomposition, n_features: int, value: float = PROBE
) -> dict[str, Float[Tensor, "features C"]]:
    """Importances of every component when one feature is active, by site."""
    return causal_importances(model, decomposition, value * torch.eye(n_features, device=adapt(model).device))


def need_scipy() -> Any:
    """What assigns components to features; MissingExtraError where scipy is not installed."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtraError(
            "Components are assigned to features by scipy, which is not installed; pip install 'tl-paramdecomp[toys]'."
        ) from error
    return linear_sum_assignment


def best_assignment(values: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """A column for each row, no column twice, so that the chosen values' sum is largest; ShapeError with too few columns."""
    n, m = values.shape
    if n > m:
        raise ShapeError(f"An assignment needs at least as many columns as rows; given {n} rows, {m} columns.")
    return torch.from_numpy(need_scipy()(values.detach().double().cpu().numpy(), maximize=True)[1])


def lined_up(matrix: Float[Tensor, "features C"]) -> Int[Tensor, " C"]:
    """The order of components that puts each feature's own on the diagonal, the others after them, strongest first.

    With fewer components than features, components are ordered by the feature they are strongest for.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return matrix.argmax(0).argsort(stable=True)
    own = best_assignment(matrix)
    rest = torch.ones(matrix.shape[1], dtype=torch.bool)
    rest[own] = False
    others = rest.nonzero().flatten()
    return torch.cat([own, others[matrix.cpu().sum(0)[others].argsort(descending=True, stable=True)]])


def identity_error(matrix: Float[Tensor, "features C"]) -> int:
    """Entries that keep an importance matrix from one component per feature, whatever the order of components.

    After lining up: entries above 0.1 off the diagonal, and entries below 0.9 on it. ShapeError with too few components.
    """
    if matrix.shape[0] > matrix.shape[1]:
        raise ShapeError(f"{matrix.shape[1]} components cannot be one per feature for {matrix.shape[0]} features.")
    ordered = matrix[:, lined_up(matrix).to(matrix.device)]
    own = ordered.diagonal()
    stray = (ordered > TOLERANCE).sum() - (own > TOLERANCE).sum()
    return int(stray + (own < 1.0 - TOLERANCE).sum())


def dense_error(matrix: Float[Tensor, "features C"], k: int, strong_entries: int = 1) -> int:
    """Entries that keep an importance matrix from exactly k components that are active for many features.

    The k components with most entries of at least 0.9: what each lacks to `strong_entries` of them; of the others, every
    entry above 0.1.
    """
    strong = (matrix >= 1.0 - TOLERANCE).sum(0)
    order = (strong + matrix.mean(0) / 2).argsort(descending=True)
    lacking = (strong_entries - strong[order[:k]]).clamp(min=0).sum() + max(0, k - matrix.shape[1]) * strong_entries
    return int(lacking + (matrix[:, order[k:]] > TOLERANCE).sum())


def pattern_errors(
    matrices: Mapping[str, Float[Tensor, "features C"]], one_per_feature: Iterable[str], dense: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Identity errors of sites whose components are one per feature, and dense errors of others, by name or glob.

    The sites of a glob are taken side by side: a feature may have its component in any one of several layers.
    """
    identity = {glob: identity_error(_side_by_side(matrices, glob)) for glob in one_per_feature}
    return identity, {glob: dense_error(_side_by_side(matrices, glob), k) for glob, k in dense.items()}


def _side_by_side(matrices: Mapping[str, Float[Tensor, "features _C"]], glob: str) -> Float[Tensor, "features C_total"]:
    return torch.cat([matrix for name, matrix in matrices.items() if fnmatch.fnmatchcase(name, glob)], 1)


def tms_scores(model: Any, decomposition: Decomposition) -> dict[str, Any]:
    """MMCS and ML2R of a toy model of superposition: of `linear1.weight` at the top, and of each side by site.

    `ml2r` takes the most parallel of all components, as published, even one that nothing uses; `ml2r_alive` of those that
    matter for some feature alone.
    """
    by_site = {}
    matrices = importance_matrices(model, decomposition, model.config.n_features)
    for name in ("linear1.weight", "linear2.weight"):
        components, W = decomposition[name], site_weight(model, name)
        V, U = components.V.detach(), components.U.detach()
        sides = (V, U, W) if name == "linear1.weight" else (U.T, V.T, W.T)
        alive = (matrices[name] > TOLERANCE).any(0)
        by_site[name] = feature_scores(*sides).figures() | feature_scores(*sides, among=alive).figures("_alive")
    return {**by_site["linear1.weight"], "feature_scores": by_site}


def neuron_contributions(model: Any, decomposition: Decomposition | None = None) -> Float[Tensor, "features neurons"]:
    """How much each neuron of a residual MLP adds to a feature's own output for that feature's input, ReLU aside.

    For feature j and neuron n of layer l: (W_E[j] . W_in[:, n]) (W_out[n] . W_E[j]). With a decomposition, of the one
    component of the layer's input matrix that is assigned to the feature in place of W_in.
    """
    embed, parts = model.W_E.detach(), []
    matrices = {} if decomposition is None else importance_matrices(model, decomposition, len(embed))
    for i in range(len(model.layers)):
        name = f"layers.{i}.mlp_in.weight"
        written = site_weight(model, f"layers.{i}.mlp_out.weight") @ embed.T
        if decomposition is None:
            read = embed @ site_weight(model, name)
        else:
            V, U = decomposition[name].V.detach(), decomposition[name].U.detach()
            own = lined_up(matrices[name])[: len(embed)]
            read = (embed @ V)[torch.arange(len(own)), own].unsqueeze(1) * U[own]
        parts.append(read * written.T)
    return torch.cat(parts, 1)


def scrubbed_errors(
    model: Any, decomposition: Decomposition, x: Float[Tensor, "rows features"], seed: int = 0
) -> dict[str, float]:
    """What a residual MLP loses when components of its input matrices are removed: mean square distances from labels.

    Each feature owns the component assigned to it in every layer. `target`: the model itself; `scrubbed`: half of the
    components removed for each row, none of them an active feature's; `anti_scrubbed`: the same, the active features' among
    them; `own_only`: the active features' alone; `none`: no component. The delta component stays out. Also, for one active
    feature: `own_share`, the part of what its own output gains over the bare embedding that goes when its own component
    does, and `others_share`, the same of another feature's component (mean over features).
    """
    embed = model.W_E.detach()
    n, labels = x.shape[1], x + torch.relu(x)
    own = {
        name: lined_up(matrix)[:n]
        for name, matrix in importance_matrices(model, decomposition, n).items()
        if name.endswith("mlp_in.weight")
    }
    generator = torch.Generator().manual_seed(seed)

    def run(rows: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        masks = decomposition.masks()
        for name, m in kept.items():
            masks = masks.with_values(name, m.to(rows), delta=0.0)
        with torch.no_grad(), patched(model, decomposition, masks):
            return model(rows)

    active, half, mine = x != 0, {}, {}
    for name, order in own.items():
        C = decomposition[name].n_components
        half[name] = torch.rand(len(x), C, generator=generator).to(x.device) < 0.5
        mine[name] = torch.zeros(len(x), C, dtype=torch.bool, device=x.device)
        mine[name][:, order.to(x.device)] = active
    nothing = {name: torch.zeros_like(m) for name, m in half.items()}
    with torch.no_grad():
        outputs = {"target": model(x)}
    outputs["scrubbed"] = run(x, {name: half[name] | mine[name] for name in own})
    outputs["anti_scrubbed"] = run(x, {name: half[name] & ~mine[name] for name in own})
    outputs["own_only"], outputs["none"] = run(x, mine), run(x, nothing)
    errors = {name: (y - labels).square().mean().item() for name, y in outputs.items()}

    single = PROBE * torch.eye(n, device=x.device, dtype=x.dtype)
    bare = (single @ embed @ embed.T).diagonal()
    lost = torch.empty(n, n)  # [component's feature, active feature]
    with torch.no_grad():
        gain = model(single).diagonal() - bare
    for j in range(n):
        masks = decomposition.masks()
        for name, order in own.items():
            masks = masks.ablate(name, [int(order[j])])
        with torch.no_grad(), patched(model, decomposition, masks):
            lost[j] = 1.0 - (model(single).diagonal() - bare).cpu() / gain.cpu()
    off = lost[~torch.eye(n, dtype=torch.bool)]
    return errors | {"own_share": lost.diagonal().mean().item(), "others_share": off.abs().mean().item()}


def induction_scores(
    model: Any, decomposition: Decomposition, tokens: Int[Tensor, "rows pos"], answers: Int[Tensor, " rows"]
) -> dict[str, Any]:
    """Accuracy, and KL from the target, of the induction transformer under each kind of mask."""
    with torch.no_grad():
        target = torch.log_softmax(model(tokens), -1)
        accuracy, kl = {"target": (target.argmax(-1) == answers).float().mean().item()}, {}
        for kind in ("unmasked", "stochastic", "importance", "rounded", "zero"):
            with patched(model, decomposition, importance_masks(model, decomposition, tokens, kind)):
                output = torch.log_softmax(model(tokens), -1)
            accuracy[kind] = (output.argmax(-1) == answers).float().mean().item()
            kl[kind] = kl_of(target, output).mean().item()
    return {"accuracy": accuracy, "kl": kl}
