"""Numbers at the doors of the package, and settings that files tell by their type, a user's own among them."""

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest

import tl_paramdecomp as tlpd
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.loss import Loss
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.settings import Kind, from_settings, kinds_of, to_settings

WHOLE = ("nan", "inf", "1.5", "-1", "True", "'3'", "None")
SEEDS = ("nan", "1.5", "10**30", "-(1 << 63) - 1", "True", "'3'", "None")
NUMBERS = ("nan", "inf", "-1.0", "'3'", "True")
DOORS = {
    **{f"decompose(model, '*', RandomBasis(), rows, **{{'steps': 1, 'batch_size': 2, {name!r}: X}}, progress=False)": bad
       for name, bad in (("steps", WHOLE), ("batch_size", WHOLE), ("seed", SEEDS), ("log_every", WHOLE),
                         ("checkpoint_every", WHOLE), ("keep_checkpoints", WHOLE), ("max_skips", WHOLE),
                         ("accumulate", WHOLE), ("max_seconds", NUMBERS))},
    **{f"estimate_run(model, '*', RandomBasis(), rows, **{{'steps': 1, 'batch_size': 2, {name!r}: X}}, trial=False)": bad
       for name, bad in (("steps", WHOLE), ("seed", SEEDS), ("accumulate", WHOLE), ("checkpoint_every", WHOLE))},
    "SPD(n_components=X)": ("nan", "1.5", "0", "True", "'3'"), "SPD(n_components={'*': X})": WHOLE, "SPD(lr=X)": NUMBERS,
    "SPD(warm_up_steps=X)": WHOLE, "SPD(clip=X)": NUMBERS, "VPD(kl_chunk=X)": ("nan", "1.5", "0"),
    "L3D(n_subnetworks=X)": WHOLE, "L3D(rank=X)": WHOLE, "L3D(decay=X)": (*NUMBERS, "2.0"), "L3D(active=X)": NUMBERS,
    "WhitenedSVD(ridge=X)": NUMBERS, "ImportanceConfig(hidden=X)": ("nan", "1.5", "0", "True"),
    "Faithfulness(X)": NUMBERS, "ImportanceMinimality(X)": NUMBERS, "ImportanceMinimality(p_start=X)": NUMBERS,
    "EvaluationConfig(seed=X)": SEEDS, "EvaluationConfig(samples=X)": WHOLE, "EvaluationConfig(ladder=(X,))": WHOLE,
    "Oracle(X)": WHOLE, "Oracle(2, seed=X)": SEEDS, "EvaluateEvery(X, rows)": WHOLE,
    "importance_masks(model, made, rows, 'random', seed=X)": SEEDS,
    "importance_masks(model, made, rows, 'random', steps=X)": WHOLE,
    "impacts(model, subnetworks, rows, X)": WHOLE, "impacts(model, subnetworks, rows, seed=X)": SEEDS,
    "made.masks().with_values('0.weight', torch.full((4,), X))": ("nan", "inf"),
    "make_task('ioi', tokenizer, X)": WHOLE, "make_task('ioi', tokenizer, 2, seed=X)": SEEDS,
    "tune_along(model, subnetworks, [0], rows, steps=X)": WHOLE,
    "tune_along(model, subnetworks, [0], rows, steps=1, lr=X)": NUMBERS,
}  # fmt: skip
ALWAYS = ["Task.from_tokens('task', [[1, 2]], [True])", "decompose(broken, '*', SVD(training=None))"]
CODE = """
import sys, json, torch
from math import inf, nan
import tl_paramdecomp as tlpd
from tl_paramdecomp import *
from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
torch.manual_seed(0)
model, rows = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(6, 4)
broken = torch.nn.Sequential(torch.nn.Linear(4, 4))
broken[0].weight.data[0, 0] = nan
made = decompose(model, "*", RandomBasis(training=None))
subnetworks = decompose(model, "*", L3D(n_subnetworks=2, divergence="mse"), rows, 0, progress=False)
tokenizer = micro_gpt2_tokenizer()
for case in json.load(sys.stdin):
    try:
        eval(case)
    except errors.TLParamDecompError as error:
        said = f"{type(error).__name__}: {error}"
    except Exception as error:
        said = f"raw {type(error).__name__}: {error}"
    else:
        said = "accepted"
    print(" ".join(said.split()))
"""


