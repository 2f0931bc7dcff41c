"""What is not finite stops a run, or is left out, and is told apart; runs that collapse are warned of."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.disk import read_tensors
from tl_paramdecomp.errors import CollapseWarning, DivergedError
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.method import LossReport, ParameterGroup
from tl_paramdecomp.settings import to_settings
from tl_paramdecomp.training import guards as collapse
from tl_paramdecomp.training import loop
from tl_paramdecomp.training.callbacks import STOP
from tl_paramdecomp.training.guards import CollapseWatch, FiniteGuard, smallest_power

from . import runs
from .checkpoints import steps
from .runs import METHODS, lines, start
from .test_fit import same, tiny_gpt2

NAN, INF = float("nan"), float("inf")
IN, OUT = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"


@pytest.fixture(autouse=True)
def type_checked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "DRAWS_IN_PYTHON", False)
        yield


def spoil(monkeypatch, name, at, within=None, after=None):
    """Change a method's step: `within` gets the step's number, its argument and its report, `after` the step after the move."""
    kind, count = type(METHODS[name]()), [0]
    gradients, after_step = kind.gradients, kind.after_step

    def new_gradients(self, step):
        count[0] += 1
        report = gradients(self, step)
        return within(step, report) if within is not None and count[0] in at else report

    def new_after_step(self, step):
        after_step(self, step)
        if after is not None and count[0] in at:
            with torch.no_grad():
                after(step)

    monkeypatch.setattr(kind, "gradients", new_gradients)
    monkeypatch.setattr(kind, "after_step", new_after_step)


def bad_gradient(step, report):
    step.decomposition[OUT].U.grad[1, 2] = NAN
    return report


def bad_term(step, report):
    terms = dict(report.terms)
    name = list(terms)[1]
    terms[name] = terms[name] * INF
    return LossReport(report.total * NAN, terms, report.figures)


# --- stop -------------------------------------------------------------------------------------------------------------
def hidden_term(step, report):
    """Not finite in the terms alone, as where the sum was taken of others."""
    return bad_term(step, report)._replace(total=report.total)


def bad_total(step, report):
    return report._replace(total=report.total * NAN)


def bad_network(step, report):
    next(step.decomposition.importance.networks["blocks/0/mlp/W_in"].parameters()).grad.fill_(INF)
    return report


def large_gradient(step, report):
    for p in step.decomposition.importance.parameters():
        p.grad.fill_(2e19)
    return report


def bad_parameter(step):
    step.decomposition[IN].V[3, 4] = NAN


def every_gradient(step, report):
    for p in step.decomposition.parameters():
        p.grad.fill_(NAN)
    return report


@pytest.mark.parametrize("within, after, words", [
    (bad_term, None, r"the loss is nan: stochastic_subset is not finite\."),
    (hidden_term, None, r"the loss is \d+\.\d+: stochastic_subset is not finite\."),
    (bad_total, None, r"the loss is nan: the sum is not finite\."),
    (bad_gradient, None, rf"the gradient of {OUT}\.U is not finite, though all losses are\."),
    (bad_network, None, rf"the gradient of importance\.networks\.{IN}\.\S+ is not finite, though"),
    (every_gradient, None, rf"the gradient of {IN}\.V, {IN}\.U, {OUT}\.V and \d+ more is not finite"),
    (large_gradient, None, r"the gradient norm of importance is too large for the optimiser"),
    (None, bad_parameter, rf"{IN}\.V is not finite after the step, though losses and gradients are\."),
], ids=lambda p: getattr(p, "__name__", ""))  # fmt: skip
def test_what_is_not_finite_is_named(tmp_path, monkeypatch, within, after, words):
    spoil(monkeypatch, "SPD", {5}, within, after)
    with pytest.raises(
        DivergedError, match=rf"At step 5, {words}.*of step 3, stays in .*step-00000003.*on_nonfinite='skip'"
    ):
        start("SPD", tmp_path)
    assert sorted(steps(tmp_path)) == [3] and len(lines(tmp_path)) == 4
    monkeypatch.undo()
    assert same(start("SPD", tmp_path), start("SPD"))


def test_losses_and_the_gradients_they_spoil_are_both_named(monkeypatch):
    spoil(monkeypatch, "SPD", {2}, lambda step, report: bad_term(step, bad_gradient(step, report)))
    with pytest.raises(
        DivergedError, match=rf"stochastic_subset is not finite, nor is the gradient of {OUT}\.U\. There is no "
    ):
        start("SPD")


@pytest.mark.parametrize("name", ["L3D", "SVD"])
def test_other_methods_name_theirs(monkeypatch, name):
    def within(step, report):
        made = step.decomposition
        part = made.decoder[IN].A if name == "L3D" else next(made.importance.parameters())
        part.grad[0] = NAN
        return report

    spoil(monkeypatch, name, {4}, within)
    words = rf"decoder\.parts\.{IN}\.A" if name == "L3D" else r"importance\.networks"
    with pytest.raises(DivergedError, match=f"At step 4, the gradient of {words}"):
        start(name)


class Reads(TorchDispatchMode):
    """Counts how often a number is read back from a tensor, for which a GPU must be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_one_number_is_read_back_per_step(monkeypatch, on_nonfinite):
    """Over the optimiser's step and the guard; on steps that are logged, figures are read besides."""
    seen = []

    def counted(function):
        def call(*args):
            with Reads() as reads:
                found = function(*args)
            seen.append((function.__name__, reads.count))
            return found

        return call

    monkeypatch.setattr(loop, "optimise", counted(loop.optimise))
    for name in ("before_step", "after_step"):
        monkeypatch.setattr(FiniteGuard, name, counted(getattr(FiniteGuard, name)))
    start("SPD", steps=3, log_every=3, on_nonfinite=on_nonfinite)
    assert seen == [("before_step", 0), ("optimise", 0), ("after_step", 1)] * 3


