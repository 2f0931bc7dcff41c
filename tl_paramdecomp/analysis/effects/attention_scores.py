"""Attention scores split into pairs of query and key components.

Before the mask and the softmax, the score of head h from query position q to key position k is

    Z[q, k] = scale sum over c, c' of (x_q V_Qc) (R_q U^h_Qc) . (R_k U^g_Kc') (V_Kc' x_k)

with R the rotation of rotary embeddings (the identity where there are none), g = h // (query heads per key/value head), and
biases and delta components as further terms c and c'. The scale, 1 / sqrt(d_head) in most models, and the rotation are read
off the model's own scores; where the sum does not reproduce them, the model is refused.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.attention import (
    Rotation,
    attention_softmaxes,
    refuse_unknown_scores,
    rotations,
    seen_angles,
)
from tl_paramdecomp.analysis.effects.site_writes import SiteWrites, chosen_columns
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import checked_head
from tl_paramdecomp.components.positions import PositionsLike
from tl_paramdecomp.errors import HeadIndexError, NoMatchingSiteError, SettingError, UnsupportedModelError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import SiteCall, WeightSite, check_rows

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference from the model's own scores relative to the largest, by dtype; some hosts compute them in float32."""
DELTA, BIAS = "delta", "bias"
"""Names of the terms after the components."""


class ScorePair(NamedTuple):
    """What one query term and one key term add to a score."""

    query: int | str
    """Component of W_Q, "delta" or "bias"."""
    key: int | str
    """Component of W_K, "delta" or "bias"."""
    value: float
    """Score with the pair minus score without it."""


@dataclass(frozen=True, eq=False)
class AttentionScores:
    """Scores of one head, before mask and softmax."""

    layer: int
    """Of the attention."""
    head: int
    """Its query head."""
    queries: list[int]
    """Columns of the query axis."""
    keys: list[int]
    """Columns of the key axis."""
    pairs: Float[Tensor, "batch query key query_term key_term"]
    """Terms are the components of W_Q (W_K), then the delta component, then the bias (0 where there is none)."""
    model: Float[Tensor, "batch query key"]
    """The model's own scores; NaN where it masks them."""
    rotation: str
    """How queries and keys are turned; "none" without rotary embeddings."""
    scale: float
    """What dot products of queries and keys are multiplied by."""

    @property
    def total(self) -> Float[Tensor, "batch query key"]:
        """Sum over all pairs of terms: the score."""
        return self.pairs.sum((-2, -1))

    @property
    def components(self) -> Float[Tensor, "batch query key C_query C_key"]:
        """Pairs of components alone."""
        return self.pairs[..., :-2, :-2]

    def top(self, query: int, key: int, n: int = 10, row: int = 0) -> list[ScorePair]:
        """The n pairs of largest absolute value between two positions, largest first.

        Raises:
            SettingError: These positions are not among the scores'.
        """
        if query not in self.queries or key not in self.keys:
            raise SettingError(f"Scores are of queries {self.queries} and keys {self.keys}; given {query} and {key}.")
        table = self.pairs[row, self.queries.index(query), self.keys.index(key)]
        found, (query_terms, key_terms) = [], ([*range(n - 2), DELTA, BIAS] for n in table.shape)
        for place in table.abs().flatten().topk(min(n, table.numel())).indices.tolist():
            q, k = divmod(place, table.shape[1])
            found.append(ScorePair(query_terms[q], key_terms[k], float(table[q, k])))
        return found


