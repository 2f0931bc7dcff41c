"""Weight sites: the linear maps of a model, and the seam between hosts and components.

A weight site is one linear map (or embedding look-up) inside a model, with a readable input `x`, output `y`, weight
`W [d_in, d_out]` and bias `b`. An adapter runs the host model and hands every call of a site to a `SiteFn`, which
returns the output to use instead. Nothing here knows a host library or a component.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.errors import DataError, DtypeError, NoMatchingSiteError, ShapeError, UnsupportedSiteError


@dataclass(frozen=True)
class WeightSite:
    """One linear map of a target model, as it is known on every host."""

    name: str
    """Canonical name, such as `blocks.0.mlp.W_in`; a plain module's is its dotted path plus `.weight`."""
    d_in: int
    """Input width; for an embedding the number of rows of its table."""
    d_out: int
    """Output width."""
    kind: Literal["linear", "embedding"] = "linear"
    """`embedding`: x is a tensor of row indices, and y their rows."""
    n_heads: int | None = None
    """Heads the weight divides into: query heads for W_Q and W_O, key/value heads for W_K and W_V."""
    head_side: Literal["in", "out"] | None = None
    """Which side of W the heads divide: `in` for W_O (what is read), `out` for W_Q, W_K, W_V (what is written)."""
    has_bias: bool = False
    """Whether the host adds a bias inside this map."""
    tied_to: str | None = None
    """The site whose parameter this one shares, such as `embed.W_E` for a tied unembedding."""
    aliases: tuple[str, ...] = field(default=(), compare=False)
    """The host's own names for the site."""


@dataclass(frozen=True)
class NormSite:
    """One normalisation of a target model whose output is affine in a gain: y = xhat * w + b, or xhat * (1 + w) + b."""

    name: str
    """Canonical name, such as `blocks.0.ln1.w`; a plain module's is its dotted path plus `.weight`."""
    width: int
    """Entries of the gain."""
    has_bias: bool = False
    """Whether the host adds a bias after it."""
    aliases: tuple[str, ...] = field(default=(), compare=False)
    """The host's own names for it."""


@dataclass(frozen=True)
class Span:
    """The columns of the token rows that one forward pass computes: with a key/value cache only the last ones.

    A row is what the user handed to the model, padding included.
    """

    start: int = 0
    """Columns before this pass: the length of the cache."""
    prompt: int | None = None
    """Columns of the row when decoding began; None while that is this very pass."""
    generating: bool = False
    """Inside `generate`: the row may still grow."""
    prompt_known: bool = True
    """False where nothing tells the end of the prompt, so that only absolute positions have a meaning."""


@dataclass(frozen=True)
class SiteCall:
    """One call of a weight site during a forward pass."""

    x: Float[Tensor, "*rows d_in"] | Int[Tensor, "*rows"]
    """Exactly what multiplies the weight; for an embedding, the indices; for a norm, the normalised xhat."""
    y: Float[Tensor, "*out_rows d_out"]
    """The host's own output, bias included."""
    bias: Float[Tensor, " d_out"] | None
    """The bias the host added, if any."""
    span: Span
    """Which columns of the row these are."""


SiteFn: TypeAlias = Callable[[SiteCall], Tensor]
"""From one call of a site to the output to use instead of `y` (broadcast to the batch where the masks need it)."""

SitePattern: TypeAlias = str | Iterable[str] | Callable[[WeightSite], bool]
"""A glob, several globs, or a predicate over sites."""
AnySite = TypeVar("AnySite", bound=WeightSite | NormSite)


@dataclass(frozen=True)
class Fingerprint:
    """What is remembered of one site's weight and bias, to recognise them again."""

    shape: tuple[int, int]
    dtype: str
    norm: float
    """Frobenius norm of W."""
    bias_norm: float
    """Norm of b; 0 without a bias."""
    projections: tuple[float, ...]
    """Seeded random projections over all entries of W, then of b."""
    means: tuple[float, float]
    """Norms of the mean over the input and over the output axis: 0 after the host centred that side."""


# --- sites by name ----------------------------------------------------------------------------------------------------
def select_sites(
    sites: Mapping[str, AnySite], pattern: SitePattern, refused: Mapping[str, str] | None = None
) -> dict[str, AnySite]:
    """Sites that a pattern selects, in the order of `sites`.

    Args:
        sites: All sites of a model by canonical name.
        pattern: A glob (`*` also crosses dots) over canonical names and aliases, a list of globs, or a predicate.
        refused: Names that the host has but that cannot be decomposed, each with the reason.

    Raises:
        NoMatchingSiteError: A pattern selects nothing; the message names the nearest names.
        UnsupportedSiteError: A pattern selects only refused names.
    """
    if not callable(pattern):
        return _matching(sites, pattern, _NoMatch(sites, refused))
    chosen = {name: site for name, site in sites.items() if pattern(site)}  # type: ignore[arg-type]
    if not chosen:
        raise NoMatchingSiteError(
            f"The predicate {pattern!r} is true of none of the {len(sites)} weight sites. {_examples(sites)}"
        )
    return chosen


