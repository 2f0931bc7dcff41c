"""The masked output of one site against the textbook b + (m * x V) U + d x (W - V U), written out here."""

import pytest
import torch
from torch import Tensor

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import InterpolatedMask, ResolvedMask, masked_output, masked_weight
from tl_paramdecomp.components.masks import Masks, SiteMask
from tl_paramdecomp.sites import SiteCall, Span, WeightSite

BATCH, POS, D_IN, D_OUT, C = 2, 3, 6, 8, 4
SITES = {
    "linear": WeightSite("w", D_IN, D_OUT, has_bias=True),
    "embedding": WeightSite("e", D_IN, D_OUT, "embedding"),
    "out heads": WeightSite("blocks.0.attn.W_Q", D_IN, D_OUT, n_heads=2, head_side="out"),
    "in heads": WeightSite("blocks.0.attn.W_O", D_IN, D_OUT, n_heads=2, head_side="in"),
}


class Case:
    """One site with inputs of its own, every tensor a leaf that gradients reach."""

    def __init__(self, kind: str = "linear", bias: bool = True, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)

        self.site = SITES[kind]
        self.components = Components(self.site, random(D_IN, C), random(C, D_OUT))
        self.W, self.b = random(D_IN, D_OUT), random(D_OUT) if bias else None
        self.x = (
            torch.randint(0, D_IN, (BATCH, POS), generator=generator)
            if kind == "embedding"
            else random(BATCH, POS, D_IN)
        )

    @property
    def leaves(self) -> list[Tensor]:
        tensors = [self.components.V, self.components.U, self.W, self.b, self.x]
        return [t for t in tensors if t is not None and t.requires_grad]

    def times(self, matrix: Tensor) -> Tensor:
        """x matrix, or the rows of it that x names."""
        if self.site.kind == "embedding":
            return torch.nn.functional.one_hot(self.x, D_IN).to(matrix.dtype) @ matrix
        return self.x @ matrix

    def y(self) -> Tensor:
        """The model's own output."""
        return self.times(self.W) + (0 if self.b is None else self.b)

    def textbook(self, m: Tensor, d: Tensor) -> Tensor:
        V, U = self.components.V, self.components.U
        masked = (m * self.times(V)) @ U + d.unsqueeze(-1) * self.times(self.W - V @ U)
        return masked if self.b is None else masked + self.b


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True))


SHAPES = {"full": (BATCH, POS), "rows": (BATCH, 1), "positions": (POS,), "one row": (1, POS), "constant": ()}


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m_rows", SHAPES)
@pytest.mark.parametrize("d_rows", SHAPES)
def test_values_and_gradients_are_the_textbook_form(kind: str, bias: bool, m_rows: str, d_rows: str) -> None:
    case = Case(kind, bias)
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(*SHAPES[m_rows], C, generator=generator, dtype=torch.float64).requires_grad_(True)
    d = torch.randn(SHAPES[d_rows], generator=generator, dtype=torch.float64).requires_grad_(True)
    leaves = [m, d, *case.leaves]
    expected = case.textbook(m, d)
    found = masked_output(case.components, ResolvedMask(m, d), case.x, case.y(), case.b)
    assert found.shape == (BATCH, POS, D_OUT)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves)):
        assert (ours - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("q_rows", SHAPES)
@pytest.mark.parametrize("a_rows", [*SHAPES, "number"])
def test_masks_that_training_draws_are_the_textbook_form(kind: str, bias: bool, q_rows: str, a_rows: str) -> None:
    """m = 1 - (1 - g) q and d = 1 - a written out, and differentiated by autograd."""
    case = Case(kind, bias)
    generator = torch.Generator().manual_seed(2)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_(True)

    g, q = uniform(BATCH, POS, C), uniform(*SHAPES[q_rows], C)
    a = 0.3 if a_rows == "number" else uniform(*SHAPES[a_rows])
    taken = torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a
    leaves = [g, q, *([a] if isinstance(a, Tensor) else []), *case.leaves]
    expected = case.textbook(1 - (1 - g) * q, 1 - taken)
    found = masked_output(case.components, InterpolatedMask(g, q, a), case.x, case.y(), case.b)
    assert (found - expected).abs().max() < 1e-12
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves)):
        assert (ours - theirs).abs().max() < 1e-11
    untouched = InterpolatedMask(g, torch.zeros_like(q), torch.zeros_like(taken))
    assert torch.equal(masked_output(case.components, untouched, case.x, case.y(), case.b), case.y())


