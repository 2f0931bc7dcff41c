"""What a run file says: every setting of a run and of its method, in one tree.

1. The file, or the options of the command, are a tree (`settings_paths`); `--set` changes it.
2. The method is laid over its preset, so that every field has a value and can be named.
3. The tree is fitted to the dataclasses below; what is unknown or of another type is refused with its path.
4. Fitted settings are a tree again, with nothing left out: the resolved file, which gives the same run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig
from tl_paramdecomp.cli.methods import ALL_PRESETS, method_named
from tl_paramdecomp.cli.models import Host
from tl_paramdecomp.cli.settings_paths import merge, put
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.report.quality import SHORT
from tl_paramdecomp.settings import (
    TYPE,
    Count,
    Seed,
    Settings,
    Whole,
    as_declared,
    from_settings,
    hints_of,
    to_settings,
    unknown,
)
from tl_paramdecomp.sites import Fingerprint
from tl_paramdecomp.training.config import RunConfig

PRESET = "preset"
"""Key of a method whose other fields are laid over a method by name."""
METHOD = "method"

Change = tuple[Sequence[str], Any]
"""A path, and the value that is put there."""


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which rows a run sees; nothing given: the embedded model's own text."""

    text: str | tuple[str, ...] | None = None
    """A file, a glob of them, or several: JSON lines (.jsonl), parquet, or else plain text in UTF-8."""
    dataset: str | None = None
    """A dataset on the hub, or a folder with one, read while training."""
    length: Count | None = 64
    """Tokens per row; null: as many as model and tokenizer take, at most 1024."""
    column: str | None = None
    """Where records hold text or tokens; null: one of the usual names."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    separator: Annotated[str, Field(min_length=1)] | None = None
    """What parts the documents of a text file; null: a file is one document."""
    join: bool | None = None
    """Whether documents are joined and cut into rows; null: texts are."""
    shuffle: Whole = 1000
    """Rows that are shuffled with each other; 0: as they come."""
    shuffle_seed: Seed | None = None
    """Their order; null: by the run's seed."""
    bos: bool | Literal["auto"] = "auto"
    """Whether each row begins with the beginning-of-sequence token; auto: as the model was trained."""


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """An evaluation on held-out rows, again and again during the run."""

    every: Count
    """Steps between evaluations."""
    rows: Count = 32
    """Held-out rows, 32 at most."""
    protocol: EvaluationConfig = SHORT


@dataclass(frozen=True)
class WandBSettings(Settings):
    """A run at Weights & Biases."""

    project: str
    settings: Mapping[str, Any] | None = None
    """Other arguments of `wandb.init`, such as name, mode, tags."""


def _fingerprint(value: Any) -> Fingerprint:
    try:
        return value if isinstance(value, Fingerprint) else as_declared(value, Fingerprint)
    except TypeError as error:
        raise ValueError(f"no fingerprint of weights ({error}); copy the file again") from error


@dataclass(frozen=True, kw_only=True)
class RunSettings(RunConfig):
    """One run of `decompose`; what is not explained here is an argument of it."""

    model: str
    """micro-gpt2, a folder with a transformers model, or a name on the hub."""
    sites: str | tuple[str, ...]
    """Globs over site names."""
    method: Method
    host: Host = "transformers"
    device: str = "cpu"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Number type that the model is brought to; null: as it comes."""
    data: DataSettings = DataSettings()
    background: DataSettings | None = None
    """A second stream of rows, for methods that take one."""
    steps: Whole = 1000
    batch_size: Whole = 8
    run_dir: str = "runs/decompose"
    evaluate: EvaluationSettings | None = None
    tensorboard: bool | str = False
    """Also log for TensorBoard, into `run_dir/tensorboard` or the folder given."""
    wandb: WandBSettings | None = None
    versions: Mapping[str, str] | None = None
    """Of the libraries, in a resolved file."""
    target: Mapping[str, Annotated[Fingerprint, BeforeValidator(_fingerprint)]] | None = None
    """Fingerprints of the sites' weights, in a resolved file; a model with other weights is refused."""

    def tree(self) -> dict[str, Any]:
        """Every setting as plain values, which `resolve` takes back."""
        found = to_settings(self, complete=True)
        return {"model": self.model, "sites": found["sites"], "method": found["method"], **found}


def resolve(tree: Mapping[str, Any], changes: Sequence[Change] = ()) -> RunSettings:
    """The settings of a run, from a file's tree and changes to it: paths with their new values, in order; else SettingError."""
    known = list(hints_of(RunSettings))
    for path in (*((key,) for key in tree), *(path for path, _ in changes)):
        if path[0] not in known:
            if path[0] in (whereabouts := _deeper_keys(tree)):
                raise SettingError(f"{path[0]} is not a setting of a run; it is {whereabouts[path[0]]}.")
            raise unknown(path[0], known, "", "a setting of a run")
    whole = [change for change in changes if tuple(change[0]) in ((METHOD,), (METHOD, PRESET), (METHOD, TYPE))]
    for path, value in whole:
        tree = put(tree, path, value)
    tree = spelt_out({METHOD: {}, **tree})
    for path, value in (change for change in changes if change not in whole):
        tree = spelt_out(put(tree, path, value))
    return from_settings(tree, base=RunSettings)


def _deeper_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """Where those settings are that people look for among those of the run: by the command's names, and one level down."""
    method = method_tree(tree.get(METHOD) or {})
    inside = {METHOD: method if isinstance(method, Mapping) else (), "data": hints_of(DataSettings)}
    paths = {key: f"{where}.{key}" for where, keys in inside.items() for key in keys if key != TYPE}
    return {**paths, "out": "run_dir", "components": "method.n_components"}


def spelt_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree without short forms: presets, and plain values that stand for mappings."""
    spelt = {**tree, METHOD: method_tree(tree[METHOD])}
    if isinstance(tree.get("evaluate"), int) and not isinstance(tree["evaluate"], bool):
        spelt["evaluate"] = {"every": tree["evaluate"]}
    if isinstance(tree.get("wandb"), str):
        spelt["wandb"] = {"project": tree["wandb"]}
    return spelt


def method_tree(given: Any, path: str = METHOD) -> Any:
    """A method's tree with every field, from the name of a preset, or from a preset or type and what differs from it."""
    if isinstance(given, str):
        given = {PRESET: given}
    if not isinstance(given, Mapping):
        return given
    if PRESET in given and TYPE in given:
        raise SettingError(
            f"{path} has both a preset ({given[PRESET]!s:.60}) and a type ({given[TYPE]!s:.60}); give one of them."
        )
    differing = {
        key: method_tree(value, f"{path}.{key}") if isinstance(value, Mapping) and PRESET in value else value
        for key, value in given.items()
        if key != PRESET
    }
    if TYPE in given:
        base = from_settings({TYPE: given[TYPE]}, path)
    else:
        base = method_named(given.get(PRESET, "spd"), f"{path}.{PRESET}", ALL_PRESETS)
    return merge(to_settings(base, complete=True), differing, path)
