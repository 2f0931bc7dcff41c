"""Which tokens go with a component: those that stand where it is active, those that follow, and those that the model predicts
there, against how often they come in general.

Pointwise mutual information of a token and of being active is log p(token | active) / p(token), in nats.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.analysis.contexts.component_streams import (
    SeenBatch,
    chosen_components,
    own_of,
    seen_batches,
    shown,
    token_text,
    tokenizer_of,
)
from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike
from tl_paramdecomp.errors import NoImportanceError, SettingError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.settings import Count, Share, Whole, fit

Active = Literal["importance", "activation"]
RankBy = Literal["pmi", "count"]
KINDS = ("input", "following", "predicted")


@dataclass(frozen=True)
class TokenCount:
    """How often a token goes with a component."""

    token: int
    text: str | None
    active: int
    """Positions with this token where the component is active."""
    total: int
    """Positions with it."""
    pmi: float
    """log p(token | active) / p(token), in nats."""


@dataclass(frozen=True)
class ComponentTokens:
    """Tokens of one component, ranked."""

    site: str
    component: int
    threshold: float
    """It is active where its importance is above this, or its absolute activation not below it (and not 0)."""
    active: int
    """Positions where it is active."""
    input: list[TokenCount]
    """Tokens at these positions."""
    following: list[TokenCount]
    """The tokens after them."""
    predicted: list[TokenCount]
    """The model's most probable next tokens there."""


@dataclass(frozen=True)
class TokenStatistics(Record, what="token statistics"):
    """Tokens that go with components."""

    active_by: str
    """`importance`, or `activation`."""
    rank_by: str
    """What tokens are ordered by."""
    positions: int
    """How many counted."""
    components: list[ComponentTokens] = field(repr=False)
    """Which."""

    def of(self, site: str, component: int) -> ComponentTokens:
        """Tokens of one component.

        Raises:
            ComponentIndexError: It was not looked at.
        """
        return own_of(self.components, site, component)

    def tables(self) -> list[Table]:
        from rich.text import Text

        tables = []
        for own in self.components:
            title = f"{own.site}[{own.component}], active at {own.active} of {self.positions} positions"
            table = plain_table(title, "", "token", "active", "in all", "PMI")
            for kind in KINDS:
                for i, c in enumerate(getattr(own, kind)):
                    figures = (str(c.active), str(c.total), f"{c.pmi:+.2f}")
                    table.add_row("" if i else kind, Text(shown(c.token, c.text)), *figures)
                table.add_section()
            tables.append(table)
        return tables

    def footnotes(self) -> list[str]:
        return ["PMI is log p(token | active) / p(token) in nats; counts are of positions."]


def token_statistics(
    model: Any,
    decomposition: Decomposition,
    data: Any,
    components: Mapping[str, ComponentsLike] | None = None,
    n: int = 10,
    *,
    active: Active | None = None,
    threshold: float = 0.1,
    quantile: float = 0.99,
    predictions: int | None = None,
    rank_by: RankBy = "pmi",
    min_count: int = 2,
    attention_mask: Tensor | None = None,
    rows_at_once: int = 64,
    tokenizer: Any = None,
) -> TokenStatistics:
    """Tokens that occur more often where components are active than in general, of the model as it stands.

    By importance, only counts are kept of each batch. By activation the quantile is exact, for which the tokens and one number
    for each component and position are kept in the host's memory.

    Args:
        data: As for `top_contexts`.
        components: By site; None: all.
        n: Tokens in each ranking at most.
        active: What tells that a component is active: `importance` above the threshold, or an `activation` whose absolute
            value is in the top share 1 - quantile of all positions that count, and not 0. None: importance, where the
            decomposition has an importance function.
        threshold: Of importance.
        quantile: Of absolute activations, below 1.
        predictions: How many of the model's most probable next tokens count at each position; 0 for none, which spares the
            logits. None: one, or none where the model gives no logits.
        rank_by: `pmi` (ties by count), or `count` where the component is active (ties by PMI).
        min_count: Tokens that come fewer times with an active component are left out.
        attention_mask: Of one tensor of rows: 1 where a position counts.
        rows_at_once: Rows in one forward pass, where `data` is one tensor.
        tokenizer: For the tokens' text; None: the host's own, where it holds one.

    Raises:
        NoImportanceError: By importance, without an importance function.
        SettingError: A setting that makes no sense, or no components.
        NoMatchingSiteError, ComponentIndexError: There are no such components.
        DataError, ShapeError, DtypeError: The data is not token rows, or empty.
        UnsupportedModelError: Predictions are asked of a model that gives no logits.
        TargetMismatchError, DeviceError: As `component_acts`.
    """
    active = active or ("activation" if decomposition.importance is None else "importance")
    adapter = checked_adapter(model, decomposition)
    predictions = int(adapter.gives_logits) if predictions is None else predictions
    for value, kind, place in (
        (active, Active, "active"), (rank_by, RankBy, "rank_by"), (n, Count, "n"), (min_count, Count, "min_count"),
        (predictions, Whole, "predictions"), (quantile, Share, "quantile"),
    ):  # fmt: skip
        fit(value, kind, place)
    if quantile == 1:
        raise SettingError("The quantile is below 1, so that a component is active somewhere; given 1.")
    if active == "importance" and decomposition.importance is None:
        raise NoImportanceError("This decomposition has no causal-importance function; use active='activation'.")
    if predictions:
        need_logits(adapter, "Predicted tokens need", "give predictions=0")
    chosen = chosen_components(decomposition, components)
    names = [(name, c) for name in chosen for c in chosen[name]]
    tallies = {kind: _Tally(len(names)) for kind in KINDS}
    fired, positions, least = torch.zeros(len(names), dtype=torch.long), 0, None
    batches = seen_batches(adapter, decomposition, chosen, data, attention_mask, rows_at_once, predictions > 0)
    seen: Iterable[Any] = ((_values(batch, active), _tokens(batch, predictions)) for batch in batches)
    if active == "activation":
        seen = list(seen)
        together = torch.cat([values for values, _ in seen])
        # the smallest of the ceil((1 - quantile) seen) largest values of each component
        below = min(math.floor(quantile * len(together) + 1e-9), len(together) - 1)
        least = together.kthvalue(below + 1, dim=0).values
    for values, tokens in seen:
        positions += len(values)
        fires = values > threshold if least is None else (values >= least) & (values > 0)
        fired += fires.sum(0)
        for kind, tally in tallies.items():
            for column in tokens[kind].T:
                tally.add(fires[column >= 0], column[column >= 0])
    thresholds = [threshold] * len(names) if least is None else least.tolist()
    told, found = tokenizer_of(model, tokenizer), []
    for i, (name, c) in enumerate(names):
        ranked = {kind: tallies[kind].ranked(i, n, rank_by, min_count, told) for kind in KINDS}
        found.append(ComponentTokens(name, c, thresholds[i], int(fired[i]), **ranked))
    return TokenStatistics(active, rank_by, positions, found)


