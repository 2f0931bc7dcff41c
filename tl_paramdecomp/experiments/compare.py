"""`compare`: several methods on the same matrices, data and budget, at several sparsities and seeds.

1. The protocol is fixed, and written to the run's folder before the first run.
2. Every method, at every sparsity and seed, is one `decompose` and one `evaluate`; a run that is there is not repeated.
3. Seeds are matched with each other, and their untrained starts likewise; capacities are varied where that is asked for.

The outcome is a `Comparison`: curves, not points.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter, adapt
from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.analysis.evaluation.comparison import Comparison, Row
from tl_paramdecomp.analysis.evaluation.evaluate import EvaluationConfig, evaluate
from tl_paramdecomp.analysis.evaluation.matching import active_components, matched_cosines, split_share
from tl_paramdecomp.analysis.evaluation.oracle import Oracle
from tl_paramdecomp.analysis.evaluation.result import Evaluation
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.disk import read_json, replace_text, writing
from tl_paramdecomp.components.files import METADATA
from tl_paramdecomp.data.batch import bytes_of, digest_of_rows
from tl_paramdecomp.data.rows import rows_to_measure
from tl_paramdecomp.data.tables import Table, as_known
from tl_paramdecomp.data.token_batches import TokenBatches
from tl_paramdecomp.errors import DataError, DecompositionFileError, SettingError
from tl_paramdecomp.methods.from_factors import versions
from tl_paramdecomp.methods.method import Method
from tl_paramdecomp.settings import from_settings, to_settings
from tl_paramdecomp.sites import check_dense, check_rows
from tl_paramdecomp.training.callbacks import StepInfo
from tl_paramdecomp.training.fit import decompose

PROTOCOL, POINT = "protocol.json", "point.json"
OTHER = "{what} is of {label} with other settings; give the method another label, or choose another run_dir."


@dataclass(frozen=True)
class ComparisonProtocol:
    """What a comparison depends on besides model, methods and data."""

    sites: str | tuple[str, ...]
    """A glob or several."""
    steps: int
    """Of every method that trains."""
    batch_size: int = 8
    """Rows of a step."""
    seeds: tuple[int, ...] = (0, 1)
    """Of every method."""
    sparsities: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    """Factors on each method's own coefficient of importance minimality."""
    oracle_shares: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
    """For bases without an importance function: components that the oracle keeps, as shares of the summed ranks."""
    capacities: tuple[float, ...] = ()
    """Factors on the number of components, compared with 1 at the middle sparsity and the first seed; none: no such runs."""
    evaluation: EvaluationConfig = EvaluationConfig(ladder=(20,), ablated=0, by_site=False)  # noqa: RUF009 - is frozen
    """How each run is measured."""

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", (self.sites,))
        if not self.sites or not self.seeds or not self.sparsities or self.steps < 1 or self.batch_size < 1:
            raise SettingError(
                f"A comparison needs sites, seeds, sparsities, steps and a batch size, each at least one; given {self}."
            )
        if min(*self.sparsities, *self.oracle_shares, *self.capacities, 1.0) <= 0:
            raise SettingError(f"Sparsities, oracle_shares and capacities must be positive; given {self}.")
        for name in ("seeds", "sparsities", "oracle_shares", "capacities"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise SettingError(f"Each of {name} may stand once; given {getattr(self, name)}.")


def compare(
    model: Any,
    methods: Mapping[str, Method],
    protocol: ComparisonProtocol,
    data: Any,
    held_out: Any,
    *,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Methods against each other where they are equally sparse.

    Args:
        model: The target, on any host.
        methods: By the label that tables and plots show. Bases with `training=None` take their importances from an oracle.
        protocol: What is the same for all.
        data: Rows to train on, as `decompose` takes them.
        held_out: Rows to measure on, as `evaluate` takes them.
        attention_mask: Of the held-out rows: 1 where a position counts.
        run_dir: Where every run goes, and is found again; None keeps nothing on disk. What is found must be of the same
            weights, protocol and rows; of rows that are neither tensors, tables nor lists of tensors only the type can be
            compared.
        progress: Show a progress bar.

    Raises:
        SettingError: The folder holds a comparison of another model, under another protocol or with other data, or a run of
            the same label with other settings; a method has nothing that makes it sparser, two labels are alike, or one has
            no letters.
        DataError, NoMatchingSiteError, UnsupportedModelError, DivergedError: As `decompose`.
        DecompositionFileError: A file in the folder cannot be read or written.
    """
    rows = rows_to_measure(held_out, attention_mask, model=model)
    folder = None if run_dir is None else Path(run_dir)
    with tqdm(desc="compare", disable=not progress, unit="run") as bar:
        return _Run(model, dict(methods), protocol, data, *rows, folder, bar).all()


@dataclass(eq=False)
class _Run:
    """One comparison under way."""

    model: Any
    methods: dict[str, Method]
    protocol: ComparisonProtocol
    data: Any
    held_out: Any
    mask: Tensor | None
    folder: Path | None
    bar: Any
    kept: dict[tuple[str, str], Decomposition] = field(default_factory=dict)
    """Decompositions that are on no disk, or starts; of one method at a time."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise SettingError("There is no method to compare; give {'SPD': tlpd.SPD(), 'SVD': tlpd.SVD()}.")
        adapter, protocol = adapt(self.model), self.protocol
        check_rows(self.held_out, self.mask)
        if not len(self.held_out):
            raise DataError("There are no held-out rows to measure on.")
        Limits.of(adapter).refuse(self.held_out, "The held-out data", self.mask)
        self.sites = adapter.select(list(protocol.sites))
        self.ranks = sum(min(site.d_in, site.d_out) for site in self.sites.values())
        rows = {"data": self.data, "held_out": self.held_out, "attention_mask": self.mask}
        self.settled = {**_plain(protocol), "target": _digest([adapter.weight(name) for name in self.sites])}
        self.settled |= {name: _digest(given) for name, given in rows.items()}
        self.capacities = sorted({1.0, *protocol.capacities}) if protocol.capacities else []
        self.check(adapter)
        self.settle()

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse before the first run what would be refused after it; count the runs."""
        slugs = {_slug(label).casefold() for label in self.methods}
        if len(slugs) < len(self.methods):
            raise SettingError(f"Labels must differ in letters or digits; given {', '.join(self.methods)}.")
        self.bar.total = 0
        for method in self.methods.values():
            method.check(adapter)
            for sparsity in self.sparsities(method):
                self.variant(method, sparsity, 1.0)
            capacities = [] if method.sized_by_weights else self.capacities
            for capacity in capacities:
                self.variant(method, 1.0, capacity)
            self.bar.total += len(self.sparsities(method)) * len(self.protocol.seeds) + len(capacities)

    def settle(self) -> None:
        """Write the protocol down, or see that it is the one that the folder's runs are under."""
        if self.folder is None:
            return
        path = self.folder / PROTOCOL
        if path.exists():
            known = _read(path)
            differing = [key for key in self.settled if known.get(key) != self.settled[key]]
            if differing:
                raise SettingError(
                    f"{self.folder} holds a comparison of other {', '.join(differing)}; choose another run_dir."
                )
            return
        with writing(f"Could not make {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(self.settled, indent=1))

    def sparsities(self, method: Method) -> Sequence[float]:
        """Factors on a method's coefficient, or the oracle's shares."""
        return self.protocol.sparsities if method.trains else self.protocol.oracle_shares

    def all(self) -> Comparison:
        """Every run."""
        points, stability, splitting = [], [], []
        for label, method in self.methods.items():
            for sparsity in self.sparsities(method):
                runs = [self.point(label, method, sparsity, seed) for seed in self.protocol.seeds]
                points += runs
                if len(runs) > 1 and method.trains:
                    stability.append(self.stability(label, method, sparsity))
            if self.capacities and not method.sized_by_weights:
                splitting += self.splitting(label, method)
            self.kept.clear()
        methods = {label: to_settings(method) for label, method in self.methods.items()}
        parameters = sum(site.d_in * site.d_out for site in self.sites.values())
        found = Comparison(
            protocol=self.settled, methods=methods, ranks=self.ranks, parameters=parameters, points=points,
            stability=stability, splitting=splitting, versions=versions(),
        )  # fmt: skip
        if self.folder is not None:
            found.save(self.folder / "comparison.json")
        return found

    def variant(self, method: Method, sparsity: float, capacity: float) -> Method:
        """A method at one sparsity and capacity."""
        pressed = method.sparser(sparsity) if method.trains else method
        return pressed if capacity == 1.0 else pressed.wider(capacity, self.sites)

    # --- one run ----------------------------------------------------------------------------------------------------
    def point(self, label: str, method: Method, sparsity: float, seed: int, capacity: float = 1.0) -> Row:
        """One method at one sparsity and seed, trained and measured, or as it was found."""
        name = _name(sparsity, seed, capacity)
        oracle = None if method.trains else Oracle(max(1, round(sparsity * self.ranks)))
        pressed = self.variant(method, sparsity, capacity)
        settings = _plain({"method": to_settings(pressed), "oracle": _plain(oracle)})
        path = None if self.folder is None else self.folder / _slug(label) / name / POINT
        if path is not None and path.exists():
            known = _read(path, "settings", "row")
            if known["settings"] != settings:
                raise SettingError(OTHER.format(what=path, label=label))
            self.bar.update()
            return {**known["row"], "method": label}
        made = self.decomposition(label, pressed, name, seed)
        self.bar.set_postfix_str(f"{label}, {name}: measured")
        found = evaluate(
            self.model, made, self.held_out, attention_mask=self.mask, importances=oracle,
            protocol=self.protocol.evaluation, progress=False,
        )  # fmt: skip
        row = {"method": label, "sparsity": sparsity, "seed": seed, "capacity": capacity, **figures(found)}
        if path is not None:
            found.save(path.parent / "evaluation.json")
            replace_text(path, json.dumps({"settings": settings, "row": row}, indent=1))
        self.bar.update()
        return row

    def decomposition(
        self, label: str, method: Method, name: str, seed: int, steps: int | None = None
    ) -> Decomposition:
        """A method's outcome, trained or read."""
        steps = self.protocol.steps if steps is None else steps
        key = (label, f"{name}, {steps}")
        if key in self.kept:
            return self.kept[key]
        folder = None if self.folder is None or not steps else self.folder / _slug(label) / name
        saved = None if folder is None else folder / "decomposition"
        if saved is not None and (saved / METADATA).exists():
            made = Decomposition.load(saved, adapt(self.model).device)
            if made.info.get("run", {}).get("method") != _plain(to_settings(method)):
                raise SettingError(OTHER.format(what=saved, label=label))
            return made

        def show(info: StepInfo) -> None:
            self.bar.set_postfix_str(f"{label}, {name}: step {info.step} of {info.steps}")

        made = decompose(
            self.model, list(self.sites), method, self.data, steps, self.protocol.batch_size, seed, folder,
            callbacks=[show], log_every=max(1, steps // 20), progress=False,
        )  # fmt: skip
        if folder is None:
            self.kept[key] = made
        return made

    # --- several ----------------------------------------------------------------------------------------------------
    def made(self, label: str, method: Method, sparsity: float, seed: int, capacity: float = 1.0) -> tuple[Any, Any]:
        """A run's decomposition, and which of its components are active."""
        pressed = self.variant(method, sparsity, capacity)
        made = self.decomposition(label, pressed, _name(sparsity, seed, capacity), seed)
        return made, active_components(self.model, made, self.held_out, self.mask)

    def stability(self, label: str, method: Method, sparsity: float) -> Row:
        """How well the seeds' active components match, and the same ones in their untrained starts; means over pairs."""
        seeds = self.protocol.seeds
        trained, active = {}, {}
        for seed in seeds:
            trained[seed], active[seed] = self.made(label, method, sparsity, seed)
        starts = {seed: self.decomposition(label, method, f"start, seed {seed}", seed, steps=0) for seed in seeds}
        pairs = list(itertools.permutations(seeds, 2))
        row: Row = {"method": label, "sparsity": sparsity}
        for name, side in (("trained", trained), ("untrained", starts)):
            matched = [matched_cosines(side[a], side[b], active[a], active[b]) for a, b in pairs]
            row[name] = _mean([m._asdict() for m in matched if m is not None])
        return row

    def splitting(self, label: str, method: Method) -> list[Row]:
        """Runs with other numbers of components, the smallest one's components looked for in the largest's."""
        sparsity, seed = sorted(self.protocol.sparsities)[len(self.protocol.sparsities) // 2], self.protocol.seeds[0]
        rows, runs = [], []
        for capacity in self.capacities:
            row = self.point(label, method, sparsity, seed, capacity)
            runs.append(self.made(label, method, sparsity, seed, capacity))
            alive = sum(int(active.sum()) for active in runs[-1][1].values())
            kept = {key: row[key] for key in ("components", "l0", "rounded")}
            rows.append({"method": label, "capacity": capacity, "active": alive, "split": None, **kept})
        (least, active), (most, active_of_most) = runs[0], runs[-1]
        rows[0]["split"] = split_share(least, most, active, active_of_most)
        return rows


def start_of(model: Any, decomposition: Decomposition, data: Any) -> Decomposition:
    """What a decomposition's run started from, by the settings stored with it; SettingError where that is not known."""
    run = decomposition.info.get("run")
    if run is None:
        raise SettingError("No run is stored with this decomposition, so what it started from is not known.")
    method: Any = from_settings(run["method"])
    if method.start_needs_data:
        raise SettingError(
            f"What {type(method).__name__} starts from depends on the rows of its run; there is no control here."
        )
    return decompose(model, run["sites"], method, data, 0, run["batch_size"], run["seed"], progress=False)


def figures(found: Evaluation) -> Row:
    """What of an evaluation a comparison keeps."""
    sites, key, kl = found.sites, found.measure, found.headline.get("adversarial")
    worst = [row[f"{key}_worst"] for row in found.adversary if row[key] == kl]
    sums = {
        "l0": "l0",
        "active_parameters": "active_parameters",
        "active": "active_anywhere",
        "components": "components",
    }
    return {
        **{name: sum(row[of] for row in sites) for name, of in sums.items()},
        **{kind: found.distance(kind) for kind in ("unmasked", "importance", "random", "zero")},
        "rounded": found.distance("rounded 0.1"),
        "rounded_ce_recovered": found.mask_row("rounded 0.1").get("ce_recovered"),
        "stochastic": found.distance("stochastic", "masked"),
        "permuted": found.distance("permuted 0.1"),
        "adversarial": kl,
        "adversarial_worst": worst[0] if worst else None,
        "relative_error": max(row["relative_error"] for row in sites),
        "measured_in": found.seconds,
        **({} if key == "kl" else {"measure": key}),
    }


def _name(sparsity: float, seed: int, capacity: float) -> str:
    wide = "" if capacity == 1.0 else f"-capacity-{capacity:g}"
    return f"sparsity-{sparsity:g}{wide}-seed-{seed}"


def _slug(label: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")
    if not slug:
        raise SettingError(f"The label {label!r} has no letter or digit to name a folder by.")
    return slug


def _plain(value: Any) -> Any:
    """A dataclass or other value as JSON would give it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def _digest(data: Any) -> str | None:
    """What says whether data is the same: a hash of tensors, lists of them, tables and `token_batches`, else the type."""
    if data is None:
        return None
    if isinstance(data, Tensor):
        check_dense(data, "The data")
        told = f"{data.dtype} {list(data.shape)} ".encode() + bytes_of(data)
    elif isinstance(data, list | tuple) and all(isinstance(part, Tensor) for part in data):
        told = " ".join(str(_digest(part)) for part in data).encode()
    elif isinstance(data := as_known(data), Table):
        return digest_of_rows(data, len(data), every=True)
    elif isinstance(data, Mapping):
        told = " ".join(f"{key} {_digest(data[key])}" for key in sorted(data)).encode()
    elif isinstance(data, TokenBatches):
        told = json.dumps(data.info).encode()
    else:
        return type(data).__name__
    return hashlib.sha256(told).hexdigest()[:16]


def _read(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that holds these keys."""
    try:
        return read_json(path, *keys)
    except DecompositionFileError as error:
        raise DecompositionFileError(f"{str(error).removesuffix('.')}; delete it to do that run again.") from error


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(torch.tensor([row[key] for row in rows]).double().mean()) for key in (rows[0] if rows else {})}
