"""What the top level offers: exactly its `__all__`, every name of it real and documented."""

import inspect
import pydoc
import re
import types
from dataclasses import fields, is_dataclass

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp import adapters, pretrained


def public_names(module: types.ModuleType) -> set[str]:
    """Names without an underscore that are not subpackages."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (name in module.__all__ or not isinstance(value, types.ModuleType))
    }


def test_all_is_what_is_public() -> None:
    assert set(tlpd.__all__) == public_names(tlpd)
    assert len(set(tlpd.__all__)) == len(tlpd.__all__)


@pytest.mark.parametrize("module", [adapters, pretrained])
def test_rooms_that_export_export_what_they_have(module: types.ModuleType) -> None:
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", sorted(tlpd.__all__))
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(tlpd, name)
    assert inspect.getdoc(thing), name
    if isinstance(thing, type):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{attribute}"


@pytest.mark.parametrize("name", [n for n in sorted(tlpd.__all__) if is_dataclass(getattr(tlpd, n))])
def test_help_explains_every_field(name: str) -> None:
    shown = pydoc.render_doc(getattr(tlpd, name), renderer=pydoc.plaintext)
    for field in fields(getattr(tlpd, name)):
        assert field.name.startswith("_") or re.search(rf"^ \|  +{field.name}: \S", shown, re.MULTILINE), field.name


def test_texts_of_fields_are_those_of_the_source() -> None:
    """Of a base, over several lines, and of a field whose value takes several."""
    assert "clip: Largest gradient norm of the components.\n" in (tlpd.SPD.__doc__ or "")
    assert "n_components: C for every site; or by glob" in (tlpd.VPD.__doc__ or "")
    assert "evaluation: How each run is measured." in (tlpd.ComparisonProtocol.__doc__ or "")


def test_a_star_import_brings_the_names() -> None:
    namespace: dict[str, object] = {}
    exec("from tl_paramdecomp import *", namespace)
    assert set(tlpd.__all__) <= set(namespace)


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        _ = tlpd.no_such_name


def test_a_name_of_before_says_what_it_is_called_now() -> None:
    with pytest.warns(DeprecationWarning, match="EvaluationConfig"):
        assert tlpd.Protocol is tlpd.EvaluationConfig
