"""Canonical names for the weights of transformers models, by their modules' own names.

A block's weights are recognised by the dotted names that model families use inside a block; fused projections are split
only where the family's column order is known. What is not recognised keeps its dotted path.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tl_paramdecomp.adapters.computed import computed_tensors, peeked, plain_type, sources
from tl_paramdecomp.adapters.convolution import computes_as_torch, patches_of
from tl_paramdecomp.adapters.wiring import Layout, Tap, Wiring, interleaved_columns
from tl_paramdecomp.sites import WeightSite

ROLES: dict[str, tuple[str, ...]] = {
    "attn.W_Q": (
        "self_attn.q_proj", "attn.attention.q_proj", "attn.q_proj", "self_attention.q_proj", "attention.q_proj",
        "mixer.q_proj", "temporal_block.q_proj", "attention.self.query",
    ),
    "attn.W_K": (
        "self_attn.k_proj", "attn.attention.k_proj", "attn.k_proj", "self_attention.k_proj", "attention.k_proj",
        "mixer.k_proj", "temporal_block.k_proj", "attention.self.key",
    ),
    "attn.W_V": (
        "self_attn.v_proj", "attn.attention.v_proj", "attn.v_proj", "self_attention.v_proj", "attention.v_proj",
        "mixer.v_proj", "temporal_block.v_proj", "attention.self.value",
    ),
    "attn.W_O": (
        "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attn.c_proj", "attn.attention.out_proj",
        "attn.out_proj", "attn.c_proj", "attn.o_proj", "attn.Wo", "attention.dense", "self_attention.dense",
        "attention.o_proj", "mixer.o_proj", "temporal_block.o_proj", "attention.output.dense",
    ),
    "mlp.W_gate": (
        "mlp.gate_proj", "ffn.gate_proj", "feed_forward.gate_proj", "feed_forward.w1", "mlp_block.gate_proj",
    ),
    "mlp.W_in": (
        "mlp.up_proj", "mlp.c_fc", "mlp.fc1", "mlp.fc_in", "mlp.dense_h_to_4h", "ffn.up_proj", "feed_forward.up_proj",
        "feed_forward.w3", "mlp_block.up_proj", "mixer.up_proj", "fc1", "intermediate.dense",
    ),
    "mlp.W_out": (
        "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.Wo", "ffn.down_proj",
        "feed_forward.down_proj", "feed_forward.w2", "mlp_block.down_proj", "mixer.down_proj", "fc2", "output.dense",
    ),
}  # fmt: skip
"""Role in a block -> names of the module that plays it, in the order in which a forward pass meets the roles."""

FUSED_QKV: dict[str, dict[str, str]] = {
    "attn.c_attn": {"gpt2": "sections", "openai-gpt": "sections", "gpt_bigcode": "sections if multi_query"},
    "attention.query_key_value": {"gpt_neox": "groups"},
    "self_attention.query_key_value": {"bloom": "groups", "falcon": "sections if multi_query"},
    "self_attn.qkv_proj": {"phi3": "sections"},
    "attn.Wqkv": {"mpt": "sections"},
    "attn.qkv_proj": {"codegen": "quarters"},
}
"""Fused query/key/value module -> families that use it, each with its column order. `sections`: all queries, then keys,
then values. `groups`: the queries, key and value of one key/value head after another. `quarters`: four sections of
queries, values and keys, each of a quarter of the heads. A family that is not here keeps the fused weight as one site."""

FUSED_GATE_UP: dict[str, tuple[str, ...]] = {
    "mlp.gate_up_proj": ("phi3", "glm", "glm4", "glm4v", "glm4v_text"),
    "mlp.Wi": ("modernbert-decoder",),
}
"""Fused gate and input projection, the half that goes through the activation first -> families that use it."""

POSITIONS = ("wpe", "positions_embed", "embed_positions", "embeddings.position_embeddings")
"""Names of the table of learned positions, below the model without its head."""

COMPUTED_TABLES = {
    "gptj": "n_positions", "codegen": "n_positions", "ctrl": "n_positions", "mpt": "max_seq_len",
}  # fmt: skip
"""Families whose positions are a table that is computed once -> the field of the configuration that says how long it is."""


def vocabulary_of(model: Any) -> int | None:
    """Rows of the token embedding of a transformers model; None where it has none."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def has_unembedding(model: Any) -> bool:
    """Whether a transformers model gives logits over its vocabulary: a body or a classifier has no output embedding."""
    try:
        return isinstance(model.get_output_embeddings(), nn.Module)
    except (AttributeError, NotImplementedError):
        return False


