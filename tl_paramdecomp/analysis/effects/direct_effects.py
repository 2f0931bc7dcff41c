"""Direct effects of what sites write on what a component reads, or on a metric, in one forward pass.

Every decomposed site (or those that are chosen) is pinned: a leaf takes the place of what it writes, so that no effect
passes through another one of them. What lies between two sites is differentiated: the residual stream, attention from key to
query positions where its queries, keys and values are not pinned on the way, nonlinearities, and weights that are not
decomposed. With `frozen_norms` the denominators of LayerNorm and RMSNorm are constants, with `frozen_patterns` attention
patterns are.

With a the number that is explained, y_s = b_s + h_s U_s + delta_s the writes and g_s = da/dy_s:

    a = sum over sites and positions of (h_s U_s + delta_s + b_s) . g_s + embeddings + biases + remainder

where embeddings and biases are those of tables, weights and normalisations that are not decomposed. The remainder is 0 where a
is an affine function of the writes: everything between is linear, or frozen. Each part is a with the component (its write, a
bias, an embedding) minus a without it, the others held: exactly so in that case, to first order otherwise.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.attention import attention_softmaxes
from tl_paramdecomp.adapters.norm_scales import NormCall, opened_norms
from tl_paramdecomp.analysis.effects.site_writes import (
    EMBEDDINGS,
    Prompts,
    SiteWrites,
    along_writes,
    derivatives,
    dotted,
)
from tl_paramdecomp.components.factors import Components


@dataclass(frozen=True, eq=False)
class IncomingEdges:
    """What a number in a forward pass is made of, one number for each row."""

    target: str
    """Site, component and position."""
    value: Float[Tensor, " batch"]
    """The number itself: a component's activation at one position, or the metric."""
    values: dict[str, Float[Tensor, "batch pos _C"]]
    """By decomposed site, the edge from each component at each position: h_c (U_c . g), the number with its write minus
    without it."""
    delta: dict[str, Float[Tensor, "batch pos"]]
    """By decomposed site, the edge from its delta component."""
    bias: dict[str, Float[Tensor, " batch"]]
    """By site or normalisation, the edge from its bias at all positions together."""
    embeddings: dict[str, Float[Tensor, "batch pos"]]
    """The edge from each embedding table that is not decomposed."""

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Sum of all edges."""
        kinds = (self.values, self.bias, self.delta, self.embeddings)
        parts = [part.reshape(len(part), -1).sum(1) for kind in kinds for part in kind.values()]
        return torch.stack([part.to(self.value.dtype) for part in parts]).sum(0)

    def sums(self) -> dict[str, float]:
        """Sums of all edges of each kind, over rows too."""
        names = ("values", "delta", "bias", "embeddings")
        return {name: float(sum(float(part.sum()) for part in getattr(self, name).values())) for name in names}

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """What of the number the edges do not explain: 0 where everything between is linear or frozen."""
        return self.value - self.total


@dataclass(eq=False)
class DirectPass:
    """One forward pass with every decomposed site pinned, from which any number of targets can be explained."""

    adapter: ModelAdapter
    components: Mapping[str, Components]
    """Of the pinned sites."""
    writes: SiteWrites
    norms: dict[str, list[NormCall]]
    metric: Float[Tensor, " batch"]
    """In the graph."""
    acts: dict[str, Float[Tensor, "batch pos _C"]] = field(default_factory=dict)
    rest: dict[str, Float[Tensor, "batch pos d_out"]] = field(default_factory=dict)
    """What delta components write."""

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        components: Mapping[str, Components],
        prompts: Prompts,
        frozen_norms: bool = True,
        frozen_patterns: bool = False,
    ) -> "DirectPass":
        """Run it over the clean rows, with these components' sites pinned."""
        writes = SiteWrites(len(prompts.clean))
        others = [
            n for n in adapter.wirings if n not in components and (n in EMBEDDINGS or adapter.bias(n) is not None)
        ]
        fns = writes.fns(components, "pinned") | writes.fns(others, "open")
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            norms = stack.enter_context(opened_norms(adapter.root, frozen_norms))
            if frozen_patterns:
                stack.enter_context(attention_softmaxes(adapter.root, hold=True))
            stack.enter_context(adapter.intercept(fns))
            metric = prompts.measure(adapter.forward(prompts.clean, prompts.attention_mask))
        made = cls(adapter, components, writes.check_positions(), dict(norms), metric)
        for name, own in components.items():
            made.acts[name] = writes.acts(name, own)
            made.rest[name] = writes.delta_write(name, own)
        return made

    def into_component(self, site: str, component: int, position: int) -> IncomingEdges:
        """Edges into a component's activation at one position."""
        components, x = self.components[site], self.writes.x[site]
        if components.site.kind == "embedding":
            value = self.acts[site][:, position, component]
        else:
            value = x[:, position].to(components.V.dtype) @ components.V.detach()[:, component]
        return self.into(f"{site}[{component}] at {position}", value)

    def into_metric(self) -> IncomingEdges:
        """Edges into the metric."""
        return self.into("metric", self.metric)

    def into(self, target: str, value: Float[Tensor, " batch"]) -> IncomingEdges:
        """Edges into a number of this pass."""
        names = list(self.writes.leaves)
        norms = [(name, call) for name, calls in self.norms.items() for call in calls if call.bias is not None]
        leaves = [self.writes.leaves[n] for n in names] + [call.leaf for _, call in norms]
        found = derivatives(value.sum(), leaves, retain=True)
        gradients = dict(zip(names, found))
        values, delta, bias, embeddings = {}, {}, {}, {}
        for name, gradient in gradients.items():
            own = self.writes.bias[name]
            if own is not None:
                bias[name] = dotted(own, gradient).sum(1)
            if name in self.components:
                values[name] = along_writes(self.components[name], self.acts[name], gradient)
                delta[name] = dotted(self.rest[name], gradient)
            elif name in EMBEDDINGS:
                embeddings[name] = dotted(self.writes.y[name], gradient)
        for (name, call), gradient in zip(norms, found[len(names) :]):
            assert call.bias is not None
            part = dotted(call.bias, gradient).flatten(1).sum(1)
            bias[f"norm {name}"] = bias[f"norm {name}"] + part if f"norm {name}" in bias else part
        return IncomingEdges(target, value.detach(), values, delta, bias, embeddings)
