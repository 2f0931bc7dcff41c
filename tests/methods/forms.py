"""A small model written out densely in float64: what every loss on it must come to, weight matrix by weight matrix.

The masked model is run by its masked weights W'[b, t] = V diag(m[b, t]) U + d[b, t] (W - V U), one for every row and position,
and importances by one small network per component with the sigmoids' gradients spelt out.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.from_factors import describe
from tl_paramdecomp.methods.step import LossStep

WIDTHS = (5, 4, 6, 3)
C = (4, 5, 3)
ROWS, POSITIONS = 4, 3


class Chain(torch.nn.Module):
    """Linear maps with tanh between, alike at every position; the second has no bias."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(a, b, bias=i != 1) for i, (a, b) in enumerate(pairwise(widths))
        )

    def forward(self, x, attention_mask=None):
        for i, layer in enumerate(self.layers):
            x = layer(torch.tanh(x) if i else x)
        return x


class Gated(torch.autograd.Function):
    """clamp(x, 0, 1); below 0 a hundredth of the gradient passes where the loss wants x up, above 1 none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x <= 0, 0.01 * grad.clamp(max=0), torch.where(x <= 1, grad, 0 * grad))


@dataclass
class Case:
    """A model, a decomposition that does not sum to it, and a batch."""

    model: torch.nn.Module
    dec: torch.nn.Module
    x: torch.Tensor
    attention_mask: torch.Tensor | None = None
    measure: str = "kl"
    progress: float = 1.0
    seed: int = 3

    def draws(self):
        """The generator that masks are drawn from, as it stands at the step's start."""
        return torch.Generator().manual_seed(self.seed)

    def step(self, memory=None, generator=None):
        """What the library makes of the batch."""
        generator = self.draws() if generator is None else generator
        made = adapt(self.model), self.dec, self.x, self.attention_mask, generator
        return LossStep.of(*made, self.progress, self.measure, memory)

    def book(self):
        """What the textbook makes of it."""
        return Textbook(self)

    def but(self, **changes):
        return replace(self, **changes)


def case(seed=0, rows=ROWS, positions=POSITIONS, sigmoid="clamped", widths=WIDTHS, counts=C, **settings):
    """A random case; importances lie below 0, between and above 1."""
    draw = torch.Generator().manual_seed(seed)
    model = Chain(widths).double().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.6)
    factors = {
        f"layers.{i}.weight": (
            torch.randn(a, n, generator=draw, dtype=torch.float64) * 0.4,
            torch.randn(n, b, generator=draw, dtype=torch.float64) * 0.4,
        )
        for i, (a, b, n) in enumerate(zip(widths, widths[1:], counts))
    }
    dec = describe(adapt(model), factors, ImportanceConfig("component_mlp", hidden=3, sigmoid=sigmoid), draw)
    with torch.no_grad():
        for net in dec.importance.networks.values():
            for parameter in (net.b_in, net.b_out):
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5)
            net.b_out += 0.5
    x = torch.randn(rows, positions, widths[0], generator=draw, dtype=torch.float64)
    return Case(model, dec, x, **settings)


def padded(**settings):
    """A random case of which some positions do not count."""
    made = case(**settings)
    made.attention_mask = torch.ones(made.x.shape[:2], dtype=torch.long)
    made.attention_mask[0, -1] = made.attention_mask[2, :2] = 0
    return made