# --- skip -------------------------------------------------------------------------------------------------------------
def l3d_within(step, report):
    step.decomposition.decoder[IN].A.grad[0] = NAN
    return report


CASES = {
    "gradient": ("VPD", bad_gradient, None),
    "loss": ("VPD", bad_term, None),
    "parameter": ("VPD", None, bad_parameter),
    "L3D": ("L3D", l3d_within, None),
    "L3D-parameter": ("L3D", None, lambda step: step.decomposition.encoder[IN].A.fill_(INF)),
    "targeted": ("targeted", bad_gradient, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [1, 4])
def test_a_step_left_out_leaves_all_as_before(tmp_path, monkeypatch, case, at):
    """Components, importance function, optimiser and what the adversary remembers, bit for bit; data and masks go on."""
    name, within, after = CASES[case]
    spoil(monkeypatch, name, {at}, within, after)
    made = start(name, tmp_path, checkpoint_every=1, keep_checkpoints=9, on_nonfinite="skip", steps=6)
    folders = steps(tmp_path)
    assert sorted(folders) == [1, 2, 3, 4, 5, 6] and all(p.isfinite().all() for p in made.parameters())
    for file in ("decomposition/components", "optimiser", "memory"):
        now = read_tensors(folders[at] / f"{file}.safetensors")
        if at == 1 and file != "decomposition/components":
            assert now == {}
        elif at > 1:
            before = read_tensors(folders[at - 1] / f"{file}.safetensors")
            assert before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in now), file
    if at == 1:
        monkeypatch.undo()
        untrained = start(name, steps=0)
        assert same(type(made).load(folders[1] / "decomposition"), untrained)
    logged = {line["step"]: line for line in lines(tmp_path)}
    assert sorted(logged) == [1, 2, 3, 4, 5, 6] and logged[at].keys() == {"step", "skipped", "left_out"}
    assert logged[at]["skipped"] == 1 and "not finite" in logged[at]["left_out"] and logged[6]["skipped"] == 1.0
    if case != "targeted":  # whose rows do not come from torch's global random numbers alone
        ours, theirs = (read_tensors(folders[at + i] / "random.safetensors") for i in (0, -1 if at > 1 else 1))
        assert not torch.equal(ours["torch"], theirs["torch"]) and not torch.equal(ours["masks.0."], theirs["masks.0."])


