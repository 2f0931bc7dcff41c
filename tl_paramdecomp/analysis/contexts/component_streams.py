"""Chosen components on many token rows, batch by batch: activations, causal importances, and logits where asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.shortcuts import UNEMBEDDING
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import ComponentsLike, component_indices
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.data.rows import batches_of
from tl_paramdecomp.data.tokenizer import warn_of_other_start
from tl_paramdecomp.errors import ComponentIndexError, DataError, SettingError, ShapeError
from tl_paramdecomp.sites import check_rows, resolve_name


@dataclass(frozen=True, eq=False)
class SeenBatch:
    """What the chosen components did on one batch."""

    first: int
    """Number of its first row, counted over all batches."""
    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    """False at padding."""
    acts: dict[str, Float[Tensor, "batch pos _k"]]
    """By site, activations of the chosen components."""
    importances: dict[str, Float[Tensor, "batch pos _k"]] | None
    """The same of causal importances in [0, 1]; None without an importance function."""
    logits: Float[Tensor, "batch pos vocab"] | None


def chosen_components(
    decomposition: Decomposition, components: Mapping[str, ComponentsLike] | None
) -> dict[str, list[int]]:
    """Indices of components by site, each once; all for None."""
    if components is None:
        return {name: list(range(own.n_components)) for name, own in decomposition.items()}
    if not isinstance(components, Mapping):
        raise SettingError(
            f"Components are given by site, such as {{'blocks.0.mlp.W_in': [3, 5]}}; not {components!r}."
        )
    found: dict[str, list[int]] = {}
    for site, some in components.items():
        name = resolve_name(decomposition.sites, site)
        indices = component_indices(some, decomposition[name].n_components, name)
        found[name] = list(dict.fromkeys([*found.get(name, []), *indices]))
    found = {name: indices for name, indices in found.items() if indices}
    if not found:
        raise SettingError("No component is chosen; name some by site, or pass None for all of them.")
    return found


Own = TypeVar("Own")


def own_of(results: Iterable[Own], site: str, component: int) -> Own:
    """What belongs to one component, among results that name their site and component."""
    for own in results:
        if (own.site, own.component) == (site, component):  # type: ignore[attr-defined]
            return own
    raise ComponentIndexError(f"Component {component} of {site!r} was not looked at; choose it by components=.")


def token_rows(
    adapter: ModelAdapter, decomposition: Decomposition, data: Any, attention_mask: Any, rows_at_once: int
) -> Iterator[Batch]:
    """Batches of token rows.

    Args:
        adapter: Who reads them.
        decomposition: Made on rows that begin alike.
        data: In any form that `decompose` takes.
        attention_mask: Of one tensor of rows.
        rows_at_once: Rows of a batch, where the data is one tensor.

    Raises:
        SettingError: A mask is given beside an iterable of batches, or `rows_at_once` is below 1.
        DataError: The data is of no such form, or holds no rows or no tokens.
        ShapeError, DtypeError: As `check_rows`.
    """
    empty = True
    for batch in batches_of(data, rows_at_once, attention_mask, model=adapter, decomposition=decomposition):
        check_rows(*batch)
        if batch.tokens.is_floating_point():
            raise DataError(f"Token rows hold whole numbers; given {batch.tokens.dtype} {list(batch.tokens.shape)}.")
        if batch.tokens.numel():
            if empty:
                warn_of_other_start(decomposition, *batch)
            empty = False
            yield batch
    if empty:
        raise DataError(
            "There are no token rows: give a tensor [rows, pos] or batches of rows (an iterator is used up once)."
        )


def seen_batches(
    adapter: ModelAdapter,
    decomposition: Decomposition,
    chosen: Mapping[str, list[int]],
    rows: Iterable[Batch],
    logits: bool = False,
) -> Iterator[SeenBatch]:
    """Forward passes of the model as it stands, and what the chosen components do in them; without logits, passes end early."""
    importance = decomposition.importance
    names = list(decomposition) if importance is not None and importance.config.is_global else list(chosen)
    ends_early = not logits and UNEMBEDDING not in names and not adapter.interceptions and adapter.splits_at_unembedding
    first = 0
    for tokens, mask in rows:
        tokens = tokens.to(adapter.device)
        mask = None if mask is None else mask.to(adapter.device)
        with torch.no_grad():
            captured = adapter.capture(tokens, names, mask, to_hidden=ends_early)
            inputs = {name: captured.inputs[name] for name in names}
            found = None if importance is None else decomposition.importances(inputs, mask)
            acts, g = {}, {}
            for name, indices in chosen.items():
                index = torch.tensor(indices, device=adapter.device)
                acts[name] = decomposition[name].acts(inputs[name], index)
                if acts[name].shape[:-1] != tokens.shape:
                    raise ShapeError(
                        f"{name} has no activation for each token: {list(acts[name].shape[:-1])} for rows {list(tokens.shape)}."
                    )
                if found is not None:
                    g[name] = found[name].lower[..., index].clamp(0.0, 1.0)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        yield SeenBatch(first, tokens, real, acts, None if found is None else g, captured.output if logits else None)
        first += len(tokens)
