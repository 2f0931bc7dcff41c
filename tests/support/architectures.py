"""Every architecture that transformer-lens knows, as a tiny model: which sites are exact, and why the others are refused."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt

from . import zoo
from .exactness import roles
from .hosts import build_bridge_from_module

HOSTS = {"transformer_bridge": "TransformerBridge", "transformers": "transformers, and nnsight around it"}


FUSED = [
    key
    for key in zoo.TABLE
    if key.startswith(("GPT2", "GPTBig", "BloomForC", "FalconForC", "Phi3", "CodeGen", "Mpt", "OpenAI", "GPTNeoX"))
    and not key.endswith(("/post_residual", "/sequential", "/bias"))
]
"""Architectures that keep queries, keys and values in one weight, one of each layout."""
TELLING = {
    *FUSED,
    *("Glm4ForCausalLM", "ModernBertDecoderForCausalLM", "Gemma4ForCausalLM", "Lfm2ForCausalLM", "OPTForCausalLM"),
    *(
        "NemotronHForCausalLM",
        "StableLmForCausalLM",
        "LlavaForConditionalGeneration",
        "JambaForCausalLM",
        "BertLMHeadModel",
    ),
    *("MixtralForCausalLM", "DeepseekV3ForCausalLM", "Qwen3_5ForCausalLM", "AfmoeForCausalLM", "HrmTextForCausalLM"),
}
"""Architectures whose names or layouts are the library's own reading, and one of each odd kind."""


@dataclass(frozen=True)
class Row:
    """What an architecture's tiny model offers on one host."""

    architecture: str
    exact: tuple[str, ...]
    """Roles of the exact sites: names with the layer number replaced by `*`."""
    refused: Mapping[str, tuple[str, ...]]
    """Reason -> roles."""


_ROWS: dict[tuple[str, str], Row] = {}


def tiny_on(architecture: str, host: str) -> Any:
    """A tiny model of an architecture on a host.

    Raises:
        zoo.ArchitectureMissing: The installed libraries cannot build it; says why.
    """
    model = zoo.tiny(architecture)
    if host == "transformers":
        return model
    if build_bridge_from_module is None:
        raise zoo.ArchitectureMissing("this version of transformer-lens has no TransformerBridge")
    try:
        return build_bridge_from_module(model, zoo.bridge_name(architecture), hf_config=model.config)
    except Exception as error:  # whatever the host says is the reason
        raise zoo.ArchitectureMissing(
            f"transformer-lens cannot wrap it: {str(error).split('. ')[0].rstrip('.')}"
        ) from error


def row(architecture: str, host: str, model: Any) -> Row:
    """The row of a model; remembered."""
    if (architecture, host) not in _ROWS:
        _ROWS[architecture, host] = _row(architecture, model)
    return _ROWS[architecture, host]


def _row(architecture: str, model: Any) -> Row:
    try:
        adapter = adapt(model)
    except tlpd.errors.UnsupportedModelError as error:
        return Row(architecture, (), {str(error).rstrip("."): ("all",)})
    reasons: dict[str, list[str]] = {}
    for name, reason in adapter.refused.items():
        reasons.setdefault(re.sub(r"\.\d+\.", ".*.", reason), []).append(name)
    return Row(
        architecture, tuple(roles(adapter.sites)), {reason: tuple(roles(names)) for reason, names in reasons.items()}
    )


def surveyed(architecture: str, host: str) -> Row:
    """The row of an architecture; a refusal where it cannot be built."""
    if (architecture, host) in _ROWS:
        return _ROWS[architecture, host]
    try:
        return row(architecture, host, tiny_on(architecture, host))
    except zoo.ArchitectureMissing as reason:
        return _ROWS.setdefault((architecture, host), Row(architecture, (), {str(reason): ("all",)}))


def page() -> str:
    """The documentation page with the table of each host."""
    lines = [
        "# Architectures",
        "",
        "Which weights of which architecture can be decomposed exactly, found out with tiny random models by",
        "`docs/make_architectures.py`; a test holds this page to what that gives. `*` stands for the layer. A family outside",
        "the few that the tests hold exact by name is tried out when it is loaded, and what does not come out exactly is",
        "refused with the reason given here.",
        "",
        f"Made with transformer-lens {version('transformer-lens')} and transformers {version('transformers')}.",
    ]
    for host, title in HOSTS.items():
        lines += ["", f"## {title}", "", "| architecture | exact sites | refused |", "|---|---|---|"]
        lines += [_line(surveyed(architecture, host)) for architecture in zoo.TABLE]
    lines += ["", "## Not tried", "", "| architecture | reason |", "|---|---|"]
    lines += [f"| {architecture} | {reason} |" for architecture, reason in zoo.NOT_BUILT.items()]
    return "\n".join(lines) + "\n"


def _line(found: Row) -> str:
    refused = "; ".join(f"{_shortened(names)}: {reason}" for reason, names in found.refused.items())
    return f"| {found.architecture} | {_compact(found.exact)} | {refused.replace('|', '/')} |"


def _compact(names: Iterable[str]) -> str:
    """`attn W_Q W_K, mlp W_in, ...`: canonical roles by part, other names in full."""
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, weight = name.rpartition(".")
        canonical = part in ("blocks.*.attn", "blocks.*.mlp", "embed", "pos_embed", "unembed")
        parts.setdefault(part.removeprefix("blocks.*.") if canonical else f"`{name}`", []).extend([weight] * canonical)
    return ", ".join(" ".join((part, *weights)) for part, weights in parts.items())


def _shortened(names: tuple[str, ...]) -> str:
    if names == ("all",):
        return "all"
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
