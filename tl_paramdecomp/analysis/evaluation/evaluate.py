"""One evaluation for every decomposition, learned or not: faithfulness, behaviour under masks, sparsity, specificity.

1. Weights: how far V U is from W at each site.
2. The whole model under every kind of mask (`measures`), against the model itself and the row's own next tokens.
3. Sparsity of the importances.
4. The adversary (`climb`): 1, 4, 20 and 40 steps, several restarts.
5. Specificity: does importance predict what ablating a component does?
6. Each matrix masked by itself.
7. Controls: importances dealt out anew, and an untrained decomposition where one is given.

What the headline is made of runs first, so that a time budget leaves out the rest before it.
Read L0 with the rounded and the adversarial KL first. Stochastic masks keep half of every absent component and flatter.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.limits import Limits
from tl_paramdecomp.analysis.evaluation.measures import (
    KINDS,
    SITE_KINDS,
    MaskKind,
    Sums,
    Target,
    climb,
    masks_of,
    specificity,
)
from tl_paramdecomp.analysis.evaluation.result import Evaluation, headline_steps
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.importance import Importance, ImportanceSource
from tl_paramdecomp.components.masked_output import InterpolatedMask
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.rows import rows_to_measure
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import DataError, NoImportanceError
from tl_paramdecomp.methods.prefixes import tensors_of
from tl_paramdecomp.methods.step import LossStep, Measure, measure_of
from tl_paramdecomp.patching.target import checked_adapter, frozen
from tl_paramdecomp.settings import Count, NotNegative, Seed, Settings, Whole, fit
from tl_paramdecomp.sites import check_rows

ACTIVE, ALIVE = 0.1, 1e-6
"""Importance above which a component is active, and mean importance above which it is alive."""
ROUNDED = MaskKind("rounded", threshold=ACTIVE)
"""Of the headline."""
DENSITIES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 0.5, 1.0)
"""Edges of the histogram of how often components are active; the first count is of those that never are."""
KEPT = 1 << 30
"""Bytes of the target's outputs and importances that may be kept between passes; beyond that each pass over the data runs the
model anew."""


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """What an evaluation depends on besides model, decomposition and data."""

    rows_at_once: Count = 8
    """Rows of one forward pass."""
    samples: Count = 4
    """Draws of stochastic and random masks."""
    ladder: tuple[Count, ...] = (1, 4, 20, 40)
    """Steps of the adversary, one climb each; the step size is 2 over the steps, at most 1."""
    restarts: Count = 3
    """Starts of the adversary."""
    ablated: Whole = 64
    """Components that are ablated by themselves, for specificity; 0: none."""
    by_site: bool = True
    """Also mask each matrix by itself."""
    seed: Seed = 0
    """Of all that is drawn."""


def evaluate(
    model: Any,
    decomposition: Decomposition,
    data: Any,
    *,
    attention_mask: Int[Tensor, "rows pos"] | None = None,
    rows: int = 64,
    importances: ImportanceSource | None = None,
    untrained: Decomposition | None = None,
    protocol: EvaluationConfig | None = None,
    seconds: float | None = None,
    progress: bool = True,
    measure: Measure | None = None,
) -> Evaluation:
    """How good a decomposition is on held-out rows.

    Args:
        data: Token rows [rows, pos] that it was not trained on, a dict of them and their attention mask, such as a tokenizer's
            `BatchEncoding`, batches of such rows, as `token_batches` gives them, or rows in any other form that `decompose`
            takes.
        attention_mask: 1 where a position counts; padding is left out of every figure. Batches bring their own.
        rows: How many of the first rows of batches are taken.
        importances: An `Oracle`, taken instead of the decomposition's own importance function; needed where it has none.
        untrained: A control: the same method's start, `decompose(..., steps=0)`.
        protocol: Everything that can be set.
        seconds: Leave out, and name, what would begin after so many; parts of the headline begin first.
        measure: How outputs are compared: `kl` of next-token distributions, or `mse`, the mean square of outputs as they are,
            which leaves out what only logits have. None: KL, or the mean square where the model gives no logits
            or reads no tokens.

    Raises:
        UnsupportedModelError: KL is asked of a model that gives no logits.
        NoImportanceError: The decomposition has no importance function, and no oracle is given.
        DataError: There are no rows, no position of them counts, or the model cannot read them.
        TargetMismatchError, DeviceError, DtypeError, ShapeError: As `patched`.
    """
    tokens, attention_mask = rows_to_measure(data, attention_mask, rows, model=model, decomposition=decomposition)
    check_rows(tokens, attention_mask)
    if not len(tokens) or (attention_mask is not None and not attention_mask.any()):
        raise DataError("There are no rows to evaluate on, or the attention mask leaves no position of them.")
    every = [dec for dec in (decomposition, untrained) if dec is not None]
    if importances is None and not all(dec.gives_importances for dec in every):
        raise NoImportanceError(
            "This decomposition has no importance function; give importances=tl_paramdecomp.Oracle(k=...), which keeps "
            "the k components per position that the model's gradients call for."
        )
    adapter, *_ = (checked_adapter(model, dec) for dec in every)
    Limits.of(adapter).refuse(tokens, "The data", attention_mask)
    warn_of_other_start(decomposition, tokens, attention_mask)
    protocol = protocol or EvaluationConfig()
    seconds = None if seconds is None or seconds == math.inf else fit(seconds, NotNegative, "seconds")
    measure = fit(measure, Measure | None, "measure")
    numbers = tokens.is_floating_point()
    measure = measure or ("mse" if numbers else measure_of(adapter))
    if measure == "kl" and numbers:
        raise DataError(
            f"KL is of next tokens, and the data is {tokens.dtype}; use measure='mse', of outputs as they are."
        )
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for module in (adapter, *every):
            stack.enter_context(frozen(module))
        batch = Batch(tokens, attention_mask).to(adapter.device)
        run = _Run(adapter, decomposition, *batch, importances, protocol, seconds, measure)
        parts = run.parts(untrained)
        total = 2 * run.n_batches + sum(part.cost for part in parts)
        bar = tqdm(total=total, desc="evaluate", disable=not progress, leave=False, unit="pass")
        run.bar = stack.enter_context(bar)
        return run.all(parts)


class _Part(NamedTuple):
    """Something to measure, that a time budget may leave out."""

    field: str
    """Of the `Evaluation` that it belongs to."""
    name: str
    run: Callable[[], Any]
    cost: int
    """Passes, as the bar counts them: one for each batch, or each component that is ablated."""
    first: bool = False
    """Whether it belongs to the headline."""


@dataclass(eq=False)
class _Run:
    """One evaluation under way."""

    adapter: ModelAdapter
    dec: Decomposition
    tokens: Tensor
    mask: Tensor | None
    oracle: ImportanceSource | None
    protocol: EvaluationConfig
    seconds: float | None
    measure: Measure
    bar: Any = None
    """Counts passes over batches."""
    ends: tuple[float, float] | None = None
    """Cross-entropy of the model, and with everything removed; None where outputs are no logits."""
    kept: list[LossStep] | None = None

    def __post_init__(self) -> None:
        self.begun, self.left_out = time.perf_counter(), []
        generator, device = self.generator(0), self.adapter.device
        self.dealt = {
            name: torch.randperm(c.n_components, generator=generator, device=device) for name, c in self.dec.items()
        }

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of one draw."""
        return torch.Generator(device=self.adapter.device).manual_seed(self.protocol.seed + number)

    # --- the data ---------------------------------------------------------------------------------------------------
    def batches(self) -> Iterator[LossStep]:
        """The rows, some at a time, with the target's output and importances."""
        size, kept, steps = 0, [], self._steps() if self.kept is None else self.kept
        for step in steps:
            size += 2 * step.divergence.target.nbytes + sum(i.lower.nbytes for i in step.importances.values())
            size += sum(t.nbytes for t in tensors_of(step.blocks[:1]) or ())  # which stands for all before the sites
            kept = [*kept, step] if size <= KEPT else []
            self.bar.update()
            yield step
        self.kept = kept if size <= KEPT else None

    def _steps(self) -> Iterator[LossStep]:
        size = self.protocol.rows_at_once
        masks = itertools.repeat(None) if self.mask is None else self.mask.split(size)
        for tokens, mask in zip(self.tokens.split(size), masks):
            if mask is None or mask.any():
                step = LossStep.of(
                    self.adapter, self.dec, tokens, mask, torch.Generator(), measure=self.measure, source=self.oracle
                )
                # what is kept between passes holds what they need, and no more
                alone = {name: Importance(i.lower, i.lower) for name, i in step.importances.items()}
                yield dataclasses.replace(step, inputs={}, importances=alone)

    @property
    def n_batches(self) -> int:
        """How many `batches` gives."""
        size = self.protocol.rows_at_once
        return -(-len(self.tokens) // size) if self.mask is None else sum(bool(m.any()) for m in self.mask.split(size))

    def has_time(self, what: str, cost: int) -> bool:
        """Whether the budget lets another part begin; what it does not is named, and no longer counted by the bar."""
        if self.seconds is None or time.perf_counter() - self.begun < self.seconds:
            self.bar.set_postfix_str(what)
            return True
        self.left_out.append(what)
        self.bar.total = (self.bar.total or cost) - cost
        self.bar.refresh()
        return False

    # --- the parts --------------------------------------------------------------------------------------------------
    def all(self, parts: Sequence[_Part]) -> Evaluation:
        """Every part that there is time for; figures stand in the order of the parts, whichever ran first."""
        model, zero = self.sums(None), self.sums(MaskKind("zero"))
        if self.measure == "kl":
            self.ends = (model.ce / max(1, model.predicted), zero.ce / max(1, zero.predicted))
        done: dict[int, Any] = {}
        for i in sorted(range(len(parts)), key=lambda i: not parts[i].first):
            if self.has_time(parts[i].name, parts[i].cost):
                done[i] = parts[i].run()
        found: dict[str, list[Any]] = {"masks": [], "adversary": []}
        for i, figures in sorted(done.items()):
            found.setdefault(parts[i].field, []).append(figures)
        return Evaluation(
            protocol={
                **dataclasses.asdict(self.protocol),
                "ladder": list(self.protocol.ladder),
                "oracle": dataclasses.asdict(self.oracle) if dataclasses.is_dataclass(self.oracle) else None,
                **({} if self.measure == "kl" else {"measure": self.measure}),
            },
            rows=len(self.tokens),
            positions=model.positions,
            ce={} if self.ends is None else dict(zip(("model", "zero"), self.ends)),
            masks=found["masks"],
            adversary=found["adversary"],
            sites=found.get("sites", [[]])[0],
            specificity=found.get("specificity", [{}])[0],
            controls=dict(zip(["untrained"], found.get("controls", []))),
            run=dict(self.dec.info),
            seconds=time.perf_counter() - self.begun,
            left_out=self.left_out,
        )

    def parts(self, untrained: Decomposition | None) -> list[_Part]:
        """What there is to measure."""
        P, n = self.protocol, self.n_batches
        head = headline_steps(P.ladder) if P.ladder else None

        def row(kind: MaskKind, site: str | None = None) -> _Part:
            first = site is None and (kind == ROUNDED or kind.kind == "permuted")
            name = f"{kind.name}, delta {kind.delta}" if site is None else f"{site}, {kind.name}"
            return _Part("masks", name, functools.partial(self.row, kind, site), n * self.draws(kind), first)

        def climbs(steps: int) -> int:
            return P.restarts * (n * (steps + 1) + 1)  # each begins with a look at the first batch

        found = [_Part("sites", "sparsity", self.sparsity, n, True), *map(row, KINDS)]
        for s in P.ladder:
            run = functools.partial(self.climbs, s)
            found.append(_Part("adversary", f"adversary of {s} steps", run, climbs(s), s == head))
        ablated = min(P.ablated, sum(c.n_components for c in self.dec.values()))
        if ablated:
            found.append(_Part("specificity", "specificity", self.specificity, ablated + 1))  # and a look at the rows
        found += [row(kind, name) for name in self.dec for kind in SITE_KINDS if P.by_site]
        if untrained is not None:
            cost = 2 * n + (0 if head is None else climbs(head))
            found.append(_Part("controls", "untrained control", functools.partial(self.control, untrained), cost, True))
        return found

    def sums(self, kind: MaskKind | None, site: str | None = None, sample: int = 0) -> Sums:
        """Totals of the model under a kind of mask (None: of the model itself), at all sites or one."""
        generator, total = self.generator(sample), Sums()
        for step in self.batches():
            target = Target.of(step)
            if kind is None:
                output = target[0]
            else:
                masks = masks_of(step, kind, generator, self.dealt)
                output = step.divergence.rows(step.run_masked(masks if site is None else {site: masks[site]}))
            total = total.plus(target.sums(output))
        return total

    def draws(self, kind: MaskKind) -> int:
        """How often a kind is measured: more than once where it is drawn at random."""
        return self.protocol.samples if kind.kind in ("stochastic", "random") or kind.delta == "masked" else 1

    def row(self, kind: MaskKind, site: str | None = None) -> dict[str, Any]:
        """A kind's figures; those that are drawn at random as means, with the standard deviation of the distance."""
        n, ends = self.draws(kind), self.ends
        drawn = [self.sums(kind, site, sample) for sample in range(n)]
        distance = torch.tensor([s.mean(self.measure) for s in drawn], dtype=torch.float64)
        found = {
            "site": site or "all",
            "masks": kind.name,
            "delta": kind.delta,
            self.measure: distance.mean().item(),
            f"{self.measure}_sd": distance.std().item() if n > 1 else None,
        }
        if ends is None:
            return found
        ce = sum(s.ce / max(1, s.predicted) for s in drawn) / n
        gap = ends[1] - ends[0]
        return found | {
            "ce_difference": ce - ends[0],
            "ce_recovered": (ends[1] - ce) / gap if gap else None,
            "top1": sum(s.agree / s.positions for s in drawn) / n,
        }

    def sparsity(self) -> list[dict[str, Any]]:
        """What importances say of each site."""
        positions, over, active, mean = 0, {}, {}, {}
        for step in self.batches():
            for i, (name, importance) in enumerate(step.importances.items()):
                g = _by_position(step, importance.lower)
                positions += 0 if i else len(g)
                for sums, values in ((over, g > 0.0), (active, g > ACTIVE), (mean, g)):
                    sums[name] = sums.get(name, 0.0) + values.double().sum(0)
        rows = []
        edges = torch.tensor(DENSITIES[1:], dtype=torch.float64, device=self.adapter.device)
        for name, components in self.dec.items():
            W = self.adapter.weight(name).detach().double()
            error = (W - components.V.double() @ components.U.double()).norm() / W.norm()
            density = active[name] / positions
            places = torch.bucketize(density, edges) + 1
            places[density == 0] = 0
            l0 = density.sum().item()
            rows.append({
                "site": name,
                "components": components.n_components,
                "rank": min(components.site.d_in, components.site.d_out),
                "relative_error": error.item(),
                "l0": l0,
                "l0_above_0": (over[name] / positions).sum().item(),
                "active_parameters": l0 * (components.site.d_in + components.site.d_out),
                "alive": int((mean[name] / positions > ALIVE).sum()),
                "active_anywhere": int((density > 0).sum()),
                "densities": torch.bincount(places, minlength=len(DENSITIES)).tolist(),
            })  # fmt: skip
        return rows

    def climbs(self, steps: int) -> dict[str, Any]:
        """The adversary's restarts; after the first, only those that there is time for."""
        found, restarts, cost = [], self.protocol.restarts, self.n_batches * (steps + 1) + 1
        for restart in range(restarts):
            rest = f"adversary of {steps} steps, {restarts - restart} of {restarts} restarts"
            if restart and not self.has_time(rest, (restarts - restart) * cost):
                break
            self.bar.set_postfix_str(f"adversary of {steps} steps, restart {restart + 1}")
            found.append(climb(self.batches, steps, self.generator(7919 * restart)))
        worst = list(map(max, found))
        return {
            "steps": steps,
            "restarts": len(found),
            self.measure: statistics.median(worst),
            f"{self.measure}_worst": max(worst),
            f"{self.measure}_all": worst,
            "start": statistics.median(values[0] for values in found),
        }

    def specificity(self) -> dict[str, Any]:
        """Components ablated by themselves on the first rows: half of them active somewhere, half drawn from the others."""
        step = next(iter(self.batches()))
        target, flat = Target.of(step), {name: _by_output(step, g.lower) for name, g in step.importances.items()}
        effects, given, dealt = [], [], []
        for name, c in self._sampled(flat):
            self.bar.update()
            g = step.importances[name].lower
            q = torch.zeros(g.shape[-1], dtype=g.dtype, device=g.device)
            q[c] = 1.0
            logits = step.run_masked({name: InterpolatedMask(g.new_zeros(g.shape), q, 0.0)})
            effects.append(target.distances(step.divergence.rows(logits)))
            given.append(flat[name][:, c])
            dealt.append(flat[name][:, self.dealt[name][c]])
        effect = torch.cat(effects)
        return {
            "importance": specificity(torch.cat(given), effect)._asdict(),
            "permuted": specificity(torch.cat(dealt), effect)._asdict(),
        }

    def _sampled(self, flat: Mapping[str, Tensor]) -> Iterable[tuple[str, int]]:
        generator = torch.Generator().manual_seed(self.protocol.seed)
        sides: Sequence[list[tuple[str, int]]] = ([], [])
        for name, g in flat.items():
            for c, there in enumerate((g > ACTIVE).any(0).tolist()):
                sides[there].append((name, c))
        half, n = self.protocol.ablated // 2, self.protocol.ablated
        wanted = (max(half, n - len(sides[1])), max(n - half, n - len(sides[0])))
        chosen = []
        for side, n in zip(sides, wanted, strict=True):
            order = torch.randperm(len(side), generator=generator).tolist()
            chosen += [side[i] for i in order[:n]]
        return chosen

    def control(self, untrained: Decomposition) -> dict[str, Any]:
        """The headline of another decomposition of the same model, under the same protocol."""
        other = dataclasses.replace(self, dec=untrained, seconds=None, ends=None, kept=None)
        rounded = other.sums(ROUNDED)
        l0 = sum(row["l0"] for row in other.sparsity())
        found = {"l0": l0, "rounded": rounded.mean(self.measure)}
        if self.protocol.ladder:
            found["adversarial"] = other.climbs(headline_steps(self.protocol.ladder))[self.measure]
        return found


def _by_position(step: LossStep, g: Float[Tensor, "batch *pos C"], width: int | None = None) -> Float[Tensor, "n C"]:
    """Importances at the positions that count; a site that is called once for a row, such as a pooler, stands at each."""
    rows = max((i.lower.shape[:-1] for i in step.importances.values()), key=len) if width is None else (len(g), width)
    rows = rows if step.scored is None else step.scored.shape
    return step.at_scored(g.unsqueeze(1).expand(*rows, -1) if g.ndim - 1 < len(rows) == 2 else g)


def _by_output(step: LossStep, g: Float[Tensor, "batch *pos C"]) -> Float[Tensor, "n C"]:
    """Importances where an output is scored; the largest of a row where each row has one output."""
    if not step.divergence.by_row:
        return _by_position(step, g, len(step.divergence.target) // len(g))
    if g.ndim > 2:
        whole = g if step.scored is None else g.masked_fill(~step.scored.unsqueeze(-1), 0.0)
        g = whole.flatten(1, -2).amax(1)
    return step.divergence.rows(g)