@pytest.mark.parametrize("d", [0.0, 0.3, 1.0, -2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_and_tensors_of_the_delta_mask_are_one(d: float, bias: bool) -> None:
    case = Case(bias=bias)
    m = torch.rand(C, dtype=torch.float64)
    expected = case.textbook(m, torch.tensor(d, dtype=torch.float64))
    for form in (d, torch.tensor(d, dtype=torch.float64), torch.full((BATCH, POS), d, dtype=torch.float64)):
        assert (
            masked_output(case.components, ResolvedMask(m, form), case.x, case.y(), case.b) - expected
        ).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["out heads", "in heads"])
@pytest.mark.parametrize("delta", ["number", "tensor"])
def test_masks_by_head_are_masks_of_each_heads_slice(kind: str, delta: str) -> None:
    """Against a loop over heads with the slices of V or U written out."""
    case = Case(kind)
    m = torch.rand(BATCH, POS, 2, C, dtype=torch.float64).requires_grad_(True)
    d = (
        torch.rand(BATCH, POS, dtype=torch.float64)
        if delta == "tensor"
        else torch.full((BATCH, POS), 0.4, dtype=torch.float64)
    )
    V, U = case.components.V, case.components.U
    parts = []
    for head in range(2):
        if kind == "in heads":
            rows = slice(head * 3, head * 3 + 3)
            parts.append((m[..., head, :] * (case.x[..., rows] @ V[rows])) @ U)
        else:
            parts.append((m[..., head, :] * (case.x @ V)) @ U[:, head * 4 : head * 4 + 4])
    summed = sum(parts) if kind == "in heads" else torch.cat(parts, -1)
    expected = case.b + summed + d.unsqueeze(-1) * (case.x @ (case.W - V @ U))
    resolved = ResolvedMask(m, d if delta == "tensor" else 0.4, by_head=True)
    found = masked_output(case.components, resolved, case.x, case.y(), case.b)
    assert (found - expected).abs().max() < 1e-12
    leaves = [m, *case.leaves]
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves)):
        assert (ours - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_the_shortcut_for_few_changed_components_changes_nothing(kind: str) -> None:
    case = Case(kind)
    mask = _masks(case).ablate(case.site.name, [2]).site_mask(case.site.name)
    resolved = mask.resolve((BATCH, POS), Span(), torch.device("cpu"), torch.float64)
    assert resolved.only is not None and resolved.only.tolist() == [2]
    fast = masked_output(case.components, resolved, case.x, case.y(), case.b)
    slow = masked_output(case.components, resolved._replace(only=None), case.x, case.y(), case.b)
    assert (fast - slow).abs().max() < 1e-13
    for ours, theirs in zip(gradients(fast, case.leaves), gradients(slow, case.leaves)):
        assert (ours - theirs).abs().max() < 1e-13
    many = _masks(case).ablate(case.site.name, [0, 1]).site_mask(case.site.name)
    assert many.resolve((BATCH, POS), Span(), torch.device("cpu"), torch.float64).only is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["constants", "tensors"])
@pytest.mark.parametrize("bias", [True, False])
def test_no_mask_is_the_output_bit_for_bit(dtype: torch.dtype, factors: torch.dtype, form: str, bias: bool) -> None:
    case = Case(bias=bias, dtype=dtype)
    case.components.to(factors)
    y = case.y()
    ones = torch.ones(BATCH, POS, C, dtype=factors)
    mask = ResolvedMask(ones[0, 0], 1.0) if form == "constants" else ResolvedMask(ones, ones[..., 0])
    found = masked_output(case.components, mask, case.x, y, case.b)
    assert found.dtype == dtype and torch.equal(found, y)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.006), (torch.float32, 2e-5)])
