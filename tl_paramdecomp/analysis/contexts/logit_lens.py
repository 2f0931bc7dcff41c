"""What a component's write says to the unembedding when it goes there straight, past all later blocks.

A component that writes into the residual stream adds h_c U_c to it. The last normalisation is s (r - mean r) w + b (LayerNorm)
or s r w + b (RMSNorm); with its scale s left out, the logits change per unit of activation by

    W_U^T (w * (U_c - mean U_c))    LayerNorm
    W_U^T (w * U_c)                 RMSNorm
    W_U^T U_c                       no normalisation

where w is 1 if it is folded into W_U. Nothing is said of what later blocks make of the write, of the change in s, and of what
the host does to its logits afterwards (a factor, a cap). After nostalgebraist, "interpreting GPT: the logit lens" (2020); for
weights instead of activations Dar et al. 2023, arXiv 2209.02535.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.shortcuts import PROBE_SHAPE, UNEMBEDDING, probe_tokens
from tl_paramdecomp.analysis.contexts.component_streams import shown, token_text, tokenizer_of
from tl_paramdecomp.analysis.effects.site_writes import EMBEDDINGS, SiteWrites
from tl_paramdecomp.analysis.records import Record, Table, plain_table
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.indices import component_indices
from tl_paramdecomp.errors import ComponentIndexError, SettingError, UnsupportedModelError, UnsupportedSiteError
from tl_paramdecomp.patching.target import checked_adapter
from tl_paramdecomp.sites import resolve_name

FINAL_NORM = "ln_final.w"
WRITERS = ("W_O", "W_out")
FormulaKind = Literal["LayerNorm", "RMSNorm", "none"]


@dataclass(frozen=True)
class LensToken:
    """A token and what the write does to its logit."""

    token: int
    text: str | None
    value: float
    """Change of the logit per unit of the component's activation, with the component minus without it, the last
    normalisation's scale at 1."""


@dataclass(frozen=True)
class LogitLens(Record, what="logit lens"):
    """The tokens that a component's write promotes and demotes most, straight at the unembedding."""

    site: str
    """Its name."""
    component: int
    """Its number."""
    applied: str
    """The formula, in words."""
    top: list[LensToken]
    """Largest values first."""
    bottom: list[LensToken]
    """Smallest values first."""

    def tables(self) -> list[Table]:
        pairs = zip(self.top, self.bottom)
        rows = [[cell for t in pair for cell in (shown(t.token, t.text), f"{t.value:+.4f}")] for pair in pairs]
        return [plain_table(f"{self.site}[{self.component}]", "promoted", "value", "demoted", "value", rows=rows)]

    def footnotes(self) -> list[str]:
        return [f"{self.applied}. The sign is that of a positive activation; the normalisation's scale is left out."]


def logit_lens(
    model: Any, decomposition: Decomposition, site: str, c: int, n: int = 10, *, tokenizer: Any = None
) -> LogitLens:
    """The tokens whose logits a component's write raises and lowers most when it goes straight to the unembedding.

    Args:
        site: Name or alias of a W_O, a W_out or an embedding.
        c: The component.
        n: Tokens at each end.
        tokenizer: For the tokens' text; None: the host's own, where it holds one.

    Raises:
        UnsupportedSiteError: The site does not write into the residual stream, or not as it is.
        UnsupportedModelError: The model has no unembedding, or a last normalisation whose gain cannot be read.
        NoMatchingSiteError, ComponentIndexError: There is no such component.
        SettingError: n is not between 1 and the number of tokens.
        TargetMismatchError, DeviceError: As `component_acts`.
    """
    site = resolve_name(decomposition.sites, site)
    adapter, components = checked_adapter(model, decomposition), decomposition[site]
    chosen = component_indices(c, components.n_components, site)
    if len(chosen) != 1:
        raise ComponentIndexError(f"The logit lens is of one component; given {c!r}.")
    values, applied = lens_logits(adapter, site, components.U[chosen[0]].detach())
    if not 1 <= n <= len(values):
        raise SettingError(f"n lies between 1 and the {len(values)} tokens; given {n}.")
    told, order = tokenizer_of(model, tokenizer), values.sort(descending=True, stable=True).indices.tolist()
    ends = [
        [LensToken(t, token_text(told, t), float(values[t])) for t in tokens]
        for tokens in (order[:n], order[: -n - 1 : -1])
    ]
    return LogitLens(site, chosen[0], applied, *ends)


