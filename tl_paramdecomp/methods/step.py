"""One batch, or a microbatch of it, as every loss of a step sees it: a clean pass, importances, and passes under masks."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.outputs import need_logits
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.importance import CleanPass, Importance, ImportanceSource
from tl_paramdecomp.components.masked_output import InterpolatedMask, masked_output
from tl_paramdecomp.methods.divergence import KL, ChunkedKL, Divergence, MeanSquare, at_scored
from tl_paramdecomp.methods.prefixes import Prefixes
from tl_paramdecomp.methods.random_streams import AnyGenerator, RandomStreams, as_streams
from tl_paramdecomp.parallel import WHOLE, Place
from tl_paramdecomp.sites import SiteCall

Measure = Literal["kl", "mse"]
"""How outputs are compared: KL of next-token distributions, or mean square."""

KL_NEEDS, MSE_INSTEAD = (
    "KL compares distributions of next tokens and needs",
    "use measure='mse', of outputs as they are",
)
"""Why KL is refused where there are no logits, and what works."""


def measure_of(adapter: ModelAdapter) -> Measure:
    """What outputs are compared by where nobody says: KL of logits, else their mean square."""
    return "kl" if adapter.gives_logits else "mse"


SiteMasks: TypeAlias = Mapping[str, InterpolatedMask]
"""Masks by site; a site that is missing runs the target's own weight."""


class SiteValues(NamedTuple):
    """What passes one site in a forward pass."""

    x: Tensor
    """Input [..., d_in]."""
    y: Tensor
    """Output [..., d_out], after the mask."""


