"""Fine-tuning along subnetworks, against the closed form of a linear model and the model's own loss."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import DivergedError, SettingError
from tl_paramdecomp.experiments.tuning import next_token_loss, tune_along


def test_the_coefficients_are_those_of_least_squares():
    """A linear model's outputs are linear in them: the best ones solve normal equations."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    rows, wanted = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    method = tlpd.L3D(n_subnetworks=3, divergence="mse")
    made = tlpd.decompose(model, "*", method, rows, steps=0, progress=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = tune_along(
        model, made, [0, -1], lambda step: rows, steps=600, lr=0.05, progress=False,
        loss=lambda output, batch: (output - wanted).square().mean(),
    )  # fmt: skip
    columns = []
    for k in (0, 2):
        direction = made.subnetwork(k)["0.weight"]
        columns.append((rows @ direction.weight + direction.bias).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, 1), (wanted - model(rows)).flatten().detach().unsqueeze(1)).solution
    assert list(found) == [0, 2]
    assert torch.tensor(list(found.values()), dtype=torch.float64) == pytest.approx(best.flatten(), abs=1e-3)
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in model.named_parameters())
    assert all(p.grad is None for p in made.parameters())


def test_a_language_model_gets_better_at_its_rows_along_a_few_directions():
    model = gpt2()
    rows = torch.randint(0, 61, (8, 6), generator=torch.Generator().manual_seed(1))
    made = tlpd.decompose(model, "*", tlpd.L3D(n_subnetworks=4), rows, steps=0, progress=False)
    batch = Batch(rows, None)

    def loss(deltas):
        with torch.no_grad(), tlpd.perturbed(model, made, deltas):
            return next_token_loss(model(rows).logits, batch).item()

    found = tune_along(model, made, range(4), rows, steps=60, batch_size=8, progress=False)
    again = tune_along(model, made, range(4), rows, steps=60, batch_size=8, progress=False)
    assert loss(found) < loss({}) - 1e-3 and found == again
    expected = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert loss({}) == pytest.approx(expected.item(), rel=1e-5)
    mask = torch.ones_like(rows)
    mask[:, 4:] = 0
    short = torch.nn.functional.cross_entropy(model(rows[:, :4]).logits[:, :-1].flatten(0, 1), rows[:, 1:4].flatten())
    assert next_token_loss(model(rows).logits, Batch(rows, mask)).item() == pytest.approx(short.item(), rel=1e-5)


def test_what_cannot_be_tuned_is_refused():
    model = gpt2()
    rows = torch.randint(0, 61, (4, 5))
    made = tlpd.decompose(model, "*", tlpd.L3D(n_subnetworks=3), rows, steps=0, progress=False)
    for wrong in ([], [1, -2]):
        with pytest.raises(SettingError, match="each once"):
            tune_along(model, made, wrong, rows, steps=1, progress=False)
    with pytest.raises(SettingError, match="must be at least 1"):
        tune_along(model, made, [0], rows, steps=0, progress=False)
    with pytest.raises(DivergedError, match="step 0"):
        tune_along(
            model, made, [0], rows, steps=1, progress=False, loss=lambda output, batch: output.sum() * float("nan")
        )
