"""tl_paramdecomp: the weights of a language model as trainable sums of components, patched back through its hooks.

Import it as `tlpd`. All of it loads when the first name is used, torch with it: the command answers Ctrl-C and `--help` before.
Host libraries, the command and plots load when they are used.
"""

import sys as _sys
import threading as _threading
import warnings as _warnings
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

if _TYPE_CHECKING or "_opening" in globals():  # `__getattr__` runs this file a second time
    from tl_paramdecomp import errors
    from tl_paramdecomp.adapters import find_sites, site_weight
    from tl_paramdecomp.analysis.activations import causal_importances, component_acts
    from tl_paramdecomp.analysis.circuits.circuit import Circuit, evaluate_circuit, find_circuit
    from tl_paramdecomp.analysis.circuits.search import LearnedMasks
    from tl_paramdecomp.analysis.circuits.units import component_units, neuron_and_head_units
    from tl_paramdecomp.analysis.contexts.logit_lens import LogitLens, logit_lens
    from tl_paramdecomp.analysis.contexts.token_statistics import TokenStatistics, token_statistics
    from tl_paramdecomp.analysis.contexts.top_contexts import TopContexts, top_contexts
    from tl_paramdecomp.analysis.effects.attention_scores import AttentionScores, attention_scores
    from tl_paramdecomp.analysis.effects.attribution import Attribution, attribute
    from tl_paramdecomp.analysis.effects.component_heads import ComponentHeads, PerHead, component_heads, per_head
    from tl_paramdecomp.analysis.effects.edges import Graph, IncomingEdges, dataset_graph, edges_into, prompt_graph
    from tl_paramdecomp.analysis.effects.sweep import Sweep, sweep
    from tl_paramdecomp.analysis.evaluation.comparison import Comparison
    from tl_paramdecomp.analysis.evaluation.controls import shuffled_weights
    from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig, evaluate
    from tl_paramdecomp.analysis.evaluation.matching import NearestComponents, nearest_components
    from tl_paramdecomp.analysis.evaluation.oracle import Oracle
    from tl_paramdecomp.analysis.evaluation.result import Evaluation
    from tl_paramdecomp.analysis.subnetworks import (
        Selectivity,
        SubnetworkEvaluation,
        causal_selectivity,
        evaluate_subnetworks,
        impacts,
        output_derivative,
        top_logits,
        top_samples,
    )
    from tl_paramdecomp.analysis.tasks.makers import make_task
    from tl_paramdecomp.analysis.tasks.metrics import (
        AnswerLoss,
        AnswerProbability,
        AnswerRank,
        KLToClean,
        LogitDifference,
        ProbabilityDifference,
        TokenLoss,
        answer_logits,
        default_metric,
        normalised_faithfulness,
        score,
    )
    from tl_paramdecomp.analysis.tasks.task import Task, load_task
    from tl_paramdecomp.components.decomposition import Decomposition
    from tl_paramdecomp.components.importance import ImportanceConfig
    from tl_paramdecomp.components.masks import Masks
    from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition
    from tl_paramdecomp.data.documents import TextRows
    from tl_paramdecomp.data.token_batches import token_batches
    from tl_paramdecomp.experiments.compare import ComparisonProtocol, compare
    from tl_paramdecomp.experiments.tuning import tune_along
    from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
    from tl_paramdecomp.methods.baselines import SVD, NeuronBasis, RandomBasis, WhitenedSVD
    from tl_paramdecomp.methods.from_factors import from_factors
    from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
    from tl_paramdecomp.methods.l3d import L3D
    from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
    from tl_paramdecomp.methods.reconstruction import (
        ImportanceMaskedReconstruction,
        StochasticReconstruction,
        UnmaskedReconstruction,
    )
    from tl_paramdecomp.methods.spd import SPD, VPD
    from tl_paramdecomp.patching.act_patches import ActPatches, act_patches, patched_acts
    from tl_paramdecomp.patching.edit import edited_model, edited_weights
    from tl_paramdecomp.patching.hooks import attached, fwd_hooks, patched
    from tl_paramdecomp.patching.interventions import activation_means, delta_writes, importance_masks
    from tl_paramdecomp.patching.subnetworks import perturbed
    from tl_paramdecomp.patching.target import check_target
    from tl_paramdecomp.patching.trace import patch_trace
    from tl_paramdecomp.pretrained import (
        TaskPrompt,
        load_micro_gpt2,
        micro_gpt2_prompts,
        micro_gpt2_tokenizer,
        micro_gpt2_tokens,
    )
    from tl_paramdecomp.sites import WeightSite
    from tl_paramdecomp.training.callbacks import STOP, RunInfo, StepInfo
    from tl_paramdecomp.training.config import RunConfig
    from tl_paramdecomp.training.estimate import Estimate, estimate_run
    from tl_paramdecomp.training.fit import decompose
    from tl_paramdecomp.training.loggers import EvaluateEvery, TensorBoard, WandB

