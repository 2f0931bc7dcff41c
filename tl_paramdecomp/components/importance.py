"""Causal-importance functions: small networks from site inputs to how much each component matters there, in [0, 1].

They read the clean forward pass, never masked activations, and are part of the decomposition: saved and loaded with it.
Published in "Stochastic Parameter Decomposition" (arXiv 2506.20790), section 2 and appendix, and its successors. `sigmoids`
makes importances of their raw outputs.

    kind                reads                                   shape
    component_mlp       h_c of one component                    1 -> hidden -> 1, for each component
    vector_mlp          a site's input x                        d_in -> hidden -> 1, for each component
    shared_mlp          a site's input x                        d_in -> hidden -> C
    global_mlp          the inputs of all sites, side by side   sum of d_in -> hidden -> sum of C
    global_transformer  the same, at every position             linear, blocks with attention both ways, linear

The first is the paper's, the last of its successor "Interpreting Language Model Parameters" (2026), the others of their
authors' code. An embedding site's input is an index: where another network has a matrix for x, it looks up a learned row.
Starting values: normal, of standard deviation sqrt(2 / fan-in) in layers that feed a GELU or begin a transformer,
1 / sqrt(fan-in) in the others, 1 in learned rows; biases are 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, gelu, linear, rms_norm, scaled_dot_product_attention

from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.sigmoids import SIGMOIDS, Importance
from tl_paramdecomp.errors import SettingError, ShapeError
from tl_paramdecomp.settings import Count, Kind, Whole

ROTARY_BASE = 1e4
CPU_PIECE = 1 << 19
"""Hidden activations held at once by a component MLP on a CPU: about a core's cache."""
DEVICE_PIECE = 1 << 27
"""The same elsewhere, where memory is what limits it."""


@dataclass(frozen=True)
class ImportanceConfig(Kind):
    """Which causal-importance function a decomposition has.

    The defaults suit models of up to a few million weights. For its 67M-weight target VPD took
    `ImportanceConfig("global_transformer", hidden=2048, layers=8, heads=16, d_mlp=8192)`, that is `ImportanceConfig.vpd()`.

    Raises:
        SettingError: A setting makes no sense.
    """

    kind: Literal["component_mlp", "vector_mlp", "shared_mlp", "global_mlp", "global_transformer"] = "shared_mlp"
    """`component_mlp`: a tiny network per component on its own activation (the paper's). `vector_mlp`: one per component
    on the site's whole input. `shared_mlp`: one network per site from its whole input. `global_mlp`, `global_transformer`:
    one network for all sites from all inputs, the latter with attention over positions (VPD's)."""
    hidden: Count | None = 128
    """Hidden width; a transformer's width. None: twice the (widest) d_in, at least 128; 12 for `vector_mlp`. The paper has
    16 for `component_mlp`."""
    sigmoid: Literal["clamped", "leaky"] = "clamped"
    """How raw outputs become importances."""
    normalise: bool = True
    """Divide inputs by their root mean square, site by site. Not for `component_mlp`. Off, `vector_mlp`, `shared_mlp` and
    `global_mlp` are the authors' own."""
    layers: Whole = 2
    """Blocks of a transformer."""
    heads: Count = 4
    """Attention heads of a transformer; twice their number divides its width."""
    d_mlp: Count | None = None
    """Width of a transformer's MLPs; None: four times its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "global_transformer" and self.hidden is not None and self.hidden % (2 * self.heads):
            raise SettingError(
                f"Twice the number of heads must divide an importance transformer's width (its heads are rotated in pairs "
                f"of dimensions); given hidden={self.hidden}, heads={self.heads}."
            )

    @classmethod
    def vpd(cls) -> "ImportanceConfig":
        """The transformer of the VPD paper, made for decomposing a model of 67M weights."""
        return cls("global_transformer", hidden=2048, layers=8, heads=16, d_mlp=8192)

    @property
    def is_global(self) -> bool:
        """Whether one network reads the inputs of all sites."""
        return self.kind in GLOBAL_KINDS

    def width(self, d_in: int) -> int:
        """Hidden width for sites of at most this input width."""
        if self.hidden is not None:
            return self.hidden
        if self.kind == "vector_mlp":
            return 12
        width = max(128, 2 * d_in)
        multiple = 2 * self.heads if self.kind == "global_transformer" else 1
        return -(-width // multiple) * multiple


class CleanPass(NamedTuple):
    """A forward pass of the target as it is, of which importances are told."""

    adapter: Any
    """The target's adapter, for sources that run it again."""
    tokens: Shaped[Tensor, "batch ..."]
    attention_mask: Shaped[Tensor, "batch pos"] | None
    inputs: Mapping[str, Tensor]
    """x of each site: [..., d_in], or indices [...]."""
    measure: Literal["kl", "mse"] = "kl"
    """How outputs are compared, by sources that look at gradients."""


