"""A small record of every kind, with every key that its rows have."""

from typing import Any

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.contexts.logit_lens import LensToken, LogitLens
from tl_paramdecomp.analysis.contexts.token_statistics import ComponentTokens, TokenCount, TokenStatistics
from tl_paramdecomp.analysis.contexts.top_contexts import ComponentContexts, Context, TopContexts
from tl_paramdecomp.analysis.effects.component_heads import ComponentHeads
from tl_paramdecomp.analysis.effects.sweep import Sweep
from tl_paramdecomp.analysis.evaluation.matching import NearestComponents
from tl_paramdecomp.analysis.records import Record
from tl_paramdecomp.training.estimate import Estimate

MASK = {
    "site": "all", "masks": "rounded 0.1", "delta": "absent", "kl": 0.5, "kl_sd": None, "ce_difference": 0.25,
    "ce_recovered": 0.75, "top1": 0.5,
}  # fmt: skip
ADVERSARY = {"steps": 20, "restarts": 1, "kl": 1.5, "kl_worst": 1.5, "kl_all": [1.5], "start": 0.5}
SITE = {
    "site": "blocks.0.mlp.W_in", "components": 4, "rank": 3, "relative_error": 0.125, "l0": 3.0, "l0_above_0": 3.5,
    "active_parameters": 30.0, "alive": 4, "active_anywhere": 3, "densities": [1, 0, 0, 0, 0, 2, 1],
}  # fmt: skip
SPECIFICITY = {"auroc": 0.75, "spearman": None, "important": 0.5, "unimportant": 0.25, "pairs": 64}
POINT = {
    "method": "SPD", "sparsity": 1.0, "seed": 0, "l0": 8.0, "active_parameters": 80.0, "active": 7, "components": 9,
    "unmasked": 0.0, "importance": 0.5, "rounded": 0.5, "stochastic": 0.75, "adversarial": None, "permuted": 6.0, "zero": 7.0,
}  # fmt: skip
SIDE = {"read": 0.9, "write": 0.8, "rank_one": 0.7, "components": 9.0}
RECORDS: dict[str, Record] = {
    "evaluation": tlpd.Evaluation(
        {"rows": 4}, 4, 32, {"model": 1.5, "zero": float("nan")}, [MASK], [ADVERSARY], [SITE],
        {"importance": SPECIFICITY, "permuted": SPECIFICITY}, {"untrained": {"l0": 3.0, "rounded": 2.5}}, {"seed": 0}, 1.5,
        ["adversary"],
    ),
    "comparison": tlpd.Comparison(
        {"seeds": [0]}, {"SPD": {"type": "SPD"}}, 8, 64, [POINT],
        [{"method": "SPD", "sparsity": 1.0, "trained": SIDE, "untrained": SIDE}],
        [{"method": "SPD", "capacity": 2.0, "components": 9, "active": 5, "split": None, "l0": 3.0, "rounded": 1.0}],
        {"torch": "2"},
    ),
    "lens": LogitLens("embed.W_E", 3, "W_U", [LensToken(1, "a", 0.5)], [LensToken(2, "b", -0.5)]),
    "attribution": tlpd.Attribution(
        "ablation", "logit difference", "removal", [0, 1], True, [0.5], None, None, None, False, False,
        {"b": torch.tensor([[[1.0, -2.5, 3.0], [0.0, float("inf"), 1e-8]]]), "a": torch.ones(1, 2, 1, dtype=torch.bfloat16)},
        {"b": torch.zeros(1, 2), "a": torch.tensor([[0.5, -0.0]], dtype=torch.float64)}, {}, {"embed.W_E": torch.ones(1, 2)},
    ),
    "sweep": Sweep(
        "with minus without", "noising", "zero", "answer", ["position", "component"], "each", 3, 0.5, None,
        {"b": [[0.1, -0.25], [1 / 3, float("nan")]], "a": [[1e-300], [2.0]]},
    ),
    "graph": tlpd.Graph(
        "answer", "prompt",
        [{"site": "a", "component": 1, "position": 2, "activation": 0.5, "attribution": -0.25}],
        [{"source": 0, "target": "metric", "value": 0.125}],
        [{"target": 0, "value": 0.5, "nodes": 0.0, "other_components": 0.25, "delta": 0.0, "bias": 0.125, "embeddings": 0.0,
          "remainder": 0.125}],
        True, False, 1,
    ),
    "circuit": tlpd.Circuit(
        "ioi", "answer", "components", "gradients", "noising", "zero", 1.0, 4, {"a": [0, 2]}, ["a[0]", "a[2]"], 2, 12.0, 8,
        48.0, 3.5, 0.5, {"ablated": 3.0}, {"ablated": 0.75}, [0.1, 0.2], 0.25, 0.125, [0.5], {"one": 0.75}, [[0.5, 0.75]],
        0.4, 0.1, 0,
    ),
    "heads": ComponentHeads("blocks.0.attn.W_O", "in", [[0.25, 0.75], [1.0, 0.0]]),
    "nearest": NearestComponents("a", [1], [[2, 0]], [[0.5, -0.25]], [[0.5, 0.5]]),
    "tokens": TokenStatistics(
        "importance", "pmi", 64,
        [ComponentTokens("a", 1, 0.1, 5, [TokenCount(3, "é", 2, 4, 0.5)], [], [TokenCount(4, None, 1, 1, 2.0)])],
    ),
    "contexts": TopContexts(
        "activation", "both", 64, [ComponentContexts("a", 1, [Context(0, 2, -1.5, None, [5, 6], 1, ["a", None])])]
    ),
    "estimate": Estimate(
        {"method": "SPD", "importance": None, "steps": 5, "rows": 2, "shape": [8], "device": "cpu"},
        [{"site": "a", "d_in": 4, "d_out": 8, "components": 3, "parameters": 36}],
        {"components": 3, "parameters": 36, "importance": 0, "trained": 36, "optimiser": 72},
        {"process": 100, "model": 10, "components": 144, "importance": 0, "gradients": 144, "optimiser": 288, "copy": 0,
         "step": None, "row": None, "start": None, "peak": None, "in_use": 110, "available": 1000},
        {"start": None, "step": None, "run": None}, {"checkpoint": 500, "kept": 1, "result": 144, "total": 644}, "no trial",
    ),
}  # fmt: skip


def same(one: Record, other: Record) -> bool:
    """Whether two records hold the very same values, bit for bit; a NaN is as good as another."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), list(value.shape), value.contiguous().view(torch.uint8).tolist()
        if isinstance(value, dict):
            return [(key, plain(inner)) for key, inner in value.items()]
        return repr(value)

    return type(one) is type(other) and plain(one.__dict__) == plain(other.__dict__)