def attention_scores(
    model: Any,
    decomposition: Decomposition,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    head: SupportsIndex,
    *,
    queries: PositionsLike = None,
    keys: PositionsLike = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> AttentionScores:
    """One head's attention scores, split into pairs of query and key components.

    Args:
        decomposition: Of this model, with W_Q or W_K of the layer; a site that it lacks is all delta component.
        head: Query head.
        queries, keys: Positions; None for all.
        attention_mask: 1 where a position counts.

    Raises:
        UnsupportedModelError: Scores are not sums over pairs (qk-norm, ALiBi, soft-capping), the model takes no softmax that
            can be seen, or its rotation is not known.
        NoMatchingSiteError: The decomposition has neither W_Q nor W_K of this layer.
        HeadIndexError, PositionIndexError, ShapeError, DtypeError, TargetMismatchError, DeviceError: As elsewhere.
    """
    check_rows(tokens, attention_mask)
    adapter = checked_adapter(model, decomposition, tokens, attention_mask)
    names = tuple(f"blocks.{layer}.attn.W_{role}" for role in "QK")
    missing = [name for name in names if name not in adapter.wirings]
    if missing or not any(name in decomposition for name in names):
        raise NoMatchingSiteError(
            f"Scores of layer {layer} need {' and '.join(names)} as sites of the model, and one of them decomposed; "
            f"{f'the model has no {missing[0]}' if missing else 'the decomposition has neither'}."
        )
    sites = [adapter.site(name) for name in names]
    chosen = checked_head(sites[0], head)
    if chosen is None:
        raise HeadIndexError(f"Scores are those of one head of {names[0]}; given None.")
    head = chosen
    block = adapter.block_modules()[layer]
    refuse_unknown_scores(adapter.root, block)
    writes, scores, angles = _see(adapter, names, block, tokens, attention_mask)
    q_site, k_site = sites
    assert q_site.n_heads is not None and k_site.n_heads is not None
    group = head * k_site.n_heads // q_site.n_heads
    parts = [
        _terms(writes, decomposition, name, site, h) for name, site, h in zip(names, sites, (head, group), strict=True)
    ]
    own = scores[:, head]
    allowed = _allowed(own, attention_mask)
    d_head = q_site.d_out // q_site.n_heads
    known = rotations(block, angles, tokens.shape[1], d_head)
    rotation, scale = _fitted(adapter, known, parts, own, allowed)
    at_q, at_k = (chosen_columns(positions, tokens, "attention scores") for positions in (queries, keys))
    turned = [known[rotation](part)[:, columns] for part, columns in zip(parts, (at_q, at_k), strict=True)]
    pairs = torch.einsum("bqid,bkjd->bqkij", turned[0] * scale, turned[1])
    shown = own.to(pairs.dtype).masked_fill(~allowed, math.nan)[:, at_q][:, :, at_k]
    return AttentionScores(layer, head, at_q, at_k, pairs, shown, rotation, scale)


def _see(
    adapter: ModelAdapter, names: Sequence[str], block: nn.Module, tokens: Tensor, attention_mask: Tensor | None
) -> tuple[SiteWrites, Float[Tensor, "batch head query key"], list[tuple[Tensor, Tensor]]]:
    """What the sites write, the model's own scores, and the angles of its rotation."""
    writes, before = SiteWrites(len(tokens)), [0]
    fns = writes.fns(names, "read")

    def counted(read: Any, seen: Any, call: SiteCall) -> Tensor:
        before[0] = len(seen.scores)
        return read(call)

    with torch.no_grad(), attention_softmaxes(adapter.root) as seen, seen_angles(block) as angles:
        fns = {name: functools.partial(counted, fn, seen) for name, fn in fns.items()}
        with adapter.intercept(fns):
            adapter.forward(tokens, attention_mask)
    if len(seen.scores) <= before[0]:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} takes no softmax over [batch, head, query, key] after {names[0]}: its attention "
            "is of another kind, or runs in a fused kernel that cannot be switched off."
        )
    return writes, seen.scores[before[0]], list(angles)


def _terms(
    writes: SiteWrites, decomposition: Decomposition, name: str, site: WeightSite, head: int
) -> Float[Tensor, "batch pos term d_head"]:
    """What a head's part of a site writes, term by term: components, delta component, bias."""
    assert site.n_heads is not None
    width = site.d_out // site.n_heads
    own = slice(head * width, (head + 1) * width)
    y, bias = writes.y[name][..., own], writes.bias[name]
    shift = torch.zeros_like(y) if bias is None else bias.detach()[own].to(y.dtype).expand_as(y)
    if name not in decomposition:
        return torch.stack([y - shift, shift], -2)
    components = decomposition[name]
    with torch.no_grad():
        each = writes.acts(name, components).unsqueeze(-1) * components.U[:, own]
    wide = each.dtype if each.dtype == y.dtype else torch.promote_types(each.dtype, y.dtype)
    rest = y.to(wide) - shift.to(wide) - each.to(wide).sum(-2)
    return torch.cat([each.to(wide), rest.unsqueeze(-2), shift.to(wide).unsqueeze(-2)], -2)


def _allowed(
    scores: Float[Tensor, "batch query key"], attention_mask: Tensor | None
) -> Bool[Tensor, "batch query key"]:
    """Where the model's scores are not masked."""
    length = scores.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    allowed = causal & scores.isfinite() & (scores > -1e4 if scores.dtype == torch.float16 else scores > -1e9)
    if attention_mask is not None:
        real = attention_mask.bool()
        allowed = allowed & real[:, None, :] & real[:, :, None]
    return allowed


def _fitted(
    adapter: ModelAdapter, known: dict[str, Rotation], parts: list[Tensor], own: Tensor, allowed: Tensor
) -> tuple[str, float]:
    """The rotation and the scale under which queries and keys give the model's own scores."""
    wholes = [part.sum(-2) for part in parts]
    wanted = own[allowed].to(wholes[0].dtype)
    tried: dict[str, tuple[float, float]] = {}
    for name, rotation in known.items():
        q, k = (rotation(whole) for whole in wholes)
        found = torch.einsum("bqd,bkd->bqk", q, k)[allowed]
        fit = float((found * wanted).sum() / found.pow(2).sum().clamp(min=1e-30))
        usual = 1 / math.sqrt(q.shape[-1])
        scale = next((s for s in (usual, 1.0) if abs(fit / s - 1) < 1e-5), fit)
        tried[name] = (float((found * scale - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)), scale)
    best = min(tried, key=lambda name: tried[name][0])
    error, scale = tried[best]
    if error > TOLERANCE.get(own.dtype, 1e-4):
        raise UnsupportedModelError(
            f"The attention scores of this {type(adapter.root).__name__} are no scaled inner products of its queries and keys "
            f"under any rotation that is known (tried: {', '.join(tried)}; the nearest is {error:.1e} of the largest score "
            "away): it does something else between W_Q, W_K and the softmax."
        )
    return best, scale