@runtime_checkable
class ImportanceSource(Protocol):
    """What says how much each component matters at each position: a decomposition's own function, or an oracle."""

    def importances(self, components: Mapping[str, Components], clean: CleanPass) -> dict[str, Importance]:
        """Importances [..., C] of every site."""
        ...


class ImportanceFunction(nn.Module):
    """Causal importances of all sites of a decomposition, from the inputs of a clean forward pass."""

    def __init__(
        self, components: Mapping[str, Components], config: ImportanceConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        if config.is_global:
            width = config.width(max((c.site.d_in for c in components.values() if c.site.kind == "linear"), default=0))
            network = GLOBAL_KINDS[config.kind](components, width, config, generator)
            first = next(iter(components.values()))
            self.network = network.to(first.V.device, first.V.dtype)
            return
        self.networks = nn.ModuleDict()
        for name, comps in components.items():
            network = SITE_KINDS[config.kind](comps, config.width(comps.site.d_in), config, generator)
            self.networks[module_key(name)] = network.to(comps.V.device, comps.V.dtype)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        components: Mapping[str, Components],
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    ) -> dict[str, Importance]:
        """Importances [..., C] of every site in `inputs`, which are x of each in a clean forward pass: [..., d_in], or indices.

        A transformer does not see positions where the attention mask is 0. SettingError where a global kind lacks the input of
        some site, ShapeError where the mask does not have the shape of the inputs' rows.
        """
        if self.config.is_global:
            found = self.network(inputs, attention_mask)
            raw = {name: values.to(components[name].V.device) for name, values in found.items()}
        else:
            raw = {name: self._raw(name, x, components[name]) for name, x in inputs.items()}
        return {name: SIGMOIDS[self.config.sigmoid](values) for name, values in raw.items()}

    def importances(self, components: Mapping[str, Components], clean: CleanPass) -> dict[str, Importance]:
        """Importances [..., C] of every site; as `forward`."""
        return self(clean.inputs, components, clean.attention_mask)

    def _raw(self, name: str, x: Tensor, components: Components) -> Tensor:
        network: Any = self.networks[module_key(name)]
        return network(components(type(components).acts, x) if network.reads_acts else x)

    def parts(self) -> list[nn.Module]:
        """The networks, each of which reads its parameters together."""
        return [self.network] if self.config.is_global else list(self.networks.values())


def module_key(site: str) -> str:
    """A site's name as torch accepts it for a submodule."""
    return site.replace(".", "/")


# --- networks --------------------------------------------------------------------------------------------------------
def rms_normed(x: Float[Tensor, "... d"], normalise: bool = True) -> Float[Tensor, "... d"]:
    """x over its root mean square, without a weight; x itself unless `normalise`."""
    return rms_norm(x, x.shape[-1:]) if normalise else x


