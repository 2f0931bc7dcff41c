"""`evaluate` against values worked out by hand and against the library's other roads to the same figure."""

import dataclasses
import functools
import io
import json
import math

import pytest
import torch
from torch import nn

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.evaluation import evaluate as evaluation
from tl_paramdecomp.analysis.evaluation.measures import MaskKind, Sums, Target, auroc, ranks, spearman, specificity
from tl_paramdecomp.analysis.evaluation.oracle import estimated_effects
from tl_paramdecomp.analysis.next_tokens import masked_kl
from tl_paramdecomp.components.importance import Importance
from tl_paramdecomp.errors import DataError, DecompositionFileError, NoImportanceError, SettingError

SITES = "blocks.*.mlp.*"
FEW = tlpd.EvaluationConfig(rows_at_once=3, samples=2, ladder=(1, 3), restarts=2, ablated=6, by_site=False)


def tokens(rows=7, length=6, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def dec(model):
    """Random components with an untrained importance function, so that nothing is exact."""
    method = tlpd.SPD(n_components=12, start="random", warm_up_steps=3)
    return tlpd.decompose(model, SITES, method, tokens(), steps=0, progress=False)


@pytest.fixture(scope="module")
def found(model, dec):
    return tlpd.evaluate(model, dec, tokens(), protocol=FEW, progress=False)


# --- by hand ----------------------------------------------------------------------------------------------------------
def log_odds(*p):
    """Logits of a two-token vocabulary whose second token has these probabilities."""
    return torch.tensor([[0.0, math.log(q / (1 - q))] for q in p], dtype=torch.float64)


def test_sums_of_a_two_token_vocabulary():
    """KL, agreement and cross-entropy at three positions, the last of which nothing follows."""
    target = Target(log_odds(0.75, 0.2, 0.5).log_softmax(-1), torch.tensor([1, 0, -1]))
    found = target.sums(log_odds(0.5, 0.9, 0.5))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) + 0.2 * math.log(0.2 / 0.9) + 0.8 * math.log(0.8 / 0.1)
    assert abs(found.kl - kl) < 1e-12 and found.positions == 3
    assert abs(found.ce - (-math.log(0.5) - math.log(0.1))) < 1e-12 and found.predicted == 2
    assert target.sums(target.log_p).kl == 0.0 and target.sums(target.log_p).agree == 3
    assert target.sums(log_odds(0.9, 0.9, 0.4)).agree == 2  # at .5 the first of equals is the likeliest
    assert Sums(1.0, 2, 3, 4.0, 5).plus(Sums(1.0, 1, 1, 1.0, 1)) == Sums(2.0, 3, 4, 5.0, 6)


