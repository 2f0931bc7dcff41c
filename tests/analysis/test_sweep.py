"""Sweeps against one patched pass for each component, and against themselves without any short cut."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tests.support.slow_ablations import ablation_effects
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.effects.sweep import Sweep, sweep
from tl_paramdecomp.analysis.next_tokens import answer_log_prob
from tl_paramdecomp.errors import (
    DataError,
    DecompositionFileError,
    HeadIndexError,
    NoMatchingSiteError,
    PatchConflictError,
    PositionIndexError,
    SettingError,
    ShapeError,
)
from tl_paramdecomp.patching.act_patches import ActPatches, act_patches, patched_acts
from tl_paramdecomp.patching.interventions import activation_means

from ..support.models import (
    BUILDERS,
    VOCAB,
    build,
    decomposition_of,
    dtype_of,
    gpt2,
    logits,
    module_of,
    plain,
    random_factors,
)

W_IN, W_O = "blocks.0.mlp.W_in", "blocks.1.attn.W_O"


@dataclass(frozen=True, eq=False)
class Prompts:
    """The part of a task that a sweep looks at."""

    clean: Tensor
    corrupt: Tensor | None
    attention_mask: Tensor | None
    last: Tensor


def task(n: int = 3, padded: bool = True, corrupt: bool = True) -> Prompts:
    """Prompts of two lengths, padded on the right."""
    generator = torch.Generator().manual_seed(6)
    clean = torch.randint(1, VOCAB, (n, 7), generator=generator)
    other = clean.clone()
    other[:, [1, 3]] = torch.randint(1, VOCAB, (n, 2), generator=generator)
    last, mask = torch.full((n,), 6), None
    if padded:
        mask = torch.ones(n, 7, dtype=torch.long)
        mask[0, 5:] = clean[0, 5:] = other[0, 5:] = 0
        last[0] = 4
    return Prompts(clean, other if corrupt else None, mask, last)


def difference(logits: Tensor, task: Any) -> Tensor:
    """A metric of every prompt by itself, which knows its prompts."""
    return logits[torch.arange(len(task.clean)), task.last] - logits[:, 9]


def scores(model: Any, given: Prompts, tokens: Tensor) -> Tensor:
    kwargs = {} if given.attention_mask is None else {"attention_mask": given.attention_mask}
    out = logits(model, tokens, **kwargs)
    return difference(out[torch.arange(len(tokens)), given.last], given).double()


def patched_scores(model: Any, dec: tlpd.Decomposition, patches: ActPatches, given: Prompts, tokens: Tensor) -> float:
    with patched_acts(model, dec, patches):
        return scores(model, given, tokens).mean().item()


def tolerance(model: Any) -> float:
    return 1e-9 if dtype_of(model) == torch.float64 else 2e-4


def agrees(model: Any, found: Tensor, expected: list[float]) -> None:
    expected_ = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == expected_.shape
    bound, far = tolerance(model) * max(1.0, float(expected_.abs().max())), float((found - expected_).abs().max())
    assert far < bound


CASES = [(host, case) for host in BUILDERS for case in ("corrupt", "clean")]
CASES += [(host, case) for host in ("gpt2", "hooked-gqa") for case in ("zero", "mean", "resample", -1.5)]


@pytest.mark.parametrize("host, case", CASES)
def test_every_site_against_single_patches(host: str, case: Any, tokens: Tensor) -> None:
    """Every kind of site; padded prompts where the host takes a mask as transformers does."""
    model = build(host)
    dec = decomposition_of(model, n=2)
    given = task(padded=not host.startswith(("hooked", "bridge")))
    base, other = (given.corrupt, given.clean) if case == "clean" else (given.clean, given.corrupt)
    assert base is not None and other is not None
    acts = tlpd.component_acts(model, dec, other, given.attention_mask)
    means = activation_means(model, dec, base, attention_mask=given.attention_mask)
    setting: dict[str, Any] = {"direction": "denoising"} if case == "clean" else {"value": case}
    found = sweep(model, dec, given, difference, rows_at_once=12, seed=3, progress=False, **setting)
    before = scores(model, given, base).mean().item()
    assert (found.corrupt if case == "clean" else found.clean) == pytest.approx(before, abs=tolerance(model))
    for name in dec:
        expected = []
        for c in (0, 1):
            patches = act_patches(dec)
            if case in ("corrupt", "clean"):
                patches = patches.from_acts(name, c, acts)
            elif case == "mean":
                patches = patches.mean(name, c, means)
            elif case == "resample":
                patches = patches.resample(name, c, seed=3)
            else:
                patches = patches.set(name, c, 0.0 if case == "zero" else case)
            change = patched_scores(model, dec, patches, given, base) - before
            expected.append(change if case == "clean" else -change)  # the patch puts the component in, or takes it out
        agrees(model, found.effect(name), expected)
    assert max(abs(row.effect) for row in found.rows()) > 1e-3


@pytest.mark.parametrize("host", ["hooked-gqa", "bridge", "gpt2"])
def test_heads_and_positions_apart(host: str) -> None:
    model = build(host)
    names = [f"blocks.1.attn.{role}" for role in ("W_Q", "W_K", "W_V", "W_O")]
    dec, given = decomposition_of(model, names, n=2), task(n=2, padded=False)
    before = scores(model, given, given.clean).mean().item()
    x, other = (adapt(model).capture(t, names).inputs for t in (given.clean, given.corrupt))
    acts = {name: dec[name].head_acts(other[name]) if name == W_O else dec[name].acts(other[name]) for name in names}
    for value in ("zero", "corrupt"):
        found = sweep(
            model, dec, given, difference, value=value, by_head=True, positions="each", rows_at_once=9, progress=False
        )
        assert found.granularity == ["position", "head", "component"] and found.positions == "each"
        for name in names:
            heads = dec.sites[name].n_heads or 0
            assert found.effect(name).shape == (7, heads, 2) and x[name].shape[1] == 7
            for p, head, c in ((0, 0, 1), (3, heads - 1, 0), (6, 1, 1)):
                patches = act_patches(dec).zero(name, c, positions=p, head=head)
                if value == "corrupt":
                    patches = act_patches(dec).from_acts(name, c, acts[name], positions=p, head=head)
                expected = before - patched_scores(model, dec, patches, given, given.clean)
                far, bound = abs(float(found.effect(name)[p, head, c]) - expected), tolerance(model) * 10
                assert far < bound, (name, p, head, c)


@pytest.mark.parametrize("positions", [-1, [1, 4], slice(2, None), torch.arange(14).view(2, 7) % 3 == 0], ids=str)
def test_chosen_positions(positions: Any) -> None:
    model, given = gpt2(), task(n=2, padded=False)
    dec = decomposition_of(model, [W_IN, "embed.W_E"])
    found = sweep(model, dec, given, difference, value=2.0, positions=positions, progress=False)
    before = scores(model, given, given.clean).mean().item()
    for name in dec:
        patches = [act_patches(dec).set(name, c, 2.0, positions=positions) for c in range(5)]
        agrees(model, found.effect(name), [before - patched_scores(model, dec, p, given, given.clean) for p in patches])


def without_short_cuts(model: Any) -> Any:
    """The model, on whose adapter passes begin at the first block and run to all logits."""
    adapter = adapt(model)
    adapter.__dict__["_skips_blocks"] = False
    adapter.__dict__["_after_unembedding"] = None
    assert not adapter.blocks and not adapter.splits_at_unembedding
    return model


FULL: list[tuple[str, dict]] = [(host, {"direction": "denoising"}) for host in BUILDERS]
FULL += [("gpt2", {"value": "mean", "positions": "each"}), ("bridge-llama", {})]


@pytest.mark.parametrize("host, setting", FULL, ids=str)
def test_full_passes_give_the_same(host: str, setting: dict) -> None:
    short, full = build(host), without_short_cuts(build(host))
    given = task(padded=not host.startswith(("hooked", "bridge")))
    made = [sweep(m, decomposition_of(m, n=2), given, difference, progress=False, **setting) for m in (short, full)]
    assert adapt(short).blocks and adapt(short).splits_at_unembedding
    for name in made[0].effects:
        far, bound = float((made[0].effect(name) - made[1].effect(name)).abs().max()), tolerance(short) * 10
        assert far < bound, name


def test_passes_begin_where_something_changes() -> None:
    """Blocks, and rows of each, that a sweep of the last of four blocks computes."""
    model = gpt2(n_layer=4)
    dec = decomposition_of(model, ["blocks.3.mlp.W_in", "blocks.3.attn.W_V"], n=10)
    given, seen = task(n=1, padded=False), {i: [] for i in range(4)}
    for i, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda m, args, out, i=i: seen[i].append(len(out)))
    assert adapt(model).blocks and adapt(model).splits_at_unembedding  # tried out when first asked for
    for rows in seen.values():
        rows.clear()
    sweep(model, dec, given, difference, rows_at_once=8, progress=False)
    assert sorted(seen[3])[-3:] == [4, 8, 8] and max(seen[0] + seen[1] + seen[2]) == 1


@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 64])
def test_batches_make_no_difference(rows_at_once: int) -> None:
    model, given = gpt2(), task(n=3)
    dec = decomposition_of(model, ["embed.W_E", W_IN, W_O, "unembed.W_U"])
    found = sweep(model, dec, given, difference, value="corrupt", rows_at_once=rows_at_once, progress=False)
    whole = sweep(model, dec, given, difference, value="corrupt", rows_at_once=1000, progress=False)
    assert found.clean == pytest.approx(whole.clean, abs=1e-10)
    assert all((found.effect(name) - whole.effect(name)).abs().max() < 1e-10 for name in dec)


def test_token_rows_and_metrics_of_whole_logits(tokens: Tensor) -> None:
    model = gpt2()
    dec = decomposition_of(model, [W_IN, W_O, "unembed.W_U", "pos_embed.W_pos"])
    metric = answer_log_prob((5, 6))
    found = sweep(model, dec, tokens[:1], metric, progress=False)
    for name, effects in ablation_effects(model, dec, tokens[:1], metric).items():
        assert (found.effect(name) - effects).abs().max() < 1e-5
    shifted = sweep(model, dec, tokens, metric, corrupt=(tokens + 1) % VOCAB, value="corrupt", progress=False)
    assert shifted.corrupt is not None and shifted.value == "corrupt" and shifted.prompts == 2
    means = activation_means(model, dec, (tokens * 3) % VOCAB, by_position=True)
    found = sweep(model, dec, tokens, metric, value="mean", means=means, sites=W_IN, progress=False)
    with patched_acts(model, dec, act_patches(dec).mean(W_IN, 2, means)):
        expected = metric(logits(model, tokens)).mean()
    assert list(found.effects) == [W_IN] and abs(found.effect(W_IN)[2] - (found.clean - expected)) < 1e-5


def test_plain_modules_and_inserted_identities(tokens: Tensor) -> None:
    module, x = plain(), torch.randn(3, 6).double()
    dec = decomposition_of(module)
    for value in (2.0, "mean"):
        found = sweep(module, dec, x, lambda out: out.sum(-1), value=value, progress=False)
        with (
            torch.no_grad(),
            patched_acts(
                module,
                dec,
                act_patches(dec).mean("0.weight", 1, {"0.weight": (x @ dec["0.weight"].V).mean(0)})
                if value == "mean"
                else act_patches(dec).set("0.weight", 1, 2.0),
            ),
        ):
            expected = module(x).sum(-1).mean()
        assert abs(found.effect("0.weight")[1] - (found.clean - expected)) < 1e-10
    with pytest.raises(ShapeError, match="no position axis"):
        sweep(module, dec, x, lambda out: out.sum(-1), positions="each", progress=False)
    model, name = gpt2(), f"{W_IN}.pre_identity"
    factors = random_factors(model, [W_IN])
    factors[name] = (torch.rand(24, 5).double(), torch.rand(5, 24).double())
    dec, given = tlpd.from_factors(model, factors), task()
    found = sweep(model, dec, given, difference, progress=False)
    for site in dec:
        expected = found.clean - patched_scores(model, dec, act_patches(dec).zero(site, 1), given, given.clean)
        assert abs(found.effect(site)[1] - expected) < 1e-9


def test_other_patches_hold_meanwhile(tokens: Tensor) -> None:
    model, given = gpt2(), task()
    dec = decomposition_of(model, [W_IN, W_O, "unembed.W_U"])
    around = act_patches(dec).set(W_IN, [0, 1], 2.0).set("unembed.W_U", 3, -1.0)
    with patched_acts(model, dec, around):
        found = sweep(model, dec, given, difference, sites=W_O, value="corrupt", progress=False)
        acts = tlpd.component_acts(model, dec, given.corrupt, given.attention_mask)
        with pytest.raises(PatchConflictError, match="already patched"):
            sweep(model, dec, given, difference, progress=False)
    expected = [
        found.clean - patched_scores(model, dec, around.from_acts(W_O, c, acts), given, given.clean) for c in range(5)
    ]
    agrees(model, found.effect(W_O), expected)


def test_the_model_is_left_as_it_was(tokens: Tensor) -> None:
    model, given = gpt2(), task()
    dec, before = decomposition_of(model, [W_IN, W_O]), logits(model, tokens)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module_of(model).modules()]

    def failing(logits: Tensor, task: Any) -> Tensor:
        raise RuntimeError("no metric")

    sweep(model, dec, given, difference, progress=False)
    with pytest.raises(RuntimeError, match="no metric"):
        sweep(model, dec, given, failing, progress=False)
    assert torch.equal(logits(model, tokens), before)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module_of(model).modules()]
    assert all("forward" not in m.__dict__ for m in module_of(model).modules())


# --- results ----------------------------------------------------------------------------------------------------------
def test_records(tmp_path: Any) -> None:
    model, given = gpt2(), task()
    dec = decomposition_of(model, [W_IN, W_O])
    found = sweep(model, dec, given, difference, positions="each", sites=W_IN, direction="denoising", progress=False)
    assert (found.metric, found.value, found.direction, found.prompts) == ("difference", "clean", "denoising", 3)
    top = found.top(3)
    values = found.effect(W_IN).abs()
    assert abs(top[0].effect) == values.max() and values[top[0].position, top[0].component] == values.max()
    assert [abs(row.effect) for row in top] == values.flatten().topk(3).values.tolist() and top[0].head is None
    assert Sweep.load(found.save(tmp_path / "sweep.json")) == found
    shown = str(found)
    assert "Largest effects on difference (denoising, value clean)" in shown and "with - without" in shown
    assert W_IN in shown and "3 prompts" in shown
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DecompositionFileError, match="holds no sweep"):
        Sweep.load(tmp_path / "broken.json")
    with pytest.raises(NoMatchingSiteError, match="was not swept"):
        found.effect(W_O)
    pandas = pytest.importorskip("pandas")
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == ["site", "position", "component", "effect"]
    assert len(frame) == 35 and frame["effect"].abs().max() == values.max()


def test_what_cannot_be_is_refused(tokens: Tensor) -> None:
    model, given, none = gpt2(), task(), task(corrupt=False)
    dec = decomposition_of(model, [W_IN, W_O])

    def refused(error: type[Exception], words: str, prompts: Any = given, metric: Any = difference, **setting: Any):
        with pytest.raises(error, match=words):
            sweep(model, dec, prompts, metric, progress=False, **setting)

    refused(SettingError, "Denoising puts the clean", direction="denoising", value=0.0)
    refused(SettingError, "at least 1", rows_at_once=0)
    refused(SettingError, "its own corrupt prompts", corrupt=given.corrupt)
    refused(DataError, "no corrupt prompts", none, value="corrupt")
    refused(DataError, "no corrupt prompts", none, direction="denoising")
    refused(DataError, "there is one prompt", task(n=1), value="resample")
    refused(DataError, "at least one prompt", tokens[:0], lambda out: out[:, 0, 0])
    refused(HeadIndexError, "does not divide into heads", by_head=True, sites="*")
    refused(NoMatchingSiteError, "mlp.W_inn", sites="blocks.0.mlp.W_inn")
    refused(PositionIndexError, "Position 8", positions=8)
    refused(ShapeError, "aligned with the clean ones", tokens, lambda out: out[:, 0, 0], corrupt=tokens[:, :5])
    refused(ShapeError, "one number for each of 3 prompts", metric=lambda out, task: out)
    refused(ShapeError, r"Means of .* are \[C=5\]", value="mean", means={W_IN: torch.ones(4), W_O: torch.ones(5)})
    refused(NoMatchingSiteError, "no mean of", value="mean", means={W_IN: torch.ones(5)})
    refused(SettingError, "parts that heads", value="mean", means={W_O: torch.ones(5)}, by_head=True)
    assert sweep(model, dec, given, difference, by_head=True, progress=False).effect(W_O).shape == (3, 5)
