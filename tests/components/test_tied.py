"""Tied sites: one pair of parameters for two weights that are each other's transpose."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.factors import Components, TiedComponents
from tl_paramdecomp.errors import DecompositionFileError, NoMatchingSiteError, SettingError, ShapeError
from tl_paramdecomp.methods.divergence import MeanSquare
from tl_paramdecomp.methods.from_factors import resolved_ties
from tl_paramdecomp.methods.losses import Faithfulness
from tl_paramdecomp.methods.random_streams import as_streams
from tl_paramdecomp.methods.starts import warm_up
from tl_paramdecomp.methods.step import LossStep

from ..support.models import gpt2
from ..support.saved_folders import forge, forge_format_1, values_of

FIRST, SECOND = "0.weight", "2.weight"
TIED = {SECOND: FIRST}
N = 4


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy() -> Any:
    """A bottleneck [5, 2] whose second weight is the first's transpose, with a bias after it."""
    model: Any = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Tanh(), nn.Linear(2, 5)).double()
    with torch.no_grad():
        model[0].weight.copy_(double(2, 5))
        model[2].weight.copy_(double(2, 5).T)
        model[2].bias.copy_(double(5, seed=1))
    return model.requires_grad_(False)


def tied_toy(model: Any) -> tlpd.Decomposition:
    V, U = double(5, N, seed=2), double(N, 2, seed=3)
    return tlpd.from_factors(model, {FIRST: (V, U)}, tied=TIED).requires_grad_(True)


def dense(
    dec: tlpd.Decomposition, m: dict[str, Tensor], d: float, model: Any, x: Tensor, V: Tensor, U: Tensor
) -> Tensor:
    """The masked model written out, with the second weight's factors U^T and V^T."""
    h = torch.tanh((m[FIRST] * (x @ V)) @ U + d * (x @ (model[0].weight.T - V @ U)))
    y = (m[SECOND] * (h @ U.T)) @ V.T + d * (h @ (model[2].weight.T - U.T @ V.T))
    return y + model[2].bias


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-12 * expected.abs().max())


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# --- one pair of parameters ------------------------------------------------------------------------------------------
def test_both_sites_hold_one_pair_of_parameters() -> None:
    dec = tied_toy(toy())
    source, tied = dec[FIRST], dec[SECOND]
    assert isinstance(tied, TiedComponents) and isinstance(tied, Components)
    assert list(dec) == [FIRST, SECOND] and dec.tied == TIED
    assert len(list(dec.parameters())) == 2 and len(dec.state_dict()) == 2
    assert list(tied.parameters()) == [] and tied.parameter_pair == source.parameter_pair == (source.V, source.U)
    assert torch.equal(tied.V, source.U.T) and torch.equal(tied.U, source.V.T)
    assert tied.V.untyped_storage().data_ptr() == source.U.untyped_storage().data_ptr()
    assert tied.n_components == N and close(tied.product(), source.product().T)
    assert torch.equal(tied.component(2), source.component(2).T)
    with torch.no_grad():
        source.U[1, 0] = 77.0
    assert tied.V[0, 1] == 77.0
    assert "tied to 0.weight" in repr(dec)


def test_gradients_are_the_sum_of_both_sides() -> None:
    model = toy()
    dec = tied_toy(model)
    x, m = double(7, 5, seed=4), {name: double(7, N, seed=5 + i) for i, name in enumerate(dec)}
    masks = dec.masks()
    for name in dec:
        masks = masks.with_values(name, m[name], delta=0.3)
    with tlpd.patched(model, dec, masks):
        found = model(x)
        found.square().sum().backward()
    V, U = (p.detach().clone().requires_grad_(True) for p in (dec[FIRST].V, dec[FIRST].U))
    expected = dense(dec, m, 0.3, model, x, V, U)
    expected.square().sum().backward()
    assert close(found.detach(), expected.detach())
    assert all(close(gradient(a), gradient(b)) for a, b in ((dec[FIRST].V, V), (dec[FIRST].U, U)))
    parts = []
    for name in dec:  # one side at a time: neither is nothing
        with tlpd.patched(model, dec, dec.masks().with_values(name, m[name], delta=0.3)):
            parts.append(torch.autograd.grad(model(x).square().sum(), dec[FIRST].V)[0])
    assert all(part.abs().max() > 1e-3 for part in parts)