def test_numbers_that_make_no_sense_are_refused_by_name() -> None:
    """Outside the tests, where no type checker stands in front."""
    cases = [door.replace("X", bad) for door, some in DOORS.items() for bad in some] + ALWAYS
    shown = subprocess.run([sys.executable, "-c", CODE], input=json.dumps(cases), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    said = dict(zip(cases, shown.stdout.splitlines(), strict=True))
    assert {case: line for case, line in said.items() if line.startswith(("raw ", "accepted"))} == {}


def test_numbers_of_numpy_and_whole_floats_are_numbers() -> None:
    code = "import json, numpy as np, tl_paramdecomp as tlpd; from tl_paramdecomp.settings import to_settings; "
    code += "print(json.dumps(to_settings(tlpd.SPD(n_components=np.int64(3), lr=np.float32(0.5)))))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # without a type checker
    assert shown.returncode == 0, shown.stderr
    written = json.loads(shown.stdout)
    assert (written["n_components"], written["lr"]) == (3, 0.5)
    assert from_settings({"type": "SPD", "n_components": 8.0, "lr": 1}) == tlpd.SPD(n_components=8, lr=1.0)


@dataclasses.dataclass(frozen=True)
class Quiet(Loss):
    """A user's loss that asks for nothing."""

    coefficient: float = 1.0
    strength: int = 2
    name: str = "quiet"

    def parts(self, step, shared):  # type: ignore[no-untyped-def, override]
        yield step.tokens.new_zeros((), dtype=step.adapter.weight(next(iter(step.decomposition))).dtype)


def test_a_loss_from_outside_the_package_is_known_by_its_name() -> None:
    method = tlpd.SPD(losses=(Faithfulness(), Quiet(strength=5)))
    written = json.loads(json.dumps(to_settings(method)))
    assert written["losses"][1] == {"type": "Quiet", "coefficient": 1.0, "strength": 5, "name": "quiet"}
    assert from_settings(written) == method
    with pytest.raises(SettingError, match=r"method\.losses\.1\.strength: expected a whole number; given 1\.5"):
        written["losses"][1]["strength"] = 1.5
        from_settings(written, "method")


def test_every_method_and_loss_is_a_name_of_the_package_and_known_wherever_one_is_loaded() -> None:
    code = "import tl_paramdecomp.cli.run_files, tl_paramdecomp.settings as s; print(*s.kinds_of(s.Kind))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    known = set(shown.stdout.split())
    package = {name for name, kind in kinds_of(Kind).items() if kind.__module__.startswith("tl_paramdecomp.methods")}
    assert {"SPD", "L3D", "SVD", "AttentionPatternReconstruction", "ImportanceMaskedReconstruction"} <= package
    assert package <= known and {name for name in package if not inspect.isabstract(kinds_of(Kind)[name])} <= set(
        tlpd.__all__
    )


def test_a_class_with_the_name_of_one_of_the_packages_is_not_written() -> None:
    other = dataclasses.dataclass(frozen=True)(type("Faithfulness", (Quiet,), {"__module__": __name__}))
    assert kinds_of(Loss)["Faithfulness"] is Faithfulness
    with pytest.raises(SettingError, match="rename it"):
        to_settings(other())


@pytest.mark.parametrize("given, words", [
    ({"type": "SPD", "losses": [{"type": "SPD"}]}, r"m\.losses\.0\.type: SPD is of another kind; here it is one of "),
    ({"type": "SPD", "losses": [3]}, r"m\.losses\.0: expected a mapping whose type is one of .*; given 3"),
    ({"type": "SPD", "measure": "ml"}, r"m\.measure: expected one of 'kl', 'mse'; given the text 'ml'\. Nearest"),
    ({"type": "SPD", "n_components": {"*": 0}}, r'm\.n_components\.\* must be at least 1; given 0'),
    ({"type": "SVD", "training": {"type": "SPD", "importance": {"hiden": 3}}},
     r"m\.training\.importance\.hiden is not a setting of ImportanceConfig\. Nearest: hidden"),
    ({"type": "SPD", "importance": {"kind": "global_transformer", "hidden": 12}}, r"m\.importance: Twice the number"),
    ({"lr": 3}, r"m\.type: there is no None"), (7, "m: expected a mapping"), (None, "m: expected a mapping"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_its_path(given: object, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        from_settings(given, "m")


def test_lists_and_mappings_become_what_fields_hold() -> None:
    read = from_settings({"type": "SPD", "losses": [{"type": "ImportanceMinimality"}], "importance": {"hidden": 8}})
    assert read == tlpd.SPD(losses=(ImportanceMinimality(),), importance=ImportanceConfig(hidden=8))