__all__ = [
    "ActPatches", "AdversarialReconstruction", "AnswerLoss", "AnswerProbability", "AnswerRank",
    "AttentionPatternReconstruction", "AttentionScores", "Attribution", "Circuit", "Comparison", "ComparisonProtocol",
    "ComponentHeads", "Decomposition", "Estimate", "EvaluateEvery", "Evaluation", "EvaluationConfig", "Faithfulness",
    "Graph", "HiddenActsReconstruction", "ImportanceConfig", "ImportanceMaskedReconstruction",
    "ImportanceMinimality", "IncomingEdges", "KLToClean",
    "L3D", "LearnedMasks", "LogitDifference", "LogitLens", "Masks", "NearestComponents", "NeuronBasis", "Oracle",
    "PerHead", "PersistentAdversarialReconstruction", "ProbabilityDifference", "RandomBasis", "RunConfig", "RunInfo", "SPD",
    "STOP", "SVD", "Selectivity", "StepInfo", "StochasticReconstruction", "SubnetworkDecomposition", "SubnetworkEvaluation",
    "Sweep", "Task", "TaskPrompt", "TensorBoard", "TextRows", "TokenLoss", "TokenStatistics", "TopContexts",
    "UnmaskedReconstruction", "VPD", "WandB", "WeightSite", "WhitenedSVD", "act_patches", "activation_means",
    "answer_logits", "attached", "attention_scores", "attribute", "causal_importances", "causal_selectivity",
    "check_target", "compare", "component_acts", "component_heads", "component_units", "dataset_graph", "decompose",
    "default_metric", "delta_writes", "edges_into", "edited_model", "edited_weights", "errors", "estimate_run",
    "evaluate", "evaluate_circuit", "evaluate_subnetworks", "find_circuit", "find_sites", "from_factors", "fwd_hooks",
    "impacts", "importance_masks", "load_micro_gpt2", "load_task", "logit_lens", "make_task", "micro_gpt2_prompts",
    "micro_gpt2_tokenizer", "micro_gpt2_tokens", "nearest_components", "neuron_and_head_units",
    "normalised_faithfulness", "output_derivative", "patch_trace", "patched", "patched_acts", "per_head", "perturbed",
    "prompt_graph", "score", "shuffled_weights", "site_weight", "sweep", "token_batches", "token_statistics",
    "top_contexts", "top_logits", "top_samples", "tune_along",
]  # fmt: skip

_RENAMED = {"Protocol": "EvaluationConfig"}
"""Old names, kept for one release."""
_lock = globals().get("_lock") or _threading.RLock()


def __getattr__(name: str) -> _Any:
    """A name of the package; the first one loads all of them."""
    with _lock:
        if name not in globals() and "_opening" not in globals() and not name.startswith("__"):
            globals()["_opening"] = True
            try:
                __spec__.loader.exec_module(_sys.modules[__name__])  # type: ignore[union-attr]
                _import_module("tl_paramdecomp.field_docs").show_fields(*(globals()[name] for name in __all__))
            except BaseException:
                del globals()["_opening"]
                raise
        if name in globals():
            return globals()[name]
        if name in _RENAMED:
            _warnings.warn(f"{__name__}.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
            return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
