"""Gradients of each sample's divergence from a reference output, as factors: what a site reads, and how what it writes counts.
A normalisation's gradients are vectors, for gain and bias.

One forward pass in which every chosen site keeps its input and a leaf at its output, and one backward pass for each position
of the loss: rows do not mix, so that one backward gives the gradients of all rows at once. The backward pass begins at the
output with the divergence's own gradient, which is known in closed form; no gradient of a weight is ever formed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.components.gain_subnetworks import GainGradient
from tl_paramdecomp.components.subnetworks import Gradients, SampleGradient
from tl_paramdecomp.errors import DataError, SettingError, UnsupportedSiteError
from tl_paramdecomp.methods.pieces import Every, Work, run_alone
from tl_paramdecomp.methods.random_streams import AnyGenerator, as_streams
from tl_paramdecomp.parallel import WHOLE, Place
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
    """What one forward pass gave, and where divergences may be taken.

    Args:
        output: [row, pos, width], or [row, width].
        attention_mask: 1 where a position counts.
    """

    def __init__(self, output: Tensor, attention_mask: Tensor | None = None) -> None:
        self.by_position = output.ndim == 3
        """Whether outputs are [row, pos, width]; else [row, width]."""
        self.output = output
        n, length = output.shape[0], output.shape[1] if self.by_position else 1
        scored = torch.ones(n, length, dtype=torch.bool, device=output.device)
        self.scored = (
            scored if attention_mask is None or not self.by_position else attention_mask.bool().to(output.device)
        )
        """[row, pos]: where a divergence may be taken."""

    def places(self, positions: Positions, generator: AnyGenerator, every: bool = False) -> list[Int[Tensor, " n"]]:
        """Positions of the loss, one for each row, or -1 where a row has none; several times over for `all`.

        Args:
            positions: Which.
            generator: Draws them.
            every: For `all`, also positions that no row has, as other pieces of the batch may.

        Raises:
            SettingError: The output has no positions, or not so many.
            DataError: A row has no position that counts, or the given one does not.
        """
        n, length = self.scored.shape
        if not self.by_position or length == 1:
            return [torch.zeros(n, dtype=torch.int64, device=self.output.device)]
        if not bool(self.scored.any(1).all()):
            raise DataError("A row has no position that counts; leave such rows out.")
        if positions == "all":
            order = torch.arange(length, device=self.output.device)
            places = torch.where(self.scored, order, -1)
            return [place for place in places.T if every or bool((place >= 0).any())]
        if positions == "one":
            like = torch.empty(0, device=self.output.device)
            drawn = as_streams(generator).uniform((n, length), like)
            return [(drawn * self.scored).argmax(1)]
        if positions == "last":
            order = torch.arange(length, device=self.output.device)
            return [(order * self.scored).argmax(1)]
        if not -length <= positions < length:
            raise SettingError(f"positions={positions} lies outside of rows of {length}.")
        if not bool(self.scored[:, positions].all()):
            raise DataError(
                f"Position {positions} is padding in some row; leave such rows out, or use positions='last'."
            )
        return [torch.full((n,), positions % length, device=self.output.device)]

    def at(self, places: Int[Tensor, " n"]) -> Float[Tensor, "some width"]:
        """Outputs at one position of each row that has one, with their graph."""
        if not self.by_position:
            return self.output
        rows = (places >= 0).nonzero().flatten()
        with torch.enable_grad():
            return self.output[rows, places[rows]]


class GradientPass(Outputs):
    """One forward pass, from which gradients at several positions can be taken.

    Args:
        adapter: The model's.
        sites: Names of sites, and of norms.
        tokens: Rows.
        attention_mask: 1 where a position counts.
    """

    def __init__(
        self, adapter: ModelAdapter, sites: Sequence[str], tokens: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        self.x: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.norm_calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in sites if adapter.is_norm(name)}
        """By norm, the normalised rows and the leaf of each of its calls, as HookedTransformer calls `ln1` three times."""
        fns = {
            name: functools.partial(_opened_norm, self.norm_calls[name], name, tokens)
            if name in self.norm_calls
            else functools.partial(_opened, self.x, self.leaves, name, len(tokens))
            for name in sites
        }
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
        """Gradients by site and norm of n scalars, whose gradients with respect to the outputs are given; in float32 at least.

        Args:
            output: From `at`.
            cotangent: Gradient of each row's scalar with respect to its output.
            rows: The rows that these are; None: all of them.
            keep: Whether further gradients will be asked for.
        """
        leaves = [*self.leaves.values(), *(leaf for calls in self.norm_calls.values() for _, leaf in calls)]
        found = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), retain_graph=keep, allow_unused=True)
        given = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)])
        made: dict[str, SampleGradient | GainGradient] = {}
        for name in self.leaves:
            g = next(given)
            made[name] = SampleGradient(_wide(_by_position(self.x[name], g)), _wide(_rows(g)))
        for name, calls in self.norm_calls.items():
            made[name] = _gain_gradient([(x, next(given)) for x, _ in calls], self.output.shape[0])
        return made if rows is None else {name: gradient.select(rows) for name, gradient in made.items()}


def output_gradient(
    output: Float[Tensor, "n width"], reference: Float[Tensor, "n width"], divergence: SampleDivergence
) -> Float[Tensor, "n width"]:
    """Gradient of each row's divergence with respect to its output, the reference a constant.

    Args:
        output: Logits, or a model's outputs.
        reference: Probabilities for `kl`, else outputs.
        divergence: Which; softmax(z) - q for `kl`, 2 (p - r) / width for `mse`, (2 p - r) / width for `paper_code`.
    """
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
    """What each row's output is compared with, detached; probabilities for `kl`.

    Args:
        output: Of the rows.
        kind: Which.
        divergence: Of which divergence.
        generator: Draws other samples.
        among: The samples of the whole batch; None: these are all.

    Raises:
        SettingError: Uniform outputs where outputs are no distribution.
        DataError: Fewer than two rows, or an odd number of them for `pairs`.
    """
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
    """The samples of a whole batch, and where those of a piece are among them."""

    outputs: Float[Tensor, "all width"]
    places: Int[Tensor, " n"]
    """Of the piece's samples among all."""
    drawn: Int[Tensor, " n"]
    """Of the piece's samples among its rows, for each of which a number is drawn."""
    rows: int
    """Rows of the piece."""


