"""Components of a site and the decomposition that maps site names to them."""

import copy

import pytest
import torch
from torch import nn

from tl_paramdecomp import Decomposition
from tl_paramdecomp.components.factors import Components, write
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.components.sigmoids import clamped, leaky
from tl_paramdecomp.errors import (
    DeviceError,
    DtypeError,
    NoImportanceError,
    NoMatchingSiteError,
    SettingError,
    ShapeError,
)
from tl_paramdecomp.sites import Fingerprint, WeightSite

IN, OUT, C = 4, 6, 3
SITE = WeightSite("blocks.0.mlp.W_in", IN, OUT, aliases=("blocks.0.mlp.in",))
TABLE = WeightSite("embed.W_E", 7, OUT, "embedding")
PRINT = Fingerprint((IN, OUT), "float32", 1.0, 0.0, (1.0,), (0.5, 0.5))


def make(importance: ImportanceConfig | None = None) -> Decomposition:
    generator = torch.Generator().manual_seed(0)
    sites = {site.name: site for site in (TABLE, SITE)}
    factors = {
        n: (torch.randn(s.d_in, C, generator=generator), torch.randn(C, OUT, generator=generator))
        for n, s in sites.items()
    }
    return Decomposition(factors, sites, dict.fromkeys(sites, PRINT), importance)


def test_components_sum_to_their_product() -> None:
    components = make()[SITE.name]
    assert components.n_components == C
    summed = sum(components.component(c) for c in range(C))
    assert torch.allclose(components.product(), summed, atol=1e-6)
    x = torch.randn(2, 5, IN)
    assert torch.allclose(components.acts(x) @ components.U, x @ summed, atol=1e-5)
    assert torch.equal(components.acts(x, torch.tensor([2, 0])), (x @ components.V)[..., [2, 0]])


def test_components_of_an_embedding_are_looked_up() -> None:
    components = make()[TABLE.name]
    x = torch.tensor([[0, 6, 3]])
    assert torch.equal(components.acts(x) @ components.U, components.product()[x])
    assert torch.equal(components.acts(x, torch.tensor([1])), components.V[x][..., [1]])


@pytest.mark.parametrize("side, width", [("in", IN), ("out", OUT)])
def test_activations_and_writes_by_head_sum_to_the_whole(side: str, width: int) -> None:
    site = WeightSite("w", IN, OUT, n_heads=2, head_side=side)
    components = Components(site, torch.randn(IN, C).double(), torch.randn(C, OUT).double())
    x = torch.randn(2, 5, IN).double()
    if side == "in":
        heads = components.head_acts(x)
        assert heads.shape == (2, 5, 2, C) and torch.allclose(heads.sum(-2), components.acts(x))
        half = width // 2
        assert torch.allclose(heads[..., 1, :], x[..., half:] @ components.V[half:])
    else:
        h = components.acts(x).unsqueeze(-2).expand(2, 5, 2, C)
        assert torch.allclose(write(components.site, h, components.U, by_head=True), components.acts(x) @ components.U)


def test_factors_are_copied() -> None:
    V, U = torch.ones(IN, C, requires_grad=True), torch.ones(C, OUT)
    components = Components(SITE, V, U)
    with torch.no_grad():
        V.zero_(), U.zero_()
    assert components.V.sum() == IN * C and components.U.sum() == C * OUT and components.V.is_leaf


