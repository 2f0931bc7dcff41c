"""Finding the units that keep a task's metric: an order of units, the shortest beginning of it that is good enough, and what
of that can still go.

1. Order: by gradients with respect to masks, by given scores, or by masks that are learned against an adversary
   ("Interpreting Language Model Parameters", VPD, 2026: prompt-level subcomponent masks).
2. The shortest beginning of the order that is good, by doubling and bisection.
3. Removal, weakest first and in ever smaller parts, of what is not needed (after ACDC, Conmy et al. 2023, arXiv 2304.14997).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_paramdecomp.analysis.circuits.units import TaskRuns
from tl_paramdecomp.methods.adversary import ascended
from tl_paramdecomp.methods.divergence import kl
from tl_paramdecomp.settings import Count, NotNegative, Positive, Settings, Whole

Good = Callable[[Float[Tensor, " n"]], bool]
"""Whether a circuit, given as 1 inside and 0 outside, is good enough."""


@dataclass(frozen=True)
class LearnedMasks(Settings):
    """How masks are learned: minimise KL(model || masked) at the answers, with every mask costing what it lets through.

    g = sigmoid(theta) is a unit's importance; half of each step's loss is under m = g + (1 - g) r with r uniform, half under
    the r that an adversary climbs to, shared by all prompts.
    """

    steps: Count = 300
    """Of Adam."""
    penalty: NotNegative = 0.5
    """Weight of the mean of g^p over units, beside a KL in nats."""
    p: Positive = 0.5
    """Exponent of the penalty on masks."""
    lr: Positive = 0.05
    """Learning rate of the masks."""
    adversary_steps: Whole = 2
    """Sign steps of 1 / adversary_steps, from a random start; 0: no adversary."""

    def scores(self, runs: TaskRuns, generator: torch.Generator, progress: bool = False) -> Float[Tensor, " n"]:
        """g of every unit after training."""
        n, device = len(runs.units), runs.adapter.device
        with torch.no_grad():
            target = torch.log_softmax(runs.logits().float(), -1)
        theta = torch.full((n,), 2.0, device=device, requires_grad=True)
        optimiser = torch.optim.Adam([theta], lr=self.lr)
        for _ in tqdm(range(self.steps), desc="masks", disable=not progress):
            optimiser.zero_grad()
            with torch.enable_grad():
                g = torch.sigmoid(theta)
                r = torch.rand((*runs.task.clean.shape, n), generator=generator, device=device)
                loss = self._kl(runs, target, g + (1.0 - g) * r)
                if self.adversary_steps:
                    worst = self._adversary(runs, target, g.detach(), generator)
                    loss = 0.5 * loss + 0.5 * self._kl(runs, target, g + (1.0 - g) * worst)
                (loss + self.penalty * (g + 1e-6).pow(self.p).mean()).backward()
            optimiser.step()
        return torch.sigmoid(theta.detach())

    @staticmethod
    def _kl(runs: TaskRuns, target: Float[Tensor, "prompts vocab"], keep: Tensor) -> Float[Tensor, ""]:
        return kl(target, torch.log_softmax(runs.logits(keep).float(), -1)).mean()

    def _adversary(self, runs: TaskRuns, target: Tensor, g: Tensor, generator: torch.Generator) -> Float[Tensor, " n"]:
        source = torch.rand(len(g), generator=generator, device=g.device)
        for _ in range(self.adversary_steps):
            leaf = source.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self._kl(runs, target, g + (1.0 - g) * leaf), leaf)
            source = ascended(source.detach(), gradient, 1.0 / self.adversary_steps)
        return source.detach()


def shortest_good(order: Int[Tensor, " n"], good: Good) -> int:
    """Length of the shortest good beginning of an order that doubling and bisection find; n where none is."""
    n, low, high = len(order), 0, 1
    while high < n and not good(members(order[:high], n)):
        low, high = high, min(n, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        if good(members(order[:middle], n)):
            high = middle
        else:
            low = middle
    return high


def pruned(order: Int[Tensor, " k"], n: int, good: Good, progress: bool = False) -> Int[Tensor, " some"]:
    """What is left of a circuit, given strongest first, without what it can do without: parts of an eighth, then smaller."""
    kept, part, smallest = order.tolist(), max(1, len(order) // 8), max(1, len(order) // 128)
    bar = tqdm(desc="pruning", disable=not progress)
    while True:
        end = len(kept)
        while end > 0:
            first = max(0, end - part)
            left = kept[:first] + kept[end:]
            if left and good(members(torch.tensor(left, device=order.device), n)):
                kept = left
            end = first
            bar.set_postfix(units=len(kept), part=part)
            bar.update()
        if part <= smallest:
            bar.close()
            return torch.tensor(kept, device=order.device)
        part = max(smallest, part // 4)


def members(chosen: Int[Tensor, " some"], n: int) -> Float[Tensor, " n"]:
    """1 for chosen units, 0 for all others."""
    found = torch.zeros(n, device=chosen.device)
    found[chosen] = 1.0
    return found
