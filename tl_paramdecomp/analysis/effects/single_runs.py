"""Forward passes of many variants at once: each patch adds something of its own to what one site writes, in rows of one batch.

1. Group the patches by the first block that they change anything in.
2. What each adds is worked out beforehand, from what its site reads in the run that is patched: nothing upstream changes.
3. Run batches in which each patch has copies of all rows, beginning at the group's block, to the vectors at the answer
   positions where the host allows it; from the first block to all logits where it does not. Variants are the same rows
   over and over, so that a metric which remembers something of each row still finds it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.adapters.shortcuts import UNEMBEDDING
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.sites import SiteCall


@dataclass(frozen=True, eq=False)
class SitePatches:
    """Every patch of one site: components, by head and by position where asked for, and perhaps the delta component last."""

    components: Components
    change: Float[Tensor, "n ..."]
    """a' - h: [n, pos, C], or [n, pos, head, C] where heads read parts of their own."""
    each: Sequence[int] | None = None
    """Positions that are patched one by one; None: all that `change` is not 0 at, at once."""
    by_head: bool = False
    rest: Float[Tensor, "n pos d_out"] | None = None
    """What patching the delta component adds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of the effects: positions and heads, where they are apart, and C (with the delta component C + 1)."""
        heads = (self.components.site.n_heads or 1,) if self.by_head else ()
        last = self.components.n_components + (self.rest is not None)
        return (*(() if self.each is None else (len(self.each),)), *heads, last)

    def __len__(self) -> int:
        return math.prod(self.shape)

    def changing(self) -> list[int]:
        """Patches that change anything, where heads are not apart."""
        there = self.change != 0
        if self.rest is not None:
            there = torch.cat([there, (self.rest != 0).any(-1, keepdim=True)], -1)
        there = there.any(0)
        there = there.any(0) if self.each is None else there[list(self.each)]
        return there.flatten().nonzero().flatten().tolist()

    def added(self, patches: Int[Tensor, " some"]) -> Float[Tensor, "some n ... d_out"]:
        """What these patches add to the site's output."""
        places = list(torch.unravel_index(patches, self.shape))
        of_delta = places[-1] == self.components.n_components
        c = places[-1].masked_fill(of_delta, 0)
        head, side = places[-2] if self.by_head else None, self.components.site.head_side
        acts = self.change[..., c] if head is None or side == "out" else self.change[..., head, c]
        acts, here = acts.movedim(-1, 0), None
        if self.each is not None:
            at = torch.tensor(self.each, device=c.device)[places[0]]
            here = (torch.arange(self.change.shape[1], device=c.device) == at.unsqueeze(-1)).unsqueeze(1)
            acts = acts * here.to(acts)
        U = self.components.U.detach()[c]
        if head is not None and side == "out":
            heads = self.components.site.n_heads or 1
            kept = torch.arange(heads, device=c.device) == head.unsqueeze(-1)
            U = (U.unflatten(-1, (heads, -1)) * kept.unsqueeze(-1).to(U)).flatten(1)
        writes = acts.unsqueeze(-1) * U.view(len(U), *(1,) * (acts.ndim - 1), -1)
        if self.rest is not None:
            rest = self.rest if here is None else self.rest * here[of_delta].unsqueeze(-1).to(self.rest)
            writes = writes.to(rest.dtype)
            writes[of_delta] = rest
        return writes


