"""Causal-importance functions against float64 textbook forms written here, one component and one head at a time."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from tl_paramdecomp import Decomposition
from tl_paramdecomp.components import importance
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.components.sigmoids import Importance, binomial_lower, clamped, leaky
from tl_paramdecomp.errors import SettingError, ShapeError
from tl_paramdecomp.sites import Fingerprint, WeightSite

from ..support.saved_folders import forge_format_1, values_of

TABLE = WeightSite("embed.W_E", 7, 5, "embedding")
FIRST = WeightSite("blocks.0.mlp.W_in", 4, 6)
SECOND = WeightSite("blocks.0.mlp.W_out", 6, 5)
SITES = {site.name: site for site in (TABLE, FIRST, SECOND)}
COUNTS = {TABLE.name: 2, FIRST.name: 3, SECOND.name: 4}
KINDS = ("component_mlp", "vector_mlp", "shared_mlp", "global_mlp", "global_transformer")
HIDDEN = 8


def config(kind: str, **changes: object) -> ImportanceConfig:
    return ImportanceConfig(**{"kind": kind, "hidden": HIDDEN, "layers": 3, "heads": 2, "d_mlp": 10, **changes})  # type: ignore[arg-type]


def make(settings: ImportanceConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Decomposition:
    """A decomposition of three sites whose importance function has no zero anywhere, biases included."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(site.d_in, COUNTS[name], generator=generator, dtype=dtype),
            torch.randn(COUNTS[name], site.d_out, generator=generator, dtype=dtype),
        )
        for name, site in SITES.items()
    }
    prints = {
        name: Fingerprint((site.d_in, site.d_out), "float64", 1.0, 0.0, (1.0,), (0.5, 0.5))
        for name, site in SITES.items()
    }
    made = Decomposition(factors, SITES, prints, settings, generator=generator)
    assert made.importance is not None
    with torch.no_grad():
        for parameter in made.importance.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return made


def make_inputs(*rows: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        TABLE.name: torch.randint(0, TABLE.d_in, rows, generator=generator),
        FIRST.name: torch.randn(*rows, FIRST.d_in, generator=generator, dtype=dtype),
        SECOND.name: 3.0 * torch.randn(*rows, SECOND.d_in, generator=generator, dtype=dtype),
    }


def parameters_of(made: Decomposition) -> dict[str, Tensor]:
    assert made.importance is not None
    return {name: p.detach().clone().requires_grad_(True) for name, p in made.importance.named_parameters()}


# --- textbook forms -------------------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def textbook_site(kind: str, made: Decomposition, p: dict[str, Tensor], x: Tensor, site: str, normed: bool) -> Tensor:
    """Raw importances of one site, component by component."""
    w_in, b_in, w_out, b_out = (
        p[f"networks.{site.replace('.', '/')}.{name}"] for name in ("w_in", "b_in", "w_out", "b_out")
    )
    is_table, V = made.sites[site].kind == "embedding", made[site].V
    columns = []
    for c in range(COUNTS[site]):
        if kind == "component_mlp":
            h = V[x][..., c] if is_table else sum(x[..., i] * V[i, c] for i in range(x.shape[-1]))
            column = sum(w_out[c, j] * gelu(w_in[c, j] * h + b_in[c, j]) for j in range(HIDDEN))
        else:
            own = slice(c * HIDDEN, (c + 1) * HIDDEN) if kind == "vector_mlp" else slice(None)
            matrix = w_in[:, own]
            first = matrix[x] if is_table else (norm(x) if normed else x) @ matrix
            weights = w_out[c] if kind == "vector_mlp" else w_out[:, c]
            column = (gelu(first + b_in[own]) * weights).sum(-1)
        columns.append(column + b_out[c])
    return torch.stack(columns, -1)


def textbook_global(
    kind: str, p: dict[str, Tensor], inputs: dict[str, Tensor], normed: bool, layers: int
) -> dict[str, Tensor]:
    """Raw importances of all sites."""
    p = {name.removeprefix("network."): value for name, value in p.items()}
    first, second = ((norm(inputs[s.name]) if normed else inputs[s.name]) for s in (FIRST, SECOND))
    split = FIRST.d_in
    x = first @ p["w_in"][:split] + second @ p["w_in"][split:] + p["rows.0"][inputs[TABLE.name]] + p["b_in"]
    if kind == "global_mlp":
        x = gelu(x)
    else:
        shape = x.shape
        x = x if x.ndim == 3 else x.unsqueeze(1)
        for i in range(layers):
            x = textbook_block({name.removeprefix(f"blocks.{i}."): v for name, v in p.items()}, x)
        x = x.reshape(shape)
    raw = x @ p["w_out"] + p["b_out"]
    ends = [0, 2, 5, 9]
    return {name: raw[..., a:b] for name, a, b in zip(SITES, ends[:-1], ends[1:], strict=True)}