class OneMatrix(nn.Module):
    """Logits (0, h w) of a two-token vocabulary, for an embedding h of each token and one number w."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, 1, dtype=torch.float64)
        self.out = nn.Linear(1, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.embed.weight.copy_(torch.tensor([[1.0], [2.0]]))
            self.out.weight.copy_(torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64))

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def one_matrix():
    """The model, and its matrix as one component with an importance of 0 everywhere."""
    model = OneMatrix().requires_grad_(False)
    made = tlpd.decompose(
        model, "out.weight", tlpd.SVD(training=tlpd.SPD()), torch.zeros(4, 2, dtype=torch.long), 0, progress=False
    )
    for parameter in made.importance.parameters():
        parameter.zero_()
    return model, made


def test_a_one_matrix_model():
    """Without its component the model says 1/2 to both; the rows say p = 3/4 at token 0 and 9/10 at token 1."""
    model, made = one_matrix()
    rows = torch.tensor([[0, 1, 1]])
    found = tlpd.evaluate(
        model, made, rows, protocol=tlpd.EvaluationConfig(ladder=(4,), restarts=2, ablated=1), progress=False
    )

    def kl(p, q=0.5):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    removed = (kl(0.75) + 2 * kl(0.9)) / 3
    for masks in ("zero", "importance", "rounded 0.1"):
        assert abs(found.mask_row(masks)["kl"] - removed) < 1e-9, masks
        assert abs(found.mask_row(masks, site="out.weight")["kl"] - removed) < 1e-9, masks
    assert abs(found.ce["model"] + (math.log(0.75) + math.log(0.9)) / 2) < 1e-9
    assert abs(found.ce["zero"] - math.log(2.0)) < 1e-9
    assert found.mask_row("unmasked", "kept")["ce_recovered"] == 1.0 and found.mask_row("zero")["ce_recovered"] == 0.0
    assert found.mask_row("zero")["top1"] == 0.0 and found.mask_row("unmasked", "kept")["top1"] == 1.0
    # a climb ends where both the component and the delta component (which is 0) are away
    assert abs(found.adversary[0]["kl"] - removed) < 1e-9 and abs(found.adversary[0]["kl_worst"] - removed) < 1e-9
    (site,) = found.sites
    assert (site["components"], site["rank"], site["l0"], site["alive"], site["active_anywhere"]) == (1, 1, 0.0, 0, 0)
    assert site["relative_error"] < 1e-7 and site["densities"][0] == 1


def test_ranks_with_ties_by_hand():
    assert ranks(torch.tensor([10.0, 5.0, 10.0, 1.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 9.0])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 2.0])) == pytest.approx(-0.5)
    assert spearman(torch.ones(3), torch.tensor([3.0, 1.0, 2.0])) is None


def test_auroc_counts_pairs():
    score, label = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, False, True, False])
    pairs = [(n < 0.9) + 0.5 * (n == 0.9) for n in (0.4, 0.1)] + [(n < 0.4) + 0.5 * (n == 0.4) for n in (0.4, 0.1)]
    assert auroc(score, label) == pytest.approx(sum(pairs) / 4)
    assert auroc(score, torch.ones(4, dtype=torch.bool)) is None


def test_specificity_of_importances_that_know():
    effect = torch.tensor([0.5, 0.0, 0.2, 0.0])
    found = specificity((effect > 0).float(), effect)
    assert (found.auroc, found.unimportant, found.pairs) == (1.0, 0.0, 4) and found.important == pytest.approx(0.35)


# --- other roads ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["unmasked", "importance", "rounded", "zero"])
def test_whole_model_figures_are_those_of_a_patched_model(model, dec, found, kind):
    masks = tlpd.importance_masks(model, dec, tokens(), kind)
    row = found.mask_row("rounded 0.1" if kind == "rounded" else kind)
    assert row["kl"] == pytest.approx(masked_kl(model, dec, tokens(), masks), abs=1e-6)
    with tlpd.patched(model, dec, masks):
        logits = model(tokens()).logits
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).item()
    assert row["ce_difference"] == pytest.approx(ce - found.ce["model"], abs=1e-6)
    same = (logits.argmax(-1) == model(tokens()).logits.argmax(-1)).float().mean().item()
    assert row["top1"] == pytest.approx(same)


def test_the_delta_component_makes_the_sum_whole(found):
    """Components and delta whole are the model bit for bit; kept with no component, delta alone."""
    whole = found.mask_row("unmasked", "kept")
    assert whole["kl"] == 0.0 and whole["ce_difference"] == 0.0 and whole["ce_recovered"] == 1.0
    assert found.mask_row("zero", "kept")["kl"] != found.mask_row("zero")["kl"]


def test_zero_masks_are_the_weights_removed(model, dec, found):
    zero = dec.masks()
    for name in dec:
        zero = zero.keep_only(name, [])
    with tlpd.edited_weights(model, dec, zero):
        edited = model(tokens()).logits
    p, q = (t.log_softmax(-1) for t in (model(tokens()).logits, edited))
    assert found.mask_row("zero")["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-9)


def test_sparsity_is_counted_over_positions(model, dec, found):
    for row in found.sites:
        g = tlpd.causal_importances(model, dec, tokens())[row["site"]].flatten(0, 1)
        active = g > 0.1
        assert row["l0"] == pytest.approx(active.sum().item() / len(g))
        assert row["l0_above_0"] == pytest.approx((g > 0).sum().item() / len(g))
        assert row["alive"] == (g.mean(0) > 1e-6).sum().item() and row["active_anywhere"] == active.any(0).sum().item()
        site = dec[row["site"]].site
        assert row["active_parameters"] == pytest.approx(row["l0"] * (site.d_in + site.d_out))
        assert sum(row["densities"]) == 12 and row["densities"][0] == (~active.any(0)).sum().item()
        W = tlpd.site_weight(model, row["site"])
        assert row["relative_error"] == pytest.approx(
            ((W - dec[row["site"]].product()).norm() / W.norm()).item(), rel=1e-5
        )
    assert found.headline["l0"] == pytest.approx(sum(row["l0"] for row in found.sites))


def figures(found):
    return [(r["masks"], r["delta"], r["kl"], r["ce_difference"], r["top1"]) for r in found.masks if r["kl_sd"] is None]


def test_how_rows_are_divided_changes_nothing(model, dec, found):
    """The adversary's included: its sources are shared by all rows, not by those of one batch."""
    protocol = tlpd.EvaluationConfig(rows_at_once=100, samples=2, ladder=(1, 3), restarts=2, ablated=0, by_site=False)
    whole = tlpd.evaluate(model, dec, tokens(), protocol=protocol, progress=False)
    for a, b in zip(figures(found), figures(whole), strict=True):
        assert a[:2] == b[:2] and a[2:] == pytest.approx(b[2:], abs=1e-9)
    for a, b in zip(found.adversary, whole.adversary, strict=True):
        assert a["kl_all"] == pytest.approx(b["kl_all"], rel=1e-6)


