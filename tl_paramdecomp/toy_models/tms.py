"""Toy models of superposition: more features than dimensions, read into them and back by one matrix and its transpose.

    y = ReLU(linear2(hidden(linear1(x)))),    linear2.weight = linear1.weight^T

Elhage et al. 2022 ("Toy Models of Superposition"); decomposed in "Stochastic Parameter Decomposition" (arXiv 2506.20790,
section 3.1), which adds a fixed identity matrix in the hidden space. Its mechanisms are the features: one direction in
each matrix for every one of them, and for the identity its whole rank.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.toy_models.targets import Progress, SparseFeatures, ToyTarget, fresh, minimise, quiet


@dataclass(frozen=True)
class TMSConfig:
    """Sizes of a target, and how it is trained."""

    n_features: int = 5
    n_hidden: int = 2
    identity: bool = False
    """Put an identity matrix between the two."""
    probability: float = 0.05
    """Chance that a feature is active; its value is then uniform in [0, 1]."""
    steps: int = 3000
    batch_size: int = 1024
    lr: float = 5e-3
    weight_decay: float = 0.01

    def data(self, batch_size: int, seed: int) -> SparseFeatures:
        return SparseFeatures(self.n_features, self.probability, batch_size, seed=seed)


class TMS(ToyTarget):
    """A toy model of superposition."""

    hidden_layers: Any
    measured: ClassVar[str] = "norms of the features' directions"
    least: ClassVar[float] = 0.5

    def __init__(self, config: TMSConfig) -> None:
        super().__init__()
        self.config = config
        self.linear1 = nn.Linear(config.n_features, config.n_hidden, bias=False)
        self.hidden_layers = nn.ModuleList()
        if config.identity:
            self.hidden_layers.append(nn.Linear(config.n_hidden, config.n_hidden, bias=False))
            nn.init.eye_(self.hidden_layers[0].weight)
        self.linear2 = nn.Linear(config.n_hidden, config.n_features)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        h = self.linear1(x)
        for layer in self.hidden_layers:
            h = layer(h)
        return torch.relu(self.linear2(h))

    def strengths(self) -> Float[Tensor, " features"]:
        """Norm of every feature's direction in the hidden space: about 1 where it is represented, near 0 where not."""
        return self.linear1.weight.detach().norm(dim=0)


def train_tms(config: TMSConfig, seed: int = 0, progress: Progress = quiet) -> TMS:
    """A target trained to give its sparse features back, by AdamW with a learning rate that falls linearly to 0."""
    data = config.data(config.batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    W = nn.init.xavier_normal_(torch.empty(config.n_hidden, config.n_features), generator=generator).requires_grad_()
    b = torch.zeros(config.n_features, requires_grad=True)

    def loss(step: int) -> Tensor:
        x = data(step)
        return nn.functional.mse_loss(torch.relu(torch.addmm(b, x @ W.T, W)), x)

    linear = torch.optim.lr_scheduler.LinearLR
    minimise(loss, [W, b], config, progress, lambda optimiser: linear(optimiser, 1.0, 0.0, total_iters=config.steps))
    model = fresh(TMS, config)
    with torch.no_grad():
        model.linear1.weight.copy_(W)
        model.linear2.weight.copy_(W.T)
        model.linear2.bias.copy_(b)
    return model
