"""A decomposition: components for every site, their importance function, and what target they were made from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_paramdecomp.components import files
from tl_paramdecomp.components.factors import Components, make_components
from tl_paramdecomp.components.importance import Importance, ImportanceConfig, ImportanceFunction, module_key
from tl_paramdecomp.components.masks import Masks
from tl_paramdecomp.errors import NoImportanceError, ShapeError
from tl_paramdecomp.sites import Fingerprint, WeightSite, resolve_name


class Decomposition(nn.Module, Mapping[str, Components]):
    """A Mapping from site name to components. It holds no model.

    Args:
        factors: V [d_in, C] and U [C, d_out] of each site.
        sites: The sites, by the same names.
        fingerprints: Of the weights the factors belong to.
        importance: Which causal-importance function it has; None for none.
        info: Where it came from: host, method, versions; anything JSON can hold.
        generator: Seeds the importance function's start.

    Raises:
        ShapeError, DtypeError: Factors do not fit their site.
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
    ) -> None:
        super().__init__()
        if not factors:
            raise ShapeError("A decomposition needs at least one site.")
        self._components = nn.ModuleDict(
            {module_key(name): make_components(sites[name], V, U) for name, (V, U) in factors.items()}
        )
        self.fingerprints = {name: fingerprints[name] for name in factors}
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

    def importances(self, inputs: Mapping[str, Tensor]) -> dict[str, Importance]:
        """Causal importances from the site inputs of a clean forward pass.

        Raises:
            NoImportanceError: The decomposition has no importance function.
        """
        if self.importance is None:
            raise NoImportanceError(
                "This decomposition has no causal-importance function (it was made from factors, or by a method "
                "without one); train one with tl_paramdecomp.decompose(..., method=SPD(...))."
            )
        return self.importance(inputs, self)

    # --- files --------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write `components.safetensors` and `decomposition.json` into a folder, atomically.

        Raises:
            DecompositionFileError: The folder cannot be written, or holds something else.
        """
        return files.save(Path(folder), self)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Decomposition":
        """Read a decomposition that `save` wrote.

        Raises:
            DecompositionFileError: The folder or a file is missing, broken, foreign or of a newer format.
            DeviceError: There is no such device.
        """
        return files.load(cls, Path(folder), device)
