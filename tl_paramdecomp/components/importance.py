"""Causal-importance functions: small networks from site inputs to how much each component matters there, in [0, 1].

They read the clean forward pass, never masked activations, and are part of the decomposition: saved and loaded with it.
Published in "Stochastic Parameter Decomposition" (arXiv 2506.20790), section 2 and appendix, and its successors. The
networks are in `importance_networks`, what makes importances of their outputs in `sigmoids`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.importance_networks import GLOBAL_KINDS, SITE_KINDS
from tl_paramdecomp.components.sigmoids import SIGMOIDS, Importance
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.settings import Count, Kind, Whole


@dataclass(frozen=True)
class ImportanceConfig(Kind):
    """Which causal-importance function a decomposition has.

    The defaults suit models of up to a few million weights. For its 67M-weight target VPD took
    `ImportanceConfig("global_transformer", hidden=2048, layers=8, heads=16, d_mlp=8192)`, that is `ImportanceConfig.vpd()`.

    Raises:
        SettingError: A setting makes no sense.
    """

    kind: Literal["component_mlp", "vector_mlp", "shared_mlp", "global_mlp", "global_transformer"] = "shared_mlp"
    """`component_mlp`: a tiny network per component on its own activation (the paper's). `vector_mlp`: one per component
    on the site's whole input. `shared_mlp`: one network per site from its whole input. `global_mlp`, `global_transformer`:
    one network for all sites from all inputs, the latter with attention over positions (VPD's)."""
    hidden: Count | None = 128
    """Hidden width; a transformer's width. None: twice the (widest) d_in, at least 128; 12 for `vector_mlp`. The paper has
    16 for `component_mlp`."""
    sigmoid: Literal["clamped", "leaky"] = "clamped"
    """How raw outputs become importances."""
    normalise: bool = True
    """Divide inputs by their root mean square, site by site. Not for `component_mlp`. Off, `vector_mlp`, `shared_mlp` and
    `global_mlp` are the authors' own."""
    layers: Whole = 2
    """Blocks of a transformer."""
    heads: Count = 4
    """Attention heads of a transformer; twice their number divides its width."""
    d_mlp: Count | None = None
    """Width of a transformer's MLPs; None: four times its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "global_transformer" and self.hidden is not None and self.hidden % (2 * self.heads):
            raise SettingError(
                f"Twice the number of heads must divide an importance transformer's width (its heads are rotated in pairs "
                f"of dimensions); given hidden={self.hidden}, heads={self.heads}."
            )

    @classmethod
    def vpd(cls) -> "ImportanceConfig":
        """The transformer of the VPD paper, made for decomposing a model of 67M weights."""
        return cls("global_transformer", hidden=2048, layers=8, heads=16, d_mlp=8192)

    @property
    def is_global(self) -> bool:
        """Whether one network reads the inputs of all sites."""
        return self.kind in GLOBAL_KINDS

    def width(self, d_in: int) -> int:
        """Hidden width for sites of at most this input width."""
        if self.hidden is not None:
            return self.hidden
        if self.kind == "vector_mlp":
            return 12
        width = max(128, 2 * d_in)
        multiple = 2 * self.heads if self.kind == "global_transformer" else 1
        return -(-width // multiple) * multiple


class CleanPass(NamedTuple):
    """A forward pass of the target as it is, of which importances are told."""

    adapter: Any
    """The target's adapter, for sources that run it again."""
    tokens: Shaped[Tensor, "batch ..."]
    attention_mask: Shaped[Tensor, "batch pos"] | None
    inputs: Mapping[str, Tensor]
    """x of each site: [..., d_in], or indices [...]."""
    measure: Literal["kl", "mse"] = "kl"
    """How outputs are compared, by sources that look at gradients."""


@runtime_checkable
class ImportanceSource(Protocol):
    """What says how much each component matters at each position: a decomposition's own function, or an oracle."""

    def importances(self, components: Mapping[str, Components], clean: CleanPass) -> dict[str, Importance]:
        """Importances [..., C] of every site."""
        ...


class ImportanceFunction(nn.Module):
    """Causal importances of all sites of a decomposition, from the inputs of a clean forward pass."""

    def __init__(
        self, components: Mapping[str, Components], config: ImportanceConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        if config.is_global:
            width = config.width(max((c.site.d_in for c in components.values() if c.site.kind == "linear"), default=0))
            network = GLOBAL_KINDS[config.kind](components, width, config, generator)
            first = next(iter(components.values()))
            self.network = network.to(first.V.device, first.V.dtype)
            return
        self.networks = nn.ModuleDict()
        for name, comps in components.items():
            network = SITE_KINDS[config.kind](comps, config.width(comps.site.d_in), config, generator)
            self.networks[module_key(name)] = network.to(comps.V.device, comps.V.dtype)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        components: Mapping[str, Components],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Importance]:
        """Importances [..., C] of every site in `inputs`, which are x of each in a clean forward pass: [..., d_in], or indices.

        A transformer does not see positions where the attention mask is 0. SettingError where a global kind lacks the input of
        some site, ShapeError where the mask does not have the shape of the inputs' rows.
        """
        if self.config.is_global:
            found = self.network(inputs, attention_mask)
            raw = {name: values.to(components[name].V.device) for name, values in found.items()}
        else:
            raw = {name: self._raw(name, x, components[name]) for name, x in inputs.items()}
        return {name: SIGMOIDS[self.config.sigmoid](values) for name, values in raw.items()}

    def importances(self, components: Mapping[str, Components], clean: CleanPass) -> dict[str, Importance]:
        """Importances [..., C] of every site; as `forward`."""
        return self(clean.inputs, components, clean.attention_mask)

    def _raw(self, name: str, x: Tensor, components: Components) -> Tensor:
        network: Any = self.networks[module_key(name)]
        return network(components(type(components).acts, x) if network.reads_acts else x)

    def parts(self) -> list[nn.Module]:
        """The networks, each of which reads its parameters together."""
        return [self.network] if self.config.is_global else list(self.networks.values())


def module_key(site: str) -> str:
    """A site's name as torch accepts it for a submodule."""
    return site.replace(".", "/")
