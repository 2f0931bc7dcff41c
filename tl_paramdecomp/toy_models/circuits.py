"""Networks that superpose circuits: each input, or group of inputs, is mapped by itself, through fewer neurons than inputs.

    linear    y = ReLU(W_out W_in x + b) trained on x A, A uniform in [0, 3]; inputs come alone or in groups
    squared   ELU layers, five of them, trained on x_i^2 in every output i

The toys of Local Loss Landscape Decomposition (arXiv 2504.00194, section 4), after its code: "circuit superposition" (10
inputs, 5 hidden), "high rank" (30 inputs in 6 groups, 10 hidden), "complex loss landscape" (5 inputs, 4 x 10 hidden).
Its mechanisms: one circuit for each group of inputs.
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.toy_models.targets import Progress, SparseFeatures, ToyTarget, drawn_at, quiet, trained


@dataclass(frozen=True)
class GroupedFeatures:
    """Batches as a function of the step: groups are active together, each member then uniform in [low, 1]; no row is empty."""

    n_features: int
    group: int
    probability: float
    batch_size: int
    low: float = 0.0
    seed: int = 0

    def __call__(self, step: int) -> Float[Tensor, "batch features"]:
        n = self.n_features // self.group
        groups = SparseFeatures(n, self.probability, self.batch_size, 0.5, self.seed, without_empty=True)(step)
        generator = drawn_at(self.seed, step + 500_000_007)
        values = torch.rand(self.batch_size, self.n_features, generator=generator).mul_(1.0 - self.low).add_(self.low)
        return values.mul_((groups != 0).repeat_interleave(self.group, 1))


@dataclass(frozen=True)
class CircuitsConfig:
    """Sizes of a target, and how it is trained."""

    function: Literal["linear", "squared"] = "linear"
    n_inputs: int = 10
    n_hidden: int = 5
    hidden_layers: int = 1
    group: int = 1
    """Inputs that are active together."""
    probability: float = 0.05
    """Chance that a group is active."""
    steps: int = 6000
    batch_size: int = 512
    lr: float = 1e-2
    weight_decay: float = 1e-3

    @property
    def n_mechanisms(self) -> int:
        """Circuits: one for each group."""
        return self.n_inputs // self.group

    def data(self, batch_size: int, seed: int) -> GroupedFeatures:
        return GroupedFeatures(self.n_inputs, self.group, self.probability, batch_size, self.low, seed)

    @property
    def low(self) -> float:
        """Least value of an active input."""
        return -1.0 if self.function == "squared" else 0.0


class Circuits(ToyTarget):
    """A network of superposed circuits, and the function it was trained on."""

    A: Float[Tensor, "inputs outputs"]
    layers: Any
    measured: ClassVar[str] = "shares of their own outputs that circuits explain"
    least: ClassVar[float] = 0.5

    def __init__(self, config: CircuitsConfig) -> None:
        super().__init__()
        self.config = config
        n = config.n_inputs
        self.register_buffer("A", 3.0 * torch.rand(n, n) if config.function == "linear" else torch.eye(n))
        widths = [n, *[config.n_hidden] * config.hidden_layers, n]
        biases = [config.function == "squared"] * config.hidden_layers + [True]
        pairs = zip(itertools.pairwise(widths), biases, strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for (a, b), bias in pairs)

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """What the function gives, as well as the network has learned it."""
        linear = self.config.function == "linear"
        for layer in self.layers:
            x = layer(x) if linear else nn.functional.elu(layer(x))
        return torch.relu(x) if linear else x

    def wanted(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """The function it was trained on."""
        return x @ self.A if self.config.function == "linear" else x.square()

    def strengths(self) -> Float[Tensor, " mechanisms"]:
        """For each circuit, what its rows explain of the variance of the outputs that are wanted of it."""
        found = []
        for i in range(self.config.n_mechanisms):
            members = slice(i * self.config.group, (i + 1) * self.config.group)
            x = torch.zeros(256, self.config.n_inputs, dtype=self.A.dtype, device=self.A.device)
            low = self.config.low
            values = torch.rand(256, self.config.group, generator=torch.Generator().manual_seed(i))
            x[:, members] = values.to(x) * (1.0 - low) + low
            with torch.no_grad():
                wanted, y = self.wanted(x), self(x)
            found.append(1.0 - (y - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
        return torch.stack(found)


def train_circuits(config: CircuitsConfig, seed: int = 0, progress: Progress = quiet) -> Circuits:
    """A target trained on the mean square error, by AdamW with a cosine to 0."""

    def loss(model: Circuits, data: GroupedFeatures, step: int) -> Tensor:
        x = data(step)
        return nn.functional.mse_loss(model(x), model.wanted(x))

    return trained(Circuits, config, seed, progress, loss)
