"""Gradients of each sample's divergence from a reference output, as factors: what a site reads, and how what it writes counts.
A normalisation's gradients are vectors, for gain and bias.

One forward pass in which every chosen site keeps its input and a leaf at its output, and one backward pass for each position
of the loss: rows do not mix, so that one backward gives the gradients of all rows at once. The backward pass begins at the
output with the divergence's own gradient, which is known in closed form; no gradient of a weight is ever formed.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.subnetworks import GainGradient, Gradients, SampleGradient, select
from tl_paramdecomp.errors import DataError, SettingError, UnsupportedSiteError
from tl_paramdecomp.methods.divergence import wide
from tl_paramdecomp.methods.method import Microbatch
from tl_paramdecomp.methods.random_streams import AnyGenerator, as_streams
from tl_paramdecomp.parallel import ALONE, WHOLE, ProcessGroup
from tl_paramdecomp.sites import SiteCall

SampleDivergence = Literal["kl", "mse", "paper_code"]
"""Of an output from a reference: KL(reference || output) of next tokens; mean square over outputs; or p (p - r) averaged over
outputs, which the published code has in its place for toys."""
Reference = Literal["sample", "mean", "uniform", "pairs", "paper_code"]
"""What outputs are compared with: another sample's of the batch; the batch's mean; the uniform distribution; row 2i + 1 for row
2i; or, as in the published code, any sample's of the batch, the same one included."""
Positions = Literal["one", "all", "last"] | int
"""Where the divergence is taken: at a random position of each row, at all of them, at the last, or at a given one."""


class Outputs:
    """What one forward pass gave, [row, pos, width] or [row, width], and where divergences may be taken."""

    def __init__(self, output: Tensor, attention_mask: Tensor | None = None) -> None:
        self.output, self.by_position = output, output.ndim == 3
        shape = output.shape[:2] if self.by_position else (len(output), 1)
        self.scored = torch.ones(shape, dtype=torch.bool, device=output.device)
        """[row, pos]: where a divergence may be taken."""
        if attention_mask is not None and self.by_position:
            self.scored = attention_mask.bool().to(output.device)

    def places(self, positions: Positions, generator: AnyGenerator, every: bool = False) -> list[Int[Tensor, " n"]]:
        """Positions of the loss, one for each row, or -1 where a row has none; several times over for `all`, where `every`
        asks for positions too that no row has, as other microbatches may. SettingError where the output has no such
        position, DataError where a row has no position that counts, or the given one does not."""
        (n, length), device = self.scored.shape, self.output.device
        if not self.by_position or length == 1:
            return [torch.zeros(n, dtype=torch.int64, device=device)]
        if not bool(self.scored.any(1).all()):
            raise DataError("A row has no position that counts; leave such rows out.")
        order = torch.arange(length, device=device)
        if positions == "all":
            places = torch.where(self.scored, order, -1)
            return [place for place in places.T if every or bool((place >= 0).any())]
        if positions == "one":
            order = as_streams(generator).uniform((n, length), torch.empty(0, device=device))
        if positions in ("one", "last"):
            return [(order * self.scored).argmax(1)]
        assert isinstance(positions, int)
        if not -length <= positions < length:
            raise SettingError(f"positions={positions} lies outside of rows of {length}.")
        if not bool(self.scored[:, positions].all()):
            raise DataError(
                f"Position {positions} is padding in some row; leave such rows out, or use positions='last'."
            )
        return [torch.full((n,), positions % length, device=device)]

    def at(self, places: Int[Tensor, " n"]) -> Float[Tensor, "some width"]:
        """Outputs at one position of each row that has one, with their graph."""
        if not self.by_position:
            return self.output
        rows = (places >= 0).nonzero().flatten()
        with torch.enable_grad():
            return self.output[rows, places[rows]]


Calls = list[tuple[Tensor, Tensor]]
"""What a site read or a norm's gain multiplied, and a leaf whose gradient is the output's, call by call."""


class GradientPass(Outputs):
    """One forward pass over rows, from which gradients at several positions can be taken, by names of sites and norms."""

    def __init__(
        self, adapter: ModelAdapter, sites: Sequence[str], tokens: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        self.sites: dict[str, Calls] = {name: [] for name in sites}
        self.norms = frozenset(name for name in sites if adapter.is_norm(name))
        fns = {n: functools.partial(_opened, calls, n, tokens, n in self.norms) for n, calls in self.sites.items()}
        with torch.enable_grad(), adapter.intercept(fns):
            output = adapter.forward(tokens, attention_mask)
        super().__init__(output, attention_mask)

    def gradients(
        self,
        output: Float[Tensor, "n width"],
        cotangent: Float[Tensor, "n width"],
        rows: Int[Tensor, " n"] | None = None,
        keep: bool = False,
    ) -> Gradients:
        """Gradients by site and norm of n scalars, in float32 at least, from outputs of `at` and the gradient of each
        scalar with respect to its own; `rows` says which rows these are (None: all), `keep` that further gradients will be
        asked for."""
        leaves = [leaf for calls in self.sites.values() for _, leaf in calls]
        found = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), retain_graph=keep, allow_unused=True)
        given = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)])
        made: dict[str, SampleGradient | GainGradient] = {}
        for name, calls in self.sites.items():
            pairs = [(x, next(given)) for x, _ in calls]
            made[name] = _gain_gradient(pairs, len(self.output)) if name in self.norms else _site_gradient(*pairs[0])
        return made if rows is None else select(made, rows)