def textbook_block(p: dict[str, Tensor], x: Tensor, heads: int = 2) -> Tensor:
    """Attention in both directions, each pair of dimensions of a head turned as a complex number, then the MLP."""
    width, d_head, positions = HIDDEN, HIDDEN // heads, x.shape[1]
    normed = norm(x)
    written = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = (
            normed @ p["w_qkv"][:, part * width + head * d_head : part * width + (head + 1) * d_head]
            for part in range(3)
        )
        half = d_head // 2
        rates = torch.tensor([10_000.0 ** (-2.0 * i / d_head) for i in range(half)], dtype=torch.float64)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (q, k))
        scores = torch.real(q @ k.conj().transpose(1, 2)) / math.sqrt(d_head)
        z = scores.softmax(-1) @ v
        written = written + z @ p["w_o"][head * d_head : (head + 1) * d_head]
    x = x + written
    return x + gelu(norm(x) @ p["w_mlp"] + p["b_mlp"]) @ p["w_back"] + p["b_back"]


def textbook(
    settings: ImportanceConfig, made: Decomposition, p: dict[str, Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    kind, normed = settings.kind, settings.normalise
    if kind.startswith("global"):
        return textbook_global(kind, p, inputs, normed, settings.layers)
    return {name: textbook_site(kind, made, p, inputs[name], name, normed) for name in SITES}


# --- values and gradients -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [(2, 5), (3,)], ids=["sequences", "rows"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_every_kind(kind: str, normalise: bool, rows: tuple[int, ...]) -> None:
    settings = config(kind, normalise=normalise)
    made, inputs = make(settings), make_inputs(*rows)
    assert made.importance is not None
    found = made.importances(inputs)
    p = parameters_of(made)
    expected = textbook(settings, made, p, inputs)
    assert list(found) == list(SITES)
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(raw.shape, generator=generator, dtype=torch.float64) for name, raw in expected.items()}
    for name, raw in expected.items():
        assert found[name].raw is not None and found[name].raw.shape == (*rows, COUNTS[name])
        assert (found[name].raw - raw).abs().max() < 1e-10, name
        assert torch.equal(found[name].lower, found[name].raw.clamp(0.0, 1.0))

    named = dict(made.importance.named_parameters())
    through_v = [made[name].V for name in SITES] if kind == "component_mlp" else []
    ours = torch.autograd.grad(sum((weights[n] * g.raw).sum() for n, g in found.items()), [*named.values(), *through_v])
    theirs = torch.autograd.grad(
        sum((weights[n] * raw).sum() for n, raw in expected.items()), [*(p[name] for name in named), *through_v]
    )
    for label, a, b in zip([*named, "V", "V", "V"], ours, theirs, strict=False):
        assert b.abs().max() > 0, label
        assert (a - b).abs().max() < 1e-10 * max(1.0, b.abs().max().item()), label


@pytest.mark.parametrize("piece", [1, 40, 100])
def test_component_networks_do_not_depend_on_how_they_are_cut(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("component_mlp")
    made, inputs = make(settings), make_inputs(2, 5)
    monkeypatch.setattr(importance, "CPU_PIECE", piece)
    p = parameters_of(made)
    expected = textbook(settings, made, p, inputs)
    found = made.importances(inputs)
    named = dict(made.importance.named_parameters())  # type: ignore[union-attr]
    ours = torch.autograd.grad(sum(g.raw.square().sum() for g in found.values()), list(named.values()))  # type: ignore[union-attr]
    theirs = torch.autograd.grad(sum(raw.square().sum() for raw in expected.values()), [p[name] for name in named])
    assert all((a - b).abs().max() < 1e-10 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("strided", ["sliced", "transposed"])
def test_component_networks_of_inputs_that_are_not_contiguous(strided: str) -> None:
    settings = config("component_mlp")
    made = make(settings)
    x = torch.randn(6, 5, FIRST.d_in, dtype=torch.float64)
    x = x[::2] if strided == "sliced" else x.transpose(0, 1)
    found = made.importances({FIRST.name: x})[FIRST.name]
    again = made.importances({FIRST.name: x.contiguous()})[FIRST.name]
    assert found.raw is not None and again.raw is not None and torch.equal(found.raw, again.raw)
    assert found.lower.is_contiguous()  # random numbers drawn `like` it then do not depend on its strides


# --- sigmoids -------------------------------------------------------------------------------------------------------------
def slope(value: float, sigmoid: object, which: int, upstream: float, dtype: torch.dtype) -> float:
    raw = torch.tensor([value], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(sigmoid(raw)[which], raw, torch.tensor([upstream], dtype=dtype))  # type: ignore[operator]
    return grad.item()


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_sigmoids_by_hand(dtype: torch.dtype) -> None:
    points = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=dtype)
    near = {"rtol": 0.0, "atol": 0.0 if dtype == torch.float64 else 4e-3}
    for found, lower in ((clamped(points), [0.0, 0.0, 0.5, 1.0, 1.0]), (leaky(points), [-0.01, 0.0, 0.5, 1.0, 1.0])):
        torch.testing.assert_close(found.lower.double(), torch.tensor(lower, dtype=torch.float64), **near)
        expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.01], dtype=torch.float64)
        torch.testing.assert_close(found.upper.double(), expected, **near)
        assert found.raw is points


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value, gated_up, gated_down, leaked, upper",
    # the loss wants lower up: upstream -1; down: +1; the leaky pair and upper do not ask
    [
        (-1.0, 0.01, 0.0, 0.01, 0.0),
        (-1e-30, 0.01, 0.0, 0.01, 0.0),
        (-0.0, 0.01, 0.0, 0.01, 0.0),
        (0.0, 0.01, 0.0, 0.01, 0.0),
        (1e-30, 1.0, 1.0, 1.0, 1.0),
        (0.5, 1.0, 1.0, 1.0, 1.0),
        (1.0, 1.0, 1.0, 1.0, 1.0),
        (1.0078125, 0.0, 0.0, 0.0, 0.01),
        (2.0, 0.0, 0.0, 0.0, 0.01),
    ],
)
def test_slopes_of_the_sigmoids_by_hand(
    value: float, gated_up: float, gated_down: float, leaked: float, upper: float, dtype: torch.dtype
) -> None:
    near = {"rel": 1e-2 if dtype == torch.bfloat16 else 1e-6, "abs": 0.0}
    assert slope(value, clamped, 0, -1.0, dtype) == pytest.approx(-gated_up, **near)
    assert slope(value, clamped, 0, 1.0, dtype) == pytest.approx(gated_down, **near)
    for upstream in (1.0, -1.0):
        assert slope(value, leaky, 0, upstream, dtype) == pytest.approx(upstream * leaked, **near)
        assert slope(value, leaky, 1, upstream, dtype) == pytest.approx(upstream * upper, **near)
        assert slope(value, clamped, 1, upstream, dtype) == pytest.approx(upstream * upper, **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_numbers_next_to_the_boundaries(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    above = torch.nextafter(one, one * 2).item()
    least = torch.nextafter(one * 0, one).item()
    assert slope(above, clamped, 0, -1.0, dtype) == 0.0 and slope(above, leaky, 1, 1.0, dtype) == pytest.approx(0.01)
    assert slope(least, clamped, 0, 1.0, dtype) == 1.0 and slope(least, leaky, 1, 1.0, dtype) == 1.0


@pytest.mark.parametrize("sigmoid", [clamped, leaky])
@pytest.mark.parametrize("used", ["both", "lower", "upper"])
def test_gradients_of_the_sigmoids_together(sigmoid: object, used: str) -> None:
    """Against `where`, when the loss depends on both importances, or on one."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(3, 40, generator=generator).double() * 2, torch.tensor([[0.0, 1.0] * 20] * 3)])
    x = points[::2].t().requires_grad_(True)  # not contiguous either
    to_lower, to_upper = (torch.randn(x.shape, generator=generator).double() for _ in range(2))
    to_lower = to_lower if used != "upper" else torch.zeros_like(to_lower)
    to_upper = to_upper if used != "lower" else torch.zeros_like(to_upper)
    g = sigmoid(x)  # type: ignore[operator]
    objective = {
        "both": (to_lower * g.lower).sum() + (to_upper * g.upper).sum(),
        "lower": (to_lower * g.lower).sum(),
        "upper": (to_upper * g.upper).sum(),
    }[used]
    (found,) = torch.autograd.grad(objective, x)
    below, inside = x <= 0, (x > 0) & (x <= 1)
    leak = torch.where(to_lower < 0, to_lower, 0.0) if sigmoid is clamped else to_lower
    expected = torch.where(below, 0.01 * leak, torch.where(inside, to_lower + to_upper, 0.01 * to_upper))
    assert (found - expected).abs().max() < 1e-15


def test_binomial_importances_by_hand() -> None:
    raw = torch.tensor([-1.0, 0.0, 0.04, 0.5, 0.96, 1.0], dtype=torch.float64)
    none, all_of_it = torch.zeros_like(raw), torch.ones_like(raw)
    expected = torch.tensor([0.0, 0.0, 0.042, 0.525, 1.0, 1.0], dtype=torch.float64)
    assert (binomial_lower(raw, none) - expected).abs().max() < 1e-15
    expected = torch.tensor([0.0, 0.0, 0.0, 0.475, 0.958, 1.0], dtype=torch.float64)
    assert (binomial_lower(raw, all_of_it) - expected).abs().max() < 1e-15
    expected = torch.tensor([-0.011, -0.0005, -0.00008, 0.475, 0.958, 1.0], dtype=torch.float64)
    assert (binomial_lower(raw, all_of_it, "leaky") - expected).abs().max() < 1e-15
    raw.requires_grad_(True)
    (grad,) = torch.autograd.grad(binomial_lower(raw, all_of_it * 0.5).sum(), raw)
    assert torch.equal(grad, torch.tensor([0.0, 0.0, 1.05, 1.05, 1.05, 0.0], dtype=torch.float64))


def test_an_importance_of_two_has_no_raw_value() -> None:
    assert Importance(torch.zeros(2), torch.ones(2)).raw is None


# --- padding --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_importance_where_it_counts(kind: str, side: str) -> None:
    made, row = make(config(kind)), make_inputs(1, 5)
    long, other = make_inputs(1, 8, seed=3), make_inputs(1, 3, seed=4)
    keep = slice(3, None) if side == "left" else slice(None, 5)
    padded = {}
    for name, x in row.items():
        parts = [other[name], x] if side == "left" else [x, other[name]]
        padded[name] = torch.cat([torch.cat(parts, 1), long[name]])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[0] = torch.tensor([1] * 5 + [0] * 3)
    alone, beside = made.importances(row), made.importances(long)
    with_mask, without = made.importances(padded, mask), made.importances(padded)
    for name in SITES:
        assert (with_mask[name].raw[:1, keep] - alone[name].raw).abs().max() < 1e-10  # type: ignore[index, operator]
        assert (with_mask[name].raw[1:] - beside[name].raw).abs().max() < 1e-10  # type: ignore[index, operator]
        seen = (without[name].raw[:1, keep] - alone[name].raw).abs().max()  # type: ignore[index, operator]
        assert (seen > 1e-3) == (kind == "global_transformer")


def test_a_row_of_padding_alone_stays_finite() -> None:
    made, inputs = make(config("global_transformer")), make_inputs(2, 4)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    found = made.importances(inputs, mask)
    sum(g.raw.sum() for g in found.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.importance.parameters())  # type: ignore[union-attr]


def test_a_transformer_looks_both_ways_and_minds_distance() -> None:
    made, inputs = make(config("global_transformer")), make_inputs(1, 6)

    def change(position: int) -> Tensor:
        changed = {name: x.clone() for name, x in inputs.items()}
        changed[FIRST.name][0, position] += 1.0
        return (
            (made.importances(changed)[SECOND.name].raw - made.importances(inputs)[SECOND.name].raw)[0].abs().amax(-1)
        )  # type: ignore[operator]

    assert change(0)[5] > 1e-4 and change(5)[0] > 1e-4
    swapped = {name: x[:, [0, 2, 1, 3, 4, 5]] for name, x in inputs.items()}
    moved = made.importances(swapped)[SECOND.name].raw[0, 0] - made.importances(inputs)[SECOND.name].raw[0, 0]  # type: ignore[index]
    assert moved.abs().max() > 1e-4


def test_a_mask_of_another_shape_is_refused() -> None:
    made = make(config("global_transformer"))
    with pytest.raises(ShapeError, match=r"\[2, 5\]; given \[2, 4\]"):
        made.importances(make_inputs(2, 5), torch.ones(2, 4))


@pytest.mark.parametrize("kind", ["global_mlp", "global_transformer"])
def test_global_kinds_need_every_input_in_any_order(kind: str) -> None:
    made, inputs = make(config(kind)), make_inputs(2, 5)
    backwards = made.importances(dict(reversed(inputs.items())))
    for name, g in made.importances(inputs).items():
        assert torch.equal(g.lower, backwards[name].lower)
    del inputs[SECOND.name]
    with pytest.raises(SettingError, match=f"all 3 sites at once; missing: {SECOND.name}"):
        made.importances(inputs)


def test_inputs_without_a_batch_serve_every_row() -> None:
    """A host may give one row of position indices for all rows of tokens."""
    made, inputs = make(config("global_transformer")), make_inputs(2, 5)
    inputs[TABLE.name] = inputs[TABLE.name][:1]
    full = {**inputs, TABLE.name: inputs[TABLE.name].expand(2, 5)}
    expected = made.importances(full)
    assert all(torch.equal(g.lower, expected[name].lower) for name, g in made.importances(inputs).items())


# --- number types, files, settings, starts --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_importances_in_the_weights_type(kind: str) -> None:
    made = make(config(kind), dtype=torch.float32)
    inputs = make_inputs(2, 5, dtype=torch.float32)
    exact = made.importances(inputs)
    mask = torch.ones(2, 5, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.importances(inputs, mask)
    sum((g.lower + g.upper).sum() for g in found.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.importance.parameters())  # type: ignore[union-attr]
    for name, g in found.items():
        assert g.raw is not None and g.raw.dtype == g.lower.dtype == torch.float32
        off = ((g.raw - exact[name].raw).abs().max() / exact[name].raw.abs().max()).item()  # type: ignore[union-attr]
        assert off < 0.05 and (off > 0 or name == TABLE.name), name  # looking up a row rounds nothing


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_inputs_of_float32_networks(kind: str) -> None:
    made = make(config(kind), dtype=torch.float32)
    inputs = {n: x.bfloat16() if x.is_floating_point() else x for n, x in make_inputs(2, 5).items()}
    wide = {n: x.float() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = made.importances(wide)
    for name, g in made.importances(inputs).items():
        assert torch.equal(g.lower, expected[name].lower) and g.lower.dtype == torch.float32


@pytest.mark.parametrize("sigmoid", ["clamped", "leaky"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_every_kind(kind: str, sigmoid: str, tmp_path: object) -> None:
    made = make(config(kind, sigmoid=sigmoid, normalise=False, layers=1), seed=5)
    made.save(tmp_path / "d")  # type: ignore[operator]
    again = Decomposition.load(tmp_path / "d")  # type: ignore[operator]
    assert again.importance is not None and again.importance.config == made.importance.config  # type: ignore[union-attr]
    inputs, mask = make_inputs(2, 5), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    expected = made.importances(inputs, mask)
    for name, g in again.importances(inputs, mask).items():
        assert all(torch.equal(a, b) for a, b in zip(g, expected[name], strict=True))


@pytest.mark.parametrize("kind", ["component_mlp", "shared_mlp"])
def test_files_from_before_the_newer_settings(kind: str, tmp_path: object) -> None:
    made = make(ImportanceConfig(kind, HIDDEN))  # type: ignore[arg-type]
    folder = made.save(tmp_path / "d")  # type: ignore[operator]
    settings = json.dumps(dataclasses.asdict(made.importance.config))  # type: ignore[union-attr]
    metadata = values_of(folder)

    def strip(node: object) -> object:
        if isinstance(node, dict):
            if json.dumps(node) == settings:
                return {key: node[key] for key in ("kind", "hidden", "sigmoid")}
            return {key: strip(value) for key, value in node.items()}
        return node

    older = strip(metadata)
    assert older != metadata
    again = Decomposition.load(forge_format_1(folder, older))  # type: ignore[arg-type]
    inputs = make_inputs(2, 5)
    expected = made.importances(inputs)
    assert all(torch.equal(g.lower, expected[name].lower) for name, g in again.importances(inputs).items())


def test_names_of_saved_tensors() -> None:
    """Files of the first two kinds name them so; they must go on loading."""
    for kind in ("component_mlp", "shared_mlp"):
        keys = set(make(config(kind)).importance.state_dict())  # type: ignore[union-attr]
        sites = ("embed/W_E", "blocks/0/mlp/W_in", "blocks/0/mlp/W_out")
        assert keys == {f"networks.{s}.{p}" for s in sites for p in ("w_in", "b_in", "w_out", "b_out")}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"hidden": 0}, "at least 1; given 0"),
        ({"kind": "global_transformer", "hidden": 12, "heads": 4}, "hidden=12, heads=4"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"layers": -1}, "layers must be .* from 0 on"),
        ({"d_mlp": 0}, "d_mlp must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        ImportanceConfig(**settings)  # type: ignore[arg-type]


def test_widths_by_default() -> None:
    assert (
        ImportanceConfig("shared_mlp", None).width(300) == 600 and ImportanceConfig("shared_mlp", None).width(4) == 128
    )
    assert ImportanceConfig("vector_mlp", None).width(300) == 12 and ImportanceConfig("vector_mlp").width(300) == 128
    assert ImportanceConfig("global_transformer", None, heads=7).width(65) == 140
    vpd = ImportanceConfig.vpd()
    assert (vpd.kind, vpd.hidden, vpd.layers, vpd.heads, vpd.d_mlp) == ("global_transformer", 2048, 8, 16, 8192)
    block = make(config("global_transformer", d_mlp=None)).importance.network.blocks[0]  # type: ignore[union-attr, index]
    assert block.w_mlp.shape == (HIDDEN, 4 * HIDDEN)


def spread(kind: str, seed: int) -> dict[str, tuple[float, float]]:
    """Standard deviation of every weight of a new, larger function, and what it should be; biases must be 0."""
    linear, d_in, C, hidden, d_mlp = WeightSite("a", 96, 2), 96, 64, 48, 80
    table = WeightSite("t", 90, 2, "embedding")
    factors = {s.name: (torch.zeros(s.d_in, C), torch.zeros(C, 2)) for s in (linear, table)}
    prints = dict.fromkeys(factors, Fingerprint((d_in, 2), "float32", 1.0, 0.0, (1.0,), (0.5, 0.5)))
    settings = ImportanceConfig(kind, hidden, heads=3, d_mlp=d_mlp)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    made = Decomposition(factors, {"a": linear, "t": table}, prints, settings, generator=generator)
    fan_in = 1 if kind == "component_mlp" else d_in
    expected = {
        "networks.a.w_in": math.sqrt(2 / fan_in),
        "networks.t.w_in": math.sqrt(2) if kind == "component_mlp" else 1.0,
        "networks.a.w_out": 1 / math.sqrt(hidden),
        "networks.t.w_out": 1 / math.sqrt(hidden),
        "network.w_in": math.sqrt(2 / d_in),
        "network.rows.0": 1.0,
        "network.rows.1": 1.0,
        "network.w_out": 1 / math.sqrt(hidden),
    }
    for i in range(2):
        expected |= {f"network.blocks.{i}.{w}": 1 / math.sqrt(hidden) for w in ("w_qkv", "w_o")}
        expected[f"network.blocks.{i}.w_mlp"] = math.sqrt(2 / hidden)
        expected[f"network.blocks.{i}.w_back"] = 1 / math.sqrt(d_mlp)
    found = {}
    for name, p in made.importance.named_parameters():  # type: ignore[union-attr]
        if name.split(".")[-1].startswith("b_"):
            assert not p.any()
        else:
            assert p.mean().abs() < 5 * expected[name] / math.sqrt(p.numel())
            found[name] = (p.std().item(), expected[name])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_spread_of_new_weights(kind: str) -> None:
    """At least 2,304 normal numbers each: the standard deviation is off by 1.5 % (one sigma); four seeds within 6 %."""
    off = {f"{seed} {name}": a / b - 1 for seed in range(4) for name, (a, b) in spread(kind, seed).items()}
    print(kind, "relative error of standard deviations:", min(off.values()), "to", max(off.values()))
    assert off and max(map(abs, off.values())) < 0.06, off