def test_rows_of_unequal_length_count_by_their_positions(model, dec):
    """Padded rows together are the rows by themselves, weighted by their positions; what padding says does not matter."""
    rows, lengths = tokens(3), (6, 4, 2)
    mask = torch.stack([(torch.arange(6) < n).long() for n in lengths])
    rows = rows * mask
    protocol = tlpd.EvaluationConfig(ladder=(), ablated=0, by_site=False, samples=1)
    padded = tlpd.evaluate(model, dec, rows, attention_mask=mask, protocol=protocol, progress=False)
    alone = [
        tlpd.evaluate(model, dec, rows[i : i + 1, :n], protocol=protocol, progress=False) for i, n in enumerate(lengths)
    ]
    assert padded.positions == sum(lengths)
    for kind in (("importance", "absent"), ("zero", "kept"), ("rounded 0.1", "absent")):
        kl = sum(e.mask_row(*kind)["kl"] * n for e, n in zip(alone, lengths, strict=True)) / sum(lengths)
        assert padded.mask_row(*kind)["kl"] == pytest.approx(kl, abs=1e-9), kind
        top1 = sum(e.mask_row(*kind)["top1"] * n for e, n in zip(alone, lengths, strict=True)) / sum(lengths)
        assert padded.mask_row(*kind)["top1"] == pytest.approx(top1)
        ce = sum(e.mask_row(*kind)["ce_difference"] * (n - 1) for e, n in zip(alone, lengths, strict=True))
        assert padded.mask_row(*kind)["ce_difference"] == pytest.approx(ce / (sum(lengths) - 3), abs=1e-9)
    for a, b in zip(padded.sites, zip(*(e.sites for e in alone), strict=True), strict=True):
        assert a["l0"] == pytest.approx(sum(s["l0"] * n for s, n in zip(b, lengths, strict=True)) / sum(lengths))


def test_the_adversary_climbs_from_its_start(found):
    for row in found.adversary:
        assert row["kl_worst"] >= row["kl"] > 1.01 * row["start"] > 0 and row["restarts"] == len(row["kl_all"]) == 2
        assert row["kl"] == pytest.approx(sum(row["kl_all"]) / 2)  # the median of two


