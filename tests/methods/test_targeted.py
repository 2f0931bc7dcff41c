"""Two streams of rows: the behaviour's, and a background on which the delta component stays whole."""

import json
import subprocess
import sys

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.adversary import AdversarialReconstruction
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction

from .forms import case, padded
from .test_adversary import ascend, dense_masks


def both(of, other, method):
    step = TrainingStep(
        adapt(of.model), of.dec, Batch(of.x, of.attention_mask), of.draws(), of.progress, {},
        Batch(other.x, other.attention_mask),
    )  # fmt: skip
    of.dec.zero_grad()
    return method.gradients(step), [p.grad.clone() for p in of.dec.parameters()]


def test_the_default_streams():
    method = tlpd.SPD.targeted()
    assert not any(loss.name == "faithfulness" for loss in (*method.losses, *method.background_losses))
    kept = [loss.delta for loss in method.background_losses if hasattr(loss, "delta")]
    masked = [loss.delta for loss in method.losses if hasattr(loss, "delta")]
    assert set(kept) == {"kept"} and set(masked) == {"masked"} and len(kept) == len(masked) == 2
    assert tlpd.SPD.targeted(lr=0.5).lr == 0.5


def test_terms_and_gradients_of_both_streams_are_the_textbooks():
    """Target rows with the delta component masked, then background rows with it kept whole, from one generator."""
    of = padded()
    other = of.but(x=torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1)).double(), attention_mask=None)
    method = tlpd.SPD.targeted(
        losses=(StochasticReconstruction(0.5, sites="subset"), ImportanceMinimality(1e-2, p_end=1.2)),
        background_losses=(
            StochasticReconstruction(0.7, delta="kept"), AdversarialReconstruction(0.3, delta="kept"),
            ImportanceMinimality(3e-2, p_end=1.5),
        ),
    )  # fmt: skip
    report, found = both(of, other, method)
    draws, target, background = of.draws(), of.book(), other.book()
    masks = target.stochastic(draws)
    subset = target.distance(target.run(masks, target.routes(draws)))
    penalties = [
        sum(((g[book.scored] + 1e-12) ** p).sum(-1).mean() for g in book.upper.values())
        for book, p in ((target, 1.2), (background, 1.5))
    ]
    kept = background.distance(background.run(background.stochastic(draws, "kept")))
    sources = {n: torch.rand(g.shape[-1] + 1, generator=draws, dtype=g.dtype) for n, g in background.lower.items()}
    worst = ascend(background, sources, 1, 1.0, None, "kept")
    attacked = background.distance(background.run(dense_masks(background, worst, "kept")))
    terms = {
        "stochastic_subset": (0.5, subset), "importance_minimality": (1e-2, penalties[0]),
        "background_stochastic_all": (0.7, kept), "background_adversarial": (0.3, attacked),
        "background_importance_minimality": (3e-2, penalties[1]),
    }  # fmt: skip
    assert report.terms.keys() == terms.keys()
    assert all(abs(report.terms[k] - value) < 1e-12 for k, (_, value) in terms.items())
    total = sum(weight * value for weight, value in terms.values())
    assert abs(report.total - total) < 1e-6
    for a, b in zip(found, torch.autograd.grad(total, list(of.dec.parameters())), strict=True):
        assert (a - b).abs().max() < 1e-11


def test_on_the_background_the_delta_component_carries_the_rest():
    """Components that matter nowhere, importance 0: no background loss from them, though V U is far from W."""
    of = case()
    with torch.no_grad():
        for name, components in of.dec.items():
            components.U.zero_()
            of.dec.importance.networks[name.replace(".", "/")].b_out.fill_(-5.0)
    report, _ = both(of, of, tlpd.SPD.targeted())
    assert report.terms["background_stochastic_subset"] == 0 and report.terms["background_adversarial"] == 0
    assert report.terms["background_importance_minimality"] < 1e-3
    assert report.terms["stochastic_subset"] > 1e-3 and report.terms["adversarial"] > 1e-3


def test_without_a_background_it_says_what_is_missing():
    of = case()
    with pytest.raises(SettingError, match="second stream of rows"):
        tlpd.decompose(
            of.model, "*", tlpd.SPD.targeted(n_components=4, measure="mse"), of.x, steps=1, batch_size=2, progress=False
        )


def test_a_run_on_two_streams_sees_both_and_resumes_bit_for_bit(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    draw, seen = torch.Generator().manual_seed(0), []
    data, background = torch.randn(20, 6, generator=draw), torch.randn(31, 6, generator=draw)

    def stop(info):
        seen.append(info.figures)
        if info.step == 3 and len(seen) == 3:
            raise KeyboardInterrupt

    def run(folder, **changes):
        return tlpd.decompose(
            model, "*", tlpd.SPD.targeted(n_components=4, measure="mse"), data, steps=6, batch_size=4, background=background,
            run_dir=tmp_path / folder, progress=False, log_every=1, **changes,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run("cut", callbacks=[stop])
    again, whole = run("cut"), run("whole")
    assert {"background_adversarial", "background_importance_minimality", "adversarial"} <= set(seen[0])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_only_the_wanted_circuit_is_found():
    """Two circuits of one model, target rows on the first, background rows on the second; three seeds.

    At least 90 % of ||V U||^2 lies in the first circuit. The components alone give the model's output on target rows within
    5 % (squared error), and less than 5 % of its power on background rows, where fewer than one is active on average.
    """
    shown = subprocess.run(
        [sys.executable, "-m", "tests.methods.recover_target"], capture_output=True, text=True, check=True
    )
    for seed, found in enumerate(json.loads(shown.stdout)):
        print(f"seed {seed}: shares in the wanted circuit {found['shares']}; (error, active) on target rows {found['target']}, "
              f"(power, active) on background rows {found['background']}")  # fmt: skip
        assert min(found["shares"]) > 0.9
        assert found["target"][0] < 0.05 and found["background"][0] < 0.05
        assert found["background"][1] < 1 < found["target"][1]