class ComponentMLP(nn.Module):
    """One network 1 -> hidden -> 1 for each component, reading its activation h_c."""

    reads_acts = True

    def __init__(
        self, components: Components, hidden: int, config: ImportanceConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        C = components.n_components
        self.w_in = _normal((C, hidden), math.sqrt(2.0), generator)
        self.b_in = nn.Parameter(torch.zeros(C, hidden))
        self.w_out = _normal((C, hidden), 1.0 / math.sqrt(hidden), generator)
        self.b_out = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Raw importances of component activations."""
        h = h.to(self.w_in.dtype)
        return _ScalarMLPs.apply(h.reshape(-1, h.shape[-1]), self.w_in, self.b_in, self.w_out, self.b_out).view(h.shape)


class SharedMLP(nn.Module):
    """One network d_in -> hidden -> C, reading the site's input."""

    reads_acts = per_component = False

    def __init__(
        self, components: Components, hidden: int, config: ImportanceConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        d_in, C = components.site.d_in, components.n_components
        self.is_embedding, self.normalise = components.site.kind == "embedding", config.normalise
        width, last = (C * hidden, (C, hidden)) if self.per_component else (hidden, (hidden, C))
        self.w_in = _normal((d_in, width), 1.0 if self.is_embedding else math.sqrt(2.0 / d_in), generator)
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = _normal(last, 1.0 / math.sqrt(hidden), generator)
        self.b_out = nn.Parameter(torch.zeros(C))

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... C"]:
        """Raw importances of site inputs [..., d_in], or of indices [...]."""
        if self.is_embedding:
            hidden = gelu(embedding(x, self.w_in) + self.b_in)
        else:
            hidden = gelu(_affine(rms_normed(x.to(self.w_in.dtype), self.normalise), self.w_in, self.b_in))
        if self.per_component:
            return (hidden.unflatten(-1, self.w_out.shape) * self.w_out).sum(-1) + self.b_out
        return _affine(hidden, self.w_out, self.b_out)


class VectorMLP(SharedMLP):
    """One network d_in -> hidden -> 1 for each component, reading the site's input: C * d_in * hidden weights."""

    per_component = True


class GlobalMLP(nn.Module):
    """One network that reads the inputs of all sites side by side, position by position.

    Sites that read the same tensor (W_Q, W_K and W_V; W_in and W_gate) each bring it, as in the published code: the first
    layer is two to three times as large as it need be.
    """

    def __init__(
        self, components: Mapping[str, Components], width: int, config: ImportanceConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.sizes = {name: c.n_components for name, c in components.items()}
        self.tables = {name: str(i) for i, (name, c) in enumerate(components.items()) if c.site.kind == "embedding"}
        self.normalise = config.normalise
        d_in = sum(c.site.d_in for name, c in components.items() if name not in self.tables)
        self.w_in = _normal((d_in, width), math.sqrt(2.0 / max(1, d_in)), generator)
        self.rows = nn.ParameterDict(
            {key: _normal((components[name].site.d_in, width), 1.0, generator) for name, key in self.tables.items()}
        )
        self.b_in = nn.Parameter(torch.zeros(width))
        total = sum(self.sizes.values())
        self.w_out = _normal((width, total), 1.0 / math.sqrt(width), generator)
        self.b_out = nn.Parameter(torch.zeros(total))

    def forward(
        self, inputs: Mapping[str, Tensor], attention_mask: Shaped[Tensor, "..."] | None = None
    ) -> dict[str, Float[Tensor, "... C"]]:
        """Raw importances of every site, from x of every site: [..., d_in], or indices [...]. SettingError where one is
        missing, ShapeError where sites have different numbers of positions, as convolutions do."""
        missing = [name for name in self.sizes if name not in inputs]
        if missing:
            raise SettingError(
                f"This importance function reads the inputs of all {len(self.sizes)} sites at once; "
                f"missing: {', '.join(missing)}. Capture the inputs of every site of the decomposition."
            )
        mask = None if attention_mask is None else attention_mask.to(self.b_in.device)
        raw = _affine(self.middle(self._read(inputs), mask), self.w_out, self.b_out)
        return dict(zip(self.sizes, raw.split(list(self.sizes.values()), -1), strict=True))

    def _read(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "... width"]:
        parts = [inputs[name] for name in self.sizes if name not in self.tables]
        looked_up = [embedding(inputs[name].to(self.b_in.device), self.rows[key]) for name, key in self.tables.items()]
        shapes = [t.shape[:-1] for t in (*parts, *looked_up)]
        try:
            leading = torch.broadcast_shapes(*shapes)
        except RuntimeError as error:
            raise ShapeError(
                "A global importance function reads the inputs of all sites position by position, but theirs are "
                f"{', '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}; take ImportanceConfig('shared_mlp')."
            ) from error
        out = self.b_in
        if parts:
            parts = [rms_normed(x.to(self.w_in), self.normalise).expand(*leading, -1) for x in parts]
            out = _affine(torch.cat(parts, -1), self.w_in, self.b_in)
        for rows in looked_up:
            out = out + rows
        return out

    def middle(
        self, x: Float[Tensor, "... width"], attention_mask: Shaped[Tensor, "..."] | None
    ) -> Float[Tensor, "... width"]:
        """What lies between the first and the last layer: a GELU."""
        return gelu(x)


class GlobalTransformer(GlobalMLP):
    """The same with a transformer in the middle; every position sees all others that are not padding, on both sides.

    Inputs [batch, d] have no positions: each row stands alone.
    """

    def __init__(
        self, components: Mapping[str, Components], width: int, config: ImportanceConfig, generator: torch.Generator
    ) -> None:
        super().__init__(components, width, config, generator)
        d_mlp = 4 * width if config.d_mlp is None else config.d_mlp
        self.blocks = nn.ModuleList(_Block(width, config.heads, d_mlp, generator) for _ in range(config.layers))

    def middle(
        self, x: Float[Tensor, "... width"], attention_mask: Shaped[Tensor, "..."] | None
    ) -> Float[Tensor, "... width"]:
        """The blocks, on x as [batch, position, width]; ShapeError where the attention mask is not [batch, position]."""
        leading = x.shape[:-1]
        positions = leading[-1] if len(leading) > 1 else 1
        visible = None
        if attention_mask is not None and len(leading) > 1:
            if attention_mask.shape != leading:
                raise ShapeError(
                    f"An attention mask must have the shape of the token rows, {list(leading)}; "
                    f"given {list(attention_mask.shape)}."
                )
            # a padded position sees itself too, so that none sees nothing
            itself = torch.eye(positions, dtype=torch.bool, device=x.device)
            visible = attention_mask.bool().reshape(-1, 1, 1, positions) | itself
        rotations = _rotations(positions, self.blocks[0].d_head, x) if len(self.blocks) else None  # type: ignore[arg-type]
        rows = x.reshape(-1, positions, x.shape[-1])
        for block in self.blocks:
            rows = block(rows, rotations, visible)
        return rows.reshape(*leading, x.shape[-1])


class _Block(nn.Module):
    """Pre-norm attention in both directions, then a GELU MLP."""

    def __init__(self, width: int, heads: int, d_mlp: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.d_head = heads, width // heads
        gain = 1.0 / math.sqrt(width)
        self.w_qkv = _normal((width, 3 * width), gain, generator)
        self.w_o = _normal((width, width), gain, generator)
        self.w_mlp = _normal((width, d_mlp), math.sqrt(2.0 / width), generator)
        self.b_mlp = nn.Parameter(torch.zeros(d_mlp))
        self.w_back = _normal((d_mlp, width), 1.0 / math.sqrt(d_mlp), generator)
        self.b_back = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        x: Float[Tensor, "batch pos width"],
        rotations: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "batch 1 pos pos"] | None,
    ) -> Float[Tensor, "batch pos width"]:
        qkv = (rms_normed(x) @ self.w_qkv).unflatten(-1, (3, self.heads, self.d_head)).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(qkv[i], rotations) for i in (0, 1))
        z = scaled_dot_product_attention(q, k, qkv[2], attn_mask=visible)
        x = x + z.transpose(1, 2).flatten(-2) @ self.w_o
        return x + _affine(gelu(_affine(rms_normed(x), self.w_mlp, self.b_mlp)), self.w_back, self.b_back)


SITE_KINDS: dict[str, Any] = {"component_mlp": ComponentMLP, "vector_mlp": VectorMLP, "shared_mlp": SharedMLP}
"""One network for each site."""
GLOBAL_KINDS: dict[str, Any] = {"global_mlp": GlobalMLP, "global_transformer": GlobalTransformer}
"""One network for all sites."""


class _ScalarMLPs(torch.autograd.Function):
    """out[n, c] = sum_j w_out[c, j] gelu(w_in[c, j] h[n, c] + b_in[c, j]) + b_out[c], hidden activations never kept.

    They would be [n, C, hidden]; both directions make them anew, a few components at a time, as [C', hidden, n], where
    every sum over hidden or n is a matrix product. With t the argument of the GELU and G the gradient that arrives:

        dh = G * sum_j w_in w_out gelu'(t)      (dw_in, db_in) = w_out * sum_n gelu'(t) (G h, G)      dw_out = sum_n gelu(t) G
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            lines = torch.stack([h.t(), torch.ones_like(h.t())], 1)  # C 2 n
            out = h.new_empty(h.shape[1], 1, len(h))
            for some in _few_components(h, w_in):
                hidden = torch.bmm(torch.stack([w_in[some], b_in[some]], -1), lines[some])
                torch.ops.aten.gelu.out(hidden, out=hidden)
                torch.bmm(w_out[some].unsqueeze(1), hidden, out=out[some])
            ctx.save_for_backward(lines, w_in, b_in, w_out)
            return torch.add(out.squeeze(1).t(), b_out, out=torch.empty_like(h, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        lines, w_in, b_in, w_out = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.t().unsqueeze(1)  # C 1 n
            weighted = lines * g  # C 2 n: G h and G
            g = weighted[:, 1:]
            to_h, through = torch.empty_like(g), w_in * w_out
            to_lines, to_out = w_in.new_empty(len(w_in), 2, w_in.shape[1]), torch.empty_like(w_out)
            one = grad.new_ones(())
            for some in _few_components(grad, w_in):
                t = torch.bmm(torch.stack([w_in[some], b_in[some]], -1), lines[some])
                slope = torch.ops.aten.gelu_backward(one.expand_as(t), t)
                torch.bmm(through[some].unsqueeze(1), slope, out=to_h[some])
                torch.bmm(weighted[some], slope.transpose(1, 2), out=to_lines[some])
                torch.ops.aten.gelu.out(t, out=t)
                torch.bmm(g[some], t.transpose(1, 2), out=to_out[some].unsqueeze(1))
            dh = to_h.mul_(g).squeeze(1).t()
            to_lines *= w_out.unsqueeze(1)
            return dh, to_lines[:, 0], to_lines[:, 1], to_out, grad.sum(0)


def _few_components(rows: Float[Tensor, "n C"], w: Float[Tensor, "C hidden"]) -> list[slice]:
    piece = CPU_PIECE if rows.device.type == "cpu" else DEVICE_PIECE
    few = max(1, piece // max(1, len(rows) * w.shape[1]))
    return [slice(first, first + few) for first in range(0, len(w), few)]


def _affine(x: Float[Tensor, "... d"], w: Float[Tensor, "d out"], b: Float[Tensor, " out"]) -> Float[Tensor, "... out"]:
    """x w + b, in one pass and in the biases' dtype also under autocast."""
    return linear(x, w.t(), b).to(b.dtype)


def _rotations(positions: int, d_head: int, like: Tensor) -> tuple[Float[Tensor, "pos d"], Float[Tensor, "pos d"]]:
    """Cosine and sine of the angle of every position and dimension; the halves of a head turn together."""
    wide = torch.promote_types(like.dtype, torch.float32)
    rates = ROTARY_BASE ** (-torch.arange(0, d_head, 2, device=like.device, dtype=wide) / d_head)
    angles = torch.outer(torch.arange(positions, device=like.device, dtype=wide), rates).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotated(x: Float[Tensor, "... pos d"], rotations: Sequence[Tensor]) -> Float[Tensor, "... pos d"]:
    cos, sin = rotations
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> nn.Parameter:
    """Normal numbers; none where there are shapes alone, under `torch.device("meta")`."""
    made = torch.empty(shape)
    if not made.is_meta:
        torch.randn(shape, generator=generator, out=made).mul_(std)
    return nn.Parameter(made)