def test_batches_of_padding_alone_change_nothing(model, dec):
    """Two of six rows are padding; with two rows at once one batch has nothing that counts."""
    mask = torch.ones(6, 6, dtype=torch.long)
    mask[2:4] = 0
    protocol = tlpd.EvaluationConfig(rows_at_once=2, ladder=(2,), restarts=1, ablated=0, by_site=False)
    padded = tlpd.evaluate(model, dec, tokens(6), attention_mask=mask, protocol=protocol, progress=False)
    rows = torch.cat([tokens(6)[:2], tokens(6)[4:]])
    alone = tlpd.evaluate(model, dec, rows, protocol=protocol, progress=False)
    assert padded.positions == 24 and padded.headline == pytest.approx(alone.headline, rel=1e-6)
    with pytest.raises(DataError, match="leaves no position"):
        tlpd.evaluate(model, dec, tokens(2), attention_mask=torch.zeros(2, 6, dtype=torch.long), progress=False)


def test_model_and_decomposition_stay_as_they_were():
    """In training mode with dropout, and with gradients wanted: the figures are those of evaluation mode."""
    noisy = gpt2(resid_pdrop=0.3).train().requires_grad_(True)
    made = tlpd.decompose(noisy, SITES, tlpd.SPD(n_components=12, start="random"), tokens(), 0, progress=False)
    made.requires_grad_(True)
    protocol = tlpd.EvaluationConfig(ladder=(2,), restarts=1, ablated=2, by_site=False)
    found = tlpd.evaluate(noisy, made, tokens(3), protocol=protocol, progress=False)
    assert found.mask_row("unmasked", "kept")["kl"] == 0.0
    assert noisy.training and all(module.training for module in noisy.transformer.h)
    for parameter in (*noisy.parameters(), *made.parameters()):
        assert parameter.requires_grad and parameter.grad is None


@pytest.mark.parametrize("ablated", [1, 3])
def test_an_odd_number_of_components_is_ablated(model, dec, ablated):
    protocol = tlpd.EvaluationConfig(ladder=(), ablated=ablated, by_site=False)
    found = tlpd.evaluate(model, dec, tokens(3), protocol=protocol, progress=False)
    assert found.specificity["importance"]["pairs"] == ablated * 18


def test_components_are_ablated_one_at_a_time(model):
    """All 24 components of one site against edited weights."""
    made = tlpd.decompose(model, "blocks.0.mlp.W_in", tlpd.SVD(training=None), progress=False)
    protocol = tlpd.EvaluationConfig(rows_at_once=7, ladder=(), ablated=24, by_site=False)
    oracle = tlpd.Oracle(k=24)
    found = tlpd.evaluate(model, made, tokens(), importances=oracle, protocol=protocol, progress=False)
    p = model(tokens()).logits.log_softmax(-1)
    total = 0.0
    for c in range(24):
        with tlpd.edited_weights(model, made, made.masks().ablate("blocks.0.mlp.W_in", c)):
            q = model(tokens()).logits.log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1).mean().item()
    assert found.specificity["importance"]["important"] == pytest.approx(total / 24, rel=1e-6)
    assert found.specificity["importance"]["unimportant"] is None


# --- the oracle -------------------------------------------------------------------------------------------------------
def test_the_oracle_keeps_k_components_at_each_position(model):
    made = tlpd.decompose(model, SITES, tlpd.SVD(training=None), progress=False)
    found = tlpd.evaluate(
        model,
        made,
        tokens(),
        importances=tlpd.Oracle(k=9),
        protocol=tlpd.EvaluationConfig(ladder=(), ablated=0),
        progress=False,
    )
    assert found.headline["l0"] == pytest.approx(9.0) and found.protocol["oracle"] == {"k": 9, "samples": 4, "seed": 0}
    few = tlpd.evaluate(
        model,
        made,
        tokens(),
        importances=tlpd.Oracle(k=60),
        protocol=tlpd.EvaluationConfig(ladder=(), ablated=0),
        progress=False,
    )
    assert few.headline["rounded"] < found.headline["rounded"] < found.mask_row("permuted 0.1")["kl"]


