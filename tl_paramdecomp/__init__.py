"""tl_paramdecomp: the weights of a language model as trainable sums of components, patched back through its hooks.

Import it as `tlpd`. Host libraries, the command and plots load when they are used.
"""

from tl_paramdecomp import errors
from tl_paramdecomp.adapters import find_sites, site_weight
from tl_paramdecomp.analysis.activations import causal_importances, component_acts
from tl_paramdecomp.analysis.comparison import Comparison
from tl_paramdecomp.analysis.controls import shuffled_weights
from tl_paramdecomp.analysis.evaluate import Protocol, evaluate
from tl_paramdecomp.analysis.evaluation import Evaluation
from tl_paramdecomp.analysis.oracle import Oracle
from tl_paramdecomp.analysis.selectivity import Selectivity, causal_selectivity, top_logits, top_samples
from tl_paramdecomp.analysis.subnetworks import (
    SubnetworkEvaluation,
    evaluate_subnetworks,
    impacts,
    output_derivative,
)
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.components.subnetwork_decomposition import SubnetworkDecomposition
from tl_paramdecomp.methods.baselines import SVD, NeuronBasis, RandomBasis, WhitenedSVD
from tl_paramdecomp.methods.from_factors import from_factors
from tl_paramdecomp.methods.l3d import L3D
from tl_paramdecomp.methods.spd import SPD, VPD
from tl_paramdecomp.patching.attach import attached
from tl_paramdecomp.patching.edit import edited_model, edited_weights
from tl_paramdecomp.patching.hooks import fwd_hooks, patched
from tl_paramdecomp.patching.interventions import importance_masks
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
from tl_paramdecomp.training.compare import ComparisonProtocol, compare
from tl_paramdecomp.training.data import TextRows
from tl_paramdecomp.training.fit import decompose
from tl_paramdecomp.training.tuning import tune_along

__all__ = [
    "Comparison",
    "ComparisonProtocol",
    "Decomposition",
    "Evaluation",
    "L3D",
    "Masks",
    "NeuronBasis",
    "Oracle",
    "Protocol",
    "RandomBasis",
    "SPD",
    "SVD",
    "Selectivity",
    "SubnetworkDecomposition",
    "SubnetworkEvaluation",
    "TaskPrompt",
    "TextRows",
    "VPD",
    "WeightSite",
    "WhitenedSVD",
    "attached",
    "causal_importances",
    "causal_selectivity",
    "check_target",
    "compare",
    "component_acts",
    "decompose",
    "edited_model",
    "edited_weights",
    "errors",
    "evaluate",
    "evaluate_subnetworks",
    "find_sites",
    "from_factors",
    "fwd_hooks",
    "impacts",
    "importance_masks",
    "load_micro_gpt2",
    "micro_gpt2_prompts",
    "micro_gpt2_tokenizer",
    "micro_gpt2_tokens",
    "output_derivative",
    "patch_trace",
    "patched",
    "perturbed",
    "shuffled_weights",
    "site_weight",
    "top_logits",
    "top_samples",
    "tune_along",
]