@dataclass(eq=False)
class Runs:
    """Rows that are run unpatched once, some at a time, with what later passes need of them; and with patches, in batches."""

    adapter: ModelAdapter
    tokens: Tensor
    attention_mask: Tensor | None
    rows_at_once: int
    score: Callable[[Tensor], Tensor] | None = None
    """Of the logits of all rows under one patch: [n, vocab] at the answers, or [n, pos, vocab]."""
    last: Int[Tensor, " n"] | None = None
    """Answer positions; None where all logits are wanted."""
    resumes: bool = True
    """Keep what blocks return, where the host's passes can begin later and no patch is open elsewhere."""

    def __post_init__(self) -> None:
        alone = not self.adapter.interceptions
        self.resumes = self.resumes and bool(self.adapter.blocks) and alone
        self.splits = UNEMBEDDING in self.adapter.wirings and self.adapter.splits_at_unembedding
        self.ends = self.last is not None and alone and self.adapter.splits_at_unembedding
        self.parts = list(torch.arange(len(self.tokens), device=self.tokens.device).split(self.rows_at_once))
        self.blocks: list[tuple[Any, ...]] = []
        for part in self.parts if self.resumes else ():
            rows, mask = self.batch(part, 1)
            self.blocks.append(self.adapter.capture(rows, (), mask, keep_blocks=True, to_hidden=self.splits).blocks)

    def batch(self, part: Tensor, copies: int) -> tuple[Tensor, Tensor | None]:
        """Copies of rows, one after the other, and their attention mask."""
        mask = self.attention_mask
        return copied(self.tokens[part], copies), None if mask is None else copied(mask[part], copies)

    def inputs(self, names: Sequence[str], block: int) -> dict[str, Tensor]:
        """x of sites that lie at or after a block."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        at_end = any(name.startswith(UNEMBEDDING) for name in names)
        short = self.splits and not at_end and not self.adapter.interceptions
        for i, part in enumerate(self.parts):
            rows, mask = self.batch(part, 1)
            with self.resumed(i, 1, block):
                inputs = self.adapter.capture(rows, names, mask, to_hidden=short).inputs
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

    def by_block(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Sites by the first block that a change of what they write reaches; all at 0 where passes begin there."""
        groups: dict[int, list[str]] = {}
        for name in names:
            last = len(self.adapter.blocks) if name.startswith(UNEMBEDDING) else 0
            groups.setdefault((self.adapter.block_of(name) or last) if self.resumes else 0, []).append(name)
        return dict(sorted(groups.items()))

    def plain(self) -> Float[Tensor, " n"]:
        """Scores of the run that is not patched."""
        return self._scores({}, 0)[0]

    def patched(
        self, patches: Mapping[str, SitePatches], block: int, wanted: Mapping[str, Sequence[int]] | None = None
    ) -> Iterator[tuple[str, list[int], Float[Tensor, "some n"]]]:
        """Scores of patches whose sites lie at or after a block, batch by batch: a site, some of its patches, their scores."""
        at_once = max(1, self.rows_at_once // len(self.tokens))
        queue = [
            (name, i) for name, own in patches.items() for i in (range(len(own)) if wanted is None else wanted[name])
        ]
        for first in range(0, len(queue), at_once):
            batch: dict[str, list[int]] = {}
            for name, patch in queue[first : first + at_once]:
                batch.setdefault(name, []).append(patch)
            device = self.tokens.device
            added = {name: patches[name].added(torch.tensor(some, device=device)) for name, some in batch.items()}
            scores = self._scores(added, block).split([len(some) for some in batch.values()])
            yield from ((name, some, part) for (name, some), part in zip(batch.items(), scores))

    def _scores(self, added: Mapping[str, Tensor], block: int) -> Float[Tensor, "patches n"]:
        copies = sum(map(len, added.values())) or 1
        parts = [self._logits(i, part, copies, added, block) for i, part in enumerate(self.parts)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        assert self.score is not None
        return torch.stack([self.score(logits).detach().double() for logits in whole])

    def _logits(self, i: int, part: Tensor, copies: int, added: Mapping[str, Tensor], block: int) -> Tensor:
        """[patches, rows of the part, (pos,) vocab]."""
        n, at, fns = len(part), 0, {}
        for site, writes in added.items():
            fns[site] = functools.partial(_add, writes[:, part].flatten(0, 1), at * n, copies * n)
            at += len(writes)
        tokens, mask = self.batch(part, copies)
        ends = self.ends and not any(site.startswith(UNEMBEDDING) for site in fns)
        run = self.adapter.hidden if ends else self.adapter.forward
        with self.resumed(i, copies, block), self.adapter.intercept(fns) if fns else contextlib.nullcontext():
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

    def repeated(part: Any) -> Any:
        return part.repeat(copies, *(1,) * (part.ndim - 1)) if isinstance(part, Tensor) and part.ndim else part

    return output if copies == 1 else tree_map(repeated, output)
