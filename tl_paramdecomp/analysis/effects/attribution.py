"""How much each component at each position does for a metric: by gradients, along a path of inputs, or by ablating it.

Every value is the metric with the component's write as it is minus the metric with it removed or replaced, as in `sweep`;
positive values speak for the component. With h = x V the activations, g = dL/dy the derivative of the metric by what the
site writes:

    gradient        (h_c - h'_c) (U_c . g), of first order
    integrated      (h_c - h'_c) (U_c . mean of g along a path from the corrupt to the clean run)
    ablation        exact: one run for each component

h' is 0, or the activation on a corrupt prompt aligned with the clean one. For gradients that is attribution patching (Syed,
Rager, Conmy 2023, arXiv 2310.10348), for paths EAP-IG (Hanna, Pezzelle, Belinkov 2024, arXiv 2403.17806), with parameter
components in the place of activations. The delta component, and with gradients biases and embeddings, are attributed too.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.norm_scales import opened_norms
from tl_paramdecomp.adapters.outputs import need_answers
from tl_paramdecomp.adapters.softmaxes import attention_softmaxes
from tl_paramdecomp.analysis.effects.attributions import Attribution, Direction
from tl_paramdecomp.analysis.effects.single_ablations import Ablations, ablated_effects
from tl_paramdecomp.analysis.effects.site_writes import (
    Prompts,
    SiteWrites,
    along_writes,
    chosen_sites,
    dotted,
    other_embeddings,
    prompts_of,
)
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.positions import PositionsLike, parse_positions
from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SitePattern, Span

Method = Literal["gradient", "integrated", "ablation"]
Path = Literal["embeddings", "writes"]


def attribute(
    model: Any,
    decomposition: Decomposition,
    tokens: Any,
    metric: Any,
    *,
    method: Method = "gradient",
    corrupt: Int[Tensor, "batch pos"] | None = None,
    direction: Literal["noising", "denoising"] = "noising",
    steps: int = 8,
    path: Path = "embeddings",
    sites: SitePattern | None = None,
    positions: PositionsLike = None,
    by_position: bool = True,
    frozen_norms: bool = False,
    frozen_patterns: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    rows_at_once: int = 64,
    progress: bool = True,
) -> Attribution:
    """Effect of every component at every position on a metric, of the model as it stands: metric with it minus metric without.

    Args:
        model: The target model, on any host.
        decomposition: Made from this model's weights.
        tokens: Token rows [batch, pos]; or a task, which brings its corrupt prompts and attention mask.
        metric: From logits [batch, pos, vocab] to one number per row; with a task, from its answer logits [batch, vocab] and
            the task. Row i may depend on row i alone.
        method: `gradient` takes one forward and one backward pass for everything (and one forward pass for corrupt rows),
            `integrated` as many again as `steps`, `ablation` one row for each component and position.
        corrupt: Rows aligned with `tokens`; activations are compared with theirs. None: with zero.
        direction: With corrupt rows, the run in which the effect is taken. `noising`: the clean run, where a component is
            given its corrupt activation. `denoising`: the corrupt run, where it is given its clean one. `integrated`
            averages over all runs between the two.
        steps: Nodes of the Gauss-Legendre rule along the path, which is exact where the gradient is a polynomial in the step
            of degree up to 2 steps - 1.
        path: `embeddings` interpolates what the embedding writes, and everything after it follows. `writes` sets what all
            sites write, and the embeddings, to points between the corrupt and the clean run at once, so that each is
            credited with its direct effect alone and all attributions (components, delta components, embeddings) sum to
            the difference of the metric as the rule becomes exact.
        sites: Globs or a predicate over the decomposition's sites; None for all.
        positions: Columns to attribute; None for all.
        by_position: False sums over these positions (`ablation` ablates a component at all of them at once).
        frozen_norms: Take gradients with the denominators of LayerNorm and RMSNorm held; not for `ablation`.
        frozen_patterns: Take gradients with attention patterns held; not for `ablation`.
        attention_mask: 1 where a position counts; attributions at the others are 0.
        rows_at_once: Rows of one batch of `ablation`.
        progress: Show a progress bar, for `ablation`.

    Raises:
        SettingError: No such method, direction or path; `integrated` without corrupt rows, `denoising` without them; steps
            below 1; a metric without a gradient where one is needed, or not finite; something frozen for `ablation`.
        UnsupportedModelError: No embedding for a path to start from, or a normalisation that cannot be held.
        NoMatchingSiteError: `sites` selects none.
        ShapeError, DtypeError, PositionIndexError: Rows, mask, positions or the metric's values do not fit.
        TargetMismatchError, DeviceError: As `patched`.
    """
    prompts = prompts_of(tokens, metric, corrupt, attention_mask)
    _check(method, direction, path, steps, rows_at_once, prompts)
    if method == "ablation" and (frozen_norms or frozen_patterns):
        raise SettingError("Ablations run the model as it is; frozen_norms and frozen_patterns are for gradients.")
    adapter, names = checked_adapter(model, decomposition), chosen_sites(decomposition, sites)
    need_answers(adapter, tokens, metric)
    columns = _columns(positions, prompts.clean)
    if prompts.corrupt is None:
        towards: Direction = "removal"
    else:
        towards = "corrupt to clean" if method == "integrated" else direction
    frozen = _Frozen(frozen_norms, frozen_patterns)
    run = _Run(adapter, decomposition, names, prompts, towards, columns, by_position, frozen)
    if method == "gradient":
        return run.by_gradient()
    if method == "integrated":
        return run.along_path(steps, path)
    return run.by_ablation(rows_at_once, progress)


def _check(method: Any, direction: Any, path: Any, steps: int, rows_at_once: int, prompts: Prompts) -> None:
    for what, given, known in (
        ("method", method, get_args(Method)),
        ("direction", direction, ("noising", "denoising")),
        ("path", path, get_args(Path)),
    ):
        if given not in known:
            raise SettingError(f"Attribution {what} {given!r} is none of {', '.join(known)}.")
    if steps < 1 or rows_at_once < 1:
        raise SettingError(f"steps and rows_at_once are at least 1; given {steps} and {rows_at_once}.")
    if prompts.corrupt is None and method == "integrated":
        raise SettingError("Integrated gradients run from a corrupt prompt to the clean one; give corrupt=.")
    if prompts.corrupt is None and direction == "denoising":
        raise SettingError("Denoising restores clean activations in the run over a corrupt prompt; give corrupt=.")


def _columns(positions: Any, rows: Tensor) -> list[int]:
    """Columns of the rows as indices."""
    parsed = parse_positions(positions)
    if parsed is None:
        return list(range(rows.shape[1]))
    chosen = parsed.columns(tuple(rows.shape), Span(), "attribution")
    if chosen.ndim != 1:
        raise SettingError("Attribution takes the same positions of every row; pad with attention_mask instead.")
    return chosen.nonzero().flatten().tolist()


class _Frozen(NamedTuple):
    """What is held while gradients are taken."""

    norms: bool
    patterns: bool

    @contextlib.contextmanager
    def in_(self, root: nn.Module) -> Iterator[None]:
        """Hold it in the passes inside."""
        with contextlib.ExitStack() as stack:
            if self.norms:
                stack.enter_context(opened_norms(root, hold=True))
            if self.patterns:
                stack.enter_context(attention_softmaxes(root, hold=True))
            yield


class _Run:
    """One call of `attribute`."""

    def __init__(
        self,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        names: Sequence[str],
        prompts: Prompts,
        direction: Direction,
        columns: Sequence[int],
        by_position: bool,
        frozen: _Frozen,
    ) -> None:
        self.adapter, self.decomposition, self.names, self.prompts = adapter, decomposition, list(names), prompts
        self.direction: Direction = direction
        self.columns, self.by_position, self.frozen = list(columns), by_position, frozen
        self.embeddings = other_embeddings(adapter, self.names)

    # --- passes -----------------------------------------------------------------------------------------------------
    def read(self, rows: Tensor, embeddings: bool = True) -> tuple[SiteWrites, Float[Tensor, " batch"]]:
        """Reads and writes over rows, and the metric, without gradients."""
        writes = SiteWrites(len(rows))
        fns = writes.fns([*self.names, *(self.embeddings if embeddings else ())], "read")
        with torch.no_grad(), self.adapter.intercept(fns):
            found = self.prompts.measure(self.adapter.forward(rows, self.prompts.attention_mask))
        return writes.check_positions(), found

    def opened(self, rows: Tensor) -> tuple[SiteWrites, Float[Tensor, " batch"], dict[str, Tensor]]:
        """The same with the derivative of the metric by what every site writes."""
        writes = SiteWrites(len(rows))
        fns = writes.fns([*self.names, *self.embeddings], "open")
        return (writes, *self._measured(writes, fns, rows))

    def _measured(self, writes: SiteWrites, fns: Mapping[str, Any], rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.enable_grad(), self.frozen.in_(self.adapter.root), self.adapter.intercept(fns):
            found = self.prompts.measure(self.adapter.forward(rows, self.prompts.attention_mask))
        writes.check_positions()
        if not found.requires_grad:
            raise SettingError(
                f"The metric {self.prompts.metric} has no gradient (a rank or a comparison has none); use method='ablation'."
            )
        return found.detach(), writes.gradients(found.sum(), writes.leaves)

    # --- methods ----------------------------------------------------------------------------------------------------
    def by_gradient(self) -> Attribution:
        """Activation times gradient, or attribution patching."""
        prompts = self.prompts
        if prompts.corrupt is None:
            clean, m_clean, gradients = self.opened(prompts.clean)
            return self._result("gradient", clean, None, gradients, m_clean, None)
        if self.direction == "noising":
            corrupt, m_corrupt = self.read(prompts.corrupt)
            clean, m_clean, gradients = self.opened(prompts.clean)
        else:
            clean, m_clean = self.read(prompts.clean)
            corrupt, m_corrupt, gradients = self.opened(prompts.corrupt)
        return self._result("gradient", clean, corrupt, gradients, m_clean, m_corrupt)

    def along_path(self, steps: int, path: Path) -> Attribution:
        """Gradients averaged between the corrupt and the clean run."""
        assert self.prompts.corrupt is not None
        if "embed.W_E" not in self.adapter.wirings:
            raise UnsupportedModelError(
                f"{type(self.adapter.model).__name__} has no site embed.W_E from which a path could start; "
                "use method='gradient'."
            )
        clean, m_clean = self.read(self.prompts.clean)
        corrupt, m_corrupt = self.read(self.prompts.corrupt)
        pinned = ["embed.W_E"] if path == "embeddings" else list(clean.y)
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        mean: dict[str, Tensor] = {}
        for alpha, weight in zip((nodes + 1.0) / 2.0, weights / 2.0, strict=True):
            given = {name: torch.lerp(corrupt.y[name], clean.y[name], float(alpha)) for name in pinned}
            writes = SiteWrites(len(self.prompts.clean))
            fns = writes.fns([name for name in clean.y if name not in pinned], "open")
            fns |= writes.fns(pinned, "pinned", given)
            _, gradients = self._measured(writes, fns, self.prompts.clean)
            for name, gradient in gradients.items():
                mean[name] = mean[name].add_(gradient, alpha=weight) if name in mean else gradient * weight
        return self._result("integrated", clean, corrupt, mean, m_clean, m_corrupt, steps, path)

    def by_ablation(self, rows_at_once: int, progress: bool) -> Attribution:
        """Every component at every position on its own."""
        prompts, corrupt = self.prompts, None
        clean, m_clean = self.read(prompts.clean, embeddings=False)
        m_corrupt = None
        if prompts.corrupt is not None:
            corrupt, m_corrupt = self.read(prompts.corrupt, embeddings=False)
        denoising = self.direction == "denoising"
        base, reference = (corrupt, clean) if denoising else (clean, corrupt)
        rows = prompts.corrupt if denoising else prompts.clean
        assert base is not None and rows is not None
        ablations = Ablations(
            self.adapter,
            prompts,
            rows,
            tuple(self.columns) if self.by_position else None,
            tuple(self.columns),
            rows_at_once,
        )
        plain = m_corrupt if denoising else m_clean
        assert plain is not None
        values, delta = ablated_effects(
            ablations,
            {name: self.decomposition[name] for name in self.names},
            base,
            reference,
            plain,
            progress,
        )
        if denoising:
            values, delta = ({n: -v for n, v in part.items()} for part in (values, delta))
        return self._attribution("ablation", values, delta, {}, {}, m_clean, m_corrupt)

    # --- results ----------------------------------------------------------------------------------------------------
    def _result(
        self,
        method: Method,
        clean: SiteWrites,
        corrupt: SiteWrites | None,
        gradients: Mapping[str, Tensor],
        m_clean: Tensor,
        m_corrupt: Tensor | None,
        steps: int | None = None,
        path: Path | None = None,
    ) -> Attribution:
        values, delta, bias = {}, {}, {}
        for name in self.names:
            components, gradient = self.decomposition[name], gradients[name]
            h, rest = clean.acts(name, components), clean.delta_write(name, components)
            if corrupt is not None:
                h = h - corrupt.acts(name, components)
                rest = rest - corrupt.delta_write(name, components)
            values[name] = self._placed(along_writes(components, h, gradient))
            delta[name] = self._placed(dotted(rest, gradient))
            own = clean.bias[name]
            if own is not None and corrupt is None:
                bias[name] = self._placed(dotted(own, gradient))
        embeddings = {}
        for name in self.embeddings:
            write = clean.y[name] if corrupt is None else clean.y[name] - corrupt.y[name]
            embeddings[name] = self._placed(dotted(write, gradients[name]))
        return self._attribution(method, values, delta, bias, embeddings, m_clean, m_corrupt, steps, path)

    def _placed(self, found: Float[Tensor, "batch pos *C"]) -> Float[Tensor, "batch columns *C"]:
        """Values at the columns that are asked for, 0 at padding; one column where positions are summed."""
        real = self.prompts.real
        if real is not None:
            found = found * real.to(found.dtype).view(*real.shape, *(1,) * (found.ndim - 2))
        found = found[:, self.columns]
        return found if self.by_position else found.sum(1, keepdim=True)

    def _attribution(
        self,
        method: Method,
        values: dict[str, Tensor],
        delta: dict[str, Tensor],
        bias: dict[str, Tensor],
        embeddings: dict[str, Tensor],
        m_clean: Tensor,
        m_corrupt: Tensor | None,
        steps: int | None = None,
        path: Path | None = None,
    ) -> Attribution:
        clean = m_clean.double().tolist()
        if not all(map(math.isfinite, clean)):
            raise SettingError(f"The metric {self.prompts.metric} is not finite on these rows: {clean[:4]}.")
        return Attribution(
            method=method,
            metric=self.prompts.metric,
            direction=self.direction,
            positions=list(self.columns),
            by_position=self.by_position,
            clean=clean,
            corrupt=None if m_corrupt is None else m_corrupt.double().tolist(),
            steps=steps,
            path=path,
            values=values,
            delta=delta,
            frozen_norms=self.frozen.norms,
            frozen_patterns=self.frozen.patterns,
            bias=bias,
            embeddings=embeddings,
        )
