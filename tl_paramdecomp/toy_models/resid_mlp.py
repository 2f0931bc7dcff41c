"""Residual MLPs that compute x + ReLU(x) for more features than they have neurons, in one to three layers.

    y = (r_0 + sum_l ReLU(r_l mlp_in_l) mlp_out_l) W_E^T,    r_0 = x W_E

with a fixed random embedding W_E of unit rows, and r_l the residual stream before layer l. From "Stochastic Parameter
Decomposition" (arXiv 2506.20790, section 3.2) and "Attribution-based Parameter Decomposition" (arXiv 2501.14926). Its
mechanisms: for every feature one direction that each layer's input matrix reads; output matrices are of full rank.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_paramdecomp.toy_models.targets import Progress, SparseFeatures, ToyTarget, fresh, minimise, quiet


@dataclass(frozen=True)
class ResidMLPConfig:
    """Sizes of a target, and how it is trained."""

    n_layers: int = 1
    n_features: int = 100
    d_resid: int = 1000
    n_neurons: int = 50
    """In all layers together."""
    probability: float = 0.01
    """Chance that a feature is active; its value is then uniform in [-1, 1]."""
    steps: int = 3000
    batch_size: int = 2048
    lr: float = 3e-3
    weight_decay: float = 0.01

    def data(self, batch_size: int, seed: int) -> SparseFeatures:
        return SparseFeatures(self.n_features, self.probability, batch_size, -1.0, seed)


class _Layer(nn.Module):
    def __init__(self, d_resid: int, n_neurons: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_resid, n_neurons, bias=False)
        self.mlp_out = nn.Linear(n_neurons, d_resid, bias=False)

    def forward(self, r: Float[Tensor, "batch d_resid"]) -> Float[Tensor, "batch d_resid"]:
        return r + self.mlp_out(torch.relu(self.mlp_in(r)))


class ResidMLP(ToyTarget):
    """A residual MLP between a fixed embedding and its transpose."""

    layers: Any
    measured: ClassVar[str] = "share of ReLU(x) in the feature's own output, at x = 0.75"
    least: ClassVar[float] = 0.2

    def __init__(self, config: ResidMLPConfig) -> None:
        super().__init__()
        self.config = config
        self.W_E = nn.Parameter(torch.empty(config.n_features, config.d_resid), requires_grad=False)
        width = config.n_neurons // config.n_layers
        self.layers = nn.ModuleList(_Layer(config.d_resid, width) for _ in range(config.n_layers))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """x + ReLU(x), as well as the neurons allow."""
        r = x @ self.W_E
        for layer in self.layers:
            r = layer(r)
        return r @ self.W_E.T

    def strengths(self) -> Float[Tensor, " features"]:
        """What each feature's own output gains over the bare embedding, as a share of the ReLU that it should gain.

        With half as many neurons as features it stays below 1 for all of them.
        """
        x = 0.75 * torch.eye(self.config.n_features, device=self.W_E.device)
        with torch.no_grad():
            bare = x @ self.W_E @ self.W_E.T
            return (self(x) - bare).diagonal() / 0.75


def train_resid_mlp(config: ResidMLPConfig, seed: int = 0, progress: Progress = quiet) -> ResidMLP:
    """A target trained to give x + ReLU(x), by Adam with a cosine to 0 on the mean square error.

    Products of weights are formed before a batch meets them, so that no activation of the wide residual stream exists: the
    same function of the same weights, ten times faster.
    """
    data = replace(config.data(config.batch_size, seed), without_empty=True)
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(config.n_features, config.d_resid, generator=generator)
    embed /= embed.norm(dim=1, keepdim=True)
    model, width = fresh(ResidMLP, config), config.n_neurons // config.n_layers
    with torch.no_grad():
        model.W_E.copy_(embed)
        for layer in model.layers:
            nn.init.xavier_normal_(layer.mlp_in.weight, generator=generator)
            nn.init.xavier_normal_(layer.mlp_out.weight, generator=generator)

    def loss(step: int) -> Tensor:
        x = data(step)
        readers = torch.cat([layer.mlp_in.weight for layer in model.layers] + [embed])
        writers = torch.cat([embed] + [layer.mlp_out.weight.T for layer in model.layers])
        paths = writers @ readers.T  # from features and neurons to neurons and features
        known = x
        for i in range(config.n_layers):
            read = known @ paths[: known.shape[1], i * width : (i + 1) * width]
            known = torch.cat([known, torch.relu(read)], 1)
        return nn.functional.mse_loss(known @ paths[:, config.n_layers * width :], x + torch.relu(x))

    minimise(loss, [p for p in model.parameters() if p.requires_grad], config, progress)
    return model
