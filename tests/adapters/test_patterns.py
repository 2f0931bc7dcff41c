"""Attention patterns on every host, against softmax(q k^T / sqrt(d_head) + causal mask) written out here."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.sites import SiteCall

from ..support import models
from ..support.exactness import no_hooks_left
from ..support.families import build
from ..support.hosts import VOCAB, HookedTransformer, adapted, hooked, needs_hooked_transformer, on_host, root_of

ROTARY = {"gpt2": 0, "llama": 8, "pythia": 2}
"""Family -> rotated entries of each head."""
HEADS = {"gpt2": (3, 3), "llama": (4, 2), "pythia": (4, 4)}
"""Family -> query and key/value heads."""
ROUNDING = {"gpt2": 1e-12, "llama": 1e-6, "pythia": 1e-6}
"""transformers rotates, and takes Llama's norms and softmax, in float32 whatever the model's dtype."""
HOSTS = ("transformers", "nnsight", "bridge", "hooked_transformer")


def converted(family: str) -> Any:
    """The family's model as a HookedTransformer, by TransformerLens' own conversion."""
    needs_hooked_transformer()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    rotary = {"positional_embedding_type": "rotary", "rotary_dim": ROTARY[family], "rotary_base": 10000}
    settings: dict[str, Any] = {
        "gpt2": {"d_model": 24, "n_heads": 3, "act_fn": "gelu_new", "normalization_type": "LN"},
        "llama": rotary
        | {"d_model": 24, "n_heads": 4, "n_key_value_heads": 2, "gated_mlp": True, "act_fn": "silu"}
        | {"normalization_type": "RMS", "final_rms": True, "eps": 1e-6},
        "pythia": rotary | {"d_model": 32, "n_heads": 4, "act_fn": "gelu", "parallel_attn_mlp": True},
    }[family]
    config = HookedTransformerConfig(
        n_layers=2, n_ctx=32, d_head=8, d_mlp=40, d_vocab=VOCAB, dtype=torch.float64, device="cpu", init_weights=False,
        **({"normalization_type": "LN", "eps": 1e-5} | settings),
    )  # fmt: skip
    convert = getattr(weight_conversions, f"convert_{'neox' if family == 'pythia' else family}_weights")
    model = HookedTransformer(config).eval().requires_grad_(False)
    state = convert(build(family), config)
    model.load_state_dict({key: value.to(torch.float64) for key, value in state.items()}, strict=False)
    return model


def on(family: str, host: str) -> Any:
    return converted(family) if host == "hooked_transformer" else on_host(build(family), host)


def rotated(x: Tensor, n: int) -> Tensor:
    """The first n entries of each head [batch, head, pos, d_head], rotated in pairs half of n apart."""
    if n == 0:
        return x
    angles = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(0, n, 2).double() / n)
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., n:]], -1)


def by_hand(q: Tensor, k: Tensor, family: str) -> Tensor:
    """Pattern [batch, head, query, key] of queries and keys [batch, pos, heads * 8]."""
    (heads, kv_heads), length = HEADS[family], q.shape[1]
    split = [rotated(t.unflatten(-1, (n, 8)).transpose(1, 2), ROTARY[family]) for t, n in ((q, heads), (k, kv_heads))]
    scores = split[0] @ split[1].repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) / 8**0.5
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


class Added:
    """A trainable change (x V) U of a site's output."""

    def __init__(self, adapter: ModelAdapter, name: str) -> None:
        site, generator = adapter.sites[name], torch.Generator().manual_seed(5)
        self.v = torch.randn(site.d_in, 2, generator=generator, dtype=torch.float64).requires_grad_()
        self.u = torch.randn(2, site.d_out, generator=generator, dtype=torch.float64).requires_grad_()

    def __call__(self, call: SiteCall) -> Tensor:
        return call.y + call.x @ self.v @ self.u


