"""A two-layer attention-only transformer that does induction, and nothing else.

Rows of random tokens in which a special token S stands twice: somewhere, followed by a token M, and at the end. The model
gives the logits of what follows the last token, which should be M. One head per layer, no LayerNorm; sinusoidal positions
are added to what queries and keys read, never to the residual stream. Decomposed in "Stochastic Parameter Decomposition on
language models" (Christensen and Riggs, arXiv 2511.08854). Its mechanisms: a previous-token head, and an induction head.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_paramdecomp.toy_models.targets import Progress, ToyTarget, drawn_at, quiet, trained


@dataclass(frozen=True)
class InductionConfig:
    """Sizes of a target, and how it is trained."""

    n_vocab: int = 128
    """Token 0 is the special one."""
    d_model: int = 16
    n_layers: int = 2
    length: int = 64
    steps: int = 10_000
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.01

    def data(self, batch_size: int, seed: int) -> "InductionRows":
        return InductionRows(self.n_vocab, self.length, batch_size, seed)


@dataclass(frozen=True)
class InductionRows:
    """Rows of tokens as a function of the step: random ones, with S M somewhere and S at the end."""

    n_vocab: int
    length: int
    batch_size: int
    seed: int = 0

    def __call__(self, step: int) -> Int[Tensor, "batch length"]:
        generator = drawn_at(self.seed, step)
        rows = torch.randint(1, self.n_vocab, (self.batch_size, self.length), generator=generator)
        places = torch.randint(0, self.length - 2, (self.batch_size, 1), generator=generator)
        rows.scatter_(1, places, 0)
        rows[:, -1] = 0
        return rows

    def answers(self, rows: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """M of each row."""
        places = (rows == 0).int().argmax(1, keepdim=True)
        return rows.gather(1, places + 1).squeeze(1)


class _Attention(nn.Module):
    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4))

    def forward(self, r: Float[Tensor, "batch pos d"], at: Float[Tensor, "pos d"]) -> Float[Tensor, "batch pos d"]:
        q, k, v = self.q(r + at), self.k(r + at), self.v(r)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class _Layer(nn.Module):
    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.attn = _Attention(config)


class InductionTransformer(ToyTarget):
    """A two-layer attention-only transformer that gives the logits after the last token."""

    layers: Any
    measured: ClassVar[str] = "accuracy"
    least: ClassVar[float] = 0.95
    positions: Float[Tensor, "length d"]

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.n_vocab, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.unembed = nn.Linear(config.d_model, config.n_vocab, bias=False)
        self.register_buffer("positions", sinusoids(config.length, config.d_model), persistent=False)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch vocab"]:
        """Logits of what follows the last token."""
        r = self.embed(tokens)
        for layer in self.layers:
            r = r + layer.attn(r, self.positions)
        return self.unembed(r[:, -1])

    def strengths(self) -> Float[Tensor, "1"]:
        """Share of held-out rows whose last token is continued rightly."""
        rows = self.config.data(2048, seed=1_000_000)
        with torch.no_grad():
            right = self(rows(0)).argmax(-1) == rows.answers(rows(0))
        return right.float().mean().unsqueeze(0)


def sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sines and cosines of positions at wavelengths from 2 pi to 10,000 times that."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def train_induction(config: InductionConfig, seed: int = 0, progress: Progress = quiet) -> InductionTransformer:
    """A target trained on the last token alone, by AdamW with a ramp and a cosine to 0."""
    ramp = max(1, config.steps // 100)

    def loss(model: InductionTransformer, rows: InductionRows, step: int) -> Tensor:
        tokens = rows(step)
        return nn.functional.cross_entropy(model(tokens), rows.answers(tokens))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / ramp) * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))

    rate = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor)
    return trained(InductionTransformer, config, seed, progress, loss, rate)
