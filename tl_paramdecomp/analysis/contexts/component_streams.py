"""Chosen components on many token rows, batch by batch, and tokens in words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        raise SettingError("Choose one component at least: name some by site.")
    return found


def own_of(results: Iterable[Any], site: str, component: int) -> Any:
    """What belongs to one component, among results that name their site and component."""
    for own in results:
        if (own.site, own.component) == (site, component):
            return own
    raise ComponentIndexError(f"Component {component} of {site!r} was not looked at; choose it by components=.")


def seen_batches(
    adapter: ModelAdapter,
    decomposition: Decomposition,
    chosen: Mapping[str, list[int]],
    data: Any,
    attention_mask: Any,
    rows_at_once: int,
    logits: bool = False,
) -> Iterator[SeenBatch]:
    """What the chosen components do in passes of the model as it stands; without logits, passes end early."""
    importance = decomposition.importance
    names = list(decomposition) if importance is not None and importance.config.is_global else list(chosen)
    ends_early = not logits and UNEMBEDDING not in names and not adapter.interceptions and adapter.splits_at_unembedding
    first = 0
    for tokens, mask in batches_of(data, rows_at_once, attention_mask, model=adapter, decomposition=decomposition):
        check_rows(tokens, mask)
        if tokens.is_floating_point():
            raise DataError(f"Token rows hold whole numbers; given {tokens.dtype} {list(tokens.shape)}.")
        if not tokens.numel():
            continue
        if not first:
            warn_of_other_start(decomposition, tokens, mask)
        tokens, mask = Batch(tokens, mask).to(adapter.device)
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
    if not first:
        raise DataError(
            "There are no token rows: give a tensor [rows, pos] or batches of rows (an iterator is used up once)."
        )


# --- tokens as people read them -----------------------------------------------------------------------------------------
def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer that is given, or the one that the host holds; None where there is none."""
    return tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)


def token_text(tokenizer: Any, token: int) -> str | None:
    """Text of one token, the space in front of it included; None without a tokenizer, or where it has no such token."""
    if tokenizer is None:
        return None
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
    except Exception:  # vocabularies of models are often padded beyond the tokenizer's
        return None
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"  # SentencePiece drops the space of a text's first token
    return text


def shown(token: int, text: str | None) -> str:
    """One token for a table: its text in quotes, or its number."""
    return f"#{token}" if text is None else repr(text)


def shown_context(tokens: Sequence[int], texts: Sequence[str | None], place: int) -> str:
    """Neighbouring tokens in one line, the one at a place in [brackets]."""
    named = [f"#{t}" if s is None else s.replace("\n", "\\n") for t, s in zip(tokens, texts)]
    spaced = any(text is not None and text.startswith(" ") for text in texts)
    glue = "" if spaced else " "
    named[place] = f"[{named[place]}]"
    return glue.join(named)
