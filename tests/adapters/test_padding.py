"""Padded rows are worth what they are alone, on every host; what cannot read them says so."""

from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import UnsupportedModelError

from ..support import zoo
from ..support.hosts import on_host
from ..support.models import BUILDERS, build, decomposition_of, module_of, tolerance

N = 5
PADDINGS = {"left": [3, 0], "right": [0, 3], "both": [2, 1]}
ARCHITECTURES = ["GPTNeoForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "GPTJForCausalLM", "MptForCausalLM"]
"""Learned positions, learned with an offset, ALiBi, a computed table, and ALiBi again."""


def padded(row: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """A row with padding beside it, and its attention mask."""
    pads = [row.new_full((1, n), 3) for n in (before, after)]
    mask = torch.cat([torch.zeros(1, before), torch.ones_like(row), torch.zeros(1, after)], 1).long()
    return torch.cat([pads[0], row, pads[1]], 1), mask


def agrees(model: Any, dec: tlpd.Decomposition, padding: str, bound: float) -> None:
    """Logits and component activations of one row alone, and beside a whole row in a padded batch."""
    before, after = PADDINGS[padding]
    row, whole = torch.arange(5, 5 + N).unsqueeze(0), torch.arange(20, 20 + N + before + after).unsqueeze(0)
    tokens, mask = padded(row, before, after)
    tokens, mask = torch.cat([tokens, whole]), torch.cat([mask, torch.ones_like(whole)])
    at, adapter = slice(before, before + N), adapt(model)
    with torch.no_grad():
        both = adapter.forward(tokens, mask)
        assert (both[:1, at] - adapter.forward(row)).abs().max() < bound
        assert (both[1:] - adapter.forward(whole)).abs().max() < bound
    together = tlpd.component_acts(model, dec, tokens, mask)
    for name, alone in tlpd.component_acts(model, dec, row).items():
        assert (together[name][:1, at] - alone).abs().max() < bound, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("host", BUILDERS)
def test_padded_rows_on_every_host(host: str, padding: str) -> None:
    model = build(host)
    agrees(model, decomposition_of(model, "blocks.*"), padding, tolerance(model))


@pytest.mark.parametrize("host", ["transformers", "bridge", "nnsight"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")  # tiny models are odd, and their hosts say so
def test_kinds_of_positions(architecture: str, host: str) -> None:
    if version("transformers").startswith("4."):
        pytest.skip("the tiny models are configured for transformers 5")
    try:
        model = on_host(zoo.tiny(architecture), host, zoo.bridge_name(architecture))
    except zoo.ArchitectureMissing as missing:
        pytest.skip(str(missing))
    module_of(model).requires_grad_(False)
    agrees(model, decomposition_of(model, "blocks.*"), "left", 1e-3)


class WithoutPositions(GPT2LMHeadModel):
    """It counts positions itself, from the first column of the row."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask)


def test_a_model_that_counts_its_padding_is_refused() -> None:
    model = WithoutPositions(build("gpt2").config).double().eval().requires_grad_(False)
    dec = decomposition_of(model, "blocks.*")
    agrees(model, dec, "right", 1e-10)
    for padding in ("left", "both"):
        with pytest.raises(tlpd.errors.UnsupportedModelError, match="pad them on the right"):
            agrees(model, dec, padding, 1e-10)


def test_an_evaluation_of_padded_rows_is_that_of_the_rows_alone() -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.0.mlp.*")
    settings = {
        "importances": tlpd.Oracle(k=2),
        "protocol": tlpd.EvaluationConfig(ladder=(), ablated=0),
        "progress": False,
    }
    row = torch.arange(5, 5 + N).unsqueeze(0)
    tokens, mask = padded(row, 3, 0)
    alone = tlpd.evaluate(model, dec, row, **settings)
    beside = tlpd.evaluate(model, dec, tokens, attention_mask=mask, **settings)
    for kind in ("unmasked", "zero"):  # the others draw numbers for every column
        assert beside.mask_row(kind)["kl"] == pytest.approx(alone.mask_row(kind)["kl"], rel=1e-6), kind


GAP = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 1, 1]])


@pytest.mark.parametrize("host", BUILDERS)
def test_gaps_in_a_row_on_every_host(host: str) -> None:
    model = build(host)
    rows = torch.where(GAP.bool(), torch.arange(10, 20), 3)
    with torch.no_grad():
        found = adapt(model).forward(rows, GAP)[GAP.bool()]
        alone = adapt(model).forward(rows[GAP.bool()].unsqueeze(0))[0]
    assert (found - alone).abs().max() < tolerance(model)


def test_gaps_that_local_attention_counts_are_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "sliding_window": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval().requires_grad_(False)
    adapter, short = adapt(model), torch.tensor([[1, 1, 0, 1, 1]])
    rows = torch.arange(5, 15).unsqueeze(0)
    alone = adapter.forward(rows[:, :5][short.bool()].unsqueeze(0))[0]
    assert (adapter.forward(rows[:, :5], short)[short.bool()] - alone).abs().max() < 3e-4, "within the window"
    with pytest.raises(UnsupportedModelError, match="gaps"):
        adapter.forward(rows, GAP)


@pytest.mark.parametrize("shorter", ["hidden", "capture", "blocks"])
@pytest.mark.parametrize("host", BUILDERS)
def test_a_first_padded_pass_that_is_cut_short(host: str, shorter: str) -> None:
    """What is tried out when padding is first seen must not be tried out amid a pass that ends early."""
    tokens, mask = padded(torch.arange(5, 5 + N).unsqueeze(0), 3, 0)
    model, other = build(host), build(host)
    with torch.no_grad():
        if shorter == "hidden":
            found = adapt(model).unembed(adapt(model).hidden(tokens, mask))
        else:
            captured = adapt(model).capture(tokens, (), mask, keep_blocks=True, to_hidden=shorter == "capture")
            found = adapt(model).unembed(captured.output) if shorter == "capture" else captured.output
            with adapt(model).resumed(captured.blocks, 1):
                assert torch.equal(adapt(model).forward(tokens, mask)[:, 3:], adapt(model).forward(tokens, mask)[:, 3:])
        expected = adapt(other).forward(tokens, mask)
    assert (found[:, 3:] - expected[:, 3:]).abs().max() < tolerance(model)