def select_norms(
    norms: Mapping[str, NormSite], pattern: str | Iterable[str], refused: Mapping[str, str], hint: str = ""
) -> dict[str, NormSite]:
    """Norms that globs over canonical names and aliases select, in the order of `norms`; errors as of `select_sites`.

    `refused` are names whose gains cannot be moved exactly, each with the reason; `hint` is said where nothing matches.
    """
    refusal = "The gain of {} cannot be moved exactly on this host: {}."
    return _matching(norms, pattern, _NoMatch(norms, refused, "normalisation gain", refusal, hint))


def resolve_name(sites: Mapping[str, WeightSite], name: str, refused: Mapping[str, str] | None = None) -> str:
    """Canonical name of the one site called `name`, canonically or by a host's alias; errors as of `select_sites`."""
    found = name if name in sites else next((site.name for site in sites.values() if name in site.aliases), None)
    if found is None:
        raise _NoMatch(sites, refused).error(name)
    return found


def matches(glob: str, site: WeightSite | NormSite) -> bool:
    """Whether a glob, or a name, is of a site's or norm's canonical name or of one of its aliases."""
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for name in (site.name, *site.aliases))


class _NoMatch(NamedTuple):
    """What to say of a glob that matches nothing."""

    sites: Mapping[str, Any]
    refused: Mapping[str, str] | None = None
    kind: str = "weight site"
    refusal: str = "{} cannot be decomposed on this host: {}"
    hint: str = ""

    def error(self, glob: str) -> Exception:
        for name, reason in (self.refused or {}).items():
            if name == glob or fnmatch.fnmatchcase(name, glob):
                return UnsupportedSiteError(self.refusal.format(name, reason))
        names = [*self.sites, *(alias for site in self.sites.values() for alias in site.aliases)]
        near = difflib.get_close_matches(glob, names, n=4, cutoff=0.4)
        there = f"Nearest names: {', '.join(near)}." if near else _examples(self.sites)
        hint = f" {self.hint}" if self.hint else ""
        return NoMatchingSiteError(f"{glob!r} matches none of the {len(self.sites)} {self.kind}s. {there}{hint}")


def _matching(sites: Mapping[str, AnySite], pattern: str | Iterable[str], nothing: _NoMatch) -> dict[str, AnySite]:
    globs = [pattern] if isinstance(pattern, str) else list(pattern)
    if not globs:
        raise NoMatchingSiteError(f"An empty list of globs selects no {nothing.kind}. {_examples(sites)}")
    for glob in globs:
        if not any(matches(glob, site) for site in sites.values()):
            raise nothing.error(glob)
    return {name: site for name, site in sites.items() if any(matches(glob, site) for glob in globs)}


def _examples(sites: Mapping[str, Any]) -> str:
    return f"Names look like: {', '.join(list(sites)[:4])}." if sites else "The model has none."


# --- rows -------------------------------------------------------------------------------------------------------------
def check_rows(tokens: object, attention_mask: object = None) -> None:
    """Refuse what cannot be a batch of token rows (or of other inputs, for a model that is no language model): DtypeError where
    they are no tensors or the mask is not of whole numbers, ShapeError, and DataError where there are no values to look at, or
    the mask holds something else than 0 and 1."""
    if not isinstance(tokens, Tensor):
        raise DtypeError(f"Tokens must be a tensor [batch, pos]; given {type(tokens).__name__}. Tokenise text first.")
    check_dense(tokens, "The tensor of rows")
    if not tokens.is_floating_point() and tokens.ndim != 2:
        raise ShapeError(f"Token rows are [batch, pos]; given {list(tokens.shape)}. For one row: tokens.unsqueeze(0).")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        given = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise DtypeError(f"An attention mask is a tensor of 0 and 1 (integers or booleans); given {given}.")
    if attention_mask.shape != tokens.shape[:2]:
        raise ShapeError(f"The attention mask is {list(attention_mask.shape)}, the token rows {list(tokens.shape)}.")
    check_mask_values(attention_mask)


def check_dense(given: Tensor, what: str) -> None:
    """Refuse tensors whose numbers cannot be looked at: sparse or nested ones, and those without values (DataError)."""
    if given.layout != torch.strided or given.is_meta or given.is_nested:
        raise DataError(f"{what} is {given.layout} on {given.device}; give a dense tensor with values.")


def check_mask_values(attention_mask: Tensor) -> None:
    """Refuse a mask of anything but 0 and 1 (DataError): hosts read it as yes or no, and sums over positions weigh by it."""
    check_dense(attention_mask, "The attention mask")
    if attention_mask.dtype != torch.bool and attention_mask.numel():
        other = ~((attention_mask == 0) | (attention_mask == 1))
        if bool(other.any()):
            raise DataError(
                f"An attention mask holds 1 where a position counts and 0 where not; given {attention_mask[other][0].item()}, "
                "as in labels or position numbers. For tokens != padding: (tokens != pad).long()."
            )