def _values(output: Float[Tensor, "n width"], divergence: SampleDivergence) -> Float[Tensor, "n width"]:
    output = _wide(output.detach())
    return torch.softmax(output, -1) if divergence == "kl" else output


def all_gradients(
    run: GradientPass,
    places: Sequence[Int[Tensor, " n"]],
    reference: Reference,
    divergence: SampleDivergence,
    generator: AnyGenerator,
) -> Iterator[Gradients]:
    """Gradients of the samples at each of the places, one group after the other; references are drawn from all of them."""
    yield from run_alone(piece_gradients(lambda: run, run, places, reference, divergence, generator))


def piece_gradients(
    opened: Callable[[], GradientPass],
    seen: Outputs,
    places: Sequence[Int[Tensor, " n"]],
    reference: Reference,
    divergence: SampleDivergence,
    generator: AnyGenerator,
    place: Place = WHOLE,
) -> Work:
    """The same for a piece of a batch, whose references come from the whole batch.

    Args:
        opened: Gives the pass to take gradients from, once the references are known.
        seen: What a pass over the same rows gave.
        places: Of the samples.
        reference: Which.
        divergence: Of which divergence.
        generator: Draws other samples.
        place: Where the rows stand in their batch.
    """
    every = torch.arange(len(seen.output), device=seen.output.device)
    rows = [every[at >= 0] if seen.by_position else every for at in places]
    outputs = {f"output {i}": seen.at(at).detach() for i, at in enumerate(places)}
    numbers = {f"row {i}": some + place.window.first for i, some in enumerate(rows)}
    whole = outputs | numbers
    if reference in ("sample", "mean", "paper_code"):  # what the others are compared with does not leave the piece
        whole = yield Every(whole)
    together = torch.cat([whole[name] for name in outputs])
    against, before = [], 0
    for i, some in enumerate(rows):
        own = before + torch.searchsorted(whole[f"row {i}"], numbers[f"row {i}"])
        before += len(whole[f"row {i}"])
        among = Among(together, own, some, len(every))
        against.append(references(outputs[f"output {i}"], reference, divergence, generator, among))
    run, groups = opened(), []
    for i, at in enumerate(places):
        output = run.at(at)
        cotangent = output_gradient(_wide(output.detach()), against[i], divergence)
        some = rows[i] if run.by_position and bool((at < 0).any()) else None
        found = run.gradients(output, cotangent, some, keep=i + 1 < len(places))
        groups.append(_firsts(found) if reference == "pairs" else found)
    return groups


