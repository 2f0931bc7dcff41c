"""Importances without an importance function: what a second look at the model says of each component.

For target p and a change of one component's write at one position, KL(p || p') is to second order

    1/2 E_{y ~ p} [ (h_c U_c . d log p(y) / d y_site)^2 ]

with y drawn from the model's own prediction at every position: the Fisher information along what the component writes. The
oracle keeps, at each position, the k components of all sites for which it is largest. It sees the model's gradients, which
an importance function does not: for bases that have no function of their own it is the stronger choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.analysis.effects.site_writes import SiteWrites, along_writes
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.importance import CleanPass, Importance
from tl_paramdecomp.errors import ShapeError
from tl_paramdecomp.methods.step import KL_NEEDS, MSE_INSTEAD, Measure
from tl_paramdecomp.settings import Count, Seed, Settings


@dataclass(frozen=True)
class Oracle(Settings):
    """Importances 1 for the k components of largest estimated effect at each position, 0 for all others."""

    k: Count
    """Components per position, over all sites together."""
    samples: Count = 4
    """Draws of next tokens that the expectation is taken over."""
    seed: Seed = 0
    """Of what is drawn."""

    def importances(self, components: Mapping[str, Components], clean: CleanPass) -> dict[str, Importance]:
        """Importances [batch, pos, C] of every site."""
        effects = estimated_effects(
            clean.adapter, components, clean.tokens, clean.attention_mask, self.samples, self.seed, clean.measure
        )
        together = torch.cat(list(effects.values()), -1)
        kept = torch.zeros_like(together)
        kept.scatter_(-1, together.topk(min(self.k, together.shape[-1]), -1).indices, 1.0)
        parts = kept.split([e.shape[-1] for e in effects.values()], -1)
        return {name: Importance(part, part) for name, part in zip(effects, parts, strict=True)}


def estimated_effects(
    adapter: ModelAdapter,
    decomposition: Mapping[str, Components],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    samples: int = 4,
    seed: int = 0,
    measure: Measure = "kl",
) -> dict[str, Float[Tensor, "batch pos C"]]:
    """Estimated KL, in nats over all later positions, from removing each component at each position by itself: a size, without
    a sign.

    Of outputs that are no logits, the mean square: (h_c U_c . d(s . y) / d y_site)^2 / width with signs s drawn at random.
    """
    if measure == "kl":
        need_logits(adapter, KL_NEEDS, MSE_INSTEAD)
    names, writes = list(decomposition), SiteWrites(len(tokens))
    with torch.enable_grad(), adapter.intercept(writes.fns(names, "open")):
        output = adapter.forward(tokens, attention_mask).float()
        scores = torch.log_softmax(output, -1) if measure == "kl" else output / output.shape[-1] ** 0.5
    if len({y.shape[:-1] for y in writes.y.values()}) > 1:
        shapes = ", ".join(f"{name} {list(y.shape[:-1])}" for name, y in writes.y.items())
        raise ShapeError(f"The k components of a position are chosen over all sites, and theirs differ: {shapes}.")
    acts = {name: writes.acts(name, decomposition[name]) for name in names}
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    found = {name: torch.zeros((), device=tokens.device) for name in decomposition}
    for i in range(samples):
        with torch.enable_grad():
            chosen = _drawn(scores, measure, generator)
            if attention_mask is not None and chosen.ndim > 1:  # a classifier's outputs have no positions
                chosen = chosen * attention_mask
            total = chosen.sum()
        gradients = writes.gradients(total, retain=i + 1 < samples)
        for name in names:
            change = along_writes(decomposition[name], acts[name], gradients[name])
            found[name] = found[name] + change.square_().mul_((0.5 if measure == "kl" else 1.0) / samples)
    return found


def _drawn(
    scores: Float[Tensor, "*rows width"], measure: Measure, generator: torch.Generator
) -> Float[Tensor, "*rows"]:
    """Log probabilities of next tokens drawn from the model's own prediction; or sums of outputs with random signs."""
    if measure == "mse":
        signs = torch.randint(0, 2, scores.shape, generator=generator, device=scores.device)
        return (scores * (2 * signs - 1)).sum(-1)
    drawn = torch.multinomial(scores.detach().exp().flatten(0, -2), 1, generator=generator)
    return scores.gather(-1, drawn.view(*scores.shape[:-1], 1)).squeeze(-1)
