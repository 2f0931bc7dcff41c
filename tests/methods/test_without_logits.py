"""Models that give hidden states or scores of classes: KL is refused by name, and the mean square does all that KL does."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tests.support.hosts import off_trivial, on_host
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.evaluation.oracle import estimated_effects
from tl_paramdecomp.analysis.next_tokens import masked_kl, next_token_probs
from tl_paramdecomp.errors import TLParamDecompError, UnsupportedModelError
from tl_paramdecomp.methods.internals import HiddenActsReconstruction
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.methods.step import LossStep

HOSTS = ("transformers", "nnsight")
KINDS = ("GPT2Model", "LlamaModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification")
SITE = "blocks.0.mlp.W_in"
SPD = tlpd.SPD(
    n_components=4, measure="mse", start="random", warm_up_steps=0,
    losses=(Faithfulness(1.0), StochasticReconstruction(1.0), HiddenActsReconstruction(0.1), ImportanceMinimality(1e-2)),
)  # fmt: skip
FEW = tlpd.EvaluationConfig(rows_at_once=3, samples=2, ladder=(1,), restarts=1, ablated=4)
ROWS = torch.randint(1, 31, (8, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(ROWS)
MASK[1::2, 3:] = 0
PADDED = ROWS.masked_fill(MASK == 0, 0)


def tiny(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "LlamaModel":
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
            max_position_embeddings=16,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
            num_labels=3,
        )  # fmt: skip
    config._attn_implementation = "eager"
    return off_trivial(getattr(transformers, kind)(config).double().eval()).requires_grad_(False)


def outputs(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    out = model(tokens, attention_mask=mask)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def with_weight(model: Any, weight: Tensor) -> Any:
    """A copy with another W [d_in, d_out] at the site."""
    twin = copy.deepcopy(model)
    body = getattr(twin, "transformer", twin)
    if hasattr(body, "h"):
        body.h[0].mlp.c_fc.weight.copy_(weight)
    else:
        body.layers[0].mlp.up_proj.weight.copy_(weight.T)
    return twin


def mean_square(model: Any, other: Any, tokens: Tensor, mask: Tensor | None) -> float:
    """Textbook: the mean over all numbers of outputs that count."""
    clean, changed = outputs(model, tokens, mask), outputs(other, tokens, mask)
    squares = (changed - clean) ** 2
    if mask is not None and squares.ndim == 3:
        squares = squares[mask.bool()]
    return (squares.sum() / squares.numel()).item()


def trained(model: Any, data: Any = ROWS, steps: int = 4, **more: Any) -> Any:
    return tlpd.decompose(model, SITE, SPD, data, steps, 4, progress=False, **more)


# --- refused ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_refused_before_anything_is_written_and_the_mean_square_named(kind: str, host: str, tmp_path):
    model = on_host(tiny(kind), host)
    made, kl = trained(model, steps=0), tlpd.SPD(n_components=4)
    protocol = tlpd.ComparisonProtocol(sites=SITE, steps=1)
    calls = {
        "decompose": lambda: tlpd.decompose(model, SITE, kl, ROWS, 2, 4, run_dir=tmp_path / "run", progress=False),
        "basis": lambda: tlpd.decompose(model, SITE, tlpd.SVD(), ROWS, 2, 4, run_dir=tmp_path / "run", progress=False),
        "l3d": lambda: tlpd.decompose(model, SITE, tlpd.L3D(2), ROWS, 2, 4, run_dir=tmp_path / "run", progress=False),
        "estimate": lambda: tlpd.estimate_run(model, SITE, kl, ROWS, 2, 4),
        "compare": lambda: tlpd.compare(
            model, {"kl": kl}, protocol, ROWS, ROWS, run_dir=tmp_path / "run", progress=False
        ),
        "evaluate": lambda: tlpd.evaluate(model, made, ROWS, measure="kl", protocol=FEW, progress=False),
        "step": lambda: LossStep.of(adapt(model), made, ROWS, None, torch.Generator()),
        "effects": lambda: estimated_effects(adapt(model), made, ROWS),
    }
    for name, call in calls.items():
        with pytest.raises(UnsupportedModelError) as caught:
            call()
        told = str(caught.value)
        instead = "divergence='mse'" if name == "l3d" else "measure='mse'"
        assert kind in told and "logits over a vocabulary" in told and instead in told, (name, told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_next_tokens_are_refused(kind: str):
    model = tiny(kind)
    made = trained(model, steps=0)
    task = tlpd.Task.from_tokens("x", ROWS, [3] * 8, [4] * 8, ROWS.roll(1, 0))
    metric = tlpd.LogitDifference()
    l3d = tlpd.decompose(model, SITE, tlpd.L3D(2, divergence="mse"), ROWS, 1, 4, progress=False)
    for call in (
        lambda: masked_kl(model, made, ROWS, made.masks()),
        lambda: next_token_probs(model, ROWS[:1]),
        lambda: tlpd.score(model, task, metric),
        lambda: tlpd.attribute(model, made, task, metric),
        lambda: tlpd.sweep(model, made, task, metric, progress=False),
        lambda: tlpd.tune_along(model, l3d, [0], ROWS, steps=1, progress=False),
    ):
        with pytest.raises(UnsupportedModelError, match=f"logits over a vocabulary, and {kind}"):
            call()
    if kind != "GPT2ForSequenceClassification":  # a metric of whatever the model gives is its user's own
        found = tlpd.attribute(model, made, ROWS, lambda out: out[:, -1, 0])
        assert math.isfinite(found.to_frame()["value"].sum())


def test_a_model_that_gives_no_tensor_is_named():
    import transformers

    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    model = transformers.GPT2ForQuestionAnswering(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="GPT2ForQuestionAnswering gives QuestionAnsweringModelOutput"):
        trained(model, steps=1)


def test_a_body_for_images_gives_no_logits_and_its_classifier_scores():
    import transformers

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=4, patch_size=2, num_channels=1, **sizes)
    assert not adapt(body := transformers.ViTModel(config).eval()).gives_logits and body is not None
    assert adapt(whole := transformers.ViTForImageClassification(config).eval()).gives_logits and whole is not None
    plain = torch.nn.Sequential(torch.nn.Linear(3, 2))
    assert adapt(plain).gives_logits


# --- the mean square --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_the_textbooks_of_edited_weights(kind: str, host: str, mask: Tensor | None):
    model = tiny(kind)
    hosted, tokens = on_host(model, host), ROWS if mask is None else PADDED
    made = trained(hosted, {"tokens": tokens, "attention_mask": MASK} if mask is not None else tokens)
    found = tlpd.evaluate(hosted, made, tokens, attention_mask=mask, protocol=FEW, progress=False)
    part = made[SITE].V @ made[SITE].U
    for kind_of_mask, weight in {"zero": torch.zeros_like(part), "unmasked": part}.items():
        wanted = mean_square(model, with_weight(model, weight), tokens, mask)
        assert found.distance(kind_of_mask) == pytest.approx(wanted, rel=1e-9) and wanted > 0
        assert found.distance(kind_of_mask, site=SITE) == pytest.approx(wanted, rel=1e-9)
        step = LossStep.of(adapt(hosted), made, tokens, mask, torch.Generator(), measure="mse")
        masks = {SITE: _masks(step, 0.0 if kind_of_mask == "zero" else 1.0)}
        assert step.divergence.of(step.run_masked(masks)).item() == pytest.approx(wanted, rel=1e-9)
    for kept in (row for row in found.masks if row["delta"] == "kept" and row["masks"] == "unmasked"):
        assert kept["mse"] < 1e-25
    assert found.measure == "mse" and not found.ce and "kl" not in found.masks[0]
    assert set(found.headline) == {"l0", "rounded", "adversarial"} and found.specificity
    assert all(table.row_count for table in found.tables())
    counted = tokens.numel() if mask is None else int(mask.sum())
    assert found.positions == (8 if "Sequence" in kind else counted)
    importances = made.importances(adapt(hosted).capture(tokens, [SITE], mask).inputs, mask)[SITE].lower > 0.1
    scored = torch.ones_like(tokens) if mask is None else mask
    assert found.sites[0]["l0"] == pytest.approx((importances.sum(-1) * scored).sum().item() / counted)


def _masks(step: LossStep, value: float) -> Any:
    from tl_paramdecomp.components.masked_output import InterpolatedMask

    g = step.importances[SITE].lower
    return InterpolatedMask(torch.full_like(g, value), g.new_ones(()), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_and_is_the_same_in_pieces(kind: str, tmp_path):
    model, data = tiny(kind), {"tokens": PADDED, "attention_mask": MASK}
    whole = trained(model, data, run_dir=tmp_path / "whole")
    stopped = trained(
        model, data, run_dir=tmp_path / "parted", log_every=1, callbacks=[lambda i: tlpd.STOP if i.step == 2 else None]
    )
    assert stopped.info["stopped_after"] == 2
    parted = trained(model, data, run_dir=tmp_path / "parted")
    assert torch.equal(parted[SITE].V, whole[SITE].V) and torch.equal(parted[SITE].U, whole[SITE].U)
    one, two = (trained(model, data, accumulate=n, random_numbers="global") for n in (1, 2))
    apart = [(p - q).abs().max().item() for p, q in zip(one.parameters(), two.parameters(), strict=True)]
    assert max(apart) < 1e-13 and not torch.equal(one[SITE].V, stopped[SITE].V)


def test_training_makes_the_mean_square_smaller():
    model = tiny("GPT2Model")
    method = tlpd.SPD(n_components=12, measure="mse", start="random", warm_up_steps=0)
    start, end = (tlpd.decompose(model, SITE, method, ROWS, n, 8, progress=False) for n in (0, 60))
    few = tlpd.EvaluationConfig(ladder=(), ablated=0, by_site=False, samples=1)
    before, after = (tlpd.evaluate(model, made, ROWS, protocol=few, progress=False) for made in (start, end))
    assert after.distance("stochastic", "masked") < 0.5 * before.distance("stochastic", "masked")


def test_methods_are_compared_by_the_mean_square_and_found_again(tmp_path):
    model = tiny("GPT2ForSequenceClassification")
    methods = {"SPD": SPD, "SVD": tlpd.SVD(training=None), "trained SVD": tlpd.SVD(training=SPD)}
    few = tlpd.EvaluationConfig(ladder=(1,), restarts=1, ablated=0, by_site=False)
    protocol = tlpd.ComparisonProtocol(sites=SITE, steps=2, batch_size=4, seeds=(0,), sparsities=(1.0,), evaluation=few)
    held_out = {"input_ids": PADDED, "attention_mask": MASK}
    data = {"tokens": PADDED, "attention_mask": MASK}
    found, again = (
        tlpd.compare(model, methods, protocol, data, held_out, run_dir=tmp_path, progress=False) for _ in range(2)
    )
    assert found.points == again.points and len(found.points) > 2 and found.measure == "mse"
    wanted = mean_square(model, with_weight(model, torch.zeros(12, 48, dtype=torch.float64)), PADDED, MASK)
    assert all(point["zero"] == pytest.approx(wanted, rel=1e-9) for point in found.points)
    assert all("KL" not in str(table.title) for table in found.tables())
    saved = tlpd.Comparison.load(tmp_path / "comparison.json") if hasattr(tlpd, "Comparison") else found
    assert saved.measure == "mse"


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2ForSequenceClassification"])
def test_the_oracle_estimates_the_mean_square_to_second_order(kind: str):
    """Against the derivative by differences: |change of outputs|^2 / width, summed over positions."""
    model, tokens = tiny(kind), ROWS[:1]
    made = trained(model, steps=0)
    effects = estimated_effects(adapt(model), made, tokens, samples=3000, measure="mse")[SITE]
    clean, eps = outputs(model, tokens, None), 1e-4
    for component, position in ((0, 5), (2, 3)):
        masks = made.masks().scale(SITE, [component], 1.0 - eps, positions=position)
        with torch.no_grad(), tlpd.patched(model, made, masks):
            change = (outputs(model, tokens, None) - clean) / eps
        wanted = change.square().sum() / change.shape[-1]
        assert effects[0, position, component].item() == pytest.approx(wanted.item(), rel=0.1)


def test_importance_masks_of_an_adversary_climb_the_mean_square():
    model = tiny("GPT2Model")
    made = trained(model)
    masks = tlpd.importance_masks(model, made, ROWS, "adversarial")
    with torch.no_grad(), tlpd.patched(model, made, masks):
        assert torch.isfinite(outputs(model, ROWS, None)).all()


def test_an_evaluation_of_logits_can_be_by_the_mean_square():
    from tests.support.models import gpt2

    model = gpt2()
    made = tlpd.decompose(
        model, SITE, tlpd.SPD(n_components=4, start="random", warm_up_steps=0), ROWS, 0, progress=False
    )
    found = tlpd.evaluate(model, made, ROWS, measure="mse", protocol=FEW, progress=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.h[0].mlp.c_fc.weight.zero_()
        wanted = mean_square(model, twin, ROWS, None)
    assert found.distance("zero") == pytest.approx(wanted, rel=1e-9)


# --- outputs and sites without positions -------------------------------------------------------------------------------
def vectors(shape: tuple[int, ...]) -> tuple[Any, tlpd.Decomposition, torch.Tensor]:
    """A model that reads vectors, a decomposition, and some of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)).requires_grad_(False)
    x = torch.randn(shape)
    method = tlpd.SPD(n_components=4, measure="mse", importance=tlpd.SPD.paper().importance)
    return model, tlpd.decompose(model, "*", method, x, 1, 2, progress=False), x