def test_coarse_outputs_are_computed_in_the_factors_precision(dtype: torch.dtype, error: float) -> None:
    case = Case()
    m, d = torch.rand(BATCH, POS, C), torch.rand(BATCH, POS)
    expected = case.textbook(m.double(), d.double())
    coarse = Case(dtype=dtype)
    coarse.components.to(torch.float32)
    found = masked_output(coarse.components, ResolvedMask(m, d), coarse.x, coarse.y(), coarse.b)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < error * expected.abs().max()


def test_float32_factors_serve_a_float64_model() -> None:
    case = Case()
    y = case.y()
    case.components.to(torch.float32)
    mask = ResolvedMask(torch.ones(BATCH, POS, C), torch.ones(BATCH, POS))
    found = masked_output(case.components, mask, case.x, y, case.b)
    assert found.dtype == torch.float64 and torch.equal(found, y)


@pytest.mark.parametrize("form", ["constants", "tensors", "ablation"])
def test_under_autocast(form: str) -> None:
    """What a model under autocast hands over: bf16 x and y, float32 bias, float32 factors."""
    linear = torch.nn.Linear(D_IN, D_OUT)
    components = Components(SITES["linear"], torch.randn(D_IN, C), torch.randn(C, D_OUT))
    x = torch.randn(BATCH, POS, D_IN)
    m = torch.ones(BATCH, POS, C)
    m[..., 1] = 0.0 if form == "ablation" else 1.0
    mask = ResolvedMask(m[0, 0], 1.0) if form == "constants" else ResolvedMask(m, torch.ones(BATCH, POS))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
        found = masked_output(components, mask, x, y, linear.bias)
    assert y.dtype == torch.bfloat16 and found.dtype == torch.bfloat16
    if form != "ablation":
        assert torch.equal(found, y)
    else:
        expected = linear(x) - torch.outer(components.V[:, 1], components.U[1]).T.matmul(x.unsqueeze(-1)).squeeze(-1)
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
    found.float().sum().backward()
    assert components.V.grad is not None and torch.isfinite(components.V.grad).all()


def test_masks_of_more_rows_than_the_input_broadcast_the_output() -> None:
    """Position embeddings are looked up once for the whole batch."""
    site = SITES["embedding"]
    components = Components(site, torch.randn(D_IN, C), torch.randn(C, D_OUT))
    x, y = torch.arange(POS).unsqueeze(0), torch.randn(1, POS, D_OUT)
    m = torch.rand(4, POS, C)
    mask = Masks({site.name: site}, {site.name: C}).with_values(site.name, m).site_mask(site.name)
    found = mask.output(components, SiteCall(x, y, None, Span()))
    one_by_one = [SiteMask(site, C, row).output(components, SiteCall(x, y, None, Span())) for row in m]
    assert found.shape == (4, POS, D_OUT) and (found - torch.cat(one_by_one)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", list(SITES))
def test_an_edited_weight_gives_the_masked_output(kind: str) -> None:
    case = Case(kind)
    masks = _masks(case).scale(case.site.name, [0, 1], 0.3).keep_only(case.site.name, [1, 3], delta=0.6)
    if case.site.n_heads:
        masks = masks.ablate(case.site.name, 3, head=1)
    mask = masks.site_mask(case.site.name)
    expected = mask.output(case.components, SiteCall(case.x, case.y(), case.b, Span()))
    weight = masked_weight(case.components, mask.constant(torch.device("cpu"), torch.float64), case.W)
    found = case.times(weight) + case.b
    assert (found - expected).abs().max() < 1e-12


def _masks(case: Case) -> Masks:
    return Masks({case.site.name: case.site}, {case.site.name: C})