@pytest.mark.parametrize(
    "V, U, error, said",
    [
        (torch.ones(IN + 1, C), torch.ones(C, OUT), ShapeError, r"d_in=4.*given V \[5, 3\]"),
        (torch.ones(IN, C), torch.ones(C, OUT - 1), ShapeError, r"d_out=6.*U \[3, 5\]"),
        (torch.ones(IN, C), torch.ones(C + 1, OUT), ShapeError, r"V \[4, 3\] and U \[4, 6\]"),
        (torch.ones(IN, 0), torch.ones(0, OUT), ShapeError, "C >= 1"),
        (torch.ones(C, IN), torch.ones(OUT, C), ShapeError, "given V"),
        (torch.ones(IN), torch.ones(OUT), ShapeError, r"given V \[4\]"),
        (torch.ones(IN, C).long(), torch.ones(C, OUT), DtypeError, "V .*torch.int64"),
        (torch.ones(IN, C), torch.ones(C, OUT, dtype=torch.complex64), DtypeError, "U .*complex64"),
        (torch.ones(IN, C), torch.ones(C, OUT).double(), DtypeError, "float32 and torch.float64"),
        (torch.ones(IN, C), torch.ones(C, OUT, device="meta"), DeviceError, "cpu and meta"),
    ],
)
def test_factors_that_do_not_fit(V: torch.Tensor, U: torch.Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        Components(SITE, V, U)
    assert SITE.name in str(caught.value)


def test_a_decomposition_is_a_mapping_and_a_module() -> None:
    made = make()
    assert list(made) == [TABLE.name, SITE.name] and len(made) == 2
    assert made["blocks.0.mlp.in"] is made[SITE.name]
    assert SITE.name in made and "blocks.0.mlp.in" in made and "blocks.1.mlp.in" not in made and 3 not in made
    assert (
        made.get("blocks.0.mlp.in") is made[SITE.name] and made.get("nothing") is None and made.get("nothing", 1) == 1
    )
    assert made.n_components == {TABLE.name: C, SITE.name: C} and list(made.sites.values()) == [TABLE, SITE]
    assert isinstance(made, nn.Module) and len(list(made.parameters())) == 4
    assert made == made and made != make() and len({made, make()}) == 2
    with pytest.raises(NoMatchingSiteError, match=SITE.name.replace(".", r"\.")):
        made["blocks.0.mlp.W_out"]
    copied = copy.deepcopy(made)
    assert torch.equal(copied[SITE.name].V, made[SITE.name].V) and copied[SITE.name].V is not made[SITE.name].V
    assert made.to(torch.bfloat16)[SITE.name].V.dtype == torch.bfloat16


def test_a_decomposition_needs_a_site() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        Decomposition({}, {}, {})


def test_no_importance_function_says_how_to_get_one() -> None:
    with pytest.raises(NoImportanceError, match=r"decompose\(.*SPD"):
        make().importances({})


@pytest.mark.parametrize("kind", ["component_mlp", "shared_mlp"])
def test_importances_start_the_same_for_a_seed_and_draw_nothing_global(kind: str) -> None:
    before = torch.get_rng_state()
    a, b = make(ImportanceConfig(kind, 4)), make(ImportanceConfig(kind, 4))
    assert torch.equal(torch.get_rng_state(), before)
    inputs = {TABLE.name: torch.tensor([[1, 2]]), SITE.name: torch.randn(1, 2, IN)}
    for name, g in a.importances(inputs).items():
        assert g.lower.shape == (1, 2, C) and torch.equal(g.lower, b.importances(inputs)[name].lower)


def test_importance_settings_that_make_no_sense() -> None:
    with pytest.raises(SettingError, match="at least 1; given 0"):
        ImportanceConfig(hidden=0)


def test_sigmoids_and_their_gradients() -> None:
    """Against the published definitions at points on every side of 0 and 1, for losses that want more and less."""
    points = torch.tensor([-2.0, -0.5, 0.25, 0.75, 1.5, 3.0], dtype=torch.float64)
    below, above = points <= 0, points >= 1
    for sigmoid, name in ((clamped, "clamped"), (leaky, "leaky")):
        for sign in (1.0, -1.0):
            raw = points.clone().requires_grad_(True)
            g = sigmoid(raw)
            expected_lower = points.clamp(0, 1) + (torch.where(below, 0.01 * points, 0.0) if name == "leaky" else 0.0)
            assert torch.allclose(g.lower, expected_lower)
            assert torch.allclose(g.upper, points.clamp(0, 1) + torch.where(above, 0.01 * (points - 1), 0.0))
            (slope,) = torch.autograd.grad((sign * g.lower).sum(), raw, retain_graph=True)
            leak = 0.01 if name == "leaky" or sign < 0 else 0.0
            assert torch.allclose(slope, sign * torch.where(below, leak, torch.where(above, 0.0, 1.0).double()))
            (slope,) = torch.autograd.grad((sign * g.upper).sum(), raw)
            assert torch.allclose(slope, sign * torch.where(below, 0.0, torch.where(above, 0.01, 1.0).double()))