@dataclass
class LossStep:
    """One batch, or a microbatch of it, seen by every loss of a step."""

    adapter: ModelAdapter
    decomposition: Decomposition
    tokens: Shaped[Tensor, "batch ..."]
    attention_mask: Int[Tensor, "batch pos"] | None
    inputs: Mapping[str, Tensor]
    """x of each site in the clean forward pass: [batch, pos, d_in], or indices."""
    importances: Mapping[str, Importance]
    divergence: Divergence
    """Distance of an output from the target's."""
    random: RandomStreams
    """Draws every mask of the step."""
    progress: float = 1.0
    """Share of the run that is over, in [0, 1]."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that outlive the step."""
    blocks: Sequence[Any] = ()
    """What each block of the target returned, where passes may begin at a later one; the last before the first site stands for
    all before it."""
    place: Place = WHOLE
    """Where these rows stand, where they are not the whole batch."""
    scale: float = 1.0
    """Factor on losses while gradients are taken, which are divided by it afterwards: float16 has no room for small ones."""
    uncut: Mapping[str, Importance] = field(default_factory=dict)
    """Importances with the graph of their function, where `importances` are leaves; see `cut`."""

    @classmethod
    def of(
        cls,
        adapter: ModelAdapter,
        decomposition: Decomposition,
        tokens: Tensor,
        attention_mask: Tensor | None,
        generator: AnyGenerator,
        progress: float = 1.0,
        measure: Measure = "kl",
        memory: dict[str, Tensor] | None = None,
        kl_chunk: int | None = None,
        keep_blocks: bool = False,
        source: ImportanceSource | None = None,
        place: Place = WHOLE,
        scale: float = 1.0,
        prefixes: Prefixes | None = None,
    ) -> "LossStep":
        """A batch with the target's output and the importances of a clean forward pass; arguments as the fields, and:

        Args:
            measure: How outputs are compared.
            kl_chunk: Positions whose logits may exist at once; None: all.
            keep_blocks: Let passes that mask later sites alone begin at their block; all begin at the first site's.
            source: Of importances, taken instead of the decomposition's own function.
            prefixes: Remembers what stands before the first site's block, row by row.

        Raises:
            UnsupportedModelError: KL is asked of a model that gives no logits.
        """
        if measure == "kl":
            need_logits(adapter, KL_NEEDS, MSE_INSTEAD)
        scored = None if attention_mask is None else attention_mask.bool()
        # passes may end before the unembedding where it is none of the sites, and its host adds nothing after
        unembeds = any(name.startswith("unembed.W_U") for name in decomposition)
        in_chunks = kl_chunk is not None and measure == "kl" and not unembeds and adapter.splits_at_unembedding
        # where others intercept the model, their sites must be reached too
        first = 0 if adapter.interceptions else adapter.first_block(decomposition)
        with torch.no_grad(), contextlib.ExitStack() as begins:
            known = prefixes.before(adapter, first, tokens, attention_mask) if prefixes is not None and first else None
            blocks = [known] * first
            if known is not None:
                begins.enter_context(adapter.resumed([known] * len(adapter.blocks), first))
            keep = keep_blocks or (first > 0 and known is None)
            clean = adapter.capture(tokens, list(decomposition), attention_mask, keep, to_hidden=in_chunks)
        if keep:
            blocks = [*clean.blocks[first - 1 : first] * first, *(clean.blocks[first:] if keep_blocks else ())]
        divergence: Divergence
        if in_chunks and kl_chunk is not None:
            divergence = ChunkedKL(clean.output, scored, adapter.unembed, kl_chunk)
        else:
            divergence = (KL if measure == "kl" else MeanSquare)(clean.output, scored)
            if divergence.by_row and place is not WHOLE:  # a mean over rows; microbatches weigh as their positions do
                divergence.share = place.window.rows / place.window.of / place.weight
        source = decomposition.importance_source() if source is None else source
        seen = CleanPass(adapter, tokens, attention_mask, clean.inputs, measure)
        importances = source.importances(decomposition, seen)
        return cls(
            adapter, decomposition, tokens, attention_mask, clean.inputs, importances, divergence, as_streams(generator),
            progress, {} if memory is None else memory, blocks, place, scale,
        )  # fmt: skip

    @property
    def scored(self) -> Bool[Tensor, "..."] | None:
        """Positions that count; None where all do."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def at_scored(self, values: Float[Tensor, "batch *pos width"]) -> Float[Tensor, "n width"]:
        """What stands at the positions that count, one after the other."""
        return at_scored(values, self.scored)

    @property
    def device(self) -> torch.device:
        """Where the step is computed."""
        return self.tokens.device

    def rows_of(self, site: str) -> Sequence[int]:
        """Shape of a site's masks without components: [batch, pos], or [batch]."""
        return self.importances[site].lower.shape[:-1]

    def run_masked(self, masks: SiteMasks, kept: dict[str, SiteValues] | None = None) -> Float[Tensor, "batch ..."]:
        """What the model gives with these masks at its sites, in the form that `divergence` takes; `kept` is filled with what
        passes each site."""
        fns = {
            name: functools.partial(_masked_call, self.decomposition[name], mask, name, kept)
            for name, mask in masks.items()
        }
        with self.adapter.intercept(fns), self._resumed(masks):
            run = self.adapter.hidden if self.divergence.of_hidden else self.adapter.forward
            return run(self.tokens, self.attention_mask)

    def _resumed(self, masks: SiteMasks) -> contextlib.AbstractContextManager[None]:
        """Nothing before the first masked site's block needs to be computed again."""
        first = min(self.adapter.first_block(masks), len(self.blocks))
        if not first:
            return contextlib.nullcontext()
        unknown = [None] * (len(self.adapter.blocks) - len(self.blocks))
        return self.adapter.resumed([*self.blocks, *unknown], first)

    def cut(self) -> "LossStep":
        """The same step with importances as leaves, so that each loss's gradient can be taken by itself."""
        leaves = {
            name: Importance(*(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in g))  # type: ignore[arg-type]
            for name, g in self.importances.items()
        }
        return replace(self, importances=leaves, uncut=self.importances)

    def join(self) -> None:
        """Pass gradients that gathered at the leaves on to the importance function: all at once, as sigmoids look at the sign
        of their sum."""
        pairs = [
            (whole, leaf.grad)
            for name, g in self.uncut.items()
            for whole, leaf in zip(g, self.importances[name], strict=True)
            if whole is not None and leaf is not None and leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward([whole for whole, _ in pairs], [grad for _, grad in pairs])

    def forget(self) -> None:
        """Let go of what the clean forward pass gave."""
        self.inputs, self.importances, self.uncut, self.blocks = {}, {}, {}, ()
        del self.divergence


def _masked_call(
    components: Components, mask: InterpolatedMask, name: str, kept: dict[str, SiteValues] | None, call: SiteCall
) -> Tensor:
    y = components(masked_output, mask, call.x, call.y, call.bias)
    if kept is not None:
        kept[name] = SiteValues(call.x, y)
        return y.clone()  # hosts may write into what they are given
    return y
