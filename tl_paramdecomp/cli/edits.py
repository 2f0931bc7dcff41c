"""The options of `patch` as patches of component activations."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.analysis.activations import site_acts
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

Rows = tuple[Int[Tensor, "rows pos"], Int[Tensor, "rows pos"] | None]  # token rows and their attention mask


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
        return any(astuple(self)[:7])

    @torch.no_grad()
    def patches(
        self, model: Any, decomposition: Decomposition, corrupt: Rows | None = None, averaged: Rows | None = None
    ) -> ActPatches:
        """The patches: `corrupt` are rows aligned with those that will be patched, `averaged` those whose mean is put in.

        SettingError where a specification cannot be read, or rows are needed and missing.
        """
        made, at, head = act_patches(decomposition), self.positions, self.head
        for spec in self.set_to:
            made = made.set(*_with_number(spec, "--set"), at, head)
        for spec in self.scale:
            made = made.scale(*_with_number(spec, "--scale"), at, head)
        for site, components in map(_components, self.mean):
            if averaged is None:
                raise SettingError("--mean needs prompts to average over: give --task, or --corrupt-prompt.")
            acts, mask = site_acts(model, decomposition, site, *averaged, head), averaged[1]
            means = (acts.flatten(0, 1) if mask is None else acts[mask.bool()]).mean(0)
            made = made.mean(site, components, means, at, head)
        for site, components in map(_components, self.corrupt):
            if corrupt is None:
                raise SettingError("--corrupt needs a corrupt prompt: give --corrupt-prompt, or a --task with some.")
            made = made.from_acts(site, components, site_acts(model, decomposition, site, *corrupt, head), at, head)
        for site, components in map(_components, self.ablate):
            made = made.zero(site, components, at, head)
        for site, components in map(_components, self.keep_only):
            if head is not None:
                raise SettingError("--keep-only is about whole components; leave --head out.")
            name = resolve_name(decomposition.sites, site)
            n = decomposition[name].n_components
            others = sorted(set(range(n)) - set(component_indices(components, n, name)))
            made = (made.zero(name, others, at) if others else made).delta(name, 0.0, at)
        for spec in self.delta:
            site, _, factor = spec.rpartition("=")
            made = made.delta(site, _number(factor, spec, "--delta"), at)
        return made


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
    return *_components(place, option), _number(value, spec, option)


def _number(value: str, spec: str, option: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SettingError(f"{option} {spec!r} is not {FORMS[option]}.") from None
