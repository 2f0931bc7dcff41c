"""Toy targets whose mechanisms are known, trained here from a seed: the published tests of parameter decomposition."""

from tl_paramdecomp.toy_models.circuits import Circuits, CircuitsConfig, GroupedFeatures, train_circuits
from tl_paramdecomp.toy_models.induction import InductionConfig, InductionRows, InductionTransformer, train_induction
from tl_paramdecomp.toy_models.resid_mlp import ResidMLP, ResidMLPConfig, train_resid_mlp
from tl_paramdecomp.toy_models.targets import (
    SparseFeatures,
    ToyTarget,
    Trained,
    fresh,
    load_target,
    save_target,
    train_until_sound,
)
from tl_paramdecomp.toy_models.tms import TMS, TMSConfig, train_tms

__all__ = [
    "TMS",
    "Circuits",
    "CircuitsConfig",
    "GroupedFeatures",
    "InductionConfig",
    "InductionRows",
    "InductionTransformer",
    "ResidMLP",
    "ResidMLPConfig",
    "SparseFeatures",
    "TMSConfig",
    "ToyTarget",
    "Trained",
    "fresh",
    "load_target",
    "save_target",
    "train_circuits",
    "train_induction",
    "train_resid_mlp",
    "train_tms",
    "train_until_sound",
]
