"""The published toy results of SPD and L3D, and L3D on digits: for each name its target, its settings, and what is expected.

Expected figures are those of "Stochastic Parameter Decomposition" (arXiv 2506.20790), table 1 and section 3, and of "Local Loss
Landscape Decomposition" (arXiv 2504.00194), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.l3d import L3D
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.methods.spd import SPD
from tl_paramdecomp.toy_models import CircuitsConfig, DigitsConfig, InductionConfig, ResidMLPConfig, TMSConfig


@dataclass(frozen=True)
class Recipe:
    """One published result."""

    target: Any  # configuration of the target
    sites: tuple[str, ...]
    method: SPD | L3D
    steps: int
    batch_size: int
    one_per_feature: tuple[str, ...] = ()
    """Sites where each feature should have one component; those of a glob together."""
    dense: Mapping[str, int] = field(default_factory=dict)
    """Sites where so many components should be active for many features; those of a glob together."""
    expected: Mapping[str, Any] = field(default_factory=dict)  # published figures


def _spd(n_components: int, minimality: float, p: float, lr: float, p_end: float | None = None, **changes: Any) -> SPD:
    """SPD with its authors' later settings for toys: delta component, warm-up, no faithfulness term."""
    losses = (
        StochasticReconstruction(1.0, sites="all"),
        StochasticReconstruction(1.0, sites="layerwise"),
        ImportanceMinimality(minimality, p_start=p, p_end=p if p_end is None else p_end),
    )
    method = SPD(
        n_components=n_components, losses=losses, importance=ImportanceConfig("component_mlp", hidden=16), start="random",
        warm_up_steps=200, warm_up_lr=1e-2, warm_up_weight_decay=0.1, lr=lr, lr_importance=lr, ramp_steps=0, final_lr=0.0,
        clip=None, clip_importance=None, measure="mse",
    )  # fmt: skip
    return replace(method, **changes)


def _tms(features: int, hidden: int, identity: bool, batch: int, method: SPD, steps: int, ml2r: tuple) -> Recipe:
    sides, middle = ("linear1.weight", "linear2.weight"), "hidden_layers.0.weight"
    alive = {sides[0]: features, **({middle: hidden} if identity else {}), sides[1]: features}
    return Recipe(
        target=TMSConfig(features, hidden, identity, batch_size=batch),
        sites=tuple(alive),
        method=method,
        steps=steps,
        batch_size=1024,
        one_per_feature=sides,
        dense={middle: hidden} if identity else {},
        expected={"mmcs": 1.0, "ml2r": ml2r[0], "ml2r_sd": ml2r[1], "alive": alive, "identity_ci_error": 0},
    )


def _resid_mlp(layers: int, features: int, neurons: int, method: SPD, steps: int, batch_size: int = 512) -> Recipe:
    reads, writes = "layers.*.mlp_in.weight", "layers.*.mlp_out.weight"
    return Recipe(
        target=ResidMLPConfig(layers, features, n_neurons=neurons),
        sites=(reads, writes),
        method=method,
        steps=steps,
        batch_size=batch_size,
        one_per_feature=(reads,),
        dense={writes: neurons},
        expected={"alive_in_all": {reads: features, writes: neurons}, "identity_ci_error": 0, "dense_ci_error": 0},
    )


def _l3d(target: Any, n_subnetworks: int, rank: int, error: float, steps: int = 3000, **changes: Any) -> Recipe:
    """The published code's divergence, references and norm, which its figures are of."""
    method = L3D.paper_code(n_subnetworks=n_subnetworks, rank=rank, **changes)
    return Recipe(target, ("*",), method, steps, batch_size=128, expected={"heldout_error": error})


# TMS shares its weights between both sides, and so do the components, as in the published code. The importance networks learn
# faster than the components, and p ends below 1, so that one component at 1 costs less than two at a half.
_TIED = {"linear2.weight": "linear1.weight"}
_SMALL = _spd(20, 5e-3, 1.5, 2e-3, p_end=0.8, lr_importance=4e-3, tied=_TIED)
_SMALL_ID = _spd(20, 3e-3, 1.5, 2e-3, p_end=0.8, lr_importance=4e-3, tied=_TIED)
_LARGE = _spd(200, 3e-4, 1.0, 2e-3, p_end=0.7, lr_importance=6e-3, tied=_TIED)
_LARGE_ID = _spd(200, 1.5e-4, 1.0, 2e-3, p_end=0.7, lr_importance=6e-3, tied=_TIED)

RECIPES: Mapping[str, Recipe] = {
    "tms-5-2": _tms(5, 2, False, 1024, _SMALL, 3000, (0.993, 0.002)),
    "tms-5-2-id": _tms(5, 2, True, 1024, _SMALL_ID, 3000, (0.992, 0.010)),
    "tms-40-10": _tms(40, 10, False, 4096, _LARGE, 5000, (1.010, 0.007)),
    "tms-40-10-id": _tms(40, 10, True, 4096, _LARGE_ID, 5000, (1.031, 0.001)),
    "resid-mlp-1": _resid_mlp(1, 100, 50, _spd(100, 1.2e-5, 2.0, 4e-3, p_end=1.0, lr_importance=1e-2), 15_000),
    "resid-mlp-2": _resid_mlp(2, 100, 50, _spd(200, 1.2e-5, 2.0, 4e-3, p_end=1.0, lr_importance=1e-2), 25_000),
    "resid-mlp-3": _resid_mlp(3, 102, 51, _spd(200, 1.2e-5, 2.0, 4e-3, p_end=1.0, lr_importance=1e-2), 50_000),
    "induction": Recipe(
        InductionConfig(),
        ("layers.*.attn.*.weight",),
        _spd(100, 1e-2, 1.0, 1e-3, importance=ImportanceConfig("shared_mlp", hidden=128), measure="kl"),
        steps=20_000,
        batch_size=64,
    ),
    "l3d-tms": _l3d(TMSConfig(5, 2), 5, 1, 0.19),
    "l3d-circuits": _l3d(CircuitsConfig(), 10, 1, 0.064),
    "l3d-high-rank": _l3d(CircuitsConfig(n_inputs=30, n_hidden=10, group=5), 10, 1, 0.145),
    "l3d-squared": _l3d(
        CircuitsConfig("squared", n_inputs=5, n_hidden=10, hidden_layers=4), 5, 2, 0.32, steps=6000, warm_start=0.1
    ),
    "l3d-digits": Recipe(DigitsConfig(), ("*",), L3D(n_subnetworks=100, rank=2, divergence="kl"), 2000, batch_size=128),
}
"""By the name that `tl-paramdecomp reproduce` takes."""