def queries_and_keys(adapter: ModelAdapter, layer: int, kept: dict[str, Tensor]) -> Mapping[str, Any]:
    def note(name: str, call: SiteCall) -> Tensor:
        kept[name] = call.y
        return call.y

    return {f"blocks.{layer}.attn.W_{r}": functools.partial(note, r) for r in "QK"}


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("host", HOSTS)
def test_patterns_are_the_textbook_s(family: str, host: str, tokens: Tensor) -> None:
    model = on(family, host)
    adapter = adapted(model)
    adapter.forward(tokens)
    hooks = no_hooks_left(model)
    plain = adapter.forward(tokens)
    for layer in (0, 1):
        y: dict[str, Tensor] = {}
        with adapter.patterns() as kept, adapter.intercept(queries_and_keys(adapter, layer, y)):
            logits = adapter.forward(tokens)
        assert sorted(kept) == [0, 1]
        assert kept[layer].shape == (2, HEADS[family][0], 7, 7)
        expected = by_hand(y["Q"], y["K"], family)
        error = (kept[layer] - expected).abs().max().item()
        assert error < (1e-6 if host == "bridge" else ROUNDING[family]), f"{error:.1e}"
        assert torch.equal(logits, plain)
    assert no_hooks_left(model) == hooks


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("host", HOSTS[1:])
def test_hosts_agree(family: str, host: str, tokens: Tensor) -> None:
    first, second = adapted(on(family, "transformers")), adapted(on(family, host))
    with first.patterns() as expected, second.patterns() as found:
        first.forward(tokens)
        second.forward(tokens)
    for layer in (0, 1):
        assert (found[layer] - expected[layer]).abs().max() < max(ROUNDING[family], 1e-6), layer


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("host", HOSTS)
def test_rows_sum_to_one_and_look_back(family: str, host: str, tokens: Tensor) -> None:
    adapter = adapted(on(family, host))
    with adapter.patterns() as kept:
        adapter.forward(tokens)
    for pattern in kept.values():
        assert (pattern.sum(-1) - 1).abs().max() < 1e-6
        assert pattern.min() >= 0 and pattern.triu(1).abs().max() == 0
        assert pattern.std() > 0.05


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("host", HOSTS)
def test_gradients_reach_patched_queries(family: str, host: str, tokens: Tensor) -> None:
    """Those of the formula above, where x W_K and x of W_Q are those of the clean pass: the first layer's."""
    adapter = adapted(on(family, host))
    clean: dict[str, Tensor] = {}
    with torch.no_grad(), adapter.intercept(queries_and_keys(adapter, 0, clean)):
        x = adapter.capture(tokens, ["blocks.0.attn.W_Q"]).inputs["blocks.0.attn.W_Q"]
    patch = Added(adapter, "blocks.0.attn.W_Q")
    weights = torch.randn(2, HEADS[family][0], 7, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with adapter.patterns() as kept, adapter.intercept({"blocks.0.attn.W_Q": patch}):
        adapter.hidden(tokens)
    leaves = [patch.v, patch.u]
    found = torch.autograd.grad((kept[0].double() * weights).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(
        (by_hand(clean["Q"] + x @ patch.v @ patch.u, clean["K"], family) * weights).sum(), leaves
    )
    for gradient, right in zip(found, expected):
        assert right.abs().max() > 1e-3
        tolerance = 1e-5 if host == "bridge" else 10 * ROUNDING[family]
        assert (gradient - right).abs().max() < tolerance * right.abs().max()
    later = torch.autograd.grad(kept[1].double().pow(2).sum(), leaves)
    assert all(gradient.abs().max() > 0 for gradient in later)


@pytest.mark.parametrize("host", ["transformers", "bridge", "hooked_transformer"])
def test_padding_is_honoured(host: str, tokens: Tensor) -> None:
    """A left-padded row attends as its unpadded self does."""
    adapter = adapted(on("gpt2", host))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    names = ["blocks.1.attn.W_Q"]
    with torch.no_grad(), adapter.patterns() as kept:
        adapter.capture(tokens, names, mask)
        padded = kept[0]
        adapter.forward(tokens)
    assert padded[0, :, 2:, :2].abs().max() == 0
    assert (padded[0, :, 2:].sum(-1) - 1).abs().max() < 1e-12
    assert kept[0][0, :, 2:, :2].abs().max() > 1e-3, "without a mask they are attended to"
    assert (padded[1] - kept[0][1]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [models.gpt2, models.llama])
@pytest.mark.parametrize("error", [False, True])
def test_fused_attention_is_switched_off_and_on_again(kind: Any, error: bool, tokens: Tensor) -> None:
    fused, eager = kind(torch.float64, attn_implementation="sdpa"), kind(torch.float64)
    adapter, twin = adapted(fused), adapted(eager)
    before, hooks = adapter.forward(tokens), no_hooks_left(fused)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    with adapter.patterns() as found, twin.patterns() as expected:
        assert fused.config._attn_implementation == "eager"
        adapter.forward(tokens, mask)
        twin.forward(tokens, mask)
    for layer in (0, 1):
        assert torch.equal(found[layer], expected[layer])
    if error:
        with pytest.raises(ZeroDivisionError), adapter.patterns():
            raise ZeroDivisionError
    assert fused.config._attn_implementation == "sdpa"
    assert all(getattr(m, "_attn_implementation", "sdpa") == "sdpa" for m in fused.modules())
    assert no_hooks_left(fused) == hooks
    assert torch.equal(adapter.forward(tokens), before)


def test_a_pass_begins_anew(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
        with adapter.patterns() as kept:
            adapter.hidden(tokens)
            assert sorted(kept) == [0, 1, 2]
            last = kept[2]
            with adapter.resumed(clean.blocks, 2):
                adapter.hidden(tokens)
            assert sorted(kept) == [2]
            assert torch.equal(kept[2], last)
            with adapter.patterns() as inner:
                adapter.forward(tokens[:1])
            assert all(torch.equal(inner[layer], kept[layer]) for layer in (0, 1, 2))
            assert kept[0].shape[0] == 1
        adapter.forward(tokens)
        assert kept[0].shape[0] == 1  # what is left after the context is no longer filled


@pytest.mark.parametrize("host", ["bridge", "hooked_transformer"])
def test_what_a_user_s_hook_makes_of_a_pattern_counts(host: str, tokens: Tensor) -> None:
    model = on("gpt2", host)
    adapter = adapted(model)

    def uniform(pattern: Tensor, hook: Any) -> Tensor:
        return torch.full_like(pattern, 1 / 7)

    with adapter.patterns() as kept:
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", uniform)])
        assert kept[1].unique().tolist() == [1 / 7]
        assert len(kept[0].unique()) > 7


@pytest.mark.parametrize("host", ["transformers", "nnsight"])
def test_patterns_are_those_of_evaluation_mode(host: str, tokens: Tensor) -> None:
    model = on_host(models.gpt2(attn_pdrop=0.5), host)
    adapter = adapted(model)
    with adapter.patterns() as kept:
        adapter.forward(tokens)
        expected = dict(kept)
    root_of(model).train()
    with adapter.patterns() as kept:
        adapter.forward(tokens)
        assert sorted(kept) == [0, 1] and all(torch.equal(kept[layer], expected[layer]) for layer in kept)


def test_a_plain_module_has_none() -> None:
    adapter = adapted(nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, VOCAB)))
    with pytest.raises(UnsupportedModelError, match="no attention that is known"):
        with adapter.patterns():
            pass


class Silent(nn.Module):
    """An attention that keeps its pattern to itself."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.inner = attention.c_attn, attention.c_proj, [attention]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)[0], None


class Reticent(Silent):
    """An attention that gives its pattern when it is asked for, as those of older transformers do."""

    def forward(self, *args: Any, output_attentions: bool = False, **kwargs: Any) -> Any:
        output, pattern = self.inner[0](*args, **kwargs)[:2]
        return output, pattern if output_attentions else None


def test_an_attention_that_must_be_asked(tokens: Tensor) -> None:
    model, plain = models.gpt2(), adapted(models.gpt2())
    model.transformer.h[1].attn = Reticent(model.transformer.h[1].attn)
    with adapted(model).patterns() as found, plain.patterns() as expected:
        model(tokens)
        plain.forward(tokens)
    assert torch.equal(found[1], expected[1])


def test_an_attention_that_gives_none_is_refused() -> None:
    model = models.gpt2()
    model.transformer.h[1].attn = Silent(model.transformer.h[1].attn)
    with pytest.raises(UnsupportedModelError, match="layer 1 gives no pattern"):
        with adapted(model).patterns():
            pass


def test_rows_that_are_no_distribution_are_refused() -> None:
    """GPT-OSS lets every head attend to nothing."""
    if transformers.__version__.startswith("4"):
        pytest.skip("the tiny models are configured for transformers 5")
    from ..support import zoo

    with pytest.raises(UnsupportedModelError, match="do not sum to one"):
        with adapted(zoo.tiny("GptOssForCausalLM")).patterns():
            pass


def test_kinds_of_hooked_transformers(tokens: Tensor) -> None:
    for settings in ({"attn_only": True}, {"positional_embedding_type": "alibi"}, {"attn_scores_soft_cap": 2.0}):
        adapter = adapted(hooked(**settings))
        with adapter.patterns() as kept:
            adapter.forward(tokens)
        assert sorted(kept) == [0, 1]
        assert (kept[1].sum(-1) - 1).abs().max() < 1e-12
