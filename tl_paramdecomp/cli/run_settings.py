"""What a run file says: every setting of a run and of its method, in one tree.

1. The file, or the options of the command, are a tree (`settings_paths`); `--set` changes it.
2. The method is laid over its preset, so that every field has a value and can be named.
3. The tree is fitted to the dataclasses below; what is unknown or of another type is refused with its path.
4. Fitted settings are a tree again, with nothing left out: the resolved file, which gives the same run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig
from tl_paramdecomp.cli.methods import ALL_PRESETS, method_named
from tl_paramdecomp.cli.models import Host
from tl_paramdecomp.cli.settings_paths import merge, put
from tl_paramdecomp.errors import SettingError
from tl_paramdecomp.methods.field_types import TYPE, build, unknown
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.methods.settings import TABLE, from_settings, to_settings
from tl_paramdecomp.sites import Fingerprint

PRESET = "preset"
"""Key of a method whose other fields are laid over a method by name."""
METHOD = "method"

Change = tuple[Sequence[str], Any]
"""A path, and the value that is put there."""


@dataclass(frozen=True)
class DataSettings:
    """Which rows a run sees; nothing given: the embedded model's own text."""

    text: str | tuple[str, ...] | None = None
    """A file, a glob of them, or several: JSON lines (.jsonl), parquet, or else plain text in UTF-8."""
    dataset: str | None = None
    """A dataset on the hub, or a folder with one, read while training."""
    length: int | None = 64
    """Tokens per row; null: as many as model and tokenizer take, at most 1024."""
    column: str | None = None
    """Where records hold text or tokens; null: one of the usual names."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    separator: str | None = None
    """What parts the documents of a text file; null: a file is one document."""
    join: bool | None = None
    """Whether documents are joined and cut into rows; null: texts are."""
    shuffle: int = 1000
    """Rows that are shuffled with each other; 0: as they come."""
    shuffle_seed: int | None = None
    """Their order; null: by the run's seed."""
    bos: bool | Literal["auto"] = "auto"
    """Whether each row begins with the beginning-of-sequence token; auto: as the model was trained."""


SHORT = EvaluationConfig(ladder=(20,), restarts=1, samples=1, ablated=0, by_site=False)
"""Of evaluations during a run."""


@dataclass(frozen=True)
class EvaluationSettings:
    """An evaluation on held-out rows, again and again during the run."""

    every: int
    """Steps between evaluations."""
    rows: int = 32
    """Held-out rows, 32 at most."""
    protocol: EvaluationConfig = SHORT


@dataclass(frozen=True)
class WandBSettings:
    """A run at Weights & Biases."""

    project: str
    settings: Mapping[str, Any] | None = None
    """Other arguments of `wandb.init`, such as name, mode, tags."""


@dataclass(frozen=True)
class RunSettings:
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
    steps: int = 1000
    batch_size: int = 8
    seed: int = 0
    run_dir: str = "runs/decompose"
    resume: Literal["auto"] | bool = "auto"
    """auto: go on from a checkpoint in `run_dir`, where there is one."""
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_best: str | None = None
    """A logged figure; the checkpoint where it is lowest is kept as well."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = 10
    """Steps in a row that may be skipped."""
    max_seconds: float | None = None
    """After so many the run is saved and ends; the same command goes on with it."""
    accumulate: int = 1
    """Micro-batches of each process."""
    random_numbers: Literal["per_rank", "global"] = "per_rank"
    """global: the run is the same, to rounding, on any number of processes and micro-batches."""
    shard: bool = False
    """Keep components in shards, one on each process."""
    evaluate: EvaluationSettings | None = None
    tensorboard: bool | str = False
    """Also log for TensorBoard, into `run_dir/tensorboard` or the folder given."""
    wandb: WandBSettings | None = None
    versions: Mapping[str, str] | None = None
    """Of the libraries, in a resolved file."""
    target: Mapping[str, Fingerprint] | None = None
    """Fingerprints of the sites' weights, in a resolved file; a model with other weights is refused."""


def resolve(tree: Mapping[str, Any], changes: Sequence[Change] = ()) -> RunSettings:
    """The settings of a run, from a file's tree and changes to it.

    Args:
        tree: What the file says.
        changes: Paths with their new values, in order; those of the whole method or its preset come first.

    Raises:
        SettingError: Something is unknown, missing, of another type, or refused by what it is a setting of.
    """
    known = [field.name for field in fields(RunSettings)]
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
    return build(RunSettings, tree, "", TABLE)


def _deeper_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """Where those settings are that people look for among those of the run: by the command's names, and one level down."""
    method = method_tree(tree.get(METHOD) or {})
    inside = {METHOD: method if isinstance(method, Mapping) else (), "data": [f.name for f in fields(DataSettings)]}
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
    """A method's tree with every field, from the name of a preset, or from a preset or type and what differs from it.

    Raises:
        SettingError: There is no such preset, or preset and type are given together.
    """
    if isinstance(given, str):
        given = {PRESET: given}
    if not isinstance(given, Mapping):
        return given
    if PRESET in given and TYPE in given:
        raise SettingError(f"{path} has both a preset ({given[PRESET]}) and a type ({given[TYPE]}); give one of them.")
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


def tree_of(settings: Any) -> Any:
    """Every setting as plain values, which `resolve` takes back."""
    if isinstance(settings, Method):
        return to_settings(settings, complete=True)
    if is_dataclass(settings) and not isinstance(settings, type):
        return {field.name: tree_of(getattr(settings, field.name)) for field in fields(settings)}
    if isinstance(settings, Mapping):
        return {key: tree_of(item) for key, item in settings.items()}
    return [tree_of(item) for item in settings] if isinstance(settings, list | tuple) else settings