@torch.no_grad()
def lens_logits(
    adapter: ModelAdapter, site: str, write: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " vocab"], str]:
    """Change of all logits per unit along what a site writes, and the formula in words."""
    if UNEMBEDDING not in adapter.wirings:
        raise UnsupportedModelError(f"{type(adapter.root).__name__} has no unembedding, so that nothing is promoted.")
    check_writes_residual(adapter, site)
    weight = adapter.weight(UNEMBEDDING)
    if weight.shape[0] != len(write):
        raise UnsupportedSiteError(
            f"{site} writes {len(write)} numbers and the unembedding reads {weight.shape[0]}: the model maps one to the other "
            "on the way."
        )
    kind, gain = final_norm(adapter)
    wide = torch.promote_types(torch.promote_types(write.dtype, weight.dtype), torch.float32)
    direction, formula = write.to(wide), "U_c"
    if kind == "LayerNorm":
        direction, formula = direction - direction.mean(), "(U_c - mean)"
    if gain is not None:
        direction, formula = direction * gain.to(direction), f"(gain * {formula})"
    words = "no last normalisation" if kind == "none" else f"last {kind}"
    if kind != "none" and gain is None:
        words += " without a gain of its own"
    return direction @ weight.to(direction), f"Values are W_U^T {formula}: {words}"


class FinalNorm(NamedTuple):
    """What stands between the residual stream and the unembedding."""

    kind: FormulaKind
    gain: Float[Tensor, " d_model"] | None
    """What it multiplies by; None for 1."""


def final_norm(adapter: ModelAdapter) -> FinalNorm:
    """The last normalisation; one without a gain is known by what reaches the unembedding on a few tokens."""
    if FINAL_NORM in adapter.norms.wirings:
        wiring = adapter.norms.wirings[FINAL_NORM]
        return FinalNorm("LayerNorm" if wiring.centred else "RMSNorm", adapter.gain(FINAL_NORM) + wiring.offset)
    if FINAL_NORM in adapter.norms.refused:
        raise UnsupportedModelError(
            f"The last normalisation of {type(adapter.root).__name__} has a gain that cannot be read: "
            f"{adapter.norms.refused[FINAL_NORM]}."
        )
    with adapter.undisturbed():
        rows = adapter.hidden(probe_tokens(adapter)).float()
    means, sizes = rows.mean(-1).abs().max(), rows.pow(2).mean(-1).sqrt()
    if bool((sizes < 0.5).any() or (sizes > 1.01).any()):
        return FinalNorm("none", None)
    return FinalNorm("LayerNorm" if means < 1e-2 else "RMSNorm", None)


# --- does the write reach the residual stream as it is? -----------------------------------------------------------------
def check_writes_residual(adapter: ModelAdapter, site: str) -> None:
    """See that a site's write is added to the residual stream, up to a factor: by name, then on a few tokens."""
    if site not in EMBEDDINGS and site.rpartition(".")[2] not in WRITERS:
        raise UnsupportedSiteError(
            f"{site} does not write into the residual stream; the logit lens is for W_O, W_out and embeddings."
        )
    blocks = adapter.block_modules()
    if not blocks:
        return
    before = site in EMBEDDINGS
    block = blocks[0] if before else blocks[int(site.split(".")[1])]
    others = [f"{site.split('.attn.')[0]}.mlp.W_out"] if ".attn." in site else []
    if any(other not in adapter.wirings for other in others):
        return  # an MLP that cannot be held, such as a mixture of experts
    tokens, names = probe_tokens(adapter), (site, *others)
    with torch.no_grad(), adapter.undisturbed():
        writes = SiteWrites(len(tokens))
        with adapter.intercept(writes.fns(names, "open")):  # hosts may write into what they are given, not into y
            clean = _at_block(adapter, tokens, block, before)
        y = writes.y[site]
        drawn = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        change = (drawn.to(y) * y.abs().max().clamp(min=1e-3)).expand(*PROBE_SHAPE, -1)
        with adapter.intercept(SiteWrites(len(tokens)).fns(names, "pinned", writes.y | {site: y + change})):
            moved = _at_block(adapter, tokens, block, before)
    if clean is None or moved is None or clean.shape[-1] != change.shape[-1]:
        return
    found = (moved - clean).reshape(-1, change.shape[-1]).double()
    cosine = nn.functional.cosine_similarity(found, change.reshape(-1, change.shape[-1]).double(), dim=-1)
    if bool((cosine < 0.99).any()):
        raise UnsupportedSiteError(
            f"What {site} writes is normalised, or otherwise changed, before it is added to the residual stream; its "
            "components do not write there as they are."
        )


def _at_block(adapter: ModelAdapter, tokens: Tensor, block: nn.Module, before: bool) -> Tensor | None:
    """What a block reads, or returns, in one pass; None where that is no tensor."""
    seen: list[Any] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, *output: Any) -> None:
        found = output[0] if output else args[0] if args else next(iter(kwargs.values()), None)
        seen.append(found[0] if isinstance(found, tuple | list) and found else found)

    register = block.register_forward_pre_hook if before else block.register_forward_hook
    handle = register(keep, with_kwargs=True)
    try:
        adapter.forward(tokens)
    finally:
        handle.remove()
    return seen[0].detach().clone() if seen and isinstance(seen[0], Tensor) else None