class Textbook:
    """Clean pass, importances and masked passes of a case."""

    def __init__(self, of):
        self.dec, self.x, self.measure, self.layers = of.dec, of.x, of.measure, list(of.model.layers)
        self.names = [f"layers.{i}.weight" for i in range(len(self.layers))]
        self.scored = torch.ones(of.x.shape[:2], dtype=torch.bool)
        if of.attention_mask is not None:
            self.scored = of.attention_mask == 1
        self.inputs, self.outputs, self.lower, self.upper, self.raw = {}, {}, {}, {}, {}
        h = self.x
        for i, (name, layer) in enumerate(zip(self.names, self.layers)):
            self.inputs[name] = torch.tanh(h) if i else h
            h = self.outputs[name] = torch.einsum("bti,oi->bto", self.inputs[name], layer.weight)
            h = self.outputs[name] = h if layer.bias is None else h + layer.bias
            self.raw[name] = self.network(name, self.inputs[name])
            self.lower[name], self.upper[name] = self.sigmoids(self.raw[name])
        self.target = h

    def network(self, name, x):
        """One network 1 -> hidden -> 1 for each component, on its activation."""
        net, h = self.dec.importance.networks[name.replace(".", "/")], x @ self.dec[name].V
        rows = [
            F.gelu(h[..., c, None] * net.w_in[c] + net.b_in[c]) @ net.w_out[c] + net.b_out[c]
            for c in range(h.shape[-1])
        ]
        return torch.stack(rows, -1)

    def sigmoids(self, raw):
        upper = torch.where(raw > 1, 1 + 0.01 * (raw - 1), raw.clamp(min=0))
        if self.dec.importance.config.sigmoid == "clamped":
            return Gated.apply(raw), upper
        return torch.where(raw < 0, 0.01 * raw, raw.clamp(max=1)), upper

    def rest(self, name):
        """W - V U."""
        weight = self.layers[self.names.index(name)].weight.T
        return weight - self.dec[name].V @ self.dec[name].U

    def run(self, masks, routes=None):
        """Output under masks (m [..., C], d [...]) by site; `seen` then holds inputs and outputs of every site."""
        self.seen, h = {}, self.x
        for i, (name, layer) in enumerate(zip(self.names, self.layers)):
            h = torch.tanh(h) if i else h
            own = h @ layer.weight.T
            y = own
            if name in masks:
                m = masks[name][0].expand(*self.lower[name].shape)
                d = torch.as_tensor(masks[name][1], dtype=h.dtype).expand(h.shape[:2])
                V, U = self.dec[name].V, self.dec[name].U
                weights = torch.einsum("ic,btc,co->btio", V, m, U) + d[..., None, None] * self.rest(name)
                y = torch.einsum("bti,btio->bto", h, weights)
                if routes is not None:
                    y = torch.where(routes[name][..., None], y, own)
            y = y if layer.bias is None else y + layer.bias
            self.seen[name] = (h, y)
            h = y
        return h

    def distance(self, out):
        """Mean over scored positions of the KL, or over their elements of the square."""
        out, target = out[self.scored], self.target[self.scored]
        if self.measure == "mse":
            return ((out - target) ** 2).sum() / out.numel()
        p = target.softmax(-1)
        return (p * (p.log() - out.softmax(-1).log())).sum() / len(out)

    # --- random numbers, in the library's order -----------------------------------------------------------------------
    def stochastic(self, draws, delta="masked", sampling="continuous"):
        """m = g + (1 - g) r with the r = 1 - q that these draws give, and d."""
        masks = {}
        for name, g in self.lower.items():
            r = 1 - torch.rand(g.shape, generator=draws, dtype=g.dtype)
            if sampling == "binomial":
                noise = torch.rand(g.shape, generator=draws, dtype=g.dtype)
                g = self.sigmoids(1.05 * self.raw[name] - 0.05 * noise)[0]
                r = (r > 0.5).to(g.dtype)
            d = {"absent": 0.0, "kept": 1.0}.get(delta)
            masks[name] = (g + (1 - g) * r, self.rows(draws) if d is None else d)
        return masks

    def rows(self, draws):
        return 1 - torch.rand(self.x.shape[:2], generator=draws, dtype=self.x.dtype)

    def routes(self, draws):
        """Which sites are masked at each position: k of them, k uniform, those of the k smallest numbers."""
        noise = torch.rand((len(self.names), *self.x.shape[:2]), generator=draws)
        chosen = torch.randint(1, len(self.names) + 1, self.x.shape[:2], generator=draws)
        routes = {name: torch.zeros(self.x.shape[:2], dtype=torch.bool) for name in self.names}
        for b in range(self.x.shape[0]):
            for t in range(self.x.shape[1]):
                for i in sorted(range(len(self.names)), key=lambda i: noise[i, b, t].item())[: chosen[b, t]]:
                    routes[self.names[i]][b, t] = True
        return routes


def compare(of, found, expected, tolerance=1e-11):
    """One value and one gradient with respect to V, U and every parameter of the importance function."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert abs(found.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item())), (found, expected)
    parameters = dict(of.dec.named_parameters())
    pairs = [
        torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
        if value.requires_grad
        else [None] * len(parameters)
        for value in (found, expected)
    ]
    for name, a, b in zip(parameters, *pairs):
        a, b = (torch.zeros_like(parameters[name]) if t is None else t for t in (a, b))
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (name, a, b)