def test_faithfulness_pulls_from_both_sides() -> None:
    """||W1 - V U||^2 / ||W1||^2 and the same of W2, their mean."""
    model = toy()
    dec = tied_toy(model)
    x = double(7, 5)
    step = LossStep(adapt(model), dec, x, None, {}, {}, MeanSquare(model(x), None), as_streams(torch.Generator()))
    value = Faithfulness(1.0)(step)
    value.backward()
    V, U = (p.detach().clone().requires_grad_(True) for p in (dec[FIRST].V, dec[FIRST].U))
    W1, W2 = model[0].weight.T, model[2].weight.T
    sides = [(W1 - V @ U).square().sum() / W1.square().sum(), (W2 - U.T @ V.T).square().sum() / W2.square().sum()]
    expected = torch.stack(sides).mean()
    expected.backward()
    assert abs(value.item() - expected.item()) < 1e-6 * expected.item()
    assert all(close(gradient(a), gradient(b)) for a, b in ((dec[FIRST].V, V), (dec[FIRST].U, U)))


def test_edited_weights_agree_with_the_hooks() -> None:
    model = toy()
    dec = tied_toy(model)
    masks = dec.masks().ablate(SECOND, [0, 2]).keep_only(FIRST, 1, delta=0.5)
    x = double(7, 5, seed=4)
    with tlpd.patched(model, dec, masks):
        hooked = model(x).detach()
    with tlpd.edited_weights(model, dec, masks):
        assert close(model(x).detach(), hooked)


@pytest.mark.parametrize(
    "tied", [{"unembed.W_U": "embed.W_E"}, {"embed.W_E": "unembed.W_U"}, {"lm_head": "transformer.wte"}]
)
def test_an_embedding_and_the_unembedding(tied: dict[str, str], tokens: Tensor) -> None:
    """In both directions, and by alias, against separate factors that are the same numbers."""
    model = gpt2().requires_grad_(False)
    V, U = double(61, N, seed=1) * 0.3, double(N, 24, seed=2) * 0.3
    apart = tlpd.from_factors(model, {"embed.W_E": (V, U), "unembed.W_U": (U.T, V.T)}).requires_grad_(True)
    given = {"embed.W_E": (V, U)} if "embed.W_E" not in tied else {"unembed.W_U": (U.T, V.T)}
    together = tlpd.from_factors(model, given, tied=tied).requires_grad_(True)
    assert list(together) == list(apart) and len(list(together.parameters())) == 2
    assert set(together.tied) | set(together.tied.values()) == {"embed.W_E", "unembed.W_U"}
    gradients = []
    for dec in (apart, together):
        masks = dec.masks().ablate("embed.W_E", 1).keep_only("unembed.W_U", [0, 3], delta=0.4)
        with tlpd.patched(model, dec, masks):
            out = model(tokens).logits
            gradients.append((out.detach(), *torch.autograd.grad(out.square().sum(), list(dec.parameters()))))
    out, dV, dU, dU_other, dV_other = gradients[0]
    first, second = gradients[1][1:] if "unembed.W_U" in together.tied else gradients[1][:0:-1]
    turned = "unembed.W_U" not in together.tied
    assert close(gradients[1][0], out)  # a product with transposed factors may end in another last bit
    assert close(first.T if turned else first, dV + dV_other.T)
    assert close(second.T if turned else second, dU + dU_other.T)


def test_a_warm_up_trains_the_pair_once() -> None:
    """AdamW written out: both sites' relative errors, one moment per parameter, the rate falling linearly."""
    model, lr, steps = toy(), 0.05, 3
    dec = tied_toy(model)
    V, U = (p.detach().clone().requires_grad_(True) for p in (dec[FIRST].V, dec[FIRST].U))
    warm_up(adapt(model), dec, steps, lr, 0.0, lambda phase, total: range(total))
    W1, W2 = model[0].weight.T, model[2].weight.T
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (V, U)]
    for step in range(steps):
        errors = (W1 - V @ U).square().sum() / W1.square().sum() + (W2 - U.T @ V.T).square().sum() / W2.square().sum()
        rate = lr * (1 + (1 / steps - 1) * step / steps)
        for p, g, (first, second) in zip((V, U), torch.autograd.grad(errors, (V, U)), moments, strict=True):
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            p.data -= rate * first / (1 - 0.9 ** (step + 1)) / root
    assert close(dec[FIRST].V, V) and close(dec[FIRST].U, U)


