"""The options of `patch` as patches of component activations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import component_indices
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.patching.act_patches import ActPatches, act_patches
from tl_paramdecomp.sites import resolve_name

FORMS = {
    "--ablate": "SITE:C[,C...], such as blocks.0.mlp.W_in:3,17,20-25 (* for all)",
    "--set": "SITE:C[,C...]=VALUE, such as blocks.0.mlp.W_in:3=2.5",
    "--scale": "SITE:C[,C...]=FACTOR, such as blocks.0.mlp.W_in:3=0",
    "--delta": "SITE=FACTOR, such as blocks.0.mlp.W_in=0",
}

Rows = tuple[Int[Tensor, "rows pos"], Int[Tensor, "rows pos"] | None]
"""Token rows and their attention mask."""


@dataclass(frozen=True)
class Edits:
    """What is to be done, as the options say it."""

    ablate: Sequence[str] = ()
    keep_only: Sequence[str] = ()
    set_to: Sequence[str] = ()
    scale: Sequence[str] = ()
    mean: Sequence[str] = ()
    corrupt: Sequence[str] = ()
    delta: Sequence[str] = ()
    head: int | None = None
    positions: Sequence[int] | None = None

    def __bool__(self) -> bool:
        every = (self.ablate, self.keep_only, self.set_to, self.scale, self.mean, self.corrupt, self.delta)
        return any(every)

    def patches(
        self, model: Any, decomposition: Decomposition, corrupt: Rows | None = None, averaged: Rows | None = None
    ) -> ActPatches:
        """The patches.

        Args:
            model: Run for activations, where corrupt or mean ones are put in.
            decomposition: Made from its weights.
            corrupt: Rows aligned with those that will be patched.
            averaged: Rows whose mean activations, over all that counts, are put in.

        Raises:
            SettingError: A specification that cannot be read, or rows that are needed and missing.
            NoMatchingSiteError, ComponentIndexError, HeadIndexError: No such site, component or head.
        """
        with torch.no_grad():
            return self._made(model, decomposition, corrupt, averaged)

    def _made(
        self, model: Any, decomposition: Decomposition, corrupt: Rows | None, averaged: Rows | None
    ) -> ActPatches:
        made, at, head = act_patches(decomposition), self.positions, self.head
        for site, components, value in (_with_number(spec, "--set") for spec in self.set_to):
            made = made.set(site, components, value, at, head)
        for site, components, factor in (_with_number(spec, "--scale") for spec in self.scale):
            made = made.scale(site, components, factor, at, head)
        for site, components in map(_components, self.mean):
            if averaged is None:
                raise SettingError("--mean needs prompts to average over: give --task, or --corrupt-prompt.")
            acts = _mean(_acts(model, decomposition, site, averaged, head), averaged[1])
            made = made.mean(site, components, acts, at, head)
        for site, components in map(_components, self.corrupt):
            if corrupt is None:
                raise SettingError(
                    "--corrupt needs a corrupt prompt: give --corrupt-prompt, or a --task that has some."
                )
            made = made.from_acts(site, components, _acts(model, decomposition, site, corrupt, head), at, head)
        for site, components in map(_components, self.ablate):
            made = made.zero(site, components, at, head)
        for site, components in map(_components, self.keep_only):
            if head is not None:
                raise SettingError("--keep-only is about whole components; leave --head out.")
            made = _only(made, decomposition, site, components, at)
        for site, factor in map(_delta, self.delta):
            made = made.delta(site, factor, at)
        return made


# --- what options say -------------------------------------------------------------------------------------------------
def _components(spec: str, option: str = "--ablate") -> tuple[str, Any]:
    site, _, listed = spec.rpartition(":")
    if site and listed == "*":
        return site, slice(None)
    try:
        return site, [c for part in listed.split(",") for c in _run(part)]
    except ValueError:
        raise SettingError(f"{spec!r} is not {FORMS[option]}.") from None


def _run(part: str) -> Iterable[int]:
    """One number, or neighbours as A-B."""
    first, dash, last = part.strip().partition("-")
    return range(int(first), int(last) + 1) if first and dash else (int(part),)


def _with_number(spec: str, option: str) -> tuple[str, Any, float]:
    place, _, value = spec.rpartition("=")
    try:
        return *_components(place, option), float(value)
    except ValueError:
        raise SettingError(f"{spec!r} is not {FORMS[option]}.") from None


def _delta(spec: str) -> tuple[str, float]:
    site, _, value = spec.rpartition("=")
    try:
        return site, float(value)
    except ValueError:
        raise SettingError(f"--delta {spec!r} is not {FORMS['--delta']}.") from None


def _only(made: ActPatches, decomposition: Decomposition, site: str, components: Any, positions: Any) -> ActPatches:
    """All others and the delta component removed."""
    name = resolve_name(decomposition.sites, site)
    n = decomposition[name].n_components
    others = sorted(set(range(n)) - set(component_indices(components, n, name)))
    made = made.zero(name, others, positions) if others else made
    return made.delta(name, 0.0, positions)


# --- activations to put in --------------------------------------------------------------------------------------------
def _acts(model: Any, decomposition: Decomposition, site: str, rows: Rows, head: int | None) -> Float[Tensor, "... C"]:
    """Component activations [rows, pos, C] of one site, by head where a head's part of what it reads is patched."""
    name = resolve_name(decomposition.sites, site)
    components = decomposition[name]
    x = adapt(model).capture(rows[0], [name], rows[1]).inputs[name]
    by_head = head is not None and components.site.head_side == "in"
    return components.head_acts(x) if by_head else components.acts(x)


def _mean(acts: Float[Tensor, "rows pos ..."], mask: Int[Tensor, "rows pos"] | None) -> Float[Tensor, "..."]:
    return (acts.flatten(0, 1) if mask is None else acts[mask.bool()]).mean(0)
