"""micro-gpt2 on any host, and its text and task prompts as token tensors.

The weights lie beside this file as a plain transformers checkpoint (safetensors and JSON), so that every host loads
what it would load from the hub, offline. Nothing is folded or centred on the way.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_paramdecomp.errors import SettingError, UnsupportedModelError
from tl_paramdecomp.pretrained import grammar

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

MICRO_GPT2_DIR = Path(__file__).parent / "micro-gpt2"


@dataclass(frozen=True, eq=False)
class TaskPrompt:
    """One prompt of a task, and what the next token may and may not be.

    Attributes:
        task: "ioi", "pronoun", "greater_than" or "induction".
        text: the prompt without the end-of-text mark in front, which TransformerLens' `to_tokens` adds.
        tokens: the token ids with that mark.
        answers: ids of the correct next tokens: the indirect object, the pronoun, every later year, the next word.
        wrong: ids to contrast them with: the subject, the other pronoun, every year that is not later; none for
            induction.
        corrupted: the same task asked of other content, token by token aligned with `tokens`: three different names
            (ioi), a name of the other gender (pronoun), the first year 01 (greater_than), an unrelated first copy
            (induction).
    """

    task: str
    text: str
    tokens: Int[Tensor, " length"]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    corrupted: Int[Tensor, " length"] | None


def _ids(words: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(grammar.TOKEN_IDS[word] for word in words)


def as_task_prompt(prompt: grammar.Prompt) -> TaskPrompt:
    """Return a prompt of the grammar as token ids."""
    tokens, corrupted = (torch.tensor(_ids((grammar.END_OF_TEXT, *w))) for w in (prompt.words, prompt.corrupted))
    return TaskPrompt(prompt.task, " ".join(prompt.words), tokens, _ids(prompt.answers), _ids(prompt.wrong), corrupted)


def micro_gpt2_prompts(task: str, n: int, seed: int = 0, split: str = "test") -> list[TaskPrompt]:
    """Return `n` prompts of one task, the same for the same arguments.

    Prompts of the splits "validation" and "test" ask for pairs of names, names with adjectives, years and random words
    that the training text never held together. IOI and pronoun prompts differ in length, from template to template.

    Args:
        task: "ioi", "pronoun", "greater_than" or "induction".
        n: the number of prompts.
        seed: selects the prompts.
        split: "train", "validation" or "test".

    Raises:
        SettingError: for an unknown task or split, or a negative n.
    """
    return [as_task_prompt(prompt) for prompt in grammar.prompts(task, n, seed, split)]


def micro_gpt2_tokens(n: int, seed: int = 0) -> Int[Tensor, "n 64"]:
    """Return `n` rows of the text micro-gpt2 was trained on, `[n, 64]`: packed documents and repeated random words.

    Raises:
        SettingError: for a negative n.
    """
    if n < 0:
        raise SettingError(f"the number of rows must not be negative, got {n}")
    rows = [_ids(row.words) for row in islice(grammar.rows(f"text/{seed}"), n)]
    return torch.tensor(rows, dtype=torch.long).reshape(n, grammar.N_CTX)


def micro_gpt2_tokenizer() -> "PreTrainedTokenizerFast":
    """Return the tokenizer: one token per word, mark of punctuation and pair of digits, whatever the case.

    It adds no end-of-text mark by itself (TransformerLens' `to_tokens` does), and raises on a word that micro-gpt2
    does not know, instead of passing a token that means nothing.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MICRO_GPT2_DIR)


def load_micro_gpt2(host: str = "transformers") -> Any:
    """Return micro-gpt2 with unprocessed weights, in eval mode on the CPU, with its tokenizer where the host holds one.

    Args:
        host: "transformers" (`GPT2LMHeadModel`), "transformer_bridge" (`TransformerBridge`, TransformerLens 3 and 4),
            "hooked_transformer" (`HookedTransformer`, TransformerLens 2 and 3) or "nnsight" (`TransformersModel`).

    Raises:
        UnsupportedModelError: for another host, or one the installed libraries do not have; it names those there are.
    """
    if host not in _HOSTS:
        raise UnsupportedModelError(f"unknown host {host!r}; micro-gpt2 loads on {', '.join(_HOSTS)}")
    paths, load = _HOSTS[host]
    host_class = _host_class(host)
    if host_class is None:
        there = ", ".join(other for other in _HOSTS if _host_class(other) is not None)
        raise UnsupportedModelError(
            f"the installed libraries have no host {host!r} (no {paths[-1]}); here micro-gpt2 loads on {there}"
        )
    # Some hosts draw initial weights before they take ours; the caller's random numbers must not depend on that.
    with torch.random.fork_rng(devices=[]):
        return load(host_class)


# hosts -----------------------------------------------------------------------------------------------------------
# Finding a host's class and loading onto it are two steps, so that only a missing class reads as a missing host and an
# ImportError from inside a host stays what it is.


def _host_class(host: str) -> Any:
    """The class of a host; None where the installed libraries have none."""
    for module, _, name in (path.rpartition(".") for path in _HOSTS[host][0]):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    return None


def _load_transformers(gpt2_class: Any) -> "GPT2LMHeadModel":
    # Eager attention: the one that returns attention patterns, and the one TransformerLens computes.
    return gpt2_class.from_pretrained(MICRO_GPT2_DIR, local_files_only=True, attn_implementation="eager").eval()


def _load_bridge(bridge_class: Any) -> Any:
    parts = {"hf_model": load_micro_gpt2(), "tokenizer": micro_gpt2_tokenizer()}
    return bridge_class.boot_transformers(str(MICRO_GPT2_DIR), device="cpu", **parts).eval()


def _load_hooked(hooked_class: Any) -> Any:
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    source = load_micro_gpt2()
    shape = source.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer, d_model=shape.n_embd, d_head=shape.n_embd // shape.n_head, n_heads=shape.n_head,
        d_mlp=shape.n_inner, n_ctx=shape.n_positions, d_vocab=shape.vocab_size, act_fn=shape.activation_function,
        eps=shape.layer_norm_epsilon, normalization_type="LN", model_name="micro-gpt2",
        original_architecture="GPT2LMHeadModel", init_weights=False, device="cpu",
    )  # fmt: skip
    model = hooked_class(config, tokenizer=micro_gpt2_tokenizer())
    weights = {name: weight.detach() for name, weight in convert_gpt2_weights(source, config).items()}
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(processing, False))
    return model.eval()


def _load_nnsight(nnsight_class: Any) -> Any:
    return nnsight_class(load_micro_gpt2(), tokenizer=micro_gpt2_tokenizer())


_HOSTS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "transformers": (("transformers.GPT2LMHeadModel",), _load_transformers),
    "transformer_bridge": (("transformer_lens.model_bridge.TransformerBridge",), _load_bridge),
    "hooked_transformer": (("transformer_lens.HookedTransformer",), _load_hooked),
    "nnsight": (("nnsight.modeling.transformers.TransformersModel", "nnsight.LanguageModel"), _load_nnsight),
}
