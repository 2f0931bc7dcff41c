"""What subnetworks are about, against orderings and moves worked out by hand and a subnetwork whose samples are known."""

import pytest
import torch

import tl_paramdecomp as tlpd
from examples.directions import random_directions, singular_directions
from tests.support.models import gpt2, logits, plain
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.subnetworks import causal_selectivity, impacts, top_logits, top_samples
from tl_paramdecomp.errors import DataError, SettingError
from tl_paramdecomp.patching.subnetworks import perturbed


def tokens(rows=6, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def made_of(model, sites="*", data=None, **settings):
    settings = {"n_subnetworks": 4, "rank": 2, **settings}
    data = tokens() if data is None else data
    return tlpd.decompose(model, sites, tlpd.L3D(**settings), data, steps=0, progress=False)


def test_top_samples_are_those_of_largest_impact():
    found = torch.tensor([[[0.1], [0.9]], [[0.8], [0.7]], [[0.0], [0.2]]])
    assert [t[:2] for t in top_samples(found, 0, 3)] == [(0, 1), (1, 0), (2, 1)]
    assert [t[:2] for t in top_samples(found, 0, 3, distinct_rows=False)] == [(0, 1), (1, 0), (1, 1)]
    assert top_samples(found, 0, 1)[0].impact == pytest.approx(0.9)
    assert [t[:2] for t in top_samples(found[:, 1], 0, 9)] == [(0, None), (1, None), (2, None)]
    assert len(top_samples(found[:, 0], 0, 9)) == 2  # no impact, no sample


def test_top_logits_are_the_largest_slopes_at_the_last_position_that_counts():
    model, h = gpt2(), 1e-5
    made = made_of(model)
    mask = torch.tensor([[1, 1, 1, 0, 0]] + [[1] * 5] * 5)
    found = top_logits(model, made, 2, tokens(), 7, attention_mask=mask)
    sides = []
    for sign in (1.0, -1.0):
        with perturbed(model, made, {2: sign * h}):
            sides.append(model(tokens(), attention_mask=mask).logits)
    slopes = ((sides[0] - sides[1]) / (2 * h)).detach()
    at_last = torch.stack([slopes[0, 2], *slopes[1:, -1]])
    order = at_last.abs().argsort(-1, descending=True)[:, :7]
    assert torch.equal(found.indices, order)
    assert (found.slopes - at_last.gather(1, order)).abs().max() < 1e-5 * at_last.abs().max()
    with pytest.raises(SettingError, match="given 62"):
        top_logits(model, made, 0, tokens(), 62)


def test_a_subnetwork_of_one_token_moves_only_what_follows_that_token():
    """Known answer: a row of the position table's neighbour, the token table, matters from that token on and nowhere else."""
    model, token = gpt2(), 7
    made = made_of(model, "embed.W_E", n_subnetworks=2, rank=1, biases=False)
    part = made.decoder["embed.W_E"]
    with torch.no_grad():
        for side in (part, made.encoder["embed.W_E"]):
            side.A[0].zero_()
            side.A[0, token] = 1.0
            side.B[0] = torch.randn(side.B[0].shape, generator=torch.Generator().manual_seed(0)).to(side.B)
    rows = tokens(12)
    rows[rows == token] = 8
    rows[3:5, -1] = token  # only the last output of two rows can change
    found = causal_selectivity(model, made, rows, delta=0.5, top=2, rows_at_once=5)
    assert found.rest[0] < 1e-14 < 1e-6 < found.top[0] and found.ratios[0] == float("inf")
    assert found.rest[1] > 0 and found.subnetworks == [0, 1]
    assert {t[:2] for t in top_samples(impacts(model, made, rows), 0, 2)} == {(3, 4), (4, 4)}


def test_changes_are_those_of_moves_in_both_directions():
    model, rows = gpt2(), tokens(8)
    mask = torch.ones_like(rows)
    mask[0, 3:] = 0
    made = made_of(model)
    found = causal_selectivity(model, made, rows, delta=0.4, top=3, subnetworks=[1, -1], attention_mask=mask, seed=2)
    impact = impacts(model, made, rows, attention_mask=mask, seed=2)
    log_p = model(rows, attention_mask=mask).logits.log_softmax(-1).detach()
    for i, k in enumerate((1, 3)):
        change = torch.zeros(rows.shape, dtype=torch.float64)
        for sign in (0.4, -0.4):
            with perturbed(model, made, {k: sign}, in_weights=True):
                log_q = model(rows, attention_mask=mask).logits.log_softmax(-1).detach()
            change += 0.5 * (log_p.exp() * (log_p - log_q)).sum(-1)
        best = impact[..., k].max(1)
        chosen = torch.zeros(rows.shape, dtype=torch.bool)
        for row in best.values.argsort(descending=True)[:3].tolist():
            chosen[row, best.indices[row]] = True
        assert found.top[i] == pytest.approx(change[chosen].mean().item(), rel=1e-7)
        assert found.rest[i] == pytest.approx(change[(mask == 1) & ~chosen].mean().item(), rel=1e-7)
        assert found.ratios[i] == pytest.approx(found.top[i] / found.rest[i])


def test_models_without_positions_and_bad_requests():
    model = plain()
    rows = torch.randn(6, 6, dtype=next(model.parameters()).dtype)
    made = made_of(model, data=rows, divergence="mse", n_subnetworks=3)
    found = causal_selectivity(model, made, rows, top=2)
    assert len(found.ratios) == 3 and all(value > 0 for value in found.top)
    with pytest.raises(DataError, match="more than 6 rows"):
        causal_selectivity(model, made, rows, top=6)
    with pytest.raises(SettingError, match="must be positive"):
        causal_selectivity(model, made, rows, delta=0.0)


# --- directions that were not learned -------------------------------------------------------------------------------------
def test_singular_directions_are_the_weights_leading_pairs():
    model = gpt2()
    made = made_of(model, "blocks.*.mlp.*", n_subnetworks=5)
    found = singular_directions(made, adapt(model))
    values = sorted(
        (s.item() for n in made for s in torch.linalg.svdvals(tlpd.site_weight(model, n))), reverse=True
    )[:5]  # fmt: skip
    for k in range(5):
        direction = found.subnetwork(k)
        inner = [(direction[n].weight * tlpd.site_weight(model, n)).sum().item() for n in made]
        norms = [d.weight.norm().item() for d in direction.values()]
        assert sum(norm > 0 for norm in norms) == 1 and sum(norms) == pytest.approx(1.0, rel=1e-5)
        assert sum(inner) == pytest.approx(values[k], rel=1e-5)
        assert all((d.bias == 0).all() for d in direction.values())
    for a, b in zip(found.encoder.parameters(), found.decoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert found.info == made.info
    with pytest.raises(SettingError, match="singular pairs"):
        singular_directions(made_of(model, "blocks.0.mlp.W_in", n_subnetworks=999), adapt(model))


def test_random_directions_have_norm_one_and_leave_the_others_alone():
    model = gpt2()
    made = made_of(model)
    before = logits(model, tokens())
    a, b, again = (random_directions(made, seed) for seed in (1, 2, 1))
    assert torch.allclose(a.decoder.norms(), torch.ones(4, dtype=torch.float64), atol=1e-6)
    first = next(iter(made))
    assert torch.equal(a.decoder[first].A, again.decoder[first].A)
    assert not torch.equal(a.decoder[first].A, b.decoder[first].A)
    assert not torch.equal(a.decoder[first].A, made.decoder[first].A)
    assert torch.equal(logits(model, tokens()), before)