# --- moving and keeping ----------------------------------------------------------------------------------------------
def test_a_tie_survives_copies_and_conversions() -> None:
    dec = tied_toy(toy())
    for other in (copy.deepcopy(dec), copy.deepcopy(dec).to(torch.float32)):
        assert other[SECOND].V.untyped_storage().data_ptr() == other[FIRST].U.untyped_storage().data_ptr()
        assert other[SECOND].V.untyped_storage().data_ptr() != dec[FIRST].U.untyped_storage().data_ptr()
        assert other[SECOND].V.dtype == other[FIRST].U.dtype
    assert not dec.requires_grad_(False)[SECOND].V.requires_grad
    state = {key: torch.zeros_like(value) for key, value in dec.state_dict().items()}
    dec.load_state_dict(state)
    assert not dec[SECOND].product().any()


def test_save_and_load_keep_the_tie(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    dec = tied_toy(toy())
    folder = dec.save(tmp_path / "saved")
    assert set(load_file(folder / "components.safetensors")) == {f"{FIRST}.V", f"{FIRST}.U"}
    loaded = tlpd.Decomposition.load(folder)
    assert loaded.tied == TIED and list(loaded) == [FIRST, SECOND]
    assert all(torch.equal(loaded[n].V, dec[n].V) and torch.equal(loaded[n].U, dec[n].U) for n in dec)
    assert loaded[SECOND].V.untyped_storage().data_ptr() == loaded[FIRST].U.untyped_storage().data_ptr()
    tlpd.check_target(toy(), loaded)
    whole = values_of(folder)
    for broken in ({SECOND: SECOND}, {SECOND: "no site"}, {FIRST: SECOND, SECOND: FIRST}, {}):
        with pytest.raises(DecompositionFileError, match="agree"):
            tlpd.Decomposition.load(forge(folder, whole | {"tied": broken}))
    assert tlpd.Decomposition.load(forge(folder, whole)).tied == TIED


def test_files_from_before_there_were_ties_open(tmp_path: Path) -> None:
    dec = tlpd.from_factors(toy(), {FIRST: (double(5, N), double(N, 2))})
    folder = dec.save(tmp_path / "saved")
    forge_format_1(folder, {k: v for k, v in values_of(folder).items() if k != "tied"})
    assert tlpd.Decomposition.load(folder).tied == {}


# --- refusals --------------------------------------------------------------------------------------------------------
def wide() -> Any:
    """[5, 2], [2, 5] as its transpose, [5, 3] and again [3, 3]."""
    layers = [nn.Linear(5, 2), nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    model: Any = nn.Sequential(*layers).double().requires_grad_(False)
    model[1].weight.copy_(model[0].weight.T)
    model[4].weight.copy_(model[3].weight.T)
    return model


PAIR = (double(5, N), double(N, 2))
REFUSED: list[tuple[dict[str, Any], dict[str, str], type[Exception], str]] = [
    ({"0.weight": PAIR}, {"2.weight": "0.weight"}, ShapeError, r"\[5, 3\].*\[5, 2\].*transposed, \[2, 5\]"),
    ({"0.weight": PAIR}, {"0.weight": "0.weight"}, SettingError, "tied to itself"),
    ({"0.weight": PAIR}, {"1.weight": "0.weight", "0.weight": "1.weight"}, SettingError, "chains"),
    (
        {"3.weight": (double(3, N), double(N, 3))},
        {"4.weight": "3.weight", "3.weight": "0.weight"},
        SettingError,
        "not among the sites|chains",
    ),
    ({"0.weight": PAIR, "1.weight": PAIR}, {"1.weight": "0.weight"}, SettingError, "factors for 0.weight alone"),
    ({"0.weight": PAIR}, {"1.weight": "3.weight"}, SettingError, "3.weight is not among the sites"),
    ({"0.weight": PAIR}, {"1.weight": "0.weihgt"}, NoMatchingSiteError, "Nearest names: 0.weight"),
    ({"0.weight": PAIR}, {"1.*": "0.weight"}, NoMatchingSiteError, "exactly, by name or alias"),
    ({"3.weight": (double(3, N), double(N, 3))}, {"3.weight": "4.weight"}, SettingError, "4.weight"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_ties_that_cannot_be(case: int) -> None:
    factors, tied, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        tlpd.from_factors(wide(), factors, tied=tied)


def test_two_tables_are_not_tied() -> None:
    model: Any = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Embedding(3, 5)).double()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight.T)  # type: ignore[operator]
    with pytest.raises(SettingError, match="both look rows up"):
        tlpd.from_factors(model, {"0.weight": (double(5, N), double(N, 3))}, tied={"2.weight": "0.weight"})


def test_weights_must_be_each_others_transpose() -> None:
    model = wide()
    factors = {"0.weight": PAIR}
    model[1].weight[4, 1] += 1e-9 * model[1].weight[4, 1]
    with pytest.raises(SettingError, match="not each other's transpose"):
        tlpd.from_factors(model, factors, tied={"1.weight": "0.weight"})
    model[1].weight[4, 1] = torch.nan
    with pytest.raises(SettingError, match="not each other's transpose"):
        tlpd.from_factors(model, factors, tied={"1.weight": "0.weight"})


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_of_the_coarser_dtype_is_allowed_and_no_more(coarse: torch.dtype) -> None:
    model = wide()
    model[1].to(coarse)
    dec = tlpd.from_factors(model, {"0.weight": PAIR}, tied={"1.weight": "0.weight"})
    assert dec.tied == {"1.weight": "0.weight"}
    small = model[1].weight.abs().argmin().item()
    entry = model[1].weight.view(-1)[small : small + 1]
    entry *= 1 + 4 * torch.finfo(coarse).eps  # far below the rounding of the largest entry
    with pytest.raises(SettingError, match="not each other's transpose"):
        tlpd.from_factors(model, {"0.weight": PAIR}, tied={"1.weight": "0.weight"})


def test_counts_and_repeated_ties() -> None:
    model = wide()
    adapter, names = adapt(model), ["0.weight", "1.weight"]
    tied = {"1.weight": "0.weight"}
    assert resolved_ties(adapter, names, tied, counts=dict.fromkeys(names, 4)) == tied
    assert resolved_ties(adapter, names, {}) == {}
    with pytest.raises(SettingError, match="4 and 5; give both the same"):
        resolved_ties(adapter, names, tied, counts={"0.weight": 5, "1.weight": 4})
    with pytest.raises(SettingError, match="but 1.weight is not among the sites"):
        resolved_ties(adapter, ["0.weight"], tied)
    language_model = gpt2()
    both = {"unembed.W_U": "embed.W_E", "lm_head": "embed.W_E"}
    with pytest.raises(SettingError, match="tied twice"):
        resolved_ties(adapt(language_model), ["embed.W_E", "unembed.W_U"], both)


def test_the_constructor_refuses_what_from_factors_does() -> None:
    dec = tied_toy(toy())
    own = {FIRST: (dec[FIRST].V.detach(), dec[FIRST].U.detach())}
    sites = dec.sites | {"x": replace(dec.sites[FIRST], name="x")}
    fingerprints = dec.fingerprints | {"x": dec.fingerprints[FIRST]}
    for tied, error in (({"x": FIRST}, ShapeError), ({FIRST: FIRST}, SettingError), ({SECOND: "x"}, SettingError)):
        with pytest.raises(error):
            tlpd.Decomposition(own, sites, fingerprints, tied=tied)
    with pytest.raises(NoMatchingSiteError):
        _ = tlpd.Decomposition(own, dec.sites, dec.fingerprints)[SECOND]


# --- training --------------------------------------------------------------------------------------------------------
def test_a_run_keeps_its_tie_through_a_checkpoint(tmp_path: Path, tokens: Tensor) -> None:
    """By alias; stopped after its first step and gone on with, it is the run that was never stopped."""
    model = gpt2()
    method = tlpd.SPD(n_components=30, tied={"lm_head": "embed.W_E"}, ramp_steps=0)

    def run(folder: Path, callbacks: tuple[Any, ...] = ()) -> tlpd.Decomposition:
        settings: dict[str, Any] = {"batch_size": 2, "progress": False, "log_every": 1, "checkpoint_every": 1}
        sites = ["embed.W_E", "unembed.W_U"]
        return tlpd.decompose(model, sites, method, tokens, 2, run_dir=folder, callbacks=callbacks, **settings)

    def stop(info: Any) -> None:
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", (stop,))
    parts = run(tmp_path / "stopped")
    assert whole.tied == parts.tied == {"unembed.W_U": "embed.W_E"}
    assert torch.equal(whole["unembed.W_U"].V, whole["embed.W_E"].U.T)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    start = tlpd.decompose(model, list(whole), replace(method, lr=1e-30), tokens, 1, batch_size=2, progress=False)
    assert not torch.equal(start["embed.W_E"].V, whole["embed.W_E"].V)
    assert close(start["embed.W_E"].product(), model.transformer.wte.weight.detach())


def test_n_components_must_agree_over_a_tie(tokens: Tensor) -> None:
    method = tlpd.SPD(n_components={"embed*": 30, "*": 31}, tied={"unembed.W_U": "embed.W_E"})
    with pytest.raises(SettingError, match="31 and 30; give both the same"):
        tlpd.decompose(gpt2(), ["embed.W_E", "unembed.W_U"], method, tokens, 1, progress=False)