def test_without_a_bad_step_skip_changes_nothing():
    assert same(start("VPD", on_nonfinite="skip"), start("VPD"))


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "SPD", {3, 4, 6, 7}, bad_gradient)
    start("SPD", tmp_path / "a", on_nonfinite="skip", max_skips=2)
    assert lines(tmp_path / "a")[-1]["skipped"] == 4.0
    assert capsys.readouterr().err.count("was left out") == 4
    monkeypatch.undo()
    spoil(monkeypatch, "SPD", {3, 4, 5}, bad_gradient)
    with pytest.raises(
        DivergedError, match=rf"3 steps in a row .*max_skips=2\)\. At step 5, the gradient of {OUT}\.U.*of step 3"
    ):
        start("SPD", tmp_path / "b", on_nonfinite="skip", max_skips=2)
    monkeypatch.undo()
    spoil(monkeypatch, "SPD", {3}, bad_gradient)
    with pytest.raises(DivergedError, match="1 steps in a row"):
        start("SPD", on_nonfinite="skip", max_skips=0)


def test_a_run_that_goes_on_knows_how_many_were_left_out(tmp_path, monkeypatch):
    spoil(monkeypatch, "SPD", {3, 4, 5}, bad_gradient)
    with pytest.raises(DivergedError):
        start("SPD", tmp_path, on_nonfinite="skip", max_skips=2, checkpoint_every=1)
    with pytest.raises(DivergedError, match="3 steps in a row"):  # the first step now
        monkeypatch.undo()
        spoil(monkeypatch, "SPD", {1}, bad_gradient)
        start("SPD", tmp_path, on_nonfinite="skip", max_skips=2)
    monkeypatch.undo()
    start("SPD", tmp_path, on_nonfinite="skip", max_skips=2)
    assert lines(tmp_path)[-1]["skipped"] == 2.0 and [line["step"] for line in lines(tmp_path)] == list(range(1, 9))


def test_what_a_callback_spoiled_cannot_be_left_out(tmp_path):
    def callback(info):
        if info.step == 4:
            with torch.no_grad():
                info.decomposition[IN].V.fill_(NAN)

    with pytest.raises(DivergedError, match=rf"Before step 5, {IN}\.V was not finite.*of step 3"):
        start("SPD", tmp_path, callbacks=[callback], on_nonfinite="skip")


# --- collapses --------------------------------------------------------------------------------------------------------
def watch(steps=1000, components=24, clip=1.0, method=None):
    group = ParameterGroup("importance", [], 1e-3, clip)
    return CollapseWatch([group], components, to_settings(method or tlpd.SPD()), steps)


