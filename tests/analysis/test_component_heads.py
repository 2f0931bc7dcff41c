"""Shares of heads, and nearest components, against components made by hand and plain loops."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.analysis.effects.component_heads import ComponentHeads, component_heads
from tl_paramdecomp.analysis.evaluation.matching import NearestComponents, nearest_components
from tl_paramdecomp.errors import (
    ComponentIndexError,
    HeadIndexError,
    NoMatchingSiteError,
    SettingError,
    ShapeError,
)

from ..support.models import BUILDERS, build, decomposition_of, gpt2, hooked

W_IN, W_O, W_Q, W_K = "blocks.0.mlp.W_in", "blocks.0.attn.W_O", "blocks.0.attn.W_Q", "blocks.0.attn.W_K"


@pytest.mark.parametrize("host", BUILDERS)
def test_shares_are_squares_by_head(host: str) -> None:
    model = build(host)
    dec = decomposition_of(model, "blocks.0.attn.*")
    for site in dec:
        heads, side = dec.sites[site].n_heads, dec.sites[site].head_side
        found = component_heads(dec, site)
        assert found.side == side and found.shares.shape == (5, heads)
        for c in range(5):
            vector = dec[site].V[:, c] if side == "in" else dec[site].U[c]
            parts = [float((part**2).sum()) for part in vector.detach().double().chunk(heads)]
            assert found.values[c] == pytest.approx([part / sum(parts) for part in parts], abs=1e-6)


def test_a_head_of_its_own_has_all_of_a_component(tmp_path) -> None:
    model = gpt2()
    V, U = torch.randn(24, 3).double(), torch.zeros(3, 24).double()
    U[0, 8:16], U[1, :8], U[1, 16:] = 2.0, 1.0, -1.0
    dec = tlpd.from_factors(model, {W_Q: (V, U)})
    found = component_heads(dec, W_Q)
    assert found.values == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert ComponentHeads.load(found.save(tmp_path / "heads.json")) == found
    assert "head 2" in str(found) and "0.500" in str(found) and "write" in str(found)
    with pytest.raises(HeadIndexError, match="W_O do"):
        component_heads(decomposition_of(model, W_IN), W_IN)
    with pytest.raises(NoMatchingSiteError):
        component_heads(dec, W_O)


def test_nearest_components_are_found_by_cosines_of_whole_matrices() -> None:
    model = gpt2()
    a, b = decomposition_of(model, W_IN, 4), decomposition_of(model, W_IN, 6, seed=1)
    found = nearest_components(a, b, W_IN, n=6)
    for c in range(4):
        own, others = a[W_IN].component(c).detach(), [b[W_IN].component(d).detach() for d in range(6)]
        cosines = [float((own * other).sum() / (own.norm() * other.norm())) for other in others]
        order = sorted(range(6), key=lambda d: -abs(cosines[d]))
        assert found.nearest[c] == order
        assert found.cosines[c] == pytest.approx([cosines[d] for d in order], abs=1e-9)


def test_a_shuffle_with_other_signs_and_sizes_is_undone(tmp_path) -> None:
    model = gpt2()
    a = decomposition_of(model, W_IN)
    order, V, U = [3, 0, 4, 1, 2], a[W_IN].V.detach(), a[W_IN].U.detach()
    sizes = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]).double()
    b = tlpd.from_factors(model, {W_IN: (V[:, order] * sizes, U[order] * sizes.abs()[:, None])})
    found = nearest_components(a, b.float(), "transformer.h.0.mlp.c_fc")
    assert found.site == W_IN and [order[one[0]] for one in found.nearest] == [0, 1, 2, 3, 4]
    for (d,), (cosine,), (read,) in zip(found.nearest, found.cosines, found.read):
        assert cosine == pytest.approx(float(sizes[d].sign()), abs=1e-5) and read == pytest.approx(cosine, abs=1e-5)
    some = nearest_components(a, b, W_IN, components=[-1, 2])
    assert some.components == [4, 2] and some.nearest == [found.nearest[4], found.nearest[2]]
    assert NearestComponents.load(some.save(tmp_path / "nearest.json")) == some
    assert "+1.000" in str(found) and "-1.000" in str(found)


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = decomposition_of(gpt2(), [W_IN, W_Q]), decomposition_of(gpt2(), W_Q)
    with pytest.raises(NoMatchingSiteError):
        nearest_components(a, b, W_IN)
    with pytest.raises(SettingError, match="5 components"):
        nearest_components(a, b, W_Q, n=6)
    with pytest.raises(ComponentIndexError):
        nearest_components(a, b, W_Q, components=5)
    with pytest.raises(ShapeError, match="same model"):
        nearest_components(a, decomposition_of(hooked(d_model=16), W_IN), W_IN)