@dataclasses.dataclass(frozen=True)
class Everywhere:
    """A source of importances from outside the package: one number."""

    g: float

    def importances(self, components, clean):
        shapes = {name: (*clean.inputs[name].shape[:-1], c.n_components) for name, c in components.items()}
        return {name: Importance(*(torch.full(shape, self.g),) * 2) for name, shape in shapes.items()}


def test_importances_of_any_source_are_evaluated(model):
    made = tlpd.decompose(model, SITES, tlpd.SVD(training=None), progress=False)
    protocol = tlpd.EvaluationConfig(ladder=(), ablated=0)
    one, half = (
        tlpd.evaluate(model, made, tokens(), importances=Everywhere(g), protocol=protocol, progress=False)
        for g in (1.0, 0.5)
    )
    assert one.headline["l0"] == sum(made.n_components.values()) and one.protocol["oracle"] == {"g": 1.0}
    assert one.mask_row("importance")["kl"] == one.mask_row("unmasked")["kl"] != half.mask_row("importance")["kl"]
    with tlpd.patched(model, made, functools.reduce(lambda m, n: m.with_values(n, 0.5, 0.0), made, made.masks())):
        q = model(tokens()).logits.log_softmax(-1)
    p = model(tokens()).logits.log_softmax(-1)
    assert half.mask_row("importance")["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)


def test_the_oracle_estimates_the_kl_to_second_order():
    """Of a two-token vocabulary: half the squared change of the log odds times p (1 - p)."""
    model, made = one_matrix()
    found = estimated_effects(adapt(model), made, torch.tensor([[0, 1]]), samples=20_000)["out.weight"].flatten()
    for value, h, p in zip(found.tolist(), (1.0, 2.0), (0.75, 0.9), strict=True):
        assert value == pytest.approx(0.5 * (h * math.log(3.0)) ** 2 * p * (1 - p), rel=0.05)


# --- what it is like to use -------------------------------------------------------------------------------------------
def test_it_can_be_read_framed_and_kept(model, dec, found, tmp_path):
    text = str(found)
    assert "Headline" in text and "rounded 0.1" in text and "blocks.0.mlp.W_in" in text
    assert max(map(len, text.splitlines())) <= 110
    frame = found.to_frame()
    assert {"masks", "delta", "kl", "ce_recovered", "top1"} <= set(frame.columns) and len(frame) == len(found.masks)
    with pytest.warns(DeprecationWarning, match="to_frame"):
        assert found.frame().equals(frame)
    assert list(found.sites_frame().index) == list(dec)
    assert tlpd.Evaluation.load(found.save(tmp_path / "found.json")) == found
    (tmp_path / "other.json").write_text(json.dumps({"kl": 3}))
    for name in ("other.json", "none.json"):
        with pytest.raises(DecompositionFileError, match=name):
            tlpd.Evaluation.load(tmp_path / name)


def test_the_budget_leaves_out_what_it_names(model, dec):
    found = tlpd.evaluate(model, dec, tokens(2), protocol=FEW, seconds=0.0, progress=False)
    assert "sparsity" in found.left_out and "adversary of 3 steps" in found.left_out and not found.masks
    assert "Left out" in str(found) and found.headline == {} and not len(found.sites_frame())


class Clock:
    """A clock that moves on by a second whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize("seconds, reached", [
    (0.5, []), (1.5, ["l0"]), (3.5, ["l0", "rounded"]), (4.5, ["l0", "rounded", "adversarial"]),
])  # fmt: skip
def test_what_there_was_time_for_is_in_the_headline_and_marked(model, dec, found, monkeypatch, seconds, reached):
    """Whatever else there is to measure comes after; the figures are those of an evaluation without a budget."""
    monkeypatch.setattr(evaluation, "time", Clock())
    few = tlpd.evaluate(model, dec, tokens(), protocol=FEW, seconds=seconds, progress=False)
    assert few.headline == {key: found.headline[key] for key in reached[:2]} | {k: few.headline[k] for k in reached[2:]}
    title, *table = str(few).split("Masks (")[0].splitlines()
    assert "partial" in title and sum("not reached" in line for line in table) == (len(reached) < 3)
    assert "".join(table).count("not reached") == 3 - len(reached)
    if "adversarial" in reached:  # the second restart had no time
        whole = next(row for row in found.adversary if row["steps"] == 3)
        assert few.adversary == [whole | {"restarts": 1, "kl_all": whole["kl_all"][:1], "kl": whole["kl_all"][0],
                                          "kl_worst": whole["kl_all"][0], "start": few.adversary[0]["start"]}]  # fmt: skip
        assert "(1 of 2 restarts)" in "".join(table) and "adversary of 3 steps, 1 of 2 restarts" in few.left_out
    assert "partial" not in str(found) and "not reached" not in str(found)


@pytest.mark.parametrize("seconds", [None, 0.5, 4.5, 12.5])
@pytest.mark.parametrize(
    "protocol", [FEW, tlpd.EvaluationConfig(4, 1, (2,), 1, ablated=3), tlpd.EvaluationConfig(ladder=(), ablated=999)]
)
def test_the_bar_has_a_total_and_ends_there(model, dec, monkeypatch, seconds, protocol):
    """Counted before the first pass, with padding; parts that have no time are taken off."""
    mask = torch.ones(7, 6, dtype=torch.long)
    mask[:3] = 0
    bars = []

    class Bar(evaluation.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})
            self.totals = [self.total]
            bars.append(self)

        def update(self, n=1):
            self.totals.append(self.total)
            return super().update(n)

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    monkeypatch.setattr(evaluation, "time", Clock())
    tlpd.evaluate(
        model, dec, tokens(), attention_mask=mask, protocol=protocol, untrained=dec if protocol.ladder else None,
        seconds=seconds, progress=True,
    )  # fmt: skip
    (bar,) = bars
    assert bar.n == bar.total > 0 and all(total and total >= bar.total for total in bar.totals)
    assert seconds is not None or set(bar.totals) == {bar.n}


def test_an_untrained_decomposition_stands_beside(model, dec):
    protocol = tlpd.EvaluationConfig(ladder=(2,), restarts=3, ablated=0, by_site=False)
    found = tlpd.evaluate(model, dec, tokens(3), untrained=dec, protocol=protocol, progress=False)
    assert found.controls["untrained"] == pytest.approx(found.headline)
    assert "untrained" in str(found)


def test_each_matrix_by_itself(model, dec):
    found = tlpd.evaluate(
        model, dec, tokens(3), protocol=tlpd.EvaluationConfig(ladder=(), ablated=0, samples=1), progress=False
    )
    name = "blocks.1.mlp.W_out"
    masks = dec.masks().keep_only(name, [])
    assert found.mask_row("zero", site=name)["kl"] == pytest.approx(masked_kl(model, dec, tokens(3), masks), abs=1e-6)


def test_bad_input_is_refused_by_name(model, dec):
    bare = tlpd.decompose(model, SITES, tlpd.SVD(training=None), progress=False)
    with pytest.raises(NoImportanceError, match="Oracle"):
        tlpd.evaluate(model, bare, tokens())
    with pytest.raises(DataError, match="no rows"):
        tlpd.evaluate(model, dec, tokens(0))
    with pytest.raises(SettingError, match="from 0 on"):
        tlpd.EvaluationConfig(ablated=-1)
    for wrong in ({"restarts": 0}, {"ladder": (0,)}, {"samples": 0}):
        with pytest.raises(SettingError, match="at least 1"):
            tlpd.EvaluationConfig(**wrong)
    with pytest.raises(SettingError, match="k must be at least 1"):
        tlpd.Oracle(k=0)
    assert MaskKind("rounded", threshold=0.1).name == "rounded 0.1"
