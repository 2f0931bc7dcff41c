"""Toy targets trained here from a seed: those of published tests, with known mechanisms, and a network that reads digits."""

from tl_paramdecomp.toy_models.circuits import Circuits, CircuitsConfig, GroupedFeatures, train_circuits
from tl_paramdecomp.toy_models.digits import DigitImages, Digits, DigitsConfig, load_digits, train_digits
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
    "TMS", "Circuits", "CircuitsConfig", "DigitImages", "Digits", "DigitsConfig", "GroupedFeatures", "InductionConfig",
    "InductionRows", "InductionTransformer", "ResidMLP", "ResidMLPConfig", "SparseFeatures", "TMSConfig", "ToyTarget",
    "Trained", "fresh", "load_digits", "load_target", "save_target", "train_circuits", "train_digits", "train_induction",
    "train_resid_mlp", "train_tms", "train_until_sound",
]  # fmt: skip
