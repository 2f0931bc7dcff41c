"""Every component ablated on its own, many variants at once as rows of one batch.

A variant changes what one site writes: y' = y - (h_c - h'_c) U_c at one position, or at several. Variants of one site are the
same rows over and over, so that a metric which remembers something of each row still finds it. Blocks before the site return
what they returned.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.shortcuts import UNEMBEDDING
from tl_paramdecomp.analysis.effects.site_writes import Prompts, SiteWrites
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.sites import SiteCall


@dataclass(frozen=True, eq=False)
class Ablations:
    """What is run: rows, and where components are ablated."""

    adapter: ModelAdapter
    prompts: Prompts
    rows: Int[Tensor, "batch pos"]
    singly: tuple[int, ...] | None
    """Positions to ablate at one by one; None: at all of `columns` at once."""
    columns: tuple[int, ...]
    rows_at_once: int

    @property
    def copies(self) -> int:
        """Variants in one forward pass."""
        return max(1, self.rows_at_once // len(self.rows))


def ablated_effects(
    run: Ablations,
    sites: Mapping[str, Components],
    base: SiteWrites,
    reference: SiteWrites | None,
    plain: Float[Tensor, " batch"],
    progress: bool = True,
) -> tuple[dict[str, Float[Tensor, "batch columns _C"]], dict[str, Float[Tensor, "batch columns"]]]:
    """Metric of the run minus metric with one component's activation replaced, for components and delta components; in the
    clean run, with the component minus without it.

    Args:
        run: What is run.
        sites: Components to ablate.
        base: Reads and writes over `run.rows`.
        reference: Of the run whose activations take their place; None for zero.
        plain: The metric over `run.rows`.
        progress: Show a progress bar.
    """
    values, delta = {}, {}
    work = {name: _Changes.of(run, name, c, base, reference) for name, c in sites.items()}
    with _known_blocks(run) as blocks, tqdm(desc="ablations", disable=not progress, leave=False) as bar:
        bar.total = sum(len(changes.variants) for changes in work.values())
        for name, changes in work.items():
            effects = _effects_at(run, name, changes, plain, blocks, bar)
            values[name], delta[name] = effects[..., :-1], effects[..., -1]
    return values, delta


@dataclass(frozen=True, eq=False)
class _Changes:
    """What the variants of one site subtract from its output."""

    amounts: Float[Tensor, "batch pos C"]
    """h - h', 0 where nothing is to be ablated."""
    U: Float[Tensor, "C d_out"]
    rest: Float[Tensor, "batch pos d_out"]
    """The same of the delta component, as vectors."""
    variants: list[tuple[int, int]]
    """(place among the columns, component) of those that change anything; component C is the delta component."""
    columns: int
    """Length of the second axis of the effects."""

    @classmethod
    def of(
        cls, run: Ablations, name: str, components: Components, base: SiteWrites, reference: SiteWrites | None
    ) -> "_Changes":
        amounts, rest = base.acts(name, components), base.delta_write(name, components)
        if reference is not None:
            amounts = amounts - reference.acts(name, components)
            rest = rest - reference.delta_write(name, components)
        wanted = torch.zeros(run.rows.shape, dtype=amounts.dtype, device=amounts.device)
        wanted[:, list(run.columns)] = 1.0
        if run.prompts.real is not None:
            wanted *= run.prompts.real
        amounts, rest = amounts * wanted.unsqueeze(-1), rest * wanted.unsqueeze(-1).to(rest.dtype)
        touched = torch.cat([amounts != 0, (rest != 0).any(-1, keepdim=True)], -1).any(0)  # [pos, C + 1]
        touched = touched.any(0, keepdim=True) if run.singly is None else touched[list(run.singly)]
        variants = [(p, c) for p, c in touched.nonzero().tolist()]
        return cls(amounts, components.U.detach(), rest, variants, len(touched))

    def vectors(self, run: Ablations, variants: list[tuple[int, int]]) -> Float[Tensor, "copies batch pos d_out"]:
        """What each of some variants subtracts."""
        C, batch = self.U.shape[0], len(run.rows)
        found = self.rest.new_zeros(len(variants), batch, run.rows.shape[1], self.U.shape[1])
        for i, (place, c) in enumerate(variants):
            at = slice(None) if run.singly is None else run.singly[place]
            found[i, :, at] = self.rest[:, at] if c == C else self.amounts[:, at, c, None] * self.U[c]
        return found


@contextlib.contextmanager
def _known_blocks(run: Ablations) -> Iterator[tuple]:
    """What every block returns over the repeated rows; nothing where passes cannot begin later."""
    if run.adapter.interceptions or not run.adapter.blocks:
        yield ()
        return
    with torch.no_grad():
        rows, mask = _repeated(run)
        yield run.adapter.capture(rows, (), mask, keep_blocks=True).blocks


def _repeated(run: Ablations) -> tuple[Tensor, Tensor | None]:
    mask = run.prompts.attention_mask
    return run.rows.repeat(run.copies, 1), None if mask is None else mask.repeat(run.copies, 1)


def _effects_at(
    run: Ablations, name: str, changes: _Changes, plain: Tensor, blocks: tuple, bar: "tqdm"
) -> Float[Tensor, "batch columns C_and_delta"]:
    rows, mask = _repeated(run)
    found = changes.amounts.new_zeros(len(run.rows), changes.columns, changes.U.shape[0] + 1)
    block = run.adapter.block_of(name) if blocks else None
    first = block or (len(blocks) if name == UNEMBEDDING else 0)
    for begin in range(0, len(changes.variants), run.copies):
        some = changes.variants[begin : begin + run.copies]
        filled = some + [some[-1]] * (run.copies - len(some))  # what blocks returned is of this many rows
        fn = functools.partial(_subtracted, changes.vectors(run, filled).flatten(0, 1))
        shorter = run.adapter.resumed(blocks, first) if blocks else contextlib.nullcontext()
        with torch.no_grad(), run.adapter.intercept({name: fn}), shorter:
            logits = run.adapter.forward(rows, mask)
        for (place, c), own in zip(some, logits.split(len(run.rows)), strict=False):
            found[:, place, c] = (plain - run.prompts.measure(own)).to(found.dtype)
        bar.update(len(some))
    real = run.prompts.real
    if run.singly is not None and real is not None:  # rounding, at most: nothing is changed at padding
        found *= real[:, list(run.singly)].unsqueeze(-1)
    return found


def _subtracted(change: Tensor, call: SiteCall) -> Tensor:
    return (call.y.to(change.dtype) - change).to(call.y.dtype)
