"""Ties of a target's sites: which sites may share components, because the target itself shares the weight, transposed."""

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.ties import check_ties
from tl_paramdecomp.errors import NoMatchingSiteError, SettingError


def named_ties(adapter: ModelAdapter, tied: Mapping[str, str]) -> dict[str, str]:
    """Ties by canonical names: each tied site and the site whose components it takes.

    Raises:
        NoMatchingSiteError: A name is no site's name or alias; a tie takes no globs.
        SettingError: A site is tied twice.
    """
    found: dict[str, str] = {}
    for names in tied.items():
        try:
            name, source = map(adapter.resolve, names)
        except NoMatchingSiteError as error:
            raise NoMatchingSiteError(f"A tie names two sites exactly, by name or alias. {error}") from error
        if name in found:
            raise SettingError(f"{name} is tied twice, to {found[name]} and to {source}; choose one.")
        found[name] = source
    return found


def resolved_ties(
    adapter: ModelAdapter,
    sites: Collection[str],
    tied: Mapping[str, str],
    *,
    counts: Mapping[str, int] | None = None,
    given: Collection[str] | None = None,
) -> dict[str, str]:
    """Ties by canonical names, after seeing that the target's own weights are each other's transpose.

    Args:
        adapter: The target's.
        sites: The sites to decompose, by canonical names.
        tied: Each tied site and the site whose components it takes; exact names or aliases.
        counts: C of each site, where it is chosen site by site.
        given: Sites that have factors already; None: all that are not tied will get some.

    Raises:
        NoMatchingSiteError: An unknown name.
        SettingError: A site that is not to be decomposed, ties that form a chain, C that differ, weights that are not each
            other's transpose.
        ShapeError: The shape of one is not that of the other transposed.
    """
    found = named_ties(adapter, tied)
    own = [name for name in sites if name not in found] if given is None else given
    check_ties(found, {name: adapter.site(name) for name in sites}, own)
    for name, source in found.items():
        if counts is not None and counts[name] != counts[source]:
            raise SettingError(
                f"{name} is tied to {source}, but n_components gives them {counts[name]} and {counts[source]}; give both the "
                "same number."
            )
        _check_weights(adapter, name, source)
    return found


def _check_weights(adapter: ModelAdapter, name: str, source: str) -> None:
    """See that W of one site is W^T of the other, up to the rounding of the coarser of their dtypes."""
    weight, other = adapter.weight(name).detach(), adapter.weight(source).detach().T
    if weight.dtype == other.dtype and torch.equal(weight, other):
        return
    excess, difference = _largest_excess(weight, other.to(weight.device))
    if not excess <= 0:  # not a number is no transpose either
        raise SettingError(
            f"{name} cannot be tied to {source}: the target's own weights are not each other's transpose (largest difference "
            f"{difference:.3g}, largest entry {weight.abs().max().item():.3g}). Leave the tie out, or load the model without "
            "processing its weights (folding, centring), if that is what parted them."
        )


def _largest_excess(a: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_in d_out"]) -> tuple[float, float]:
    """How far the difference of two weights goes beyond rounding, at the worst entry; and the largest difference."""
    coarse = max((torch.finfo(t.dtype) for t in (a, b)), key=lambda info: info.eps)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    difference = (a - b).abs()
    allowed = torch.maximum(a.abs(), b.abs()).clamp(min=coarse.smallest_normal) * coarse.eps
    return (difference - allowed).max().item(), difference.max().item()
