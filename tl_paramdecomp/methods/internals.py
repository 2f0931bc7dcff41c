"""Reconstruction of what happens inside the target: site activations and attention patterns under masks.

Outputs can be right for the wrong reasons. These terms ask whether the activations at the sites, and where each head
attends, survive masking too; as metrics they show it, as auxiliary losses they make runs agree more across seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.divergence import wide
from tl_paramdecomp.methods.loss import Loss, LossBatch
from tl_paramdecomp.methods.reconstruction import importance_masks_of, stochastic_masks
from tl_paramdecomp.methods.step import LossStep, SiteMasks, SiteValues
from tl_paramdecomp.settings import NotNegative

Masking = Literal["stochastic", "importance"]
"""Random masks m = g + (1 - g) r with the delta component masked too, or m = g without it."""


@dataclass(frozen=True)
class HiddenActsReconstruction(Loss):
    """Squared error of the activations at the sites under masks at all of them, mean over sites and scored positions."""

    coefficient: NotNegative = 1.0
    masks: Masking = "stochastic"
    """Kind of masks the activations are compared under."""
    at: Literal["outputs", "inputs"] = "outputs"
    """What each site writes, or what it reads."""
    relative: bool = True
    """Divided by the mean square of the target's own activations; otherwise a mean over elements."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"hidden_acts_{self.masks}_{self.at}"

    def prepare(self, batch: LossBatch) -> dict[str, Tensor]:
        """Mean squares of the whole batch's activations, which errors are relative to; by site."""
        if not (self.relative and batch.divided):
            return {}
        return batch.total(lambda step: {
            name: step.place.weight * _mean(self._clean(step, name).square()) for name in self._names(step)
        })  # fmt: skip

    def parts(self, step: LossStep, shared: dict[str, Tensor]) -> Iterator[Tensor]:
        names = self._names(step)
        kept: dict[str, SiteValues] = {}
        step.run_masked(_masks(step, self.masks), kept)
        errors = []
        for name in names:
            masked = kept[name].x if self.at == "inputs" else kept[name].y
            clean = self._clean(step, name, masked)
            error = _mean((_rows(step, masked) - clean).square())
            if self.relative:
                error = error / (shared[name] if shared else _mean(clean.square())).clamp(min=1e-30)
            errors.append(error.to(step.device))
        yield torch.stack(errors).mean()

    def _names(self, step: LossStep) -> list[str]:
        """Sites to compare at; an embedding reads indices, which no mask changes."""
        names = [n for n in step.inputs if self.at == "outputs" or step.inputs[n].is_floating_point()]
        if not names:
            raise SettingError("None of the sites reads activations; compare at='outputs'.")
        return names

    def _clean(self, step: LossStep, name: str, like: Tensor | None = None) -> Float[Tensor, "n d"]:
        """The target's own activations at the positions that count."""
        clean = step.inputs[name] if self.at == "inputs" else clean_output(step, name)
        return _rows(step, clean if like is None else clean.expand_as(like))


def _rows(step: LossStep, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "n d"]:
    return wide(step.at_scored(values))


def _mean(values: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The mean, or 0 where a microbatch is padding alone."""
    return values.mean() if values.numel() else values.sum()


@dataclass(frozen=True)
class AttentionPatternReconstruction(Loss):
    """KL of each head's attention pattern from the target's under masks, mean over layers, heads and scored queries."""

    coefficient: NotNegative = 1.0
    masks: Masking = "stochastic"
    """Kind of masks the patterns are compared under."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"attention_patterns_{self.masks}"

    def parts(self, step: LossStep, shared: Any) -> Iterator[Tensor]:
        with torch.no_grad(), step.adapter.patterns() as clean:
            step.adapter.forward(step.tokens, step.attention_mask)
        with step.adapter.patterns() as masked:
            step.run_masked(_masks(step, self.masks))
        # a layer that the masked pass left out, as nothing before it changes, has the target's own pattern
        errors = [_pattern_kl(step, p, masked[layer]) for layer, p in clean.items() if layer in masked]
        yield sum((e.to(step.device) for e in errors), torch.zeros((), device=step.device)) / len(clean)


def clean_output(step: LossStep, name: str) -> Float[Tensor, "batch ... d_out"]:
    """What a site gives in the target itself: x W + b."""
    x, weight, bias = step.inputs[name], step.adapter.weight(name).detach(), step.adapter.bias(name)
    y = x.to(weight.dtype) @ weight if x.is_floating_point() else weight[x]
    return y if bias is None else y + bias.detach()


def _pattern_kl(
    step: LossStep, clean: Float[Tensor, "batch head query key"], masked: Float[Tensor, "batch head query key"]
) -> Float[Tensor, ""]:
    p, q = (wide(t).transpose(1, 2) for t in (clean, masked))
    kl = (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(-1)
    return _mean(step.at_scored(kl))


def _masks(step: LossStep, masks: Masking) -> SiteMasks:
    return stochastic_masks(step) if masks == "stochastic" else importance_masks_of(step)
