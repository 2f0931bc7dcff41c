"""Components as nodes of a graph: which components, where in the prompt, make up what a component reads.

A node is (site, component, position). The edge u -> v is what u's write adds to v's activation directly, that is with what all
other decomposed sites write held fixed: h_u (U_u . dh_v/dy_u), across positions too. It is v's activation (or the metric) with
u minus without u, to first order, so that a positive edge raises its target.

Every decomposed site (or those that are chosen) is pinned: a leaf takes the place of what it writes, so that no effect
passes through another one of them. What lies between two sites is differentiated: the residual stream, attention from key to
query positions where its queries, keys and values are not pinned on the way, nonlinearities, and weights that are not
decomposed. With `frozen_norms` the denominators of LayerNorm and RMSNorm are constants, with `frozen_patterns` attention
patterns are.

With a the number that is explained, y_s = b_s + h_s U_s + delta_s the writes and g_s = da/dy_s:

    a = sum over sites and positions of (h_s U_s + delta_s + b_s) . g_s + embeddings + biases + remainder

where embeddings and biases are those of tables, weights and normalisations that are not decomposed. The remainder is 0 where a
is an affine function of the writes: everything between is linear, or frozen. Each part is a with the component (its write, a
bias, an embedding) minus a without it, the others held: exactly so in that case, to first order otherwise.

After Ge, Zhu, Shu, Wang, He, Qiu 2024 (arXiv 2405.13868) and Marks et al. 2024 (arXiv 2403.19647, section 3), with parameter
components in the place of dictionary features.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.attention import attention_softmaxes
from tl_paramdecomp.adapters.norm_scales import opened_norms
from tl_paramdecomp.analysis.activations import component_acts
from tl_paramdecomp.analysis.effects.attribution import attribute, held
from tl_paramdecomp.analysis.effects.site_writes import (
    EMBEDDINGS,
    Prompts,
    SiteWrites,
    along_writes,
    chosen_sites,
    derivatives,
    dotted,
    prompts_of,
)
from tl_paramdecomp.analysis.records import WITH_WITHOUT, Record, Row, Table, form, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.indices import component_indices
from tl_paramdecomp.errors import PositionIndexError, SettingError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.settings import Count, fit
from tl_paramdecomp.sites import SitePattern, resolve_name

Node = tuple[str, SupportsIndex, SupportsIndex]
"""Site, component, position."""
METRIC = "metric"
NODE: tuple[str, ...] = ("site", "component", "position", "activation", "attribution")
SHOWN = 20
"""Edges in a printed table."""


# --- direct effects -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class IncomingEdges:
    """What a number in a forward pass is made of, one number for each row."""

    target: str
    """Site, component and position."""
    value: Float[Tensor, " batch"]
    """The number itself: a component's activation at one position, or the metric."""
    values: dict[str, Float[Tensor, "batch pos _C"]]
    """By decomposed site, the edge from each component at each position: h_c (U_c . g), the number with its write minus
    without it."""
    delta: dict[str, Float[Tensor, "batch pos"]]
    """By decomposed site, the edge from its delta component."""
    bias: dict[str, Float[Tensor, " batch"]]
    """By site or normalisation, the edge from its bias at all positions together."""
    embeddings: dict[str, Float[Tensor, "batch pos"]]
    """The edge from each embedding table that is not decomposed."""

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Sum of all edges."""
        kinds = (self.values, self.bias, self.delta, self.embeddings)
        parts = [part.reshape(len(part), -1).sum(1) for kind in kinds for part in kind.values()]
        return torch.stack([part.to(self.value.dtype) for part in parts]).sum(0)

    def sums(self) -> dict[str, float]:
        """Sums of all edges of each kind, over rows too."""
        names = ("values", "delta", "bias", "embeddings")
        return {name: float(sum(float(part.sum()) for part in getattr(self, name).values())) for name in names}

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """What of the number the edges do not explain: 0 where everything between is linear or frozen."""
        return self.value - self.total


class DirectPass:
    """One forward pass with every decomposed site pinned, from which any number of targets can be explained."""

    def __init__(
        self, adapter: ModelAdapter, components: Mapping[str, Components], prompts: Prompts, norms: bool, patterns: bool
    ) -> None:
        """Over the clean rows, with these components' sites pinned; norms or patterns may be frozen."""
        writes = SiteWrites(len(prompts.clean))
        others = [
            n for n in adapter.wirings if n not in components and (n in EMBEDDINGS or adapter.bias(n) is not None)
        ]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            seen = stack.enter_context(opened_norms(adapter.root, norms))
            if patterns:
                stack.enter_context(attention_softmaxes(adapter.root, hold=True))
            stack.enter_context(adapter.intercept(writes.fns(components, "pinned") | writes.fns(others, "open")))
            self.metric = prompts.measure(adapter.forward(prompts.clean, prompts.attention_mask))
        self.components, self.writes, self.norms = components, writes.check_positions(), dict(seen)
        self.acts = {name: writes.acts(name, own) for name, own in components.items()}
        self.rest = {name: writes.delta_write(name, own) for name, own in components.items()}

    def into(self, node: tuple[str, int, int] | None) -> IncomingEdges:
        """Edges into a component's activation at one position, or into the metric."""
        target, value = METRIC, self.metric
        if node is not None:
            site, component, position = node
            target, components = f"{site}[{component}] at {position}", self.components[site]
            if components.site.kind == "embedding":
                value = self.acts[site][:, position, component]
            else:
                x = self.writes.x[site][:, position].to(components.V.dtype)
                value = x @ components.V.detach()[:, component]
        names = list(self.writes.leaves)
        norms = [(name, call) for name, calls in self.norms.items() for call in calls if call.bias is not None]
        leaves = [self.writes.leaves[n] for n in names] + [call.leaf for _, call in norms]
        found = derivatives(value.sum(), leaves, retain=True)
        values, delta, bias, embeddings = {}, {}, {}, {}
        for name, gradient in zip(names, found):
            own = self.writes.bias[name]
            if own is not None:
                bias[name] = dotted(own, gradient).sum(1)
            if name in self.components:
                values[name] = along_writes(self.components[name], self.acts[name], gradient)
                delta[name] = dotted(self.rest[name], gradient)
            elif name in EMBEDDINGS:
                embeddings[name] = dotted(self.writes.y[name], gradient)
        for (name, call), gradient in zip(norms, found[len(names) :]):
            assert call.bias is not None
            part = dotted(call.bias, gradient).flatten(1).sum(1)
            bias[f"norm {name}"] = bias[f"norm {name}"] + part if f"norm {name}" in bias else part
        return IncomingEdges(target, value.detach(), values, delta, bias, embeddings)