# --- counting ---------------------------------------------------------------------------------------------------------
def _values(batch: SeenBatch, active: str) -> Float[Tensor, "seen k"]:
    """What tells whether components are active, at the positions that count, of all sites side by side."""
    by_site = batch.importances if active == "importance" else batch.acts
    assert by_site is not None
    values = [found[batch.real] for found in by_site.values()]
    wide = torch.float64 if any(found.dtype == torch.float64 for found in values) else torch.float32
    return torch.cat([found.abs().to(wide) for found in values], 1).cpu()


def _tokens(batch: SeenBatch, predictions: int) -> dict[str, Int[Tensor, "seen _m"]]:
    """Tokens of each kind at the positions that count, perhaps several; -1 where there is none."""
    real, nothing = batch.real, torch.full_like(batch.tokens[:, :1], -1)
    after = torch.cat([batch.tokens[:, 1:].masked_fill(~real[:, 1:], -1), nothing], 1)
    if batch.logits is None:
        predicted = batch.tokens.new_empty(int(real.sum()), 0)
    else:
        predicted = batch.logits[real].topk(min(predictions, batch.logits.shape[-1]), dim=-1).indices
    found = {"input": batch.tokens[real].unsqueeze(1), "following": after[real].unsqueeze(1), "predicted": predicted}
    return {kind: tokens.cpu() for kind, tokens in found.items()}


class _Tally:
    """Counts of tokens in all, and where each component is active."""

    def __init__(self, k: int) -> None:
        self.total = torch.zeros(0, dtype=torch.long)
        self.active = torch.zeros(k, 0, dtype=torch.long)

    def add(self, active: Bool[Tensor, "seen k"], tokens: Int[Tensor, " seen"]) -> None:
        """Count some positions."""
        more = int(tokens.max()) + 1 - len(self.total) if len(tokens) else 0
        if more > 0:
            self.total, self.active = (torch.nn.functional.pad(t, (0, more)) for t in (self.total, self.active))
        self.total += torch.bincount(tokens, minlength=len(self.total))
        which, component = active.nonzero(as_tuple=True)
        flat = component * len(self.total) + tokens[which]
        self.active.view(-1).scatter_add_(0, flat, torch.ones_like(flat))

    def ranked(self, i: int, n: int, rank_by: str, min_count: int, tokenizer: Any) -> list[TokenCount]:
        """Tokens of one component, first what is ranked highest."""
        own, tokens = self.active[i], (self.active[i] >= min_count).nonzero().flatten()
        active, total = own[tokens].double(), self.total[tokens].double()
        pmi = (active * self.total.sum() / (total * own.sum())).log()
        rows = list(zip(tokens.tolist(), own[tokens].tolist(), self.total[tokens].tolist(), pmi.tolist()))
        order = (lambda r: (-r[3], -r[1], r[0])) if rank_by == "pmi" else (lambda r: (-r[1], -r[3], r[0]))
        return [TokenCount(t, token_text(tokenizer, t), a, s, p) for t, a, s, p in sorted(rows, key=order)[:n]]
