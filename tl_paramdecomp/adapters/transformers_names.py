"""Canonical names for the weights of transformers models, by their modules' own names.

A block's weights are recognised by the dotted names that model families use inside a block; fused projections are split
only where the family's column order is known. What is not recognised keeps its dotted path.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from tl_paramdecomp.adapters.wiring import Layout, Tap, Wiring, interleaved_columns
from tl_paramdecomp.sites import WeightSite

ROLES: dict[str, tuple[str, ...]] = {
    "attn.W_Q": ("self_attn.q_proj", "attn.attention.q_proj", "attn.q_proj", "self_attention.q_proj", "attention.q_proj"),
    "attn.W_K": ("self_attn.k_proj", "attn.attention.k_proj", "attn.k_proj", "self_attention.k_proj", "attention.k_proj"),
    "attn.W_V": ("self_attn.v_proj", "attn.attention.v_proj", "attn.v_proj", "self_attention.v_proj", "attention.v_proj"),
    "attn.W_O": (
        "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attn.c_proj", "attn.attention.out_proj",
        "attn.out_proj", "attn.c_proj", "attn.o_proj", "attention.dense", "self_attention.dense", "attention.o_proj",
    ),
    "mlp.W_gate": ("mlp.gate_proj",),
    "mlp.W_in": (
        "mlp.up_proj", "mlp.c_fc", "mlp.fc1", "mlp.fc_in", "mlp.dense_h_to_4h", "ffn.up_proj", "feed_forward.up_proj", "fc1",
    ),
    "mlp.W_out": (
        "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.fc_out", "mlp.dense_4h_to_h", "ffn.down_proj",
        "feed_forward.down_proj", "fc2",
    ),
}  # fmt: skip
"""Role in a block -> names of the module that plays it, in the order in which a forward pass meets the roles."""

FUSED_QKV = {
    "attn.c_attn": "thirds",
    "attention.query_key_value": "by_head",
    "self_attention.query_key_value": "by_head",
    "self_attn.qkv_proj": "thirds",
    "attn.Wqkv": "thirds",
}
"""Fused query/key/value module -> its column order. `thirds`: all queries, then keys, then values. `by_head`: query, key
and value of one head (or key/value group) after another."""

FUSED_QKV_FAMILIES = {"gpt2", "gpt_neox", "bloom", "phi3", "mpt", "openai-gpt", "gpt_bigcode"}
"""Families whose fused column order is known to be the one above; others keep the fused weight as one site."""

FUSED_GATE_UP = {"mlp.gate_up_proj": ("phi3", "glm", "glm4")}
"""Fused gate and input projection (gate first) -> families that use it."""

POSITIONS = ("transformer.wpe", "wpe", "transformer.positions_embed")


class LinearKind(NamedTuple):
    """How a torch module holds a linear map."""

    layout: Layout
    d_in: int
    d_out: int


def linear_kind(module: nn.Module) -> LinearKind | None:
    """Layout and widths of a module that is one linear map; None for anything else.

    The type decides, never the shape: a square Conv1D looks like a transposed Linear.
    """
    weight = getattr(module, "weight", None)
    if weight is None or getattr(weight, "ndim", 0) != 2:
        return None
    if type(module).__name__ == "Conv1D":
        return LinearKind("in_out", weight.shape[0], weight.shape[1])
    if isinstance(module, nn.Linear):
        return LinearKind("out_in", module.in_features, module.out_features)
    return None


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
    found: dict[str, Wiring] = {}
    for fused in FUSED_QKV:
        if fused in modules and getattr(config, "model_type", None) in FUSED_QKV_FAMILIES:
            found |= _split_qkv(modules[fused], config, f"{path}.{fused}", index, FUSED_QKV[fused])
    for fused, families in FUSED_GATE_UP.items():
        if fused in modules and getattr(config, "model_type", None) in families:
            found |= _split_gate_up(modules[fused], f"{path}.{fused}", index)
    for role, candidates in ROLES.items():
        name = f"blocks.{index}.{role}"
        chosen = next((c for c in candidates if c in modules), None)
        if chosen is None or name in found:
            continue
        wiring = module_wiring(name, f"{path}.{chosen}", modules[chosen])
        found[name] = with_heads(wiring, role, config)
    ordered = {f"blocks.{index}.{role}" for role in ROLES} & set(found)
    return {name: found[name] for role in ROLES if (name := f"blocks.{index}.{role}") in ordered}


def module_wiring(name: str, path: str, module: nn.Module) -> Wiring:
    """Wiring of a module that is one linear map or one embedding table."""
    aliases = tuple(alias for alias in (path, f"{path}.weight") if alias != name)
    if isinstance(module, nn.Embedding):
        site = WeightSite(name, module.num_embeddings, module.embedding_dim, "embedding", aliases=aliases)
        scale = float(getattr(module, "embed_scale", 1.0))
        return Wiring(site, path, bias=None, layout="in_out", scale=scale, x=Tap(path), y=Tap(path))
    kind = linear_kind(module)
    assert kind is not None, f"{path} is not a linear map"
    has_bias = getattr(module, "bias", None) is not None
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
    kv_heads = 1 if getattr(config, "multi_query", False) else kv_heads
    kind = linear_kind(module)
    if kind is None or heads is None or kv_heads is None or kind.d_out % (heads + 2 * kv_heads):
        return {}
    d_head = kind.d_out // (heads + 2 * kv_heads)
    if order == "thirds":
        edges = [0, heads * d_head, (heads + kv_heads) * d_head, (heads + 2 * kv_heads) * d_head]
        columns = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    else:
        group = heads // kv_heads
        which = (range(group), group, group + 1)
        columns = [interleaved_columns(kv_heads, group + 2, d_head, w) for w in which]
    found = {}
    for role, part, n in zip(("W_Q", "W_K", "W_V"), columns, (heads, kv_heads, kv_heads), strict=True):
        name = f"blocks.{index}.attn.{role}"
        whole = module_wiring(name, path, module)
        site = replace(whole.site, d_out=n * d_head, n_heads=n, head_side="out", aliases=(f"{path}.{role}",))
        found[name] = replace(whole, site=site, columns=part)
    return found


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


def find_blocks(root: nn.Module, config: Any) -> tuple[str, nn.ModuleList] | None:
    """Path and list of a model's transformer blocks: the longest module list whose entries are recognised as blocks."""
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len(name_block(module[0], config, path, 0)) >= 2:
            if best is None or len(module) > len(best[1]):
                best = (path, module)
    return best
