"""What every weight site reads and writes in one forward pass, and derivatives by what it writes.

A site writes y = b + h U + x (W - V U). A pass keeps x, y and b of each site, and gives it one of three roles:

- read: y goes on as it is;
- open: a leaf of zeros is added to y, whose gradient is the total derivative by what the site writes;
- pinned: a leaf takes the place of y, equal to y or given, so that nothing upstream of the site acts through it.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.outputs import need_answers
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.positions import PositionsLike, parse_positions
from tl_paramdecomp.errors import DtypeError, SettingError, ShapeError, UnsupportedSiteError
from tl_paramdecomp.sites import SiteCall, SiteFn, SitePattern, Span, check_rows, select_sites

Role = Literal["read", "open", "pinned"]
EMBEDDINGS = ("embed.W_E", "pos_embed.W_pos")


@dataclass(eq=False)
class SiteWrites:
    """Reads and writes of sites in one forward pass."""

    batch: int
    x: dict[str, Tensor] = field(default_factory=dict)
    """[batch, pos, d_in], in the graph where there is one; indices [batch, pos] for an embedding."""
    y: dict[str, Tensor] = field(default_factory=dict)
    """[batch, pos, d_out], bias included, cut from the graph."""
    bias: dict[str, Tensor | None] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def check_positions(self) -> "SiteWrites":
        """Itself, where every site writes at positions."""
        for name, y in self.y.items():
            if y.ndim < 3:
                raise ShapeError(
                    f"{name} writes {list(y.shape)}, which has no positions that effects could be told by; leave it out "
                    "(sites=..., or another decomposition)."
                )
        return self

    def acts(self, name: str, components: Components) -> Float[Tensor, "batch pos C"]:
        """Component activations, cut from the graph."""
        with torch.no_grad():
            return components.acts(self.x[name])

    def delta_write(self, name: str, components: Components) -> Float[Tensor, "batch pos d_out"]:
        """What the delta component writes: y - b - h U."""
        with torch.no_grad():
            rest = self.y[name].to(torch.promote_types(self.y[name].dtype, components.V.dtype))
            rest = rest - self.acts(name, components) @ components.U
            bias = self.bias[name]
            return rest if bias is None else rest - bias.detach().to(rest.dtype)

    def fns(self, names: Iterable[str], role: Role, given: Mapping[str, Tensor] | None = None) -> dict[str, SiteFn]:
        """Functions for an adapter's `intercept`; `given` has y to use instead of the host's."""
        given = given or {}
        return {name: functools.partial(self._pass, name, role, given.get(name)) for name in names}

    def _pass(self, name: str, role: Role, given: Tensor | None, call: SiteCall) -> Tensor:
        if name in self.y:
            raise UnsupportedSiteError(
                f"{name} is called more than once in a forward pass, so that it has no single activation."
            )
        y = call.y if given is None else given.to(call.y.dtype)
        self.x[name] = call.x.expand(self.batch, *call.x.shape[1:]) if call.x.shape[0] == 1 else call.x
        self.y[name] = y.detach().expand(self.batch, *y.shape[1:])
        self.bias[name] = call.bias
        if role == "read":
            return y.clone()  # hosts may write into what they are given
        if role == "open":
            leaf = torch.zeros_like(self.y[name], memory_format=torch.contiguous_format).requires_grad_(True)
            self.leaves[name] = leaf
            return y + leaf
        leaf = self.y[name].clone().requires_grad_(True)
        self.leaves[name] = leaf
        return leaf.clone()

    def gradients(self, total: Float[Tensor, ""], retain: bool = False) -> dict[str, Tensor]:
        """Derivative of one number by what each site writes; zeros where nothing leads from there to it."""
        return dict(zip(self.leaves, derivatives(total, list(self.leaves.values()), retain)))


def derivatives(total: Float[Tensor, ""], leaves: list[Tensor], retain: bool = False) -> list[Tensor]:
    """Derivatives of one number; zeros by what it does not depend on."""
    if not leaves or not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def along_writes(
    components: Components, h: Float[Tensor, "batch pos C"], gradient: Float[Tensor, "batch pos d_out"]
) -> Float[Tensor, "batch pos C"]:
    """h_c (U_c . g) of every component."""
    with torch.no_grad():
        return h * (gradient.to(components.U.dtype) @ components.U.T)


def dotted(write: Tensor, gradient: Float[Tensor, "batch pos d_out"]) -> Float[Tensor, "batch pos"]:
    """Inner products along the last axis; a bias [d_out] is one write for all positions."""
    with torch.no_grad():
        wide = torch.promote_types(write.dtype, gradient.dtype)
        return (write.detach().to(wide) * gradient.to(wide)).sum(-1)


def chosen_sites(decomposition: Decomposition, sites: SitePattern | None) -> dict[str, Components]:
    """Decomposed sites that a pattern selects, and their components; all of them for None."""
    names = decomposition if sites is None else select_sites(decomposition.sites, sites)
    return {name: decomposition[name] for name in names}


def chosen_columns(positions: PositionsLike, rows: Shaped[Tensor, "batch pos"], what: str) -> list[int]:
    """Columns of all rows as indices; all of them for None."""
    parsed = parse_positions(positions)
    if parsed is None:
        return list(range(rows.shape[1]))
    chosen = parsed.columns(tuple(rows.shape), Span(), what)
    if chosen.ndim != 1:
        raise SettingError(f"The {what} takes the same positions of every row; pad with attention_mask instead.")
    return chosen.nonzero().flatten().tolist()


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token rows, and what is measured on them: from a task, or from tokens and a metric of logits."""

    clean: Int[Tensor, "batch pos"] | Float[Tensor, "batch ..."]
    corrupt: Int[Tensor, "batch pos"] | Float[Tensor, "batch ..."] | None
    attention_mask: Tensor | None
    of: Callable[..., Tensor]
    """The metric as it was given."""
    metric: str
    """Name of the metric."""
    task: Any = None

    @property
    def real(self) -> Tensor | None:
        """[batch, pos], true where no padding stands; None where all of it is."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def select(self, rows: Int[Tensor, " some"]) -> "Prompts":
        """Some of the rows; a task's by its own `select`."""
        if len(rows) == len(self.clean):
            return self
        if self.task is not None:
            task = self.task.select(rows.tolist())
            return replace(self, clean=task.clean, corrupt=task.corrupt, attention_mask=task.attention_mask, task=task)
        corrupt, mask = (None if of is None else of[rows] for of in (self.corrupt, self.attention_mask))
        return replace(self, clean=self.clean[rows], corrupt=corrupt, attention_mask=mask)

    def measure(self, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """From the model's logits to one number per row."""
        return self.score(logits if self.task is None else self.task.at_answer(logits))

    def score(self, logits: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """The same from a task's logits at its answers."""
        found = self.of(logits) if self.task is None else self.of(logits, self.task)
        if not isinstance(found, Tensor) or found.shape != (len(logits),):
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            rows = "rows" if self.task is None else "prompts"
            raise ShapeError(
                f"The metric {self.metric} must give one number for each of {len(logits)} {rows}; given {given}."
            )
        return found


def prompts_of(
    model: Any, tokens: Any, metric: Any, corrupt: Any = None, attention_mask: Any = None, *, numbers: bool = False
) -> Prompts:
    """Rows and measure from token rows (with `numbers`, any) and a metric of logits; or from a task and one of its answers."""
    name, task = getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__, None
    if hasattr(tokens, "clean"):
        if attention_mask is not None or (corrupt is not None and corrupt is not tokens.corrupt):
            raise SettingError("A task brings its own corrupt prompts and attention mask; give neither beside it.")
        task, tokens = tokens, tokens.clean
        corrupt, attention_mask = task.corrupt, task.attention_mask
    check_rows(tokens, attention_mask)
    if tokens.is_floating_point() and not numbers:
        raise DtypeError(f"Effects are told by token and position, of token ids [batch, pos]; given {tokens.dtype}.")
    if corrupt is not None:
        check_rows(corrupt, attention_mask)
        if corrupt.shape != tokens.shape:
            raise ShapeError(
                f"Corrupt rows are aligned with the clean ones token by token; given {list(corrupt.shape)} beside "
                f"{list(tokens.shape)}."
            )
    need_answers(adapt(model), task, metric)
    return Prompts(tokens, corrupt, attention_mask, metric, str(name), task)
