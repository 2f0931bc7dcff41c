"""Forward passes of a sweep: many components patched one at a time, as rows of one batch.

1. Group the patches by the first block that they change anything in.
2. Capture once per group what its sites read in the run that is patched (and in the run that values come from): nothing
   upstream changes, so that what each patch adds to its site's output is known beforehand.
3. Run batches in which each row adds its own patch, beginning at the group's block, to the vectors at the answer
   positions where the host allows it; from the first block to all logits where it does not.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.shortcuts import UNEMBEDDING
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.sites import SiteCall


class Inputs(NamedTuple):
    """What one site reads in the run that is patched, and in the run that values come from."""

    x: Tensor
    other: Tensor | None


class Added(NamedTuple):
    """What some patches of one site add to its output."""

    site: str
    writes: Float[Tensor, "patches n ... d_out"]


@dataclass(frozen=True, eq=False)
class SitePatches:
    """Every patch of one site: components, by head and by position where asked for."""

    components: Components
    by_head: bool
    each: int | None
    """Positions, where each is patched by itself."""
    change: Callable[[Inputs], Float[Tensor, "n ..."]]
    """From inputs to a' - h: [n, pos, C], or [n, pos, head, C] where heads read parts of their own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of the effects: positions and heads, where they are apart, and C."""
        heads = (self.components.site.n_heads or 1,) if self.by_head else ()
        return (*(() if self.each is None else (self.each,)), *heads, self.components.n_components)

    def __len__(self) -> int:
        return math.prod(self.shape)

    def added(self, change: Tensor, patches: Int[Tensor, " some"]) -> Float[Tensor, "some n ... d_out"]:
        """What these patches add to the site's output."""
        places = list(torch.unravel_index(patches, self.shape))
        c, p = places[-1], None if self.each is None else places[0]
        head, side = places[-2] if self.by_head else None, self.components.site.head_side
        acts = change[..., c] if head is None or side == "out" else change[..., head, c]
        acts = acts.movedim(-1, 0)
        if p is not None:
            acts = acts * (torch.arange(self.each or 0, device=p.device) == p.unsqueeze(-1)).unsqueeze(1).to(acts)
        U = self.components.U.detach()[c]
        if head is not None and side == "out":
            heads = self.components.site.n_heads or 1
            kept = torch.arange(heads, device=c.device) == head.unsqueeze(-1)
            U = (U.unflatten(-1, (heads, -1)) * kept.unsqueeze(-1).to(U)).flatten(1)
        return acts.unsqueeze(-1) * U.view(len(U), *(1,) * (acts.ndim - 1), -1)


@dataclass(eq=False)
class Unpatched:
    """Rows that are run unpatched once, some at a time, with what later passes need of them."""

    adapter: ModelAdapter
    tokens: Tensor
    attention_mask: Tensor | None
    rows_at_once: int
    resumes: bool
    """Keep what blocks return."""

    def __post_init__(self) -> None:
        self.parts = list(torch.arange(len(self.tokens), device=self.tokens.device).split(self.rows_at_once))
        self.blocks: list[tuple[Any, ...]] = []
        if self.resumes:
            for part in self.parts:
                kept = self.adapter.capture(*self._rows(part, 1), keep_blocks=True, to_hidden=self._ends)
                self.blocks.append(kept.blocks)

    @property
    def _ends(self) -> bool:
        return UNEMBEDDING in self.adapter.wirings and self.adapter.splits_at_unembedding

    def _rows(
        self, part: Tensor, copies: int, names: Sequence[str] = ()
    ) -> tuple[Tensor, Sequence[str], Tensor | None]:
        mask = self.attention_mask
        return copied(self.tokens[part], copies), names, None if mask is None else copied(mask[part], copies)

    def inputs(self, names: Sequence[str], block: int) -> dict[str, Tensor]:
        """x of sites that lie at or after a block."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        short = (
            self._ends and not any(name.startswith(UNEMBEDDING) for name in names) and not self.adapter.interceptions
        )
        for i, part in enumerate(self.parts):
            with self.resumed(i, 1, block):
                inputs = self.adapter.capture(*self._rows(part, 1, names), to_hidden=short).inputs
            for name, x in inputs.items():
                found[name].append(x)
        return {name: torch.cat(parts) for name, parts in found.items()}

    @contextlib.contextmanager
    def resumed(self, i: int, copies: int, block: int) -> Iterator[None]:
        """Passes over copies of one part's rows begin at a block."""
        if not self.resumes or block == 0:
            yield
            return
        outputs = [copied(output, copies) for output in self.blocks[i][:block]]
        with self.adapter.resumed([*outputs, *self.blocks[i][block:]], block):
            yield

    def batch(self, part: Tensor, copies: int) -> tuple[Tensor, Tensor | None]:
        """Copies of rows, one after the other, and their attention mask."""
        tokens, _, mask = self._rows(part, copies)
        return tokens, mask


