"""What all toy targets share: seeded sparse features, training until a target is sound, and its files.

A toy target is a small torch module with mechanisms known in advance, so that what a decomposition finds can be checked.
A stray seed may train to a target that lacks some of them; whether it does is read off the target alone, before any
decomposition, and the next derived seed is tried.
"""

import json
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.errors import DecompositionFileError, DivergedError

Progress: TypeAlias = Callable[[str, int], Iterable[int]]
"""Shows a phase: from its name and length to the numbers 0 to length - 1, shown as they pass."""
TENSORS, RECORD = "target.safetensors", "target.json"
APART = 1000
"""Distance of the seeds that are derived from one another."""


def quiet(what: str, total: int) -> Iterable[int]:
    """A `Progress` that shows nothing."""
    return range(total)


class ToyTarget(nn.Module):
    """A target with known mechanisms."""

    config: Any
    """The frozen dataclass it was made from; its only argument."""
    measured: ClassVar[str]
    """What `strengths` are, in words."""

    least: ClassVar[float]
    """Of each strength in a target that has all its mechanisms."""

    @abstractmethod
    def strengths(self) -> Float[Tensor, " mechanisms"]:
        """How well the target has each mechanism."""

    def is_sound(self) -> bool:
        """Whether it has all of them."""
        return bool(self.strengths().min() >= self.least)


Toy = TypeVar("Toy", bound=ToyTarget)


def fresh(build: Callable[[Any], Toy], config: Any, seed: int = 0) -> Toy:
    """An untrained target, without a trace in torch's own random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def minimise(
    loss: Callable[[int], Float[Tensor, ""]],
    parameters: Iterable[Tensor],
    config: Any,
    progress: Progress,
    rate: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> None:
    """AdamW on the loss of each step, at a learning rate that falls by a cosine to 0 unless `rate` says otherwise."""
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    schedule = cosine(optimiser, config.steps) if rate is None else rate(optimiser)
    with torch.enable_grad():
        for step in progress("target", config.steps):
            optimiser.zero_grad()
            loss(step).backward()
            optimiser.step()
            schedule.step()


def trained(
    build: Callable[[Any], Toy],
    config: Any,
    seed: int,
    progress: Progress,
    loss: Callable[[Toy, Any, int], Float[Tensor, ""]],
    rate: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
) -> Toy:
    """A target trained from the seed on `loss(model, data, step)`, data being its configuration's."""
    data, model = config.data(config.batch_size, seed), fresh(build, config, seed)
    minimise(lambda step: loss(model, data, step), model.parameters(), config, progress, rate)
    return model


def drawn_at(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step of one seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class SparseFeatures:
    """Batches of sparse features as a function of the step: each is active by itself, and then uniform in [low, 1]."""

    n_features: int
    probability: float
    """Chance that one feature is active."""
    batch_size: int
    low: float = 0.0
    seed: int = 0
    without_empty: bool = False
    """Leave out rows without an active feature: a toy without biases in its sites is reconstructed there whatever the
    masks, so that they cost time and teach nothing. The others keep their distribution."""

    def __call__(self, step: int) -> Float[Tensor, "batch features"]:
        generator = drawn_at(self.seed, step)
        shape, p = (self.batch_size, self.n_features), self.probability
        active = torch.rand(shape, generator=generator) < p
        if self.without_empty:
            # The first active feature, given that there is one, has a truncated geometric distribution; those after it
            # are as free as before.
            u = torch.rand(self.batch_size, 1, generator=generator)
            first = torch.log1p(u * ((1.0 - p) ** self.n_features - 1.0)).div_(torch.log1p(torch.tensor(-p))).floor_()
            places = torch.arange(self.n_features)
            first = first.clamp_(max=self.n_features - 1)
            active = (active & (places > first)) | (places == first)
        values = torch.rand(shape, generator=generator).mul_(1.0 - self.low).add_(self.low)
        return values.mul_(active)


@dataclass(frozen=True)
class Trained(Generic[Toy]):
    """A target and how it came about."""

    model: Toy
    seed: int
    """The seed that gave it."""
    tried: int
    """Seeds tried, this one included."""


def train_until_sound(
    train: Callable[[Any, int, Progress], Toy],
    config: Any,
    seed: int,
    progress: Progress = quiet,
    say: Callable[[str], None] = print,
    tries: int = 20,
) -> Trained[Toy]:
    """Train with seed, seed + 1000, ... until a target has all its mechanisms (else DivergedError); `say` is told of others."""
    for attempt in range(tries):
        derived = seed + APART * attempt
        model = train(config, derived, progress).eval().requires_grad_(False)
        if model.is_sound():
            return Trained(model, derived, attempt + 1)
        low = ", ".join(f"{s:.3f}" for s in sorted(model.strengths().tolist())[:8])
        say(
            f"The target of seed {derived} lacks a mechanism ({model.measured}, smallest first: {low}); trying the next."
        )
    raise DivergedError(f"None of {tries} seeds from {seed} on trains a sound target: {config}. Train it longer.")


def save_target(trained: Trained[Any], folder: Path) -> None:
    """Write a target's weights and how it came about into a folder; the record comes last and makes it count."""
    record = {"config": asdict(trained.model.config), "seed": trained.seed, "tried": trained.tried}
    record |= {trained.model.measured: trained.model.strengths().tolist()}
    tensors = {k: t.contiguous() for k, t in trained.model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            safetensors.torch.save_file(tensors, str(Path(scratch, TENSORS)))
            Path(scratch, RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            for name in (TENSORS, RECORD):
                os.replace(Path(scratch, name), folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        raise DecompositionFileError(f"Could not save the target into {folder}: {error}") from error


def load_target(empty: Toy, folder: Path) -> Trained[Toy] | None:
    """The target that `save_target` wrote into a folder, put into an untrained one; None where its settings are others."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["config"] != json.loads(json.dumps(asdict(empty.config))):
            return None
        empty.load_state_dict(safetensors.torch.load_file(str(folder / TENSORS)))
        return Trained(empty.eval().requires_grad_(False), record["seed"], record["tried"])
    except Exception as error:
        raise DecompositionFileError(f"The target in {folder} cannot be read ({error}); delete the folder.") from error