def output_gradient(
    output: Float[Tensor, "n width"], reference: Float[Tensor, "n width"], divergence: SampleDivergence
) -> Float[Tensor, "n width"]:
    """Gradient of each row's divergence with respect to its output, the reference (for `kl` probabilities) a constant:
    softmax(z) - q for `kl`, 2 (p - r) / width for `mse`, (2 p - r) / width for `paper_code`."""
    if divergence == "kl":
        return torch.softmax(output, -1) - reference
    twice = 2.0 * output - (2.0 if divergence == "mse" else 1.0) * reference
    return twice / output.shape[-1]


def references(
    output: Float[Tensor, "n width"],
    kind: Reference,
    divergence: SampleDivergence,
    generator: AnyGenerator,
    among: "Among | None" = None,
) -> Float[Tensor, "n width"]:
    """What each row's output is compared with, detached; probabilities for `kl`. `among` says where the rows stand among
    the samples of the whole batch (None: these are all). SettingError for uniform outputs where outputs are no
    distribution, DataError for fewer than two rows, or an odd number of them for `pairs`."""
    values = _values(output, divergence)
    if kind == "uniform":
        if divergence != "kl":
            raise SettingError(
                "reference='uniform' needs divergence='kl'; outputs that are no distribution have no such."
            )
        return torch.full_like(values, 1.0 / values.shape[-1])
    if kind == "pairs":
        if len(values) % 2:
            raise DataError(f"reference='pairs' takes rows two by two, sample and reference; given {len(values)} rows.")
        return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if among is None:
        order = torch.arange(len(values), device=output.device)
        among = Among(output, order, order, len(values))
    others, device = _values(among.outputs, divergence), output.device
    n = len(others)
    if n < 2:
        raise DataError(f"reference={kind!r} compares samples of a batch with each other; given {n} row.")
    if kind == "mean":
        return others.mean(0, keepdim=True).expand_as(values)
    itself = kind == "paper_code"
    drawn = as_streams(generator).integers(0 if itself else 1, n, (among.rows,), device)[among.drawn]
    return others[drawn if itself else (among.places + drawn) % n]


class Among(NamedTuple):
    """The samples of a whole batch, and where those of a microbatch are among them."""

    outputs: Float[Tensor, "all width"]
    places: Int[Tensor, " n"]
    """Of the microbatch's samples among all."""
    drawn: Int[Tensor, " n"]
    """Of the microbatch's samples among its rows, for each of which a number is drawn."""
    rows: int
    """Rows of the microbatch."""


def _values(output: Float[Tensor, "n width"], divergence: SampleDivergence) -> Float[Tensor, "n width"]:
    output = wide(output.detach())
    return torch.softmax(output, -1) if divergence == "kl" else output


class _Samples:
    """What one microbatch gave at some places of its rows."""

    def __init__(self, seen: Outputs, places: Sequence[Tensor]) -> None:
        order = torch.arange(len(seen.output), device=seen.output.device)
        self.n_rows, self.places = len(order), places
        self.rows = [order[place >= 0] if seen.by_position else order for place in places]
        """Which rows have each place."""
        self.outputs = [seen.at(place).detach() for place in places]
        self.among: list[Among | None] = [None] * len(places)
        """Where they are among the samples of the whole batch, where they are compared with those."""

    def gradients(
        self, run: GradientPass, reference: Reference, divergence: SampleDivergence, generator: AnyGenerator
    ) -> Iterator[Gradients]:
        """Place by place, from a pass over the microbatch."""
        given = zip(self.outputs, self.among, strict=True)
        against = [references(output, reference, divergence, generator, among) for output, among in given]
        for i, place in enumerate(self.places):
            output = run.at(place)
            cotangent = output_gradient(wide(output.detach()), against[i], divergence)
            some = self.rows[i] if run.by_position and bool((place < 0).any()) else None
            found = run.gradients(output, cotangent, some, keep=i + 1 < len(self.places))
            # of pairs the other rows are references
            yield select(found, slice(None, None, 2)) if reference == "pairs" else found