def bert() -> Any:
    """A model whose pooler writes once for a row, and leads to nothing that is compared."""
    from transformers import BertConfig, BertModel

    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=31, max_position_embeddings=8, **small)).eval().requires_grad_(False)


def first_output(out: torch.Tensor) -> torch.Tensor:
    return out.flatten(1)[:, 0]


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_a_model_of_vectors_is_measured_by_mean_squares(shape: tuple[int, ...]):
    model, dec, x = vectors(shape)
    protocol = tlpd.EvaluationConfig(ladder=(), ablated=0, by_site=False, samples=1)
    found, clean = tlpd.evaluate(model, dec, x, protocol=protocol, progress=False), model(x)
    zero = next(row for row in found.masks if row["masks"] == "zero")
    with tlpd.patched(model, dec, dec.masks().keep_only("0.weight", []).keep_only("2.weight", [])):
        wanted = (model(x) - clean).square().mean().item()
    assert found.ce == {} and zero["mse"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(tlpd.errors.DataError, match="KL is of next tokens"):
        tlpd.evaluate(model, dec, x, protocol=protocol, progress=False, measure="kl")
    for seconds in (-1.0, float("nan")):
        with pytest.raises(tlpd.errors.SettingError, match="seconds"):
            tlpd.evaluate(model, dec, x, protocol=protocol, progress=False, seconds=seconds)


def test_effects_need_tokens_and_positions():
    pooled = tlpd.decompose(
        host := bert(), ["pooler.dense.weight", "*.mlp.W_in"], tlpd.SVD(training=None), progress=False
    )
    model, dec, x = vectors((4, 6))
    for target, own, rows, error in ((model, dec, x, "token ids"), (host, pooled, ROWS, "no positions")):
        for method in ("gradient", "ablation"):
            with pytest.raises(TLParamDecompError, match=error):
                tlpd.attribute(target, own, rows, first_output, method=method)
        with pytest.raises(TLParamDecompError, match=error):
            tlpd.prompt_graph(target, own, rows[:1], first_output)
    with pytest.raises(TLParamDecompError, match="no positions"):
        tlpd.edges_into(host, pooled, ROWS, (next(iter(pooled)), 0, 0))
    with pytest.raises(TLParamDecompError, match="chosen over all sites"):
        tlpd.evaluate(host, pooled, ROWS, importances=tlpd.Oracle(2), protocol=FEW, progress=False)


@pytest.mark.parametrize("coefficient", [-1.0, float("nan"), float("inf")])
def test_a_coefficient_that_rewards_a_loss_is_refused(coefficient: float):
    with pytest.raises(tlpd.errors.SettingError, match="from 0 on"):
        tlpd.SPD(losses=(ImportanceMinimality(coefficient),))


def test_seeds_are_whole_numbers_of_64_bits():
    model, _, x = vectors((4, 6))
    method = tlpd.SPD(n_components=4, measure="mse")
    for seed in (True, 1 << 64, -(1 << 70)):
        with pytest.raises(tlpd.errors.SettingError, match="seed is a whole number"):
            tlpd.decompose(model, "*", method, x, 1, 2, seed=seed, progress=False)
    tlpd.decompose(model, "*", method, x, 3, 2, seed=1_764_570_000_000_000_000, progress=False)


def test_token_losses_and_predicted_tokens_need_logits():
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=31, n_positions=8, n_embd=40, n_layer=1, n_head=2)
    model = GPT2Model(config).eval().requires_grad_(False)
    dec = tlpd.decompose(model, "*.mlp.*", tlpd.SVD(training=None), progress=False)
    for question in (
        lambda: tlpd.attribute(model, dec, ROWS, tlpd.TokenLoss(ROWS)),
        lambda: tlpd.sweep(model, dec, ROWS, tlpd.TokenLoss(ROWS), value="zero"),
        lambda: tlpd.dataset_graph(model, dec, ROWS, tlpd.TokenLoss(ROWS)),
        lambda: tlpd.token_statistics(model, dec, ROWS, predictions=1),
    ):
        with pytest.raises(UnsupportedModelError, match="logits"):
            question()
    assert all(not own.predicted for own in tlpd.token_statistics(model, dec, ROWS).components)