@dataclass(eq=False)
class Runner:
    """Runs patches in batches and scores each.

    Args of `score`: the logits of all prompts under one patch: [n, vocab] at the answers, or [n, pos, vocab].
    """

    adapter: ModelAdapter
    prompts: Unpatched
    last: Int[Tensor, " n"] | None
    """Answer positions; None where all logits are wanted."""
    score: Callable[[Tensor], Tensor]
    ends: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ends = self.last is not None and not self.adapter.interceptions and self.adapter.splits_at_unembedding

    def scores(self, added: Sequence[Added], block: int) -> Float[Tensor, "patches n"]:
        """Scores of some patches, whose sites lie at or after a block; of the run itself where there are none."""
        copies = sum(len(a.writes) for a in added) or 1
        parts = [self._logits(i, part, copies, added, block) for i, part in enumerate(self.prompts.parts)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return torch.stack([self.score(logits).detach().double() for logits in whole])

    def _logits(self, i: int, part: Tensor, copies: int, added: Sequence[Added], block: int) -> Tensor:
        """[patches, rows of the part, (pos,) vocab]."""
        n, at, fns = len(part), 0, {}
        for a in added:
            fns[a.site] = functools.partial(_add, a.writes[:, part].flatten(0, 1), at * n, copies * n)
            at += len(a.writes)
        tokens, mask = self.prompts.batch(part, copies)
        ends = self.ends and not any(site.startswith(UNEMBEDDING) for site in fns)
        run = self.adapter.hidden if ends else self.adapter.forward
        with self.prompts.resumed(i, copies, block), self.adapter.intercept(fns) if fns else contextlib.nullcontext():
            out = run(tokens, mask)
        if self.last is not None:
            out = out[torch.arange(len(out), device=out.device), self.last[part].to(out.device).repeat(copies)]
        return (self.adapter.unembed(out) if ends else out).unflatten(0, (copies, n))


def _add(writes: Tensor, start: int, rows: int, call: SiteCall) -> Tensor:
    """A site's function that adds to some rows of its output, from `start` on."""
    wide = torch.promote_types(call.y.dtype, writes.dtype)
    y = call.y if len(call.y) == rows else call.y.expand(rows, *call.y.shape[1:])
    if len(writes) == rows:
        return (y.to(wide) + writes.to(wide)).to(y.dtype)
    new = y.clone()
    here = slice(start, start + len(writes))
    new[here] = (y[here].to(wide) + writes.to(wide)).to(y.dtype)
    return new


def copied(output: Any, copies: int) -> Any:
    """What a block returned, for copies of its rows one after the other."""
    if copies == 1:
        return output
    if isinstance(output, Tensor):
        return output.repeat(copies, *(1,) * (output.ndim - 1)) if output.ndim else output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(copied(part, copies) for part in output))
    if isinstance(output, tuple | list):
        return type(output)(copied(part, copies) for part in output)
    return output


def start_of(adapter: ModelAdapter, name: str) -> int:
    """The first block that a change of this site's output reaches; the number of blocks for the unembedding."""
    block = adapter.block_of(name)
    if block is None:
        return len(adapter.blocks) if name.startswith(UNEMBEDDING) else 0
    return block


def run_group(
    runner: Runner, patches: Mapping[str, SitePatches], changes: Mapping[str, Tensor], block: int, at_once: int
) -> Iterator[dict[str, tuple[int, Float[Tensor, "some n"]]]]:
    """Scores of all patches of some sites, batch by batch: by site, the first patch and the scores from it on."""
    queue = [(name, int(start)) for name, made in patches.items() for start in range(len(made))]
    for first in range(0, len(queue), at_once):
        batch: dict[str, list[int]] = {}
        for name, patch in queue[first : first + at_once]:
            batch.setdefault(name, []).append(patch)
        device = runner.prompts.tokens.device
        added = [
            Added(name, patches[name].added(changes[name], torch.tensor(some, device=device)))
            for name, some in batch.items()
        ]
        scores = runner.scores(added, block).split([len(some) for some in batch.values()])
        yield {name: (some[0], part) for (name, some), part in zip(batch.items(), scores)}
