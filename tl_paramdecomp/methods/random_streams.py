"""Random numbers of a run: which of them all rows of a batch share, and which every row has of its own.

One process that takes its batches whole draws everything from one generator. Where a batch is divided, among processes or
into microbatches, what all rows share (an adversary's start, the rows of W that are compared) comes from a generator that is
alike everywhere, and what each row has of its own (its masks) in one of two ways:

    per_rank   from a generator of each process's own; nothing is drawn twice
    global     for the whole batch, of which every microbatch takes its rows: a run is then the same however its batches
               are divided, at the price of drawing everything everywhere

Each term of the objective then has numbers of its own, so that it does not matter in which order terms draw.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.parallel import Window

RandomScope = Literal["per_rank", "global"]


class Generators:
    """A generator for each device that numbers are drawn on; all follow from the first one's seed."""

    def __init__(self, first: torch.Generator) -> None:
        self._first = first
        self._others: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        first = self._first.device
        if device.type == first.type and (device.index or 0) == (first.index or 0):
            return self._first
        if device not in self._others:
            seed = seed_of(self._first.initial_seed(), 1 + (device.index or 0))
            self._others[device] = torch.Generator(device).manual_seed(seed)
        return self._others[device]

    def state(self) -> dict[str, Tensor]:
        """What the next numbers depend on, by device."""
        known = {"": self._first} | {str(device): g for device, g in self._others.items()}
        return {name: generator.get_state() for name, generator in known.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, tensor in state.items():
            generator = self.on(torch.device(name)) if name else self._first
            generator.set_state(tensor.cpu())


class RandomStreams:
    """Random numbers for one microbatch.

    Args:
        own: Draws what each row has of its own.
        shared: Draws what all rows of the batch share; None: the same generator.
        window: Given where `own` draws for the whole batch, of which the microbatch takes these rows.
    """

    def __init__(self, own: Generators, shared: Generators | None = None, window: Window | None = None) -> None:
        self.own, self.shared, self.window = own, own if shared is None else shared, window

    def uniform(self, shape: Sequence[int], like: Float[Tensor, "..."], rows: int | None = 0) -> Float[Tensor, "..."]:
        """Uniform in [0, 1), of the shape that the microbatch needs, in the dtype and on the device of `like`; `rows` says
        which dimension goes over the batch's rows, None that all rows share the numbers."""
        whole, generator = self._whole(shape, rows, like.device)
        drawn = torch.rand(whole, device=like.device, dtype=like.dtype, generator=generator)
        return self._part(drawn, rows)

    def integers(
        self, low: int, high: int, shape: Sequence[int], device: torch.device, rows: int | None = 0
    ) -> Int[Tensor, "..."]:
        """Uniform over low to high - 1; `rows` as in `uniform`."""
        whole, generator = self._whole(shape, rows, device)
        return self._part(torch.randint(low, high, whole, generator=generator, device=device), rows)

    def permutation(self, n: int, device: torch.device) -> Int[Tensor, " n"]:
        """An order of n things that all rows share."""
        return torch.randperm(n, generator=self.shared.on(device), device=device)

    def _whole(
        self, shape: Sequence[int], rows: int | None, device: torch.device
    ) -> tuple[tuple[int, ...], torch.Generator]:
        whole = list(shape)
        if rows is not None and self.window is not None:
            whole[rows] = self.window.of
        return tuple(whole), (self.shared if rows is None else self.own).on(device)

    def _part(self, drawn: Tensor, rows: int | None) -> Tensor:
        if rows is None or self.window is None:
            return drawn
        return drawn.narrow(rows, self.window.first, self.window.rows)


class RandomNumbers:
    """All random numbers of a run, for one process.

    Args:
        seed: The run's.
        device: Where most are drawn.
        rank: This process.
        divided: Whether batches are divided, among processes or into microbatches.
        scope: What each row has of its own: from a generator of this process, or drawn for the whole batch.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        divided: bool = False,
        scope: RandomScope = "per_rank",
    ) -> None:
        self.seed, self.device, self.divided, self.scope = seed, torch.device(device), divided, scope
        self.own = self._seeded(1 + rank) if divided else Generators(torch.Generator(device).manual_seed(seed))

    def of_microbatch(self, step: int, window: Window, term: int = 0) -> RandomStreams:
        """Numbers of one microbatch of a step's batch, for one term of the objective."""
        if not self.divided and self.scope == "per_rank":
            return RandomStreams(self.own)
        shared = self._seeded(0, step, term)
        if self.scope == "per_rank":
            return RandomStreams(self.own, shared)
        return RandomStreams(self._seeded(1, step, term), shared, window)

    def begin_anew(self, rank: int, step: int) -> None:
        """Numbers for a run that goes on after `step` steps with its batches divided otherwise than before."""
        self.own = self._seeded(1 + rank, step)

    def _seeded(self, *parts: int) -> Generators:
        return Generators(torch.Generator(self.device).manual_seed(seed_of(self.seed, *parts)))


AnyGenerator: TypeAlias = torch.Generator | RandomStreams
"""What functions that draw take: a microbatch's random numbers, or a generator for a batch that is whole."""


def as_streams(generator: AnyGenerator) -> RandomStreams:
    """Random numbers of a batch that is whole, from a generator."""
    return generator if isinstance(generator, RandomStreams) else RandomStreams(Generators(generator))


def seed_of(*parts: int) -> int:
    """A seed from several numbers, by the mixing steps of splitmix64; other numbers give another seed."""
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
