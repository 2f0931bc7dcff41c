"""A loss and a method that nothing in the package knows of: trained, divided, saved, resumed and read back by their names.

What each costs is this: a class in one file. `decompose` takes them as they are, and files tell them by `type`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.from_factors import describe
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.losses import Faithfulness
from tl_paramdecomp.methods.method import LossReport, Method, ParameterGroup, TrainingStep
from tl_paramdecomp.settings import from_settings, to_settings
from tl_paramdecomp.training.callbacks import STOP

PACKAGE = Path(tlpd.__file__).parent
ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
COMPONENTS, STEPS = 5, 6


class Target(nn.Module):
    """Two matrices."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        WAY.note()
        return self.b(torch.relu(self.a(x)))


# --- a loss -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Crowding(Loss):
    """Mean over rows of the sum over components of g_c f_c, where f_c is how important c is over the whole batch."""

    coefficient: float = 0.1
    name: str = "crowding"

    def prepare(self, batch: Any) -> dict[str, Tensor]:
        """The mean importance of each component."""
        sums = batch.total(lambda step: {name: g.lower.sum(0) for name, g in step.importances.items()} | {
            "rows": torch.tensor(float(len(step.tokens)))})  # fmt: skip
        return {name: total / sums["rows"] for name, total in sums.items()}

    def parts(self, step: Any, shared: dict[str, Tensor]) -> Iterator[Tensor]:
        """One for each site."""
        for name, g in step.importances.items():
            WAY.note()
            yield (g.lower * shared[name]).sum(-1).mean()


SPD = tlpd.SPD(
    n_components=COMPONENTS, losses=(Faithfulness(10.0), Crowding(0.3)), measure="mse", start="random", warm_up_steps=0,
    importance=ImportanceConfig("component_mlp", hidden=3), ramp_steps=0,
)  # fmt: skip


# --- a method ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Factored(Method):
    """V U nearest to W by gradient descent on the square distance."""

    n_components: int = COMPONENTS
    lr: float = 0.05

    def initialise(
        self, adapter: Any, sites: Any, generator: torch.Generator, progress: Any, batches: Any = None
    ) -> Any:
        """Random factors."""
        C = self.n_components
        factors = {
            name: (torch.randn(s.d_in, C, generator=generator), torch.randn(C, s.d_out, generator=generator))
            for name, s in sites.items()
        }
        return describe(adapter, factors)

    def parameter_groups(self, decomposition: Any) -> list[ParameterGroup]:
        """All factors."""
        return [ParameterGroup("factors", list(decomposition.parameters()), self.lr, None)]

    def learning_rate_factor(self, step: int, steps: int) -> float:
        """Falls to a half."""
        return 1.0 - 0.5 * step / steps

    def gradients(self, step: TrainingStep) -> LossReport:
        """Of the sum of squares."""
        dec = step.decomposition
        loss = torch.stack([
            (step.adapter.weight(name).detach() - part.V @ part.U).square().sum() for name, part in dec.items()
        ]).sum()  # fmt: skip
        loss.backward()
        return LossReport(loss.detach(), {"distance": loss.detach()}, dict)


# --- the way through the package --------------------------------------------------------------------------------------
class Way:
    """Files of the package on the stack whenever something from outside is called."""

    def __init__(self) -> None:
        self.files: set[str] | None = None

    def note(self) -> None:
        found, frame = set(), sys._getframe(1)
        while frame is not None and self.files is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                found.add(path.relative_to(PACKAGE).as_posix())
            if frame.f_code.co_name == "decompose":
                self.files |= found
            frame = frame.f_back


WAY = Way()
METHODS: Mapping[str, Any] = {"loss": SPD, "method": Factored()}
BOTH = pytest.mark.parametrize("what", list(METHODS))


def run(what: str, **changes: Any) -> Any:
    settings = {"steps": STEPS, "batch_size": 8, "log_every": 1, "checkpoint_every": 2, "progress": False}
    return tlpd.decompose(Target(), "*", METHODS[what], ROWS, **(settings | changes))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@BOTH
