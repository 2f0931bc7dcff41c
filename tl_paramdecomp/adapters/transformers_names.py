"""Canonical names for the weights of transformers models, by their modules' own names.

A block's weights are recognised by the dotted names that model families use inside a block; fused projections are split
only where the family's column order is known. What is not recognised keeps its dotted path.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tl_paramdecomp.adapters.computed import computed_tensors, peeked, plain_type, sources
from tl_paramdecomp.adapters.convolution import computes_as_torch, patches_of
from tl_paramdecomp.adapters.wiring import Columns, Layout, Tap, Wiring, find_module, plain_path
from tl_paramdecomp.sites import WeightSite

_ATTENTIONS = ("self_attn", "attn.attention", "attn", "self_attention", "attention", "mixer", "temporal_block")
ROLES: dict[str, tuple[str, ...]] = {
    "attn.W_Q": (*(f"{name}.q_proj" for name in _ATTENTIONS), "attention.self.query"),
    "attn.W_K": (*(f"{name}.k_proj" for name in _ATTENTIONS), "attention.self.key"),
    "attn.W_V": (*(f"{name}.v_proj" for name in _ATTENTIONS), "attention.self.value"),
    "attn.W_O": ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attn.c_proj", "attn.attention.out_proj",
                 "attn.out_proj", "attn.c_proj", "attn.o_proj", "attn.Wo", "attention.dense", "self_attention.dense",
                 "attention.o_proj", "mixer.o_proj", "temporal_block.o_proj", "attention.output.dense"),
    "mlp.W_gate": ("mlp.gate_proj", "ffn.gate_proj", "feed_forward.gate_proj", "feed_forward.w1", "mlp_block.gate_proj"),
    "mlp.W_in": ("mlp.up_proj", "mlp.c_fc", "mlp.fc1", "mlp.fc_in", "mlp.dense_h_to_4h", "ffn.up_proj", "feed_forward.up_proj",
                 "feed_forward.w3", "mlp_block.up_proj", "mixer.up_proj", "fc1", "intermediate.dense"),
    "mlp.W_out": ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.fc_out", "mlp.dense_4h_to_h", "mlp.Wo", "ffn.down_proj",
                  "feed_forward.down_proj", "feed_forward.w2", "mlp_block.down_proj", "mixer.down_proj", "fc2", "output.dense"),
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

POSITIONS = ("wpe", "positions_embed", "embed_positions", "embeddings.position_embeddings", "position_embeddings")
"""Names of the table of learned positions, beside the token embedding or below it."""

COMPUTED_TABLES = {"gptj": "n_positions", "codegen": "n_positions", "ctrl": "n_positions", "mpt": "max_seq_len"}
"""Families whose positions are a table that is computed once -> the field of the configuration that says how long it is."""


# --- a model's own settings -------------------------------------------------------------------------------------------
def part_of(model: Any, accessor: str) -> Any:
    """What an optional accessor of transformers models returns; None where the model has no such part."""
    try:
        return getattr(model, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def vocabulary_of(model: Any) -> int | None:
    """Rows of the token embedding of a transformers model; None where it has none."""
    weight = getattr(part_of(model, "get_input_embeddings"), "weight", None)
    return None if weight is None else weight.shape[0]


def has_unembedding(model: Any) -> bool:
    """Whether a transformers model gives logits over its vocabulary: a body or a classifier has no output embedding."""
    return isinstance(part_of(model, "get_output_embeddings"), nn.Module)


def context_of(model: Any, positions: nn.Module | None) -> int | None:
    """Positions that a transformers model has, with this table of learned ones; None where it computes as many as asked for."""
    if isinstance(positions, nn.Embedding):
        padding = positions.padding_idx
        unused = getattr(positions, "offset", 0 if padding is None else padding + 1)  # OPT's own, and RoBERTa's
        return positions.weight.shape[0] - unused
    config: Any = getattr(model, "config", None)  # a bridge's native model has none
    text = None if config is None else config.get_text_config()
    return getattr(text, COMPUTED_TABLES.get(getattr(text, "model_type", ""), ""), None)


def n_heads_of(config: Any, which: str) -> int | None:
    """Query heads (`query`) or key/value heads (`kv`) that a transformers or TransformerLens configuration states."""
    query = ("num_attention_heads", "n_head", "n_heads", "num_heads")
    names = ("num_key_value_heads", "num_kv_heads", "n_key_value_heads", *query) if which == "kv" else query
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


# --- one module -------------------------------------------------------------------------------------------------------
def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map by its type, never by its shape: a square Conv1D looks like a transposed Linear."""
    weight = peeked(module, "weight")
    if weight is None or getattr(weight, "ndim", 0) != 2:
        return False
    return plain_type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is known by its type to be called, and to compute x W + b (of patches, or to look W's rows up) and no
    more."""
    kind = plain_type(module)
    if kind.__name__ == "NonDynamicallyQuantizableLinear":  # nn.MultiheadAttention reads its weight, uncalled
        return False
    if kind.forward in (nn.Linear.forward, nn.Embedding.forward) or computes_as_torch(module):
        return True
    return kind.__name__ == "Conv1D" or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))


def all_plain(root: nn.Module, wirings: Mapping[str, Wiring]) -> bool:
    """Whether the modules of all sites are."""
    return all(is_plain(find_module(root, wiring.owner)) for wiring in wirings.values())


def module_wiring(name: str, path: str, module: Any) -> Wiring:
    """Wiring of a module that is one linear map, of patches too, or one embedding table."""
    kind: Any = "embedding" if isinstance(module, nn.Embedding) else "linear"
    layout: Layout = "in_out"
    scale, patches = 1.0, None
    shape: tuple[int, int]
    if kind == "embedding":
        shape, scale = (module.num_embeddings, module.embedding_dim), float(getattr(module, "embed_scale", 1.0))
    elif isinstance(module, _ConvNd):
        layout, patches = "kernel", patches_of(module)
        shape = patches.d_in, module.out_channels
    elif isinstance(module, nn.Linear):
        layout, shape = "out_in", (module.in_features, module.out_features)
    else:
        shape = peeked(module, "weight").shape
    aliases = tuple(alias for alias in (path, f"{path}.weight") if path and alias != name)
    has_bias = kind == "linear" and peeked(module, "bias") is not None
    site = WeightSite(name, *shape, kind, has_bias=has_bias, aliases=aliases)
    tap, bias = Tap(path), "bias" if has_bias else None
    return Wiring(site, path, tap, tap, bias=bias, layout=layout, scale=scale, patches=patches)


def with_heads(wiring: Wiring, role: str, config: Any) -> Wiring:
    """The wiring with the number of heads its weight divides into, for attention weights."""
    side = {"attn.W_Q": "out", "attn.W_K": "out", "attn.W_V": "out", "attn.W_O": "in"}.get(role)
    heads = n_heads_of(config, "kv" if role in ("attn.W_K", "attn.W_V") else "query")
    width = wiring.site.d_in if side == "in" else wiring.site.d_out
    return wiring if side is None or heads is None or width % heads else wiring.renamed(n_heads=heads, head_side=side)


def computes_another(path: str) -> bool:
    """Whether a module takes part in computing another module's weight."""
    return ".parametrizations." in f".{path}."


def storages(root: nn.Module, wirings: Mapping[str, Wiring]) -> set[int]:
    """What the weights of sites are views of."""
    return {storage_behind(find_module(root, wiring.owner), wiring.weight) for wiring in wirings.values()}


def storage_behind(module: nn.Module, attribute: str) -> int:
    """What tensors share that are views of one another: of a module's tensor, or of the first that it is computed from."""
    tensor = next(iter(sources(module, attribute)), None)
    return (peeked(module, attribute) if tensor is None else tensor).untyped_storage().data_ptr()


# --- a block ----------------------------------------------------------------------------------------------------------
Modules = Mapping[str, tuple[str, nn.Module]]
"""Linear maps of a block by their names in it, each with its path in the tree."""


def linear_maps(block: nn.Module, path: str) -> Modules:
    """Those of the block at a path."""
    return {plain_path(name): (f"{path}.{name}", m) for name, m in block.named_modules() if is_linear(m)}


def name_block(modules: Modules, config: Any, index: int) -> dict[str, Wiring]:
    """Wirings of one transformer block by canonical name; empty where nothing is recognised."""
    family = getattr(config, "model_type", None)
    found: dict[str, Wiring] = {}
    for fused, orders in FUSED_QKV.items():
        if fused in modules and family in orders:
            found |= _split_qkv(*modules[fused], index, config, orders[family])
    for fused, families in FUSED_GATE_UP.items():
        if fused in modules and family in families:
            whole = module_wiring("", *modules[fused])
            half = whole.site.d_out // 2
            found |= _parts(whole, index, {"mlp.W_gate": slice(0, half), "mlp.W_in": slice(half, 2 * half)})
    found = by_role(modules, config, index) | found
    return {name: found[name] for role in ROLES if (name := f"blocks.{index}.{role}") in found}


def by_role(modules: Modules, config: Any, index: int) -> dict[str, Wiring]:
    """Wirings of the modules of a block that play a role by their names."""
    found = {}
    for role, candidates in ROLES.items():
        chosen = next((c for c in candidates if c in modules), None)
        if chosen is not None:
            wiring = module_wiring(f"blocks.{index}.{role}", *modules[chosen])
            found[wiring.site.name] = with_heads(wiring, role, config)
    return found


def block_refusals(wirings: Mapping[str, Wiring], block: nn.Module, index: int) -> dict[str, str]:
    """Roles of a block that no one matrix plays, each with the reason: experts, latent attention, fused maps.

    A matrix under the wrong name would be worse than none, so widths that contradict the role are refused.
    """
    sites = {role: w.site for role in ROLES if (w := wirings.get(f"blocks.{index}.{role}")) is not None}
    attention = ("attn.W_Q", "attn.W_K", "attn.W_V")
    refused = {}
    if "attn.W_O" in sites:
        missing = [role for role in attention if role not in sites]
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
        refused |= dict.fromkeys(attention, "its width does not divide into the model's heads")
    enters, leaves = sites.get("mlp.W_in"), sites.get("mlp.W_out")
    if enters and leaves and enters.d_out != leaves.d_in:
        refused["mlp.W_in"] = f"it gives {enters.d_out} columns where W_out reads {leaves.d_in}: gate and input in one"
    return {f"blocks.{index}.{role}": reason for role, reason in refused.items()}


def _parts(
    whole: Wiring, index: int, columns: Mapping[str, Columns], heads: Iterable[int | None] = (None,) * 3
) -> dict[str, Wiring]:
    """A fused weight's parts by role."""
    found = {}
    for (role, part), n in zip(columns.items(), heads):
        name = f"blocks.{index}.{role}"
        width = len(range(whole.site.d_out)[part]) if isinstance(part, slice) else len(part or ())
        fields = {"name": name, "d_out": width, "aliases": (f"{whole.owner}.{role.partition('.')[2]}",)}
        divided = {} if n is None else {"n_heads": n, "head_side": "out"}
        found[name] = replace(whole.renamed(**fields, **divided), columns=part)
    return found


def _split_qkv(path: str, module: nn.Module, index: int, config: Any, order: str) -> dict[str, Wiring]:
    whole, heads, kv_heads = module_wiring("", path, module), n_heads_of(config, "query"), n_heads_of(config, "kv")
    if order == "sections if multi_query":
        if getattr(config, "new_decoder_architecture", False):
            order = "groups"
        elif config.multi_query:
            order, kv_heads = "sections", 1
        else:
            order, kv_heads = "groups", heads
    if heads is None or kv_heads is None or whole.site.d_out % (heads + 2 * kv_heads):
        return {}
    columns = _qkv_columns(heads, kv_heads, whole.site.d_out // (heads + 2 * kv_heads), order)
    return _parts(whole, index, dict(zip(("attn.W_Q", "attn.W_K", "attn.W_V"), columns)), (heads, kv_heads, kv_heads))


def _qkv_columns(heads: int, kv_heads: int, d_head: int, order: str) -> list[tuple[int, ...] | slice]:
    """Columns of queries, keys and values in a fused weight."""
    if order == "sections":
        edges = [n * d_head for n in (0, heads, heads + kv_heads, heads + 2 * kv_heads)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]
    if order == "quarters":
        groups, group, d_head, which = 4, 3, heads // 4 * d_head, ([0], [2], [1])
    else:
        groups, group = kv_heads, heads // kv_heads + 2
        which = (list(range(group - 2)), [group - 2], [group - 1])
    stored = torch.arange(groups * group * d_head).view(groups, group, d_head)
    return [tuple(stored[:, heads_inside].flatten().tolist()) for heads_inside in which]


# --- a whole model ----------------------------------------------------------------------------------------------------
def find_blocks(root: nn.Module, config: Any, embedding: str) -> tuple[str, nn.ModuleList] | None:
    """Path and list of a model's transformer blocks: of the module lists whose entries are recognised as blocks, the one
    nearest to the token embedding (a vision tower has blocks too), and of these the longest."""
    found = []
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        if any(len(name_block(linear_maps(block, path), config, 0)) >= 2 for block in module):
            pairs = zip(path.split("."), embedding.split("."))
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            found.append((shared, len(module), path, module))
    return max(found, key=lambda entry: entry[:2])[2:] if found else None


def unreachable_matrices(root: nn.Module, covered: set[int]) -> dict[str, str]:
    """Every matrix of a model that no site reads (by its storage), each with the reason."""
    reasons: dict[str, str] = {}
    for path, module in root.named_modules():
        parts = {part for names in computed_tensors(module).values() for part in names}
        for attribute, parameter in module._parameters.items():
            if attribute in parts or computes_another(path):
                continue  # a site may read what is computed from it
            if parameter is None or parameter.ndim < 2 or min(parameter.shape) < 2:
                continue
            if parameter.untyped_storage().data_ptr() in covered:
                continue
            kind = type(module).__name__
            if isinstance(module, _ConvNd):
                reason = "a convolution is not one matrix product"
            elif parameter.ndim > 2:
                reason = f"{kind} holds a stack of matrices {list(parameter.shape)}, not one"
            else:
                reason = f"{kind} is not one linear map"
            reasons[f"{plain_path(path)}.{attribute}"] = reason
    return reasons
