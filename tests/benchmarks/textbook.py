"""A training step of SPD written plainly, as the published code has it: what the library's own step is measured against.

Forward hooks replace the output of each decomposed module by ((x V) * m) U + d x (W - V U) + b, with W - V U formed in the
step; gates are broadcast; every loss is kept until one backward pass. Random numbers are drawn in the library's order.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class Textbook:
    """One site-by-site state: weights as [d_in, d_out], trainable V, U and gates, and the modules they stand for."""

    model: torch.nn.Module
    modules: dict
    weights: dict
    biases: dict
    parameters: dict
    """By site: V, U, w_in, b_in, w_out, b_out."""
    measure: str = "kl"
    importance: float = 1e-3
    p: float = 2.0
    faithfulness: float = 100.0
    relative: bool = True
    layerwise: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)

    def run(self, tokens, masks=None, kept=None):
        """Output of the model, with masks (m, d, delta) at some sites, or keeping the inputs of all."""

        def hook(name):
            def replaced(module, args, output):
                (x,) = args
                if kept is not None:
                    kept[name] = x
                if masks is None or name not in masks:
                    return output
                (m, d, delta), p = masks[name], self.parameters[name]
                new = ((x @ p["V"]) * m) @ p["U"] + d[..., None] * (x @ delta)
                return new if self.biases[name] is None else new + self.biases[name]

            return replaced

        handles = [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]
        try:
            out = self.model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return getattr(out, "logits", out)

    def gate(self, name, x):
        """The paper's network for each component, and the later form's two sigmoids."""
        p = self.parameters[name]
        h = x @ p["V"]
        raw = (F.gelu(h[..., None] * p["w_in"] + p["b_in"]) * p["w_out"]).sum(-1) + p["b_out"]
        return SignGated.apply(raw), torch.where(raw > 1, 1 + 0.01 * (raw - 1), raw.clamp(min=0))

    def divergence(self, out, target):
        if self.measure == "mse":
            return (out - target).square().mean()
        log_p, log_q = target.log_softmax(-1), out.log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

    def loss(self, tokens):
        """The whole objective of one step."""
        inputs = {}
        with torch.no_grad():
            target = self.run(tokens, kept=inputs)
        lower, penalty, masks = {}, 0.0, {}
        for name, x in inputs.items():
            lower[name], upper = self.gate(name, x)
            penalty = penalty + ((upper + 1e-12) ** self.p).flatten(0, -2).sum(-1).mean()
        deltas = {n: self.weights[n] - p["V"] @ p["U"] for n, p in self.parameters.items()}
        squares = [
            d.square().sum() / (self.weights[n].square().sum() if self.relative else 1) for n, d in deltas.items()
        ]
        count = len(deltas) if self.relative else sum(d.numel() for d in deltas.values())
        total = self.faithfulness * torch.stack(squares).sum() / count + self.importance * penalty
        for layerwise in (False, True) if self.layerwise else (False,):
            for name, g in lower.items():
                r = 1 - torch.rand(g.shape, generator=self.generator)
                d = 1 - torch.rand(g.shape[:-1], generator=self.generator)
                masks[name] = (g + (1 - g) * r, d, deltas[name])
            groups = [{name: mask} for name, mask in masks.items()] if layerwise else [masks]
            total = total + sum(self.divergence(self.run(tokens, group), target) for group in groups) / len(groups)
        return total


class SignGated(torch.autograd.Function):
    """clamp(x, 0, 1) with the leaky, sign-gated gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        leaked = torch.where(grad < 0, 0.01 * grad, torch.zeros_like(grad))
        return torch.where(x <= 0, leaked, torch.where(x <= 1, grad, torch.zeros_like(grad)))


def textbook_of(method, model, dec, modules, **settings):
    """The same step for a decomposition's starting values, in tensors of its own."""
    import tl_paramdecomp as tlpd

    parameters = {}
    for name in dec:
        net = dec.importance.networks[name.replace(".", "/")]
        values = {"V": dec[name].V, "U": dec[name].U, **dict(net.named_parameters())}
        parameters[name] = {key: value.detach().clone().requires_grad_(True) for key, value in values.items()}
    weights = {name: tlpd.site_weight(model, name).contiguous() for name in dec}
    biases = {name: modules[name].bias for name in dec}
    return Textbook(model, modules, weights, biases, parameters, method.measure, **settings)


def matmul_speed(shapes, dtype=torch.float32):
    """Floating-point operations per second of matrix products [n, k] [k, m], the best of a few."""
    import time

    done = spent = 0.0
    for n, k, m in shapes:
        a, b = torch.randn(n, k, dtype=dtype), torch.randn(k, m, dtype=dtype)
        best = math.inf
        for _ in range(5):
            begun = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - begun)
        done, spent = done + 2.0 * n * k * m, spent + best
    return done / spent
