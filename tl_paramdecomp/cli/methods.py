"""Methods by the names that the command takes, or from a settings file."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tl_paramdecomp.components.disk import LARGEST, parse_json, read_text
from tl_paramdecomp.errors import DecompositionFileError, SettingError
from tl_paramdecomp.methods.baselines import SVD, NeuronBasis, RandomBasis, WhitenedSVD
from tl_paramdecomp.methods.l3d import L3D
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.methods.spd import SPD, VPD
from tl_paramdecomp.settings import TYPE, from_settings

PRESETS: Mapping[str, Callable[[], Any]] = {
    "spd": SPD,
    "paper": SPD.paper,
    "vpd": VPD,
    "svd": SVD,
    "whitened-svd": WhitenedSVD,
    "neurons": NeuronBasis,
    "random": RandomBasis,
}
"""Methods whose components every token has importances for."""
ALL_PRESETS: Mapping[str, Callable[[], Any]] = {
    **PRESETS,
    "targeted": SPD.targeted,
    "l3d": L3D,
    "l3d-paper-code": L3D.paper_code,
}
"""Also those that need a second stream of rows, or make something else."""
ORACLE = "-oracle"


def method_named(name: Any, path: str = "--method", presets: Mapping[str, Callable[[], Any]] = PRESETS) -> Any:
    """A preset; with `-oracle` after its name, exact components without an importance function. `path` is for messages."""
    plain = str(name).removesuffix(ORACLE)
    if plain not in presets:
        near = difflib.get_close_matches(plain, presets, n=1)
        hint = f" Nearest: {near[0]}." if near else ""
        raise SettingError(f"{path}: {name!r:.100} is none of {', '.join(presets)}.{hint}")
    method = presets[plain]()
    if name == plain:
        return method
    try:
        return method.untrained()
    except SettingError as error:
        raise SettingError(f"{path}: {plain} has an importance function of its own; give {plain}.") from error


def changed(method: Any, components: int | None = None, importance: float | None = None) -> Any:
    """A method with another number of components or coefficient of importance minimality, where they are given."""
    name = type(method).__name__
    for option, given, change in (
        ("--components", components, type(method).with_components),
        ("--importance", importance, type(method).pressed),
    ):
        if given is not None:
            try:
                method = change(method, given)
            except SettingError as error:
                raise SettingError(f"{option} is not for {name}: {error}") from error
    return method


def method_in(path: Path) -> Any:
    """The method that a JSON file of settings describes (else SettingError)."""
    try:
        found = parse_json(path, read_text(path, LARGEST))
    except DecompositionFileError as error:
        raise SettingError(str(error)) from error
    if not isinstance(found, dict) or TYPE not in found:
        raise SettingError(f"{path} holds no method; it should be an object with the method's name as its type.")
    return from_settings(found, base=Method)
