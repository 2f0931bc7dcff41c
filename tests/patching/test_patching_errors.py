"""Every bad input gets its named error with words that help, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp import errors

from ..support.models import C, build, decomposition_of, gpt2, logits, module_of

SITE = "blocks.0.mlp.W_in"  # 24 -> 96
HOSTS = ["gpt2", "bridge", "hooked"]
Ask = Callable[[Any, tlpd.Decomposition], Any]


def entering(context: Callable, *args: Any) -> None:
    with context(*args):
        pass


def _meta_weight(model: Any, dec: tlpd.Decomposition) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(3, 4))
    linear.to("meta")
    tlpd.site_weight(linear, "0.weight")


CASES: dict[str, tuple[Ask, type[Exception], type[Exception], tuple[str, ...]]] = {
    "no such pattern": (
        lambda m, d: tlpd.find_sites(m, "blocks.0.mpl.*"), errors.NoMatchingSiteError, ValueError,
        ("'blocks.0.mpl.*' matches none", "Nearest names", "mlp"),
    ),
    "one pattern of several": (
        lambda m, d: tlpd.find_sites(m, ["blocks.*", "nothing"]), errors.NoMatchingSiteError, ValueError, ("'nothing'",),
    ),
    "no pattern": (lambda m, d: tlpd.find_sites(m, []), errors.NoMatchingSiteError, ValueError, ("empty list",)),
    "a predicate that is never true": (
        lambda m, d: tlpd.find_sites(m, lambda site: False), errors.NoMatchingSiteError, ValueError, ("true of none",),
    ),
    "a name that is no site": (
        lambda m, d: tlpd.site_weight(m, "blocks.0.mlp.W_im"), errors.NoMatchingSiteError, ValueError, ("W_im", SITE),
    ),
    "masks of no site": (
        lambda m, d: d.masks().ablate("blocks.7.mlp.W_in", 0), errors.NoMatchingSiteError, ValueError, ("blocks.7", SITE),
    ),
    "no such component": (
        lambda m, d: d.masks().ablate(SITE, [0, C]), errors.ComponentIndexError, IndexError, ("0 to 4", "given 5", SITE),
    ),
    "no such head": (
        lambda m, d: d.masks().ablate("blocks.0.attn.W_Q", 0, head=3), errors.HeadIndexError, IndexError,
        ("query heads 0 to 2", "given 3"),
    ),
    "no heads at all": (
        lambda m, d: d.masks().ablate(SITE, 0, head=0), errors.HeadIndexError, IndexError, ("W_Q, W_K, W_V and W_O",),
    ),
    "no such position": (
        lambda m, d: _run(m, d, d.masks().ablate(SITE, 0, positions=7)), errors.PositionIndexError, IndexError,
        ("Position 7", "0 to 6", "-7 to -1"),
    ),
    "a position mask of another length": (
        lambda m, d: _run(m, d, d.masks().ablate(SITE, 0, positions=torch.ones(6).bool())), errors.ShapeError, ValueError,
        ("[7] or [2, 7]", "given [6]"),
    ),
    "masks of another length": (
        lambda m, d: _run(m, d, d.masks().with_values(SITE, torch.ones(6, C))), errors.ShapeError, ValueError,
        ("covers 6 positions", "one for each position of the prompt"),
    ),
    "masks of another width": (
        lambda m, d: d.masks().with_values(SITE, torch.ones(C + 1)), errors.ShapeError, ValueError, ("C=5", "given [6]"),
    ),
    "masks that are complex": (
        lambda m, d: d.masks().with_values(SITE, torch.ones(C) * 1j), errors.DtypeError, TypeError, ("real", "complex"),
    ),
    "masks by position as a weight": (
        lambda m, d: entering(tlpd.edited_weights, m, d, d.masks().ablate(SITE, 0, positions=0)),
        errors.MaskNotConstantError, ValueError, ("batch or position", "tl_paramdecomp.patched"),
    ),
    "factors of another shape": (
        lambda m, d: tlpd.from_factors(m, {SITE: (torch.ones(3, 2).double(), torch.ones(2, 96).double())}),
        errors.ShapeError, ValueError, ("d_in=24", "d_out=96", "given V [3, 2]"),
    ),
    "factors of whole numbers": (
        lambda m, d: tlpd.from_factors(m, {SITE: (torch.ones(24, 2).long(), torch.ones(2, 96).long())}),
        errors.DtypeError, TypeError, ("floating-point", "int64"),
    ),
    "factors of two precisions": (
        lambda m, d: tlpd.from_factors(m, {SITE: (torch.ones(24, 2), torch.ones(2, 96).double())}),
        errors.DtypeError, TypeError, ("one dtype", "float32", "float64"),
    ),
    "factors on two devices": (
        lambda m, d: tlpd.from_factors(m, {SITE: (torch.ones(24, 2), torch.ones(2, 96, device="meta"))}),
        errors.DeviceError, ValueError, ("cpu and meta",),
    ),
    "factors of no site": (
        lambda m, d: tlpd.from_factors(m, {"blocks.0.mlp.W_inn": (torch.ones(24, 2), torch.ones(2, 96))}),
        errors.NoMatchingSiteError, ValueError, ("W_inn", SITE),
    ),
    "no factors": (lambda m, d: tlpd.from_factors(m, {}), errors.ShapeError, ValueError, ("at least one site",)),
    "components elsewhere": (
        lambda m, d: entering(tlpd.patched, m, decomposition_of(m, SITE).to("meta"), d.masks()),
        errors.DeviceError, ValueError, ("meta", "cpu", ".to("),
    ),
    "another model": (
        lambda m, d: entering(tlpd.patched, gpt2(seed=9), d, d.masks()), errors.TargetMismatchError, ValueError,
        ("not those the decomposition was made from", "decompose this one"),
    ),
    "no model": (
        lambda m, d: tlpd.find_sites("gpt2"), errors.UnsupportedModelError, ValueError, ("HookedTransformer", "not str"),
    ),
    "a module without weights": (
        lambda m, d: tlpd.find_sites(torch.nn.ReLU()), errors.UnsupportedModelError, ValueError, ("no linear map",),
    ),
    "importances of plain factors": (
        lambda m, d: tlpd.importance_masks(m, d, torch.zeros(1, 3, dtype=torch.long)), errors.NoImportanceError, ValueError,
        ("no causal-importance function", "decompose"),
    ),
    "weights without numbers": (_meta_weight, errors.UnsupportedModelError, ValueError, ("meta",)),
}  # fmt: skip


def _run(model: Any, dec: tlpd.Decomposition, masks: tlpd.Masks) -> None:
    with tlpd.patched(model, dec, masks):
        logits(model, torch.arange(14).reshape(2, 7))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, host: str, tokens: torch.Tensor) -> None:
    ask, error, also, words = CASES[case]
    model = build(host)
    dec = decomposition_of(model, [SITE, "blocks.0.attn.W_Q"])
    before, plain = {k: v.clone() for k, v in module_of(model).state_dict().items()}, logits(model, tokens)
    with pytest.raises(error) as caught:
        ask(model, dec)
    assert isinstance(caught.value, also) and isinstance(caught.value, errors.TLParamDecompError)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert torch.equal(logits(model, tokens), plain)
    assert all(torch.equal(v, before[k]) for k, v in module_of(model).state_dict().items())
    with tlpd.patched(model, dec, dec.masks().ablate(SITE, 0)):  # nothing is left claimed
        logits(model, tokens)


def test_every_error_is_in_the_tree_and_drawn_in_its_docstring() -> None:
    named = {n: e for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, Exception)}
    for name, error in named.items():
        assert error.__doc__ and name in errors.__doc__
        if issubclass(error, Warning):
            continue
        assert issubclass(error, errors.TLParamDecompError)
        builtin = next((b for b in error.__mro__ if b.__module__ == "builtins"), None)
        if name != "TLParamDecompError":
            assert builtin in (
                ValueError,
                TypeError,
                IndexError,
                RuntimeError,
                OSError,
                ArithmeticError,
                ImportError,
            ), name
