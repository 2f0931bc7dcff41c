"""Where components fire most: their top activating contexts over many token rows.

Rows are streamed, and what is kept is exact: the largest values over all positions that count. Ties go to the larger absolute
activation, then to the earlier row and position.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.analysis.contexts.component_streams import (
    SeenBatch,
    chosen_components,
    own_of,
    seen_batches,
    shown_context,
    token_text,
    tokenizer_of,
)
from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike
from tl_paramdecomp.errors import NoImportanceError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.settings import Count, Whole, fit

By = Literal["activation", "importance"]
Sign = Literal["both", "positive", "negative"]
_Order = tuple[float, float, int, int]


@dataclass(frozen=True)
class Context:
    """One place where a component fires."""

    row: int
    """Counted over all batches."""
    position: int
    """Column of the row as it was given, padding included."""
    activation: float
    """h = x V_c."""
    importance: float | None
    """Causal importance in [0, 1]; None without an importance function."""
    tokens: list[int]
    """The tokens around it, padding left out."""
    place: int
    """Which of these is the one at the position."""
    texts: list[str | None]
    """Text of these tokens; None where there is no tokenizer."""

    def __str__(self) -> str:
        return shown_context(self.tokens, self.texts, self.place)


@dataclass(frozen=True)
class ComponentContexts:
    """Top contexts of one component, largest first."""

    site: str
    component: int
    contexts: list[Context]


@dataclass(frozen=True)
class TopContexts(Record, what="top contexts"):
    """Top activating contexts of components."""

    by: str
    """What is largest: `activation` or `importance`."""
    sign: str
    """Places of which sign of the activation: `both`, `positive` or `negative`."""
    positions: int
    """How many counted."""
    components: list[ComponentContexts] = field(repr=False)
    """Which."""

    def check(self) -> None:
        for own in self.components:
            for context in own.contexts:
                if len(context.texts) != len(context.tokens) or not 0 <= context.place < len(context.tokens):
                    raise ValueError(f"a context of {own.site}[{own.component}] is not at one of its tokens")

    def of(self, site: str, component: int) -> list[Context]:
        """Contexts of one component, largest first.

        Raises:
            ComponentIndexError: It was not looked at.
        """
        return own_of(self.components, site, component).contexts

    def tables(self) -> list[Table]:
        tables = []
        for own in self.components:
            known = any(context.importance is not None for context in own.contexts)
            columns = ["activation", *(["importance"] if known else []), "row", "position"]
            rows = []
            for c in own.contexts:
                g = [] if c.importance is None else [f"{c.importance:.3f}"]
                rows.append([str(c), f"{c.activation:+.4f}", *g, str(c.row), str(c.position)])
            tables.append(plain_table(f"{own.site}[{own.component}]", "context", *columns, rows=rows))
        return tables

    def footnotes(self) -> list[str]:
        by = "absolute activations" if self.by == "activation" else "causal importances"
        where = "" if self.sign == "both" else f" where activations are {self.sign}"
        return [f"Largest {by} of {self.positions} positions{where}."]


def top_contexts(
    model: Any,
    decomposition: Decomposition,
    data: Any,
    components: Mapping[str, ComponentsLike] | None = None,
    n: int = 10,
    *,
    by: By = "activation",
    sign: Sign = "both",
    distinct_rows: bool = False,
    before: int = 8,
    after: int = 4,
    attention_mask: Tensor | None = None,
    rows_at_once: int = 64,
    tokenizer: Any = None,
) -> TopContexts:
    """The places where components' activations, or causal importances, are largest, of the model as it stands.

    V_c U_c stays the same where both change sign, so that the sign of an activation means nothing by itself; activations are
    therefore compared by absolute value, of either sign unless `sign` says otherwise.

    Args:
        data: Token rows [rows, pos], or an iterable of batches (tensors, pairs with attention masks, or dicts with `tokens` or
            `input_ids`), read once.
        components: By site; None: all.
        n: Contexts of each component at most.
        by: Compare by `activation` or by `importance`.
        sign: Only places whose activation has this sign.
        distinct_rows: Only the largest position of each row.
        before, after: Tokens in front of the position and behind it that are kept.
        attention_mask: Of one tensor of rows: 1 where a position counts.
        rows_at_once: Rows in one forward pass, where `data` is one tensor.
        tokenizer: For the tokens' text; None: the host's own, where it holds one.

    Raises:
        NoImportanceError: By importance, without an importance function.
        SettingError: A setting that makes no sense, or no components.
        NoMatchingSiteError, ComponentIndexError: There are no such components.
        DataError, ShapeError, DtypeError: The data is not token rows, or empty.
        TargetMismatchError, DeviceError: As `component_acts`.
    """
    by, sign = fit(by, By, "by"), fit(sign, Sign, "sign")
    n, before, after = fit(n, Count, "n"), fit(before, Whole, "before"), fit(after, Whole, "after")
    if by == "importance" and decomposition.importance is None:
        raise NoImportanceError("This decomposition has no causal-importance function; take contexts by='activation'.")
    adapter, chosen = checked_adapter(model, decomposition), chosen_components(decomposition, components)
    best: dict[tuple[str, int], list[tuple[_Order, Context]]] = {(name, c): [] for name in chosen for c in chosen[name]}
    positions, told = 0, tokenizer_of(model, tokenizer)
    for batch in seen_batches(adapter, decomposition, chosen, data, attention_mask, rows_at_once):
        positions += int(batch.real.sum())
        here = replace(batch, tokens=batch.tokens.cpu(), real=batch.real.cpu())
        for name, indices in chosen.items():
            for c, places in zip(indices, _largest_places(batch, name, by, sign, n, distinct_rows)):
                kept = best[name, c]
                last = kept[-1][0] if len(kept) == n else None
                for primary, row, position, activation, importance in places:
                    order = (-primary, -abs(activation), row, position)
                    if last is None or order < last:
                        tokens, at = _neighbours(here, row, position, before, after)
                        kept.append((order, Context(row, position, activation, importance, tokens, at, [])))
                kept.sort(key=lambda one: one[0])
                del kept[n:]
    found = []
    for (name, c), kept in best.items():
        contexts = [replace(one, texts=[token_text(told, token) for token in one.tokens]) for _, one in kept]
        found.append(ComponentContexts(name, c, contexts))
    return TopContexts(by, sign, positions, found)


def _largest_places(batch: SeenBatch, name: str, by: By, sign: Sign, n: int, distinct_rows: bool) -> list[list[tuple]]:
    """For each chosen component its n largest places: what is compared first, row, position, activation, importance."""
    h = batch.acts[name].movedim(-1, 0)  # [k, batch, pos]
    g = None if batch.importances is None else batch.importances[name].movedim(-1, 0)
    signed = {"both": torch.ones_like(h, dtype=torch.bool), "positive": h > 0, "negative": h < 0}[sign]
    allowed = (signed & batch.real).flatten(1)
    second = h.abs().flatten(1).masked_fill(~allowed, -math.inf)
    first = second if g is None or by == "activation" else g.flatten(1).masked_fill(~allowed, -math.inf)
    width = batch.tokens.shape[1]
    if distinct_rows:
        per_row = [key.unflatten(1, (-1, width)) for key in (first, second)]
        places = _sorted(*per_row)[..., 0] + torch.arange(len(batch.tokens), device=h.device) * width
        chosen = _sorted(first.gather(1, places), second.gather(1, places))[:, :n]
        places = places.gather(1, chosen)
    else:
        places = _sorted(first, second)[:, :n]
    columns = (first, h.flatten(1), first if g is None else g.flatten(1))
    gathered = (values.gather(1, places).tolist() for values in columns)
    return [
        [
            (primary, batch.first + flat // width, flat % width, value, None if g is None else importance)
            for flat, primary, value, importance in zip(*component)
            if primary > -math.inf
        ]
        for component in zip(places.tolist(), *gathered)
    ]


def _sorted(first: Float[Tensor, "*rows m"], second: Float[Tensor, "*rows m"]) -> Int[Tensor, "*rows m"]:
    """Indices along the last axis, largest first; among equals the larger second, then the earlier."""
    order = second.sort(dim=-1, descending=True, stable=True).indices
    if first is second:
        return order
    return order.gather(-1, first.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)


def _neighbours(batch: SeenBatch, row: int, p: int, before: int, after: int) -> tuple[list[int], int]:
    """Tokens around a place without padding, and which of them stands there."""
    own, real = batch.tokens[row - batch.first].tolist(), batch.real[row - batch.first].tolist()
    columns = [column for column in range(max(0, p - before), min(len(own), p + after + 1)) if real[column]]
    return [own[column] for column in columns], columns.index(p)