def test_a_site_that_leads_nowhere_can_be_trained_with_an_adversary():
    method = tlpd.SPD(n_components=4, measure="mse", importance=tlpd.SPD.paper().importance)
    dec = tlpd.decompose(bert(), ["pooler.dense.weight", "*.mlp.W_in"], method, ROWS, 2, 2, progress=False)
    assert all(torch.isfinite(own.V).all() for own in dec.values())


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "sites", ["pooler.dense.weight", ["pooler.dense.weight", "*.mlp.W_in"]], ids=["alone", "beside"]
)
def test_a_pooler_counts_at_every_position_of_its_row(sites: str | list[str], mask: Tensor | None):
    model, pooler = bert(), "pooler.dense.weight"
    method = tlpd.SPD(n_components=4, measure="mse", start="random", warm_up_steps=0)
    dec = tlpd.decompose(model, sites, method, ROWS, steps=0, progress=False)
    found = tlpd.evaluate(model, dec, PADDED, attention_mask=mask, protocol=FEW, progress=False)
    counted = torch.full((8,), 6) if mask is None else mask.sum(1)
    active = (tlpd.causal_importances(model, dec, PADDED, mask)[pooler] > 0.1).sum(-1)
    (own,) = (row for row in found.sites if row["site"] == pooler)
    assert own["l0"] == pytest.approx(float((active * counted).sum() / counted.sum()), rel=1e-6)
    assert found.mask_row("zero", site=pooler)["mse"] == 0.0  # it leads to nothing that is compared
    first = counted[: FEW.rows_at_once].sum()
    assert found.specificity["importance"]["pairs"] == 4 * first and found.positions == counted.sum()
