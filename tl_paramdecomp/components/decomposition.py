"""A decomposition: components for every site, their importance function, and what target they were made from."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.components.factors import Components, TiedComponents, check_ties
from tl_paramdecomp.components.files import COMPONENTS, Saved
from tl_paramdecomp.components.importance import ImportanceConfig, ImportanceFunction, module_key
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.components.sigmoids import Importance
from tl_paramdecomp.errors import NoImportanceError, SettingError, ShapeError
from tl_paramdecomp.settings import as_declared
from tl_paramdecomp.sites import Fingerprint, WeightSite, resolve_name

IMPORTANCE = "importance:"
"""Prefix of the importance function's tensors on disk."""


class Decomposition(Saved, Mapping[str, Components]):
    """A Mapping from site name to components. It holds no model.

    Args:
        factors: V [d_in, C] and U [C, d_out] of each site that is not tied.
        sites: The sites by the same names, and the tied ones; where there are any, in the order they should have.
        fingerprints: Of the weights the factors belong to.
        importance: Which causal-importance function it has; None for none.
        info: Where it came from: host, method, versions; anything JSON can hold.
        generator: Seeds the importance function's start.
        tied: Sites whose components are another site's, transposed, each with that site; the two share parameters.

    Raises:
        ShapeError, DtypeError: Factors do not fit their site.
        SettingError: A tie that cannot be, or names that torch cannot tell apart.
    """

    # Mapping compares by content and so cannot be hashed; a module must be
    __hash__ = nn.Module.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    holds = COMPONENTS
    says = {"importance"}, {"tied"}  # files from before there were ties have none

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        sites: Mapping[str, WeightSite],
        fingerprints: Mapping[str, Fingerprint],
        importance: ImportanceConfig | None = None,
        info: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if not factors:
            raise ShapeError("A decomposition needs at least one site.")
        self.tied = dict(tied or {})
        """Tied sites, each with the site whose parameters it shares."""
        check_ties(self.tied, sites, factors)
        made = {name: Components(sites[name], V, U) for name, (V, U) in factors.items()}
        made |= {name: TiedComponents(sites[name], made[source]) for name, source in self.tied.items()}
        order = [name for name in sites if name in made] if self.tied else list(made)
        self._components = nn.ModuleDict({module_key(name): made[name] for name in order})
        if len(self._components) < len(made):
            raise SettingError(f"Names of sites must differ in more than . and /; given {', '.join(order)}.")
        self.fingerprints = {name: fingerprints[name] for name in self}
        self.info = dict(info or {})
        self.importance = None if importance is None else ImportanceFunction(self, importance, generator)

    # --- a Mapping ----------------------------------------------------------------------------------------------------
    def __getitem__(self, site: str) -> Components:
        if module_key(site) in self._components:
            return self._components[module_key(site)]  # type: ignore[return-value]
        return self._components[module_key(resolve_name(self.sites, site))]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return (components.site.name for components in self._components.values())  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self._components)

    def __contains__(self, site: object) -> bool:
        if isinstance(site, str) and module_key(site) in self._components:
            return True
        return any(site == c.site.name or site in c.site.aliases for c in self._components.values())  # type: ignore

    def get(self, site: str, default: Any = None) -> Any:
        """Components of a site, or `default` where the decomposition has none."""
        if site not in self:
            return default
        return self[site]

    # --- reading ------------------------------------------------------------------------------------------------------
    @property
    def sites(self) -> dict[str, WeightSite]:
        """The decomposed sites by name, in execution order."""
        return {name: self[name].site for name in self}

    @property
    def n_components(self) -> dict[str, int]:
        """C of each site."""
        return {name: components.n_components for name, components in self.items()}

    def masks(self) -> Masks:
        """All ones with the delta component: the model itself."""
        return Masks(self.sites, self.n_components)

    def importances(self, inputs: Mapping[str, Tensor], attention_mask: Tensor | None = None) -> dict[str, Importance]:
        """Causal importances from the site inputs of a clean forward pass.

        Args:
            inputs: x of each site: [..., d_in], or indices [...]. The global kinds need those of all sites.
            attention_mask: [batch, pos], 0 at padding; for importance functions that look at other positions.

        Raises:
            NoImportanceError: The decomposition has no importance function.
            SettingError, ShapeError: An input that a global importance function needs is missing; a mask of another shape.
        """
        return self.importance_source()(inputs, self, attention_mask)

    def importance_source(self) -> ImportanceFunction:
        """The importance function, or NoImportanceError."""
        if self.importance is None:
            raise NoImportanceError(
                "This decomposition has no causal-importance function (it was made from factors, or by a method "
                "without one); train one with tl_paramdecomp.decompose(..., method=SPD(...))."
            )
        return self.importance

    def device_of(self, site: str) -> torch.device:
        return self[site].V.device

    @property
    def gives_importances(self) -> bool:
        return self.importance is not None

    def sharded_parts(self) -> list[nn.Module]:
        if self.tied:
            raise SettingError(
                f"shard=True does not go with tied sites ({', '.join(self.tied)}): they share parameters. Leave one out."
            )
        return [*self.values(), *(() if self.importance is None else self.importance.parts())]

    # --- files ------------------------------------------------------------------------------------------------------
    def _as_saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = {name: components for name, components in self.items() if name not in self.tied}
        tensors = {f"{name}.{letter}": getattr(c, letter) for name, c in own.items() for letter in ("V", "U")}
        if self.importance is not None:
            tensors |= {f"{IMPORTANCE}{key}": value for key, value in self.importance.state_dict().items()}
        config = None if self.importance is None else asdict(self.importance.config)
        return tensors, {"tied": self.tied, "importance": config}

    @classmethod
    def _assembled(
        cls, tensors: dict[str, Tensor], values: dict[str, Any], *, sites: Any, norms: Any, **origin: Any
    ) -> "Decomposition":
        tied = as_declared(values.get("tied", {}), dict[str, str])
        config = as_declared(values["importance"], ImportanceConfig | None)
        own = [name for name in sites if name not in tied]
        state = {f"_components.{module_key(n)}.{key}": tensors[f"{n}.{key}"] for n in own for key in ("V", "U")}
        network = {k.removeprefix(IMPORTANCE): t for k, t in tensors.items() if k.startswith(IMPORTANCE)}
        if len(state) + len(network) != len(tensors):
            raise ValueError(f"there are {len(tensors)} tensors for {len(own)} sites and {len(network)} of importances")
        if len({tensor.dtype for tensor in network.values()}) > 1:
            raise TypeError("the importance function's tensors are of several dtypes")
        if config is not None and config.kind == "global_transformer" and config.layers > len(network):
            raise ValueError(f"{config.layers} layers cannot be of {len(network)} tensors")
        state |= {f"importance.{key}": tensor for key, tensor in network.items()}
        return cls._of_state(state, sites, importance=config, tied=tied, **origin)

    @classmethod
    def _of_state(
        cls, state: Mapping[str, Tensor], sites: Mapping[str, WeightSite], tied: Mapping[str, str], **origin: Any
    ) -> "Decomposition":
        """Of these very tensors; made without numbers first, so that nothing is as large as a wrong setting says."""
        with torch.device("meta"):
            keys = {name: f"_components.{module_key(name)}." for name in sites if name not in tied}
            factors = {name: (state[f"{key}V"].to("meta"), state[f"{key}U"].to("meta")) for name, key in keys.items()}
            made = cls(factors, sites, tied=tied, **origin)
        made.load_state_dict(state, assign=True)
        return made

    def with_tensors(self, state: Mapping[str, Tensor]) -> "Decomposition":
        """The same with other tensors, those of a `state_dict`; without gradients."""
        config = None if self.importance is None else self.importance.config
        origin = {"fingerprints": self.fingerprints, "info": self.info, "importance": config}
        return self._of_state(state, self.sites, self.tied, **origin).requires_grad_(False)
