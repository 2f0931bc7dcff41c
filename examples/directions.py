"""Dictionaries of directions that were not learned, for L3D's to be compared with.

Each takes a decomposition's place: as many subnetworks, over the same sites, encoder and decoder alike, with the same run's
divergence, references and share of coefficients.
"""

import copy

import torch

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.subnetworks import SubnetworkDecomposition, random_subnetworks
from tl_paramdecomp.errors import SettingError


@torch.no_grad()
def random_directions(made: SubnetworkDecomposition, seed: int = 0) -> SubnetworkDecomposition:
    """Random subnetworks of the same ranks and norm 1: what L3D begins from, or all that moving in any direction does."""
    ranks = {name: made.decoder[name].rank for name in made.sites}
    biases = frozenset(name for name, part in made.decoder.items() if part.bias is not None)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(made.decoder.parameters()).dtype
    drawn = random_subnetworks(made.sites, ranks, made.n_subnetworks, biases, dtype, generator, made.norms)
    return _in_place_of(made, drawn.state_dict())


@torch.no_grad()
def singular_directions(made: SubnetworkDecomposition, adapter: ModelAdapter) -> SubnetworkDecomposition:
    """The leading pairs of singular vectors of the weights, u v^T each at its own site, by singular value over all sites.

    Raises:
        SettingError: The weights have fewer pairs than there are subnetworks.
    """
    pairs = []
    for name in made.sites:
        u, s, vh = torch.linalg.svd(adapter.weight(name).detach().float(), full_matrices=False)
        pairs += [(value, name, u[:, i], vh[i]) for i, value in enumerate(s.tolist())]
    if len(pairs) < made.n_subnetworks:
        raise SettingError(f"These weights have {len(pairs)} singular pairs; {made.n_subnetworks} are wanted.")
    state = {key: torch.zeros_like(value) for key, value in made.decoder.state_dict().items()}
    empty = copy.deepcopy(made.decoder)
    empty.load_state_dict(state)
    pairs.sort(key=lambda pair: -pair[0])
    for k, (_, name, u, v) in enumerate(pairs[: made.n_subnetworks]):
        empty[name].A[k, :, 0], empty[name].B[k, :, 0] = u, v
    return _in_place_of(made, empty.state_dict())


def _in_place_of(made: SubnetworkDecomposition, state: dict[str, torch.Tensor]) -> SubnetworkDecomposition:
    found = copy.deepcopy(made)
    for side in (found.encoder, found.decoder):
        side.load_state_dict(state)
    return found