def context_of(config: Any, positions: nn.Module | None) -> int | None:
    """Positions that a transformers model has; None where it computes as many as it is asked for.

    Args:
        config: Of its text part.
        positions: Its table of learned positions, where it has one.
    """
    if isinstance(positions, nn.Embedding):
        padding = positions.padding_idx
        unused = getattr(positions, "offset", 0 if padding is None else padding + 1)  # OPT's own, and RoBERTa's
        return positions.weight.shape[0] - unused
    return getattr(config, COMPUTED_TABLES.get(getattr(config, "model_type", ""), ""), None)


class LinearKind(NamedTuple):
    """How a torch module holds a linear map."""

    layout: Layout
    d_in: int
    d_out: int


def linear_kind(module: nn.Module) -> LinearKind | None:
    """Layout and widths of a module that is one linear map; None for anything else.

    The type decides, never the shape: a square Conv1D looks like a transposed Linear.
    """
    weight = peeked(module, "weight")
    if weight is None or getattr(weight, "ndim", 0) != 2:
        return None
    if plain_type(module).__name__ == "Conv1D":
        return LinearKind("in_out", weight.shape[0], weight.shape[1])
    if isinstance(module, nn.Linear):
        return LinearKind("out_in", module.in_features, module.out_features)
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a module is known by its type to be called, and to compute x W + b (of patches, or to look W's rows up) and no
    more."""
    kind = plain_type(module)
    if kind.__name__ == "NonDynamicallyQuantizableLinear":  # nn.MultiheadAttention reads its weight, uncalled
        return False
    if kind.forward in (nn.Linear.forward, nn.Embedding.forward) or computes_as_torch(module):
        return True
    return kind.__name__ == "Conv1D" or _scaled(module)


def _scaled(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")


def n_heads_of(config: Any, which: str) -> int | None:
    """Query heads (`query`) or key/value heads (`kv`) that a transformers or TransformerLens configuration states."""
    query = ("num_attention_heads", "n_head", "n_heads", "num_heads")
    names = ("num_key_value_heads", "num_kv_heads", "n_key_value_heads", *query) if which == "kv" else query
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def name_block(block: nn.Module, config: Any, path: str, index: int) -> dict[str, Wiring]:
    """Wirings of one transformer block by canonical name; empty where nothing is recognised."""
    modules = {name: module for name, module in block.named_modules() if linear_kind(module) is not None}
    family = getattr(config, "model_type", None)
    found: dict[str, Wiring] = {}
    for fused, orders in FUSED_QKV.items():
        if fused in modules and family in orders:
            found |= _split_qkv(modules[fused], config, f"{path}.{fused}", index, orders[family])
    for fused, families in FUSED_GATE_UP.items():
        if fused in modules and family in families:
            found |= _split_gate_up(modules[fused], f"{path}.{fused}", index)
    for role, candidates in ROLES.items():
        name = f"blocks.{index}.{role}"
        chosen = next((c for c in candidates if c in modules), None)
        if chosen is not None and name not in found:
            found[name] = with_heads(module_wiring(name, f"{path}.{chosen}", modules[chosen]), role, config)
    return {name: found[name] for role in ROLES if (name := f"blocks.{index}.{role}") in found}


def block_refusals(wirings: Mapping[str, Wiring], block: nn.Module, index: int) -> dict[str, str]:
    """Roles of a block that no one matrix plays, each with the reason: experts, latent attention, fused maps.

    A matrix under the wrong name would be worse than none, so widths that contradict the role are refused.
    """
    sites = {role: w.site for role in ROLES if (w := wirings.get(f"blocks.{index}.{role}")) is not None}
    refused = {}
    if "attn.W_O" in sites:
        missing = [role for role in ("attn.W_Q", "attn.W_K", "attn.W_V") if role not in sites]
        refused |= dict.fromkeys(missing, "no single matrix of this attention plays that role")
    if "mlp.W_in" not in sites and any(p.ndim == 3 and min(p.shape) > 1 for p in block.parameters()):
        refused |= dict.fromkeys(("mlp.W_in", "mlp.W_out"), "the block routes tokens among experts")
    query, key = sites.get("attn.W_Q"), sites.get("attn.W_K")
    if query and key and query.n_heads and key.n_heads:
        widths = query.d_out // query.n_heads, key.d_out // key.n_heads
        if widths[0] != widths[1]:
            refused["attn.W_Q"] = (
                f"it gives {widths[0]} columns a head where W_K gives {widths[1]}: queries and something else in one"
            )
    elif query and key:
        refused |= dict.fromkeys(
            ("attn.W_Q", "attn.W_K", "attn.W_V"), "its width does not divide into the model's heads"
        )
    enters, leaves = sites.get("mlp.W_in"), sites.get("mlp.W_out")
    if enters and leaves and enters.d_out != leaves.d_in:
        refused["mlp.W_in"] = f"it gives {enters.d_out} columns where W_out reads {leaves.d_in}: gate and input in one"
    return {f"blocks.{index}.{role}": reason for role, reason in refused.items()}


def module_wiring(name: str, path: str, module: nn.Module) -> Wiring:
    """Wiring of a module that is one linear map, of patches too, or one embedding table."""
    aliases = tuple(alias for alias in (path, f"{path}.weight") if path and alias != name)
    if isinstance(module, nn.Embedding):
        site = WeightSite(name, module.num_embeddings, module.embedding_dim, "embedding", aliases=aliases)
        scale = float(getattr(module, "embed_scale", 1.0))
        return Wiring(site, path, bias=None, layout="in_out", scale=scale, x=Tap(path), y=Tap(path))
    has_bias = peeked(module, "bias") is not None
    if isinstance(module, _ConvNd):
        patches = patches_of(module)
        site = WeightSite(name, patches.d_in, module.out_channels, has_bias=has_bias, aliases=aliases)
        bias = "bias" if has_bias else None
        return Wiring(site, path, bias=bias, layout="kernel", x=Tap(path), y=Tap(path), patches=patches)
    kind = linear_kind(module)
    assert kind is not None, f"{path} is not a linear map"
    site = WeightSite(name, kind.d_in, kind.d_out, has_bias=has_bias, aliases=aliases)
    return Wiring(site, path, bias="bias" if has_bias else None, layout=kind.layout, x=Tap(path), y=Tap(path))


def with_heads(wiring: Wiring, role: str, config: Any) -> Wiring:
    """The wiring with the number of heads its weight divides into, for attention weights."""
    side = {"attn.W_Q": "out", "attn.W_K": "out", "attn.W_V": "out", "attn.W_O": "in"}.get(role)
    if side is None:
        return wiring
    heads = n_heads_of(config, "kv" if role in ("attn.W_K", "attn.W_V") else "query")
    width = wiring.site.d_in if side == "in" else wiring.site.d_out
    if heads is None or width % heads:
        return wiring
    return replace(wiring, site=replace(wiring.site, n_heads=heads, head_side=side))


def _split_qkv(module: nn.Module, config: Any, path: str, index: int, order: str) -> dict[str, Wiring]:
    heads, kv_heads = n_heads_of(config, "query"), n_heads_of(config, "kv")
    if order == "sections if multi_query":
        if getattr(config, "new_decoder_architecture", False):
            order = "groups"
        elif config.multi_query:
            order, kv_heads = "sections", 1
        else:
            order, kv_heads = "groups", heads
    kind = linear_kind(module)
    if kind is None or heads is None or kv_heads is None or kind.d_out % (heads + 2 * kv_heads):
        return {}
    columns = _qkv_columns(heads, kv_heads, kind.d_out // (heads + 2 * kv_heads), order)
    found = {}
    for role, part, n in zip(("W_Q", "W_K", "W_V"), columns, (heads, kv_heads, kv_heads)):
        name = f"blocks.{index}.attn.{role}"
        whole = module_wiring(name, path, module)
        width = n * kind.d_out // (heads + 2 * kv_heads)
        site = replace(whole.site, d_out=width, n_heads=n, head_side="out", aliases=(f"{path}.{role}",))
        found[name] = replace(whole, site=site, columns=part)
    return found


def _qkv_columns(heads: int, kv_heads: int, d_head: int, order: str) -> list[tuple[int, ...] | slice]:
    """Columns of queries, keys and values in a fused weight."""
    if order == "sections":
        edges = [0, heads * d_head, (heads + kv_heads) * d_head, (heads + 2 * kv_heads) * d_head]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]
    if order == "quarters":
        return [interleaved_columns(4, 3, heads // 4 * d_head, which) for which in (0, 2, 1)]
    group = heads // kv_heads
    return [interleaved_columns(kv_heads, group + 2, d_head, which) for which in (range(group), group, group + 1)]


def _split_gate_up(module: nn.Module, path: str, index: int) -> dict[str, Wiring]:
    kind = linear_kind(module)
    assert kind is not None
    half, found = kind.d_out // 2, {}
    for role, part in (("W_gate", slice(0, half)), ("W_in", slice(half, 2 * half))):
        name = f"blocks.{index}.mlp.{role}"
        whole = module_wiring(name, path, module)
        site = replace(whole.site, d_out=half, aliases=(f"{path}.{role}",))
        found[name] = replace(whole, site=site, columns=part)
    return found


def find_blocks(root: nn.Module, config: Any, embedding: str) -> tuple[str, nn.ModuleList] | None:
    """Path and list of a model's transformer blocks: of the module lists whose entries are recognised as blocks, the one
    nearest to the token embedding (a vision tower has blocks too), and of these the longest."""
    found = []
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and any(len(name_block(b, config, path, 0)) >= 2 for b in module):
            pairs = zip(path.split("."), embedding.split("."))
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            found.append((shared, len(module), path, module))
    if not found:
        return None
    best = max(found, key=lambda entry: entry[:2])
    return best[2], best[3]


def unreachable_matrices(root: nn.Module, covered: set[int]) -> dict[str, str]:
    """Every matrix of a model that no site reads (by its storage), each with the reason."""
    reasons: dict[str, str] = {}
    for path, module in root.named_modules():
        parts = {part for names in computed_tensors(module).values() for part in names}
        for attribute, parameter in module._parameters.items():
            if attribute in parts or ".parametrizations." in f".{path}.":
                continue  # a site may read what is computed from it
            if parameter is None or parameter.ndim < 2 or min(parameter.shape) < 2 or storage_of(parameter) in covered:
                continue
            name = f"{plain_path(path)}.{attribute}"
            kind = type(module).__name__
            if isinstance(module, _ConvNd):
                reasons[name] = "a convolution is not one matrix product"
            elif parameter.ndim > 2:
                reasons[name] = f"{kind} holds a stack of matrices {list(parameter.shape)}, not one"
            else:
                reasons[name] = f"{kind} is not one linear map"
    return reasons


def plain_path(path: str) -> str:
    """A module's path in transformers, without the wrappers that a bridge puts around the modules."""
    return ".".join(part for part in path.split(".") if part.strip("_") != "original_component")


def storage_of(tensor: Tensor) -> int:
    """What tensors share that are views of one another."""
    return tensor.untyped_storage().data_ptr()


def storage_behind(module: nn.Module, attribute: str) -> int:
    """The same of a module's tensor, or of the first that it is computed from."""
    parts = sources(module, attribute)
    return storage_of(parts[0] if parts else peeked(module, attribute))
