"""How many tokens and positions a model has, held against the model itself: one more of either and its own call fails."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import zoo
from tests.support.hosts import VOCAB, hooked, on_host, run
from tl_paramdecomp.adapters import adapt

ENDING = {
    "GPT2LMHeadModel": 64, "GPTNeoForCausalLM": 64, "OPTForCausalLM": 64, "GPTJForCausalLM": 64, "MptForCausalLM": 64,
    "OpenAIGPTLMHeadModel": 64, "BertLMHeadModel": 64, "RobertaForMaskedLM": 63,
}  # fmt: skip
"""Architectures whose positions are a table of 64 rows; the tables of OPT and RoBERTa have rows in front that none uses."""
ENDLESS = ("LlamaForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "FalconForCausalLM")
"""Architectures that compute positions, rotary or ALiBi, for any row."""
HOSTS = ("transformers", "bridge", "nnsight")


def reads(model: Any, tokens: torch.Tensor) -> bool:
    """Whether a host's own call takes these rows."""
    try:
        run(model, tokens)
    except Exception:  # whatever the host trips over
        return False
    return True


def row(length: int) -> torch.Tensor:
    return torch.arange(length).remainder(VOCAB - 3).add(3).unsqueeze(0)


def hosted(architecture: str, host: str) -> Any:
    if version("transformers").startswith("4."):
        pytest.skip("the tiny models are configured for transformers 5")
    try:
        model = zoo.tiny(architecture)
    except zoo.ArchitectureMissing as missing:
        pytest.skip(str(missing))
    if host == "bridge" and architecture.startswith("Roberta"):
        pytest.skip("transformer-lens cannot wrap it")
    return on_host(model, host, zoo.bridge_name(architecture))


@pytest.mark.filterwarnings("ignore:Module .* has a submodule named")  # nnsight, of BERT's `output`
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", ENDING)
def test_the_context_is_the_longest_row_that_the_model_reads(architecture: str, host: str):
    model = hosted(architecture, host)
    length = adapt(model).context_length
    assert length == ENDING[architecture]
    assert reads(model, row(length)) and not reads(model, row(length + 1))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", ENDLESS)
def test_computed_positions_have_no_end(architecture: str, host: str):
    model = hosted(architecture, host)
    assert adapt(model).context_length is None
    assert reads(model, row(200))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", ("GPT2LMHeadModel", "OPTForCausalLM", "LlamaForCausalLM"))
def test_the_vocabulary_is_the_table_that_tokens_are_looked_up_in(architecture: str, host: str):
    model = hosted(architecture, host)
    assert adapt(model).vocabulary_size == VOCAB
    assert reads(model, torch.tensor([[3, VOCAB - 1]])) and not reads(model, torch.tensor([[3, VOCAB]]))


@pytest.mark.parametrize("positions", ("standard", "shortformer", "rotary", "alibi"))
def test_a_hooked_transformer_reads_its_context(positions: str):
    model = hooked(positional_embedding_type=positions, **({"rotary_dim": 6} if positions == "rotary" else {}))
    adapter = adapt(model)
    length = adapter.context_length
    assert adapter.vocabulary_size == VOCAB and not reads(model, torch.tensor([[3, VOCAB]]))
    assert length == (None if positions == "alibi" else 16)
    longer = length is None or (positions == "rotary" and version("transformer-lens").startswith("2."))
    assert reads(model, row(16)) and reads(model, row(17)) == longer  # version 2 reads on, past what its cfg says


def test_models_without_a_head_have_the_limits_of_their_body():
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

    config = GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=12, n_layer=1, n_head=2, pad_token_id=0)
    for kind in (GPT2Model, GPT2ForSequenceClassification):
        adapter = adapt(model := kind(config).eval())
        assert reads(model, row(16)) and not reads(model, row(17))
        assert (adapter.vocabulary_size, adapter.context_length) == (VOCAB, 16)


def test_a_vocabulary_that_grew_counts():
    model = hosted("GPT2LMHeadModel", "transformers")
    adapter = adapt(model)
    model.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
    assert adapter.vocabulary_size == VOCAB + 9 and reads(model, torch.tensor([[3, VOCAB + 8]]))


@pytest.mark.parametrize(
    ("made", "vocabulary"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), None),
        (lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4)), 9),
        (lambda: nn.ModuleDict({"words": nn.Embedding(9, 5), "places": nn.Embedding(7, 5)}), None),
    ],
)
def test_plain_modules_have_the_vocabulary_of_their_only_table(made: Callable[[], nn.Module], vocabulary: int | None):
    adapter = adapt(module := made())
    assert isinstance(module, nn.Module) and (adapter.vocabulary_size, adapter.context_length) == (vocabulary, None)
