"""What must hold of every site on every host, worked out without the library where that is possible."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from .hosts import root_of, run

C = 3
GONE = 1
"""The component that tests ablate."""


def random_decomposition(model: Any, sites: Iterable[str] | str = "*", size: float = 0.3, seed: int = 0) -> Any:
    """Components that do not sum to W, so that only a right delta component keeps the model's output."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, site in tlpd.find_sites(model, sites).items():
        dtype = tlpd.site_weight(model, name).dtype
        v = torch.randn(site.d_in, C, generator=generator, dtype=torch.float64) * size
        u = torch.randn(C, site.d_out, generator=generator, dtype=torch.float64) * size
        factors[name] = (v.to(dtype), u.to(dtype))
    return tlpd.from_factors(model, factors)


def ablate(decomposition: Any, sites: Iterable[str] | None = None, head: int | None = None) -> Any:
    """Masks without component `GONE` of some sites (all of them, unless said)."""
    masks = decomposition.masks()
    for name in decomposition if sites is None else sites:
        masks = masks.ablate(name, GONE, head=head)
    return masks


def gone(decomposition: Any, site: str) -> Tensor:
    """The rank-one matrix [d_in, d_out] that `ablate` takes out of a site's weight."""
    components = decomposition[site]
    return torch.outer(components.V[:, GONE], components.U[GONE]).detach()


def part_kept(decomposition: Any, site: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Masks that keep component 0 and 0.3 of the delta component, and what they take out of the weight; the bias stays.

    Unlike an ablation, this is wrong wherever the bias is.
    """
    v, u = decomposition[site].V.detach(), decomposition[site].U.detach()
    kept = torch.outer(v[:, 0], u[0])
    return decomposition.masks().keep_only(site, 0, delta=0.3), lambda weight: weight - kept - 0.3 * (weight - v @ u)


def ones(decomposition: Any, rows: tuple[int, ...]) -> Any:
    """Masks of ones as tensors, so that no short cut for the constant mask hides the arithmetic."""
    masks = decomposition.masks()
    for name, components in decomposition.items():
        m = torch.ones(*rows, components.n_components, dtype=components.V.dtype)
        masks = masks.with_values(name, m, delta=torch.ones(rows, dtype=components.V.dtype))
    return masks


def patched_run(model: Any, decomposition: Any, masks: Any, inputs: Any) -> Tensor:
    with tlpd.patched(model, decomposition, masks):
        return run(model, inputs)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_no_mask_is_the_model(
    model: Any, inputs: Any, decomposition: Any, rows: tuple[int, ...] | None = None
) -> None:
    """Without masks, and under masks of ones, the output is the model's bit for bit."""
    plain = run(model, inputs)
    assert torch.equal(patched_run(model, decomposition, decomposition.masks(), inputs), plain)
    under_ones = patched_run(model, decomposition, ones(decomposition, rows or (1, 1)), inputs)
    assert torch.equal(under_ones, plain), f"ones are not the model: {difference(under_ones, plain):.1e}"
    assert torch.equal(run(model, inputs), plain), "something was left behind"


def assert_ablation_is_an_edited_weight(
    model: Any, inputs: Any, decomposition: Any, tolerance: float, groups: Iterable[Iterable[str]] | None = None
) -> None:
    """Ablation by hooks agrees with the library's own edited weights, and does something."""
    plain = run(model, inputs)
    for sites in groups or [list(decomposition)]:
        masks = ablate(decomposition, sites)
        hooked = patched_run(model, decomposition, masks, inputs)
        with tlpd.edited_weights(model, decomposition, masks):
            edited = run(model, inputs)
        assert difference(hooked, edited) <= tolerance, f"{list(sites)}: {difference(hooked, edited):.1e}"
        assert difference(hooked, plain) > 100 * tolerance, f"{list(sites)}: the patch does nothing"
    assert torch.equal(run(model, inputs), plain), "the weights are not restored"


def no_hooks_left(model: Any) -> Mapping[str, int]:
    """How many hooks a model carries, to be compared before and after."""
    modules = list(root_of(model).modules())
    return {
        "torch": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "lens": sum(len(getattr(m, "fwd_hooks", ())) for m in modules),
    }


def roles(names: Iterable[str]) -> dict[str, list[str]]:
    """Site names by role: the layer number replaced by `*`."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        role = ".".join("*" if part.isdigit() else part for part in name.split("."))
        grouped.setdefault(role, []).append(name)
    return grouped
