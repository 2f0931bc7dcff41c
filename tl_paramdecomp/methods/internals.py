"""Reconstruction of what happens inside the target: site activations and attention patterns under masks.

Outputs can be right for the wrong reasons. These terms ask whether the activations at the sites, and where each head
attends, survive masking too; as metrics they show it, as auxiliary losses they make runs agree more across seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.base import Loss, LossStep, SiteMasks, SiteValues
from tl_paramdecomp.methods.reconstruction import importance_masks_of, stochastic_masks

Masking = Literal["stochastic", "importance"]
"""Random masks m = g + (1 - g) r with the delta component masked too, or m = g without it."""


@dataclass(frozen=True)
class HiddenActsReconstruction(Loss):
    """Squared error of the activations at the sites under masks at all of them, mean over sites and scored positions."""

    coefficient: float = 1.0
    masks: Masking = "stochastic"
    at: Literal["outputs", "inputs"] = "outputs"
    """What each site writes, or what it reads."""
    relative: bool = True
    """Divided by the mean square of the target's own activations; otherwise a mean over elements."""

    def __post_init__(self) -> None:
        _check_masking(self.masks)
        if self.at not in ("outputs", "inputs"):
            raise SettingError(f"Hidden activations are compared at 'outputs' or 'inputs'; given {self.at!r}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name in logs."""
        return f"hidden_acts_{self.masks}_{self.at}"

    def parts(self, step: LossStep) -> Iterator[Float[Tensor, ""]]:
        """One part."""
        kept: dict[str, SiteValues] = {}
        step.run_masked(_masks(step, self.masks), kept)
        errors = []
        for name, values in kept.items():
            if self.at == "inputs" and not step.inputs[name].is_floating_point():
                continue  # an embedding reads indices, which no mask changes
            clean = step.inputs[name] if self.at == "inputs" else clean_output(step, name)
            masked = values.x if self.at == "inputs" else values.y
            rows = [_wide(step.divergence.rows(t.expand_as(masked) if t is clean else t)) for t in (clean, masked)]
            error = (rows[1] - rows[0]).square().mean()
            errors.append(error / rows[0].square().mean().clamp(min=1e-30) if self.relative else error)
        if not errors:
            raise SettingError("None of the sites reads activations; compare at='outputs'.")
        yield torch.stack(errors).mean()


@dataclass(frozen=True)
class AttentionPatternReconstruction(Loss):
    """KL of each head's attention pattern from the target's under masks, mean over layers, heads and scored queries."""

    coefficient: float = 1.0
    masks: Masking = "stochastic"

    def __post_init__(self) -> None:
        _check_masking(self.masks)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name in logs."""
        return f"attention_patterns_{self.masks}"

    def parts(self, step: LossStep) -> Iterator[Float[Tensor, ""]]:
        """One part."""
        with torch.no_grad(), step.adapter.patterns() as clean:
            step.adapter.forward(step.tokens, step.attention_mask)
        with step.adapter.patterns() as masked:
            step.run_masked(_masks(step, self.masks))
        # a layer that the masked pass left out, as nothing before it changes, has the target's own pattern
        errors = [_pattern_kl(step, p, masked[layer]) for layer, p in clean.items() if layer in masked]
        yield sum(errors, torch.zeros((), device=step.device)) / len(clean)


def clean_output(step: LossStep, name: str) -> Float[Tensor, "batch ... d_out"]:
    """What a site gives in the target itself: x W + b."""
    x, weight, bias = step.inputs[name], step.adapter.weight(name).detach(), step.adapter.bias(name)
    y = x.to(weight.dtype) @ weight if x.is_floating_point() else weight[x]
    return y if bias is None else y + bias.detach()


def _pattern_kl(
    step: LossStep, clean: Float[Tensor, "batch head query key"], masked: Float[Tensor, "batch head query key"]
) -> Float[Tensor, ""]:
    p, q = (_wide(t).transpose(1, 2) for t in (clean, masked))
    kl = (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(-1)
    return step.divergence.rows(kl).mean()


def _wide(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _masks(step: LossStep, masks: Masking) -> SiteMasks:
    return stochastic_masks(step) if masks == "stochastic" else importance_masks_of(step)


def _check_masking(masks: str) -> None:
    if masks not in ("stochastic", "importance"):
        raise SettingError(f"Masks are 'stochastic' or 'importance'; given {masks!r}.")