def _firsts(found: Gradients) -> Gradients:
    """Every second row: the samples among pairs of sample and reference."""
    return {name: gradient.select(slice(None, None, 2)) for name, gradient in found.items()}


def _opened(inputs: dict[str, Tensor], leaves: dict[str, Tensor], name: str, n: int, call: SiteCall) -> Tensor:
    """A site's function that leaves its output, and keeps its input and a leaf whose gradient is the output's."""
    if name in inputs:
        raise UnsupportedSiteError(
            f"{name} is called more than once in a forward pass, so that its gradient is not that of one product."
        )
    x, y = call.x.detach(), call.y
    inputs[name] = x.expand(n, *x.shape[1:])
    leaves[name] = torch.zeros_like(y).expand(n, *y.shape[1:]).clone().requires_grad_(True)
    return y + leaves[name]


def _opened_norm(calls: list[tuple[Tensor, Tensor]], name: str, tokens: Tensor, call: SiteCall) -> Tensor:
    """A norm's function that leaves its output, and keeps what its gain multiplies and a leaf, for each call."""
    x, y, n = call.x.detach(), call.y, len(tokens)
    flattened = (
        y.ndim == 2 and not tokens.is_floating_point() and len(y) % tokens.numel() == 0
    )  # rows, positions, heads
    if len(y) not in (1, n) and not flattened:
        raise UnsupportedSiteError(
            f"{name} normalises rows of shape {list(y.shape)} in a pass over {n} rows, so that it is not known which belong to "
            "which; leave it out of `gains`."
        )
    if len(y) == 1 < n:
        x, y = x.expand(n, *x.shape[1:]), y.expand(n, *y.shape[1:])
    leaf = torch.zeros_like(y, memory_format=torch.contiguous_format).requires_grad_(True)
    calls.append((x, leaf))
    return y + leaf


def _gain_gradient(calls: Sequence[tuple[Tensor, Tensor]], n: int) -> GainGradient:
    """Gradients of n scalars, one for each row, from the normalised rows and the outputs' gradients of all calls."""
    wide = [(_wide(x), _wide(g)) for x, g in calls]
    gains = [(x * g).reshape(n, -1, g.shape[-1]).sum(1) for x, g in wide]
    biases = [g.reshape(n, -1, g.shape[-1]).sum(1) for _, g in wide]
    return GainGradient(torch.stack(gains).sum(0), torch.stack(biases).sum(0))


def _wide(t: Tensor) -> Tensor:
    """In float32 at least; indices stay."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


def _rows(g: Tensor) -> Float[Tensor, "n pos d_out"]:
    return g.unsqueeze(1) if g.ndim == 2 else g.flatten(1, -2)


def _by_position(x: Tensor, g: Tensor) -> Tensor:
    """x as [n, pos, d_in], or [n, pos] indices."""
    if not x.is_floating_point():
        return x.unsqueeze(1) if g.ndim == 2 else x.flatten(1)
    return _rows(x)
