"""Causal-importance functions: small networks from a site's input to how much each component matters there, in [0, 1].

They read the clean forward pass, never masked activations, and are part of the decomposition: saved and loaded with it.
Published in "Stochastic Parameter Decomposition" (arXiv 2506.20790), section 2 and appendix; the clamped forward with a
sign-gated gradient is its authors' later form.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.errors import SettingError

SIGMOID_LEAK = 0.01


class Importance(NamedTuple):
    """Causal importances of one site."""

    lower: Float[Tensor, "... C"]
    """What masks are made from; its gradient ends above 1."""
    upper: Float[Tensor, "... C"]
    """What importance minimality penalises; its gradient ends below 0."""


class _SignGatedClamp(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient leaks below 0, but only where the loss wants x to rise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, x, 0.0, 1.0)
        return inside + grad.clamp(max=0.0) * SIGMOID_LEAK * (x <= 0)


class _LeakyAboveOne(torch.autograd.Function):
    """0 below 0, x up to 1, slope `SIGMOID_LEAK` above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, 1.0) + SIGMOID_LEAK * (x - 1.0).clamp(min=0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, x, 0.0, 1.0)
        return inside + grad * SIGMOID_LEAK * (x >= 1)


def clamped(raw: Float[Tensor, "... C"]) -> Importance:
    """The authors' later pair: values in [0, 1]; below 0 lower's gradient leaks (0.01) where the loss wants it up."""
    return Importance(_SignGatedClamp.apply(raw), _LeakyAboveOne.apply(raw))


def leaky(raw: Float[Tensor, "... C"]) -> Importance:
    """The paper's pair: lower really goes negative (0.01 x below 0), upper is 1 + 0.01 (x - 1) above 1."""
    lower = torch.where(raw <= 0, SIGMOID_LEAK * raw, raw.clamp(max=1.0))
    return Importance(lower, _LeakyAboveOne.apply(raw))


SIGMOIDS = {"clamped": clamped, "leaky": leaky}


@dataclass(frozen=True)
class ImportanceConfig:
    """Which causal-importance function a decomposition has."""

    kind: Literal["component_mlp", "shared_mlp"] = "shared_mlp"
    """`component_mlp`: a tiny network per component on its own activation (the paper's). `shared_mlp`: one network per
    site from its whole input."""
    hidden: int | None = 128
    """Hidden width; None: max(128, 2 d_in)."""
    sigmoid: Literal["clamped", "leaky"] = "clamped"
    """How raw outputs become importances."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"Importance kind {self.kind!r} is none of {', '.join(KINDS)}.")
        if self.sigmoid not in SIGMOIDS:
            raise SettingError(f"Sigmoid {self.sigmoid!r} is none of {', '.join(SIGMOIDS)}.")
        if self.hidden is not None and self.hidden < 1:
            raise SettingError(f"Importance hidden width must be at least 1; given {self.hidden}.")


class ComponentMLP(nn.Module):
    """One network 1 -> hidden -> 1 for each component, reading its activation h_c."""

    reads: ClassVar[str] = "acts"

    def __init__(self, components: Components, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        C = components.n_components
        self.w_in = nn.Parameter(_normal((C, hidden), math.sqrt(2.0), generator))
        self.b_in = nn.Parameter(torch.zeros(C, hidden))
        self.w_out = nn.Parameter(_normal((C, hidden), 1.0 / math.sqrt(hidden), generator))
        self.b_out = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Raw importances of component activations."""
        hidden = nn.functional.gelu(h.unsqueeze(-1) * self.w_in + self.b_in)
        return (hidden * self.w_out).sum(-1) + self.b_out


class SharedMLP(nn.Module):
    """One network d_in -> hidden -> C, reading the site's RMS-normalised input (or a learned row for each index)."""

    reads: ClassVar[str] = "input"

    def __init__(self, components: Components, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        d_in, C = components.site.d_in, components.n_components
        self.is_embedding = components.site.kind == "embedding"
        scale = 1.0 if self.is_embedding else math.sqrt(2.0 / d_in)
        self.w_in = nn.Parameter(_normal((d_in, hidden), scale, generator))
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(_normal((hidden, C), 1.0 / math.sqrt(hidden), generator))
        self.b_out = nn.Parameter(torch.zeros(C))

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... C"]:
        """Raw importances of site inputs [..., d_in], or of indices [...]."""
        if self.is_embedding:
            hidden = nn.functional.embedding(x, self.w_in)
        else:
            x = x.to(self.w_in.dtype)
            hidden = nn.functional.rms_norm(x, x.shape[-1:]) @ self.w_in
        return nn.functional.gelu(hidden + self.b_in) @ self.w_out + self.b_out


KINDS: dict[str, type[ComponentMLP] | type[SharedMLP]] = {"component_mlp": ComponentMLP, "shared_mlp": SharedMLP}


class ImportanceFunction(nn.Module):
    """Causal importances of all sites of a decomposition, from the inputs of a clean forward pass."""

    def __init__(
        self, components: Mapping[str, Components], config: ImportanceConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.networks = nn.ModuleDict()
        for name, comps in components.items():
            hidden = max(128, 2 * comps.site.d_in) if config.hidden is None else config.hidden
            network = KINDS[config.kind](comps, hidden, generator)
            self.networks[module_key(name)] = network.to(comps.V.device, comps.V.dtype)

    def forward(self, inputs: Mapping[str, Tensor], components: Mapping[str, Components]) -> dict[str, Importance]:
        """Importances [..., C] of every site in `inputs`.

        Args:
            inputs: x of each site in a clean forward pass: [..., d_in], or indices [...].
            components: The decomposition's components.
        """
        found = {}
        for name, x in inputs.items():
            network: Any = self.networks[module_key(name)]
            raw = network(components[name].acts(x)) if network.reads == "acts" else network(x)
            found[name] = SIGMOIDS[self.config.sigmoid](raw)
        return found

    def settings(self) -> dict[str, Any]:
        """The configuration as JSON-able values."""
        return asdict(self.config)


def module_key(site: str) -> str:
    """A site's name as torch accepts it for a submodule."""
    return site.replace(".", "/")


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Float[Tensor, "..."]:
    return torch.randn(*shape, generator=generator) * std