def _compared(samples: Sequence[_Samples], processes: ProcessGroup = ALONE) -> None:
    """Tell the samples of each microbatch where they are among those of all microbatches of all processes."""
    found: list[Tensor] = []
    firsts: list[int] = []
    for own in zip(*(each.outputs for each in samples), strict=True):  # place by place
        by_process = processes.every(torch.cat(own))
        firsts.append(sum(map(len, [*found, *by_process[: processes.rank]])))
        found += by_process
    together = torch.cat(found)
    for each in samples:
        for i, rows in enumerate(each.rows):
            numbers = firsts[i] + torch.arange(len(rows), device=rows.device)
            each.among[i] = Among(together, numbers, rows, each.n_rows)
            firsts[i] += len(rows)


def all_gradients(
    run: GradientPass,
    places: Sequence[Tensor],
    reference: Reference,
    divergence: SampleDivergence,
    generator: AnyGenerator,
) -> Iterator[Gradients]:
    """Gradients of the samples at each of the places, one group after the other; references are drawn from all of them."""
    samples = _Samples(run, places)
    _compared([samples])
    yield from samples.gradients(run, reference, divergence, generator)


def batch_gradients(
    adapter: ModelAdapter,
    sites: Sequence[str],
    microbatches: Sequence[Microbatch],
    positions: Positions,
    reference: Reference,
    divergence: SampleDivergence,
    processes: ProcessGroup = ALONE,
) -> list[Gradients]:
    """The same for this process's rows of a batch, whose references come from the whole batch.

    Of several microbatches only one at a time keeps what a backward pass needs: a first pass over each gives outputs alone.
    """
    several = len(microbatches) > 1
    runs: list[GradientPass] = []
    samples = []
    for batch, place, random in microbatches:
        if several:
            with torch.no_grad():
                seen = Outputs(adapter.forward(*batch), batch.attention_mask)
        else:
            seen = GradientPass(adapter, sites, *batch)
            runs.append(seen)
        samples.append(_Samples(seen, seen.places(positions, random(0), every=place is not WHOLE)))
    if reference in ("sample", "mean", "paper_code"):  # the others do not look beyond their microbatch
        _compared(samples, processes)
    groups: list[Gradients] = []
    for own, (batch, _, random) in zip(samples, microbatches, strict=True):
        run = runs.pop() if runs else GradientPass(adapter, sites, *batch)
        groups += own.gradients(run, reference, divergence, random(0))
        del run
    return groups


def _opened(calls: Calls, name: str, tokens: Tensor, is_norm: bool, call: SiteCall) -> Tensor:
    """A function that leaves the output, and keeps what was read (of a norm: what its gain multiplies) and a leaf."""
    if calls and not is_norm:  # HookedTransformer calls a norm such as `ln1` three times
        raise UnsupportedSiteError(
            f"{name} is called more than once in a forward pass, so that its gradient is not that of one product."
        )
    x, y, n = call.x.detach(), call.y, len(tokens)
    # of a norm, rows, positions and heads may be one dimension
    flattened = is_norm and y.ndim == 2 and not tokens.is_floating_point() and len(y) % tokens.numel() == 0
    if len(y) not in (1, n) and not flattened:
        raise UnsupportedSiteError(
            f"{name} gives rows of shape {list(y.shape)} in a pass over {n} rows, so that it is not known which belong to "
            f"which; leave it out{' of `gains`' if is_norm else ''}."
        )
    if len(y) == 1 < n:
        x, y = x.expand(n, *x.shape[1:]), y.expand(n, *y.shape[1:])
    leaf = torch.zeros_like(y, memory_format=torch.contiguous_format).requires_grad_(True)
    calls.append((x, leaf))
    return y + leaf


def _gain_gradient(calls: Calls, n: int) -> GainGradient:
    """Gradients of n scalars, one for each row, from the normalised rows and the outputs' gradients of all calls."""
    pairs = [(wide(x), wide(g)) for x, g in calls]
    gains = [(x * g).reshape(n, -1, g.shape[-1]).sum(1) for x, g in pairs]
    biases = [g.reshape(n, -1, g.shape[-1]).sum(1) for _, g in pairs]
    return GainGradient(torch.stack(gains).sum(0), torch.stack(biases).sum(0))


def _site_gradient(x: Tensor, g: Tensor) -> SampleGradient:
    """x as [n, pos, d_in], or [n, pos] indices; g as [n, pos, d_out]."""
    if g.ndim == 2:
        x, g = x.unsqueeze(1), g.unsqueeze(1)
    return SampleGradient(wide(x.flatten(1, -2 if x.is_floating_point() else -1)), wide(g.flatten(1, -2)))