def test_it_trains_and_its_settings_come_back_from_the_saved_file(what: str, tmp_path: Path) -> None:
    made = run(what, run_dir=tmp_path)
    losses = [line["loss"] for line in logged(tmp_path)]
    assert losses[-1] < losses[0] and not same(made, run(what, steps=0))
    loaded = tlpd.Decomposition.load(tmp_path / "decomposition")
    assert same(made, loaded) and from_settings(loaded.info["run"]["method"]) == METHODS[what]
    assert from_settings(json.loads(json.dumps(to_settings(METHODS[what], complete=True)))) == METHODS[what]


@BOTH
def test_it_goes_on_from_a_checkpoint_bit_for_bit(what: str, tmp_path: Path) -> None:
    run(what, run_dir=tmp_path, callbacks=[lambda info: STOP if info.step == 3 else None])
    assert len(logged(tmp_path)) == 3
    assert same(run(what, run_dir=tmp_path, resume=True), run(what))
    with pytest.raises(tlpd.errors.SettingError, match="method"):
        other = tlpd.SPD(losses=(Crowding(0.4),)) if what == "loss" else Factored(lr=0.01)
        tlpd.decompose(Target(), "*", other, ROWS, STEPS, 8, run_dir=tmp_path, progress=False)


def test_the_loss_is_what_it_says(tmp_path: Path) -> None:
    """On the first batch, worked out from the importances of the start."""
    run("loss", run_dir=tmp_path)
    start, model = run("loss", steps=0), Target()
    batches: list[Tensor] = []
    tlpd.decompose(model, "*", SPD, lambda step: batches.append(ROWS[:8]) or ROWS[:8], 1, 8, progress=False)
    expected = sum((g * g.mean(0)).sum(-1).mean() for g in tlpd.causal_importances(model, start, batches[0]).values())
    tlpd.decompose(model, "*", SPD, lambda step: ROWS[:8], 1, 8, run_dir=tmp_path / "b", log_every=1, progress=False)
    assert logged(tmp_path / "b")[0]["crowding"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_the_loss_divided_into_microbatches_is_that_of_the_batch(accumulate: int, tmp_path: Path) -> None:
    whole, parts = (run("loss", run_dir=tmp_path / str(n), accumulate=n) for n in (1, accumulate))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    for one, other in zip(*(logged(tmp_path / str(n)) for n in (1, accumulate)), strict=True):
        assert one["crowding"] == pytest.approx(other["crowding"], rel=1e-5)


def test_the_method_is_plain_gradient_descent_on_its_loss() -> None:
    """By torch alone, from the same start."""
    made, start, model = run("method"), run("method", steps=0), Target()
    factors = [t.detach().clone().requires_grad_(True) for name in start for t in (start[name].V, start[name].U)]
    weights = [tlpd.site_weight(model, name) for name in start]
    optimiser = torch.optim.Adam(factors, lr=0.05)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 0.05 * (1.0 - 0.5 * step / STEPS)
        optimiser.zero_grad()
        sum((w - V @ U).square().sum() for w, V, U in zip(weights, factors[::2], factors[1::2])).backward()
        optimiser.step()
    found = [t for name in made for t in (made[name].V, made[name].U)]
    for one, other in zip(found, factors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_few_files_lie_between_decompose_and_the_optimisers_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stack where a batch is asked for, the host runs, the loss is taken, its gradient is, and the optimiser steps."""

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            WAY.note()
            return grad

    steps: list[int] = []
    stepped = torch.optim.AdamW.step

    def noting(*arguments: Any, **named: Any) -> Any:
        steps.append(1)
        WAY.note()
        return stepped(*arguments, **named)

    def data(step: int) -> Tensor:
        if step == 1:
            WAY.files = set()  # from the second step on: what comes before the first is a start
        WAY.note()
        return ROWS[:8]

    real = Crowding.parts
    monkeypatch.setattr(Crowding, "parts", lambda self, *given: map(Seen.apply, real(self, *given)))
    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    try:
        tlpd.decompose(Target(), "*", SPD, data, 3, 8, progress=False)
        print(sorted(WAY.files))
        assert {"training/fit.py", "training/loop.py", "methods/spd.py"} <= WAY.files
        assert len(WAY.files) <= 9 and len(steps) == 3
    finally:
        WAY.files = None
