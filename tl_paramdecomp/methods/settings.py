"""Methods and losses as JSON and back: one explicit table of the names that files may hold."""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction, PersistentAdversarialReconstruction
from tl_paramdecomp.methods.baselines import SVD, NeuronBasis, RandomBasis, WhitenedSVD
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


def to_settings(value: Any) -> Any:
    """A method, loss or plain value as JSON-able values; objects become {"type": name, field: value, ...}."""
    if is_dataclass(value) and not isinstance(value, type):
        told = [f.name for f in fields(value) if not _is_omitted(f, getattr(value, f.name))]
        return {"type": type(value).__name__, **{name: to_settings(getattr(value, name)) for name in told}}
    if isinstance(value, Mapping):
        return {key: to_settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_settings(item) for item in value]
    return value


def _is_omitted(setting: Field, value: Any) -> bool:
    """Whether a setting that came later stays unmentioned: files of runs that do not use it are as before."""
    return bool(setting.metadata.get("omit_default")) and value == setting.default


def from_settings(settings: Any) -> Any:
    """The object that `to_settings` wrote down.

    Raises:
        SettingError: A type is unknown, or a field is.
    """
    if isinstance(settings, list):
        return tuple(from_settings(item) for item in settings)
    if not isinstance(settings, Mapping):
        return settings
    values = {key: from_settings(item) for key, item in settings.items()}
    name = values.pop("type", None)
    if name is None:
        return values
    if name not in TABLE:
        raise SettingError(f"Settings name the type {name!r}; known are {', '.join(TABLE)}.")
    try:
        return TABLE[name](**values)
    except TypeError as error:
        raise SettingError(f"Settings of {name} do not fit: {error}.") from error