def heard(of, figures):
    """Warnings at each logged step, ten steps apart."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = []
        for i, values in enumerate(figures):
            of.look(10 * (i + 1), values)
            if caught:
                assert all(isinstance(w.message, CollapseWarning) for w in caught)
                found += [(10 * (i + 1), str(w.message)) for w in caught]
                caught.clear()
    return found


@pytest.mark.parametrize("l0, words", [(0.0, "No component has been important.*since step 30 .*step 130 now"),
                                       (24.0, "All 24 components have been important")])  # fmt: skip
def test_importances_that_are_all_alike_are_warned_of_once(l0, words):
    ((step, text),) = heard(watch(), [{"l0": 3.0}, {"l0": 1.0}, *[{"l0": l0}] * 40, {"l0": 2.0}, *[{"l0": l0}] * 40])
    assert step == 130
    with pytest.warns(CollapseWarning, match=words):
        warnings.warn(text, CollapseWarning, stacklevel=1)


def test_what_does_not_last_is_no_collapse():
    on_and_off = ([{"l0": 0.0}] * 9 + [{"l0": 0.1}]) * 20
    assert heard(watch(), on_and_off) == []
    assert heard(watch(), [{"l0": 0.0}, {"l0": 24.0}] * 100) == []
    assert heard(watch(), [{"l0": 23.9}, {"l0": 0.001}] * 100 + [{}] * 100) == []
    assert heard(watch(steps=100_000), [{"l0": 0.0}] * 400) == []
    assert [step for step, _ in heard(watch(steps=100_000), [{"l0": 0.0}] * 600)] == [5010]
    assert heard(watch(components=None), [{"l0": 0.0}] * 200) == []


def norms(*values):
    return [{"grad_norm_importance": value, "l0": 3.0} for value in values]


def test_a_blow_up_is_warned_of_where_gradients_are_not_clipped():
    usual = [0.16 + 0.01 * (i % 5) for i in range(60)]
    ((step, text),) = heard(watch(clip=None), norms(*usual, 5.0, 20.0, 57.0, 60.0, *usual, 57.0, 57.0, 57.0))
    assert step == 640 and "60 at step 640, where 0.18 was usual" in text and "p down to 0.4" in text
    assert heard(watch(clip=1.0), norms(*usual, *[57.0] * 9)) == []


def test_what_grows_slowly_or_for_a_moment_is_no_blow_up():
    usual = [0.16] * 30
    assert heard(watch(clip=None), norms(*usual, 57.0, 57.0, *usual, 57.0, *usual)) == []
    assert heard(watch(clip=None), norms(*[0.1 * 1.1**i for i in range(100)])) == []
    assert heard(watch(clip=None), norms(1e-9, *[1.0] * 9)) == []
    assert heard(watch(clip=None), norms(*[0.0] * 30, *[1.0] * 9)) == []


@pytest.mark.parametrize("method, power", [
    (tlpd.SPD(clip_importance=None), 0.4), (tlpd.SVD(training=tlpd.SPD(clip_importance=None)), 0.4),
    (tlpd.SPD(clip_importance=None, losses=(ImportanceMinimality(p_start=0.7, p_end=1.0),)), 0.7),
    (tlpd.SPD.paper(), 1.0), (tlpd.SPD(clip_importance=None, losses=(ImportanceMinimality(penalty="smooth_l0"),)), None),
    (tlpd.L3D(), None), (replace(tlpd.SPD.targeted(), clip_importance=None), 0.4),
], ids=str)  # fmt: skip
def test_settings_that_let_it_blow_up_are_warned_of(method, power):
    assert smallest_power(to_settings(method)) == power
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch(clip=None, method=method).begin()
        watch(clip=1.0, method=method).begin()
    assert len(caught) == (power is not None and power < 1.0)
    assert all(f"p = {power:g} < 1" in str(w.message) for w in caught)


def test_a_run_warns_once_also_where_it_goes_on(tmp_path, monkeypatch):
    """Importances pressed to 0, within fewer steps than it takes otherwise."""
    monkeypatch.setattr(collapse, "LINES", 3), monkeypatch.setattr(collapse, "STEPS", 2)
    losses = (ImportanceMinimality(1e3, p_start=1.0, p_end=1.0),)
    monkeypatch.setitem(
        METHODS, "SPD", lambda: tlpd.SPD(n_components=12, losses=losses, lr_importance=0.1, ramp_steps=0)
    )
    settings = {"steps": 30, "checkpoint_every": 5}
    with pytest.warns(CollapseWarning, match="No component has been important") as caught:
        start("SPD", tmp_path, callbacks=[lambda info: STOP if info.step == 20 else None], **settings)
    assert len(caught) == 1 and lines(tmp_path)[-1]["l0"] == 0.0
    start("SPD", tmp_path, **settings)


def test_a_run_warns_of_its_settings_once(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "SPD", lambda: tlpd.SPD(n_components=12, clip_importance=None))
    with pytest.warns(CollapseWarning, match=r"p = 0\.4 < 1.*Set clip_importance=1\.0"):
        start("SPD", tmp_path, callbacks=[lambda info: STOP])
    start("SPD", tmp_path)


def test_the_guard_looks_at_the_state_that_is_saved(tmp_path):
    """A callback that spoils it after the guard has looked does not get it saved, on any way out."""

    def callback(info):
        if info.step == 4:
            with torch.no_grad():
                info.decomposition[IN].V[0, 0] = INF
            raise KeyboardInterrupt

    with pytest.raises(DivergedError, match=rf"After step 4, {IN}\.V is not finite, and is not saved"):
        start("SPD", tmp_path, callbacks=[callback], model=tiny_gpt2())
    assert sorted(steps(tmp_path)) == [3]
