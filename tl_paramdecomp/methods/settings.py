"""Methods and losses as JSON and back: one explicit table of the names that files may hold."""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.baselines import SVD, NeuronBasis, RandomBasis, WhitenedSVD
from tl_paramdecomp.methods.field_types import TYPE, build, joined
from tl_paramdecomp.methods.internals import AttentionPatternReconstruction, HiddenActsReconstruction
from tl_paramdecomp.methods.l3d import L3D
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import (
    ImportanceMaskedReconstruction,
    StochasticReconstruction,
    UnmaskedReconstruction,
)
from tl_paramdecomp.methods.spd import SPD, VPD

TABLE: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        SPD,
        VPD,
        SVD,
        WhitenedSVD,
        NeuronBasis,
        RandomBasis,
        L3D,
        ImportanceConfig,
        Faithfulness,
        ImportanceMinimality,
        StochasticReconstruction,
        ImportanceMaskedReconstruction,
        UnmaskedReconstruction,
        HiddenActsReconstruction,
        AttentionPatternReconstruction,
        AdversarialReconstruction,
        PersistentAdversarialReconstruction,
    )
}
"""Every class that a file may name."""


def to_settings(value: Any, complete: bool = False) -> Any:
    """A method, loss or plain value as JSON-able values; objects become {"type": name, field: value, ...}.

    Args:
        value: The object.
        complete: Mention every field, also those that files leave out where they are at their defaults.
    """
    if is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in fields(value) if complete or not _is_omitted(f, getattr(value, f.name))]
        return {TYPE: type(value).__name__, **{name: to_settings(getattr(value, name), complete) for name in told}}
    if isinstance(value, Mapping):
        return {key: to_settings(item, complete) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_settings(item, complete) for item in value]
    return value


def _is_omitted(setting: Field, value: Any) -> bool:
    """Whether a setting that came later stays unmentioned: files of runs that do not use it are as before."""
    return bool(setting.metadata.get("omit_default")) and value == setting.default


def from_settings(settings: Any, path: str = "") -> Any:
    """The object that `to_settings` wrote down.

    Args:
        settings: What it wrote; fields that are left out are at their defaults.
        path: Where it stands in a larger file, for messages.

    Raises:
        SettingError: A type or a field is unknown, or a value is of another type; the message names the nearest known one.
    """
    if isinstance(settings, list):
        return tuple(from_settings(item, joined(path, i)) for i, item in enumerate(settings))
    if not isinstance(settings, Mapping):
        return settings
    if TYPE not in settings:
        return {key: from_settings(item, joined(path, key)) for key, item in settings.items()}
    return build(object, settings, path, TABLE)
