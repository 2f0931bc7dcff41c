"""A decomposition: components for every site, their importance function, and what target they were made from."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.components import files
from tl_paramdecomp.components.factors import Components, TiedComponents
from tl_paramdecomp.components.importance import ImportanceConfig, ImportanceFunction, module_key
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.components.plain import as_declared
from tl_paramdecomp.components.saved import Saved
from tl_paramdecomp.components.saved_sites import check_keys, disagreement, fingerprints_of, named_sites
from tl_paramdecomp.components.sigmoids import Importance
from tl_paramdecomp.components.ties import check_ties
from tl_paramdecomp.errors import DecompositionFileError, NoImportanceError, SettingError, ShapeError
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
        if self.importance is None:
            raise NoImportanceError(
                "This decomposition has no causal-importance function (it was made from factors, or by a method "
                "without one); train one with tl_paramdecomp.decompose(..., method=SPD(...))."
            )
        return self.importance(inputs, self, attention_mask)

    def device_of(self, site: str) -> torch.device:
        """Where a site's components are."""
        return self[site].V.device

    # --- files --------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write `components.safetensors` and `decomposition.json` into a folder; whenever that ends, the folder holds what
        it held before or what is saved now.

        Raises:
            DecompositionFileError: The folder cannot be written, or holds something else; a number is NaN or infinite, or
                `info` is nothing that JSON has.
        """
        own = {name: components for name, components in self.items() if name not in self.tied}
        tensors = {f"{name}.{letter}": getattr(c, letter) for name, c in own.items() for letter in ("V", "U")}
        metadata = {
            "sites": [asdict(site) for site in self.sites.values()],
            "tied": self.tied,
            "fingerprints": {name: asdict(found) for name, found in self.fingerprints.items()},
            "importance": None if self.importance is None else self.importance.settings(),
            "info": self.info,
        }
        if self.importance is not None:
            tensors |= {f"{IMPORTANCE}{key}": value for key, value in self.importance.state_dict().items()}
        return files.save_parts(Path(folder), tensors, metadata)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Decomposition":
        """Read a decomposition that `save` wrote.

        Raises:
            DecompositionFileError: The folder or a file is missing, broken, foreign or of a newer format.
            DeviceError: There is no such device.
        """
        tensors, metadata = files.load_parts(Path(folder), device)
        if metadata.get("kind") is not None:
            raise DecompositionFileError(
                f"{folder} holds {metadata['kind']}, not components; open it with SubnetworkDecomposition.load."
            )
        try:
            return cls._assembled(tensors, metadata)
        except Exception as error:  # a damaged file may go wrong anywhere
            raise disagreement(folder, "a decomposition", error) from error

    @classmethod
    def _assembled(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> "Decomposition":
        """From what `save` wrote; made without numbers, which then are put in, so that nothing is as large as a wrong
        setting says before the file is seen to hold it."""
        check_keys(metadata, {"sites", "fingerprints", "importance", "info"}, {"tied"})
        sites = named_sites(WeightSite, metadata["sites"])
        fingerprints = fingerprints_of(sites, metadata["fingerprints"])
        tied = as_declared(metadata.get("tied", {}), dict[str, str])  # files from before there were ties have none
        config = as_declared(metadata["importance"], ImportanceConfig | None)
        info = as_declared(metadata["info"], dict[str, Any])
        own = [name for name in sites if name not in tied]
        state = {f"_components.{module_key(n)}.{key}": tensors[f"{n}.{key}"] for n in own for key in ("V", "U")}
        network = {k.removeprefix(IMPORTANCE): t for k, t in tensors.items() if k.startswith(IMPORTANCE)}
        if len(state) + len(network) != len(tensors):
            raise ValueError(f"there are {len(tensors)} tensors for {len(own)} sites and {len(network)} of importances")
        if len({tensor.dtype for tensor in network.values()}) > 1:
            raise TypeError("the importance function's tensors are of several dtypes")
        if config is not None and config.kind == "global_transformer" and config.layers > len(network):
            raise ValueError(f"{config.layers} layers cannot be of {len(network)} tensors")
        with torch.device("meta"):
            factors = {name: (tensors[f"{name}.V"].to("meta"), tensors[f"{name}.U"].to("meta")) for name in own}
            made = cls(factors, sites, fingerprints, config, info, tied=tied)
        made.load_state_dict(state | {f"importance.{key}": tensor for key, tensor in network.items()}, assign=True)
        return made