# --- graphs -------------------------------------------------------------------------------------------------------------
def edges_into(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    target: Node,
    *,
    sites: SitePattern | None = None,
    frozen_norms: bool = True,
    frozen_patterns: bool = False,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> IncomingEdges:
    """Edges into one component's activation from every component at every position, delta components, biases, embeddings.

    Args:
        tokens: Token rows; each has its own edges.
        target: Site, component and position (negative ones count from the end).
        sites: Globs or a predicate over the decomposition's sites that have nodes and are held; None for all. Effects pass
            freely through the others.
        frozen_norms: Hold the denominators of LayerNorm and RMSNorm, so that edges through them are exact parts.
        frozen_patterns: Hold attention patterns, so that queries and keys have no edges.
        attention_mask: 1 where a position counts.

    Returns:
        Edges; `remainder` is what they leave over, 0 where everything between is linear or frozen. An embedding's component
        has no edges into it: it reads tokens.

    Raises:
        NoMatchingSiteError, ComponentIndexError, PositionIndexError: There is no such node.
        UnsupportedModelError: A normalisation's denominator cannot be held.
        TargetMismatchError, DeviceError, ShapeError, DtypeError: As `attribute`.
    """
    prompts = prompts_of(model, tokens, lambda logits: logits.flatten(1)[:, 0], None, attention_mask)  # any metric
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    components = chosen_sites(decomposition, sites)
    node = _node(components, target, tokens.shape[1])
    return DirectPass(adapter, components, prompts, frozen_norms, frozen_patterns).into(node)


def _node(components: Mapping[str, Components], node: Any, length: int) -> tuple[str, int, int]:
    if not isinstance(node, Sequence) or isinstance(node, str) or len(node) != 3:
        raise SettingError(f"A node is (site, component, position); given {node!r}.")
    site, component, position = node
    site = resolve_name({name: own.site for name, own in components.items()}, site)
    (component,) = component_indices([component], components[site].n_components, site)
    position = position.__index__()
    if not -length <= position < length:
        raise PositionIndexError(f"The rows have positions 0 to {length - 1} (or -{length} to -1); given {position}.")
    return site, component, position % length


NodeRow = form("NodeRow", site=str, component=int, position=int | None, activation=float, attribution=float)
EdgeRow = form("EdgeRow", source=int, target=int | Literal["metric"], value=float)
PARTS = ("value", "nodes", "other_components", "delta", "bias", "embeddings", "remainder")
ExplainedRow = form("ExplainedRow", target=int | Literal["metric"], **dict.fromkeys(PARTS, float))


@dataclass(frozen=True)
class Graph(Record, what="graph of components"):
    """Nodes, and edges between them and into the metric."""

    metric: str
    """Its name."""
    kind: str
    """`prompt`: nodes have positions, and edges signs. `dataset`: mean absolute edges over rows and positions."""
    nodes: Annotated[list[Row], list[NodeRow]]
    """site, component, position, activation, attribution. In a dataset's graph position is None, activation the mean absolute
    one, and attribution the mean over rows of the summed absolute ones."""
    edges: Annotated[list[Row], list[EdgeRow]]
    """source (index of a node), target (index of a node, or "metric"), value: the target with the source minus without it."""
    explained: Annotated[list[Row], list[ExplainedRow]]
    """For each target of a prompt's graph: value, and the sums of its edges from nodes, other components, delta components,
    biases and embeddings, and the remainder."""
    frozen_norms: bool
    """Whether denominators of norms were held."""
    frozen_patterns: bool
    """Whether attention patterns were held."""
    rows: int
    """Token rows that the graph is of."""

    def check(self) -> None:
        ends = [e["source"] for e in self.edges] + [e["target"] for e in (*self.edges, *self.explained)]
        outside = [end for end in ends if end != METRIC and not 0 <= end < len(self.nodes)]
        if outside:
            raise ValueError(f"there is no node {outside[0]} among {len(self.nodes)}")

    def label(self, node: int | str, texts: Sequence[str] = ()) -> str:
        """A node in words, with the text of its position where texts are given."""
        if isinstance(node, str):
            return node
        found, position = self.nodes[node], self.nodes[node]["position"]
        where = "" if position is None else f" @{position}" + (f" {texts[position]}" if texts else "")
        return f"{found['site']}[{found['component']}]{where}"

    def into(self, node: int | str) -> list[Row]:
        """Edges into a node or the metric, of largest absolute value first."""
        return sorted((e for e in self.edges if e["target"] == node), key=lambda e: -abs(e["value"]))

    def strongest(self, n: int = SHOWN) -> list[Row]:
        """The n edges of largest absolute value."""
        return sorted(self.edges, key=lambda e: -abs(e["value"]))[:n]

    def tables(self, top: int = SHOWN, texts: Sequence[str] = ()) -> list[Table]:
        """Nodes, and the `top` strongest edges, with the texts of positions where they are given."""
        sign = f"|{WITH_WITHOUT}|" if self.kind == "dataset" else WITH_WITHOUT
        edges = plain_table(
            f"Edges of a {self.kind}'s graph for {self.metric}",
            *("source", "target", f"value\n{sign} source"),
            rows=[
                (self.label(e["source"], texts), self.label(e["target"], texts), f"{e['value']:+.4g}")
                for e in self.strongest(top)
            ],
        )
        order = sorted(range(len(self.nodes)), key=lambda i: -abs(self.nodes[i]["attribution"]))[:SHOWN]
        figures = ("activation", "attribution")
        rows = [[self.label(i), *(f"{self.nodes[i][key]:+.4g}" for key in figures)] for i in order]
        return [plain_table("Nodes of largest attribution", "node", *figures, rows=rows), edges]

    def footnotes(self) -> list[str]:
        return [
            f"{len(self.nodes)} nodes, {len(self.edges)} edges, {self.rows} row{'' if self.rows == 1 else 's'}; held: "
            f"{', '.join(['all other decomposed sites', *held(self)])}."
        ]


def prompt_graph(
    model: Any,
    decomposition: Decomposition,
    tokens: Any,
    metric: Any,
    *,
    nodes: int | Iterable[Node] = 32,
    sites: SitePattern | None = None,
    frozen_norms: bool = True,
    frozen_patterns: bool = False,
    attention_mask: Int[Tensor, "1 pos"] | None = None,
) -> Graph:
    """Components at positions of one prompt, the direct edges between them, and those into a metric.

    Args:
        tokens: One token row [1, pos], or a task of one prompt.
        metric: As in `attribute`.
        nodes: The nodes; or how many of largest absolute attribution (activation times gradient, all effects) are taken.
        sites, frozen_norms, frozen_patterns, attention_mask: As in `edges_into`.

    Raises:
        SettingError: More than one row, or fewer than one node.
        UnsupportedModelError, TargetMismatchError, DeviceError, ShapeError, DtypeError: As `edges_into` and `attribute`.
    """
    prompts = prompts_of(model, tokens, metric, None, attention_mask)
    if len(prompts.clean) != 1:
        raise SettingError(f"A prompt's graph is of one row; given {len(prompts.clean)}. See dataset_graph for many.")
    components, mask = chosen_sites(decomposition, sites), prompts.attention_mask
    found = attribute(model, decomposition, prompts.clean, prompts.measure, sites=list(components), attention_mask=mask)
    chosen: list[tuple[str, int, int]]
    if isinstance(nodes, int):
        _check_count(nodes)
        chosen = [(e.site, e.component, e.position) for e in found.top(nodes)]  # type: ignore[misc]
    else:
        chosen = [_node(components, node, prompts.clean.shape[1]) for node in nodes]
        _check_count(len(chosen))
    chosen = sorted(set(chosen), key=lambda n: (list(components).index(n[0]), n[2], n[1]))
    run = DirectPass(checked_adapter(model, decomposition), components, prompts, frozen_norms, frozen_patterns)
    figures = [(float(run.acts[s][0, p, c]), float(found.values[s][0, p, c])) for s, c, p in chosen]
    listed = [dict(zip(NODE, (*node, *own))) for node, own in zip(chosen, figures)]
    edges, explained = [], []
    for target, node in [*enumerate(chosen), (METRIC, None)]:
        incoming = run.into(node)
        values = [float(incoming.values[site][0, p, c]) for site, c, p in chosen]
        edges += [{"source": i, "target": target, "value": value} for i, value in enumerate(values) if value != 0.0]
        whole, nodes_sum = incoming.sums(), sum(values)
        rest = {"nodes": nodes_sum, "other_components": whole.pop("values") - nodes_sum}
        value, remainder = float(incoming.value), float(incoming.remainder)
        explained.append({"target": target, "value": value, **rest, **whole, "remainder": remainder})
    return Graph(prompts.metric, "prompt", listed, edges, explained, frozen_norms, frozen_patterns, 1)


def _check_count(nodes: int) -> None:
    if nodes < 1:
        raise SettingError(f"A graph needs at least one node; given {nodes}.")


def dataset_graph(
    model: Any,
    decomposition: Decomposition,
    tokens: Any,
    metric: Any,
    *,
    nodes: int | Iterable[tuple[str, SupportsIndex]] = 16,
    sites: SitePattern | None = None,
    batch_size: int = 16,
    frozen_norms: bool = True,
    frozen_patterns: bool = False,
    attention_mask: Int[Tensor, "n pos"] | None = None,
    progress: bool = True,
) -> Graph:
    """Components over a dataset, and how strong the direct edges between them are on the mean.

    The edge (s, c) -> (s', c') is the mean over rows, and over the positions of c' that count, of the summed absolute edges
    from c at all positions. The edge into the metric is the mean over rows of the summed absolute edges. It takes one short
    backward pass for each node and position of every batch.

    Args:
        tokens: Token rows [n, pos], or a task.
        metric: As in `attribute`; one that remembers something of each row is only for `batch_size` of all rows.
        nodes: (site, component) pairs; or how many are taken by the mean over rows of the summed absolute attributions.
        batch_size: Rows of one forward pass.
        sites, frozen_norms, frozen_patterns, attention_mask: As in `edges_into`.

    Raises:
        SettingError: Fewer than one node, or a batch size below 1.
        UnsupportedModelError, TargetMismatchError, DeviceError, ShapeError, DtypeError: As `edges_into` and `attribute`.
    """
    fit(batch_size, Count, "batch_size")
    whole = prompts_of(model, tokens, metric, None, attention_mask)
    batches = [whole.select(rows) for rows in torch.arange(len(whole.clean)).split(batch_size)]
    components, adapter = chosen_sites(decomposition, sites), checked_adapter(model, decomposition)
    strengths, activations = _summed_strengths(model, decomposition, components, batches)
    chosen = _chosen(components, strengths, nodes)
    n, rows, device, length = len(chosen), len(whole.clean), whole.clean.device, whole.clean.shape[1]
    between = torch.zeros(n, n, dtype=torch.float64, device=device)
    into_metric, counted = torch.zeros(n, dtype=torch.float64, device=device), 0.0
    with tqdm(total=len(batches) * length * n, desc="edges", disable=not progress, leave=False) as bar:
        for prompts in batches:
            run = DirectPass(adapter, components, prompts, frozen_norms, frozen_patterns)
            real = torch.ones(prompts.clean.shape, device=device) if prompts.real is None else prompts.real.double()
            counted += float(real.sum())
            into_metric += _absolute(run.into(None), chosen, real).sum(0)
            for target, node in enumerate(chosen):
                for position in range(length):
                    incoming = _absolute(run.into((*node, position)), chosen, real)
                    between[:, target] += (incoming * real[:, position, None]).sum(0)
                    bar.update(1)
    figures = [(float(activations[s][c] / counted), float(strengths[s][c] / rows)) for s, c in chosen]
    listed = [dict(zip(NODE, (*node, None, *own))) for node, own in zip(chosen, figures)]
    means = (between / counted).tolist()
    edges = [{"source": i, "target": j, "value": means[i][j]} for i in range(n) for j in range(n) if means[i][j]]
    edges += [{"source": i, "target": METRIC, "value": v} for i, v in enumerate((into_metric / rows).tolist()) if v]
    return Graph(whole.metric, "dataset", listed, edges, [], frozen_norms, frozen_patterns, rows)


def _summed_strengths(
    model: Any, decomposition: Decomposition, components: Mapping[str, Components], batches: Sequence[Prompts]
) -> tuple[dict[str, Float[Tensor, " _C"]], dict[str, Float[Tensor, " _C"]]]:
    """Absolute attributions and activations by site, summed over rows and positions."""
    strengths: dict[str, Tensor] = {}
    activations: dict[str, Tensor] = {}
    for prompts in batches:
        rows, mask = prompts.clean, prompts.attention_mask
        found = attribute(model, decomposition, rows, prompts.measure, sites=list(components), attention_mask=mask)
        all_acts = component_acts(model, decomposition, rows, mask)
        for name, values in found.values.items():
            acts = all_acts[name].abs()
            acts = acts if prompts.real is None else acts * prompts.real.unsqueeze(-1)
            strengths[name] = strengths.get(name, 0.0) + values.abs().sum((0, 1)).double()
            activations[name] = activations.get(name, 0.0) + acts.sum((0, 1)).double()
    return strengths, activations


def _chosen(components: Mapping[str, Components], strengths: dict[str, Tensor], nodes: Any) -> list[tuple[str, int]]:
    if isinstance(nodes, int):
        _check_count(nodes)
        flat = torch.cat([strengths[name] for name in components])
        all_nodes = [(name, c) for name in components for c in range(len(strengths[name]))]
        return [all_nodes[i] for i in sorted(flat.topk(min(nodes, len(flat))).indices.tolist())]
    given = [_node(components, (*node, 0), 1)[:2] for node in nodes]
    _check_count(len(given))
    return sorted(set(given), key=lambda n: (list(components).index(n[0]), n[1]))


def _absolute(
    incoming: IncomingEdges, nodes: Sequence[tuple[str, int]], real: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch nodes"]:
    """Absolute edges from components, summed over the positions that count."""
    return torch.stack([(incoming.values[site][..., c].abs().double() * real).sum(1) for site, c in nodes], -1)
