"""Passes that begin at a later block or end before the unembedding, against the full pass of the same model."""

import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tl_paramdecomp.adapters import ModelAdapter
from tl_paramdecomp.errors import SettingError, SiteNotFiredError, UnsupportedModelError
from tl_paramdecomp.sites import SiteCall

from ..support import models
from ..support.exactness import difference, no_hooks_left
from ..support.families import build
from ..support.hosts import VOCAB, HookedTransformer, adapted, hooked, on_host, root_of

HOSTS = ("transformers", "nnsight", "bridge")
SHOWN = ("gpt2", "gpt-neo", "gpt-j", "pythia", "llama", "gemma2")
"""Learned and rotary positions, parallel and sequential blocks, tied and untied, grouped heads, norms before and after."""
ON_HOSTS = [(family, host) for family in SHOWN for host in HOSTS]
HOOKED: dict[str, dict[str, Any]] = {
    "LayerNorm": {"n_layers": 3},
    "attention only": {"n_layers": 3, "attn_only": True, "normalization_type": None},
    "norms before and after, grouped heads": {
        **{"n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 4, "normalization_type": "RMS"},
        **{"gated_mlp": True, "act_fn": "silu", "use_normalization_before_and_after": True, "n_layers": 3},
    },
    "capped logits": {"output_logits_soft_cap": 3.0},
}
needs_hooked = pytest.mark.skipif(HookedTransformer is None, reason="transformer-lens 4 has no HookedTransformer")


PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
LEFT_PADDED = PADDED.flip(1)
"""Not for Llama in float64: transformers computes its softmax in float32, where the mask of a padded row is -inf."""


class Patch:
    """A trainable change of one site's output, y + (m * (x V)) U, and its gradients."""

    def __init__(self, adapter: ModelAdapter, name: str, rows: torch.Size, n: int = 3) -> None:
        site, generator = adapter.sites[name], torch.Generator().manual_seed(3)
        dtype = adapter.weight(name).dtype
        shapes = {"V": (site.d_in, n), "U": (n, site.d_out), "m": (*rows, n)}
        self.leaves = {
            key: (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
            for key, shape in shapes.items()
        }
        self.name, self.calls = name, 0

    def __call__(self, call: SiteCall) -> Tensor:
        self.calls += 1
        v, u, m = self.leaves["V"], self.leaves["U"], self.leaves["m"]
        acts = call.x @ v if call.x.is_floating_point() else v[call.x]
        return call.y + (m * acts) @ u

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        loss = (output * weights.to(output.dtype)).sum()
        return dict(zip(self.leaves, torch.autograd.grad(loss, list(self.leaves.values()))))


def own_forwards(model: Any) -> dict[str, Any]:
    return {path: module.__dict__.get("forward") for path, module in root_of(model).named_modules()}


def count_calls(block: nn.Module) -> tuple[list[str], list[Any]]:
    """Names of the modules inside a block as they are called."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(functools.partial(lambda name, *_: called.append(name), name))
        for name, module in block.named_modules()
        if name
    ]
    return called, handles


def assert_resumed_is_full(adapter: ModelAdapter, tokens: Tensor, mask: Tensor | None = None) -> None:
    """Bit for bit, values and gradients, for every site of every block, one at a time."""
    with torch.no_grad():
        clean = adapter.capture(tokens, [], mask, keep_blocks=True)
    assert len(clean.blocks) == len(adapter.blocks) > 1
    for name in adapter.sites:
        block = adapter.block_of(name)
        if name == "unembed.W_U":
            block = len(adapter.blocks)
        if not block:
            continue
        patch = Patch(adapter, name, tokens.shape)
        with adapter.intercept({name: patch}):
            full = adapter.forward(tokens, mask)
            with adapter.resumed(clean.blocks, block):
                resumed = adapter.forward(tokens, mask)
        assert patch.calls == 2, name
        assert torch.equal(resumed, full), f"{name}: {difference(resumed, full):.1e}"
        assert difference(full, clean.logits) > 1e-6, f"{name}: the patch does nothing"
        expected, found = patch.gradients(full), patch.gradients(resumed)
        for key, gradient in expected.items():
            assert gradient.abs().max() > 0, (name, key)
            assert torch.equal(found[key], gradient), f"{name} {key}: {difference(found[key], gradient):.1e}"


# --- beginning at a block --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "host"), ON_HOSTS)
def test_a_pass_that_begins_at_a_block_is_the_full_pass(family: str, host: str, tokens: Tensor) -> None:
    model = on_host(build(family), host)
    adapter = adapted(model)
    adapter.forward(tokens)  # hosts set hooks of their own up at their first run
    hooks, forwards = no_hooks_left(model), own_forwards(model)
    assert_resumed_is_full(adapter, tokens)
    assert no_hooks_left(model) == hooks
    assert own_forwards(model) == forwards


@needs_hooked
@pytest.mark.parametrize("kind", HOOKED)
def test_a_hooked_transformer_begins_at_a_block(kind: str, tokens: Tensor) -> None:
    model = hooked(**HOOKED[kind])
    hooks, forwards = no_hooks_left(model), own_forwards(model)
    assert_resumed_is_full(adapted(model), tokens)
    assert no_hooks_left(model) == hooks
    assert own_forwards(model) == forwards


DEEP: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: models.gpt2(n_layer=4),
    "gpt2 in float32": lambda: models.gpt2(torch.float32, n_layer=4),
    "gpt2 with scaled dot product": lambda: models.gpt2(n_layer=4, attn_implementation="sdpa"),
    "llama": lambda: models.llama(torch.float64, num_hidden_layers=4),
    "llama in bfloat16": lambda: models.llama(torch.bfloat16, num_hidden_layers=4),
    "bridge": lambda: models.bridge(models.gpt2(n_layer=4)),
    "nnsight": lambda: models.nnsight(models.llama(torch.float64, num_hidden_layers=4)),
    "hooked": lambda: models.hooked(n_layers=4),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deeper_models_and_padding(kind: str, tokens: Tensor) -> None:
    model = DEEP[kind]()
    root_of(model).requires_grad_(False)
    adapter = adapted(model)
    assert len(adapter.blocks) == 4
    assert_resumed_is_full(adapter, tokens, PADDED if "llama" in kind or kind == "nnsight" else LEFT_PADDED)


def test_blocks_are_found_by_their_own_names() -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    for name in adapter.sites:
        expected = int(name.split(".")[1]) if name.startswith("blocks.") else None
        assert adapter.block_of(name) == expected, name
    assert list(adapter.blocks) == list(adapter.root.transformer.h)
    assert adapter.block_of("blocks.2.mlp.W_in.pre_identity") == 2
    assert adapter.block_of("unembed.W_U.pre_identity") is None


@pytest.mark.parametrize("kind", ["gpt2", "bridge", "nnsight", "hooked"])
def test_blocks_before_are_not_computed(kind: str, tokens: Tensor) -> None:
    adapter = adapted(DEEP[kind]())
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
        called, handles = zip(*map(count_calls, adapter.blocks))
        with adapter.resumed(clean.blocks, 2):
            logits = adapter.forward(tokens)
    for handle in itertools.chain(*handles):
        handle.remove()
    assert torch.equal(logits, clean.logits)
    assert not called[0] and not called[1]
    assert called[2] and called[3]


def test_the_very_object_is_given_back(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
        with adapter.resumed(clean.blocks, 2):
            again = adapter.capture(tokens, [], keep_blocks=True)
    assert again.blocks[0] is clean.blocks[0] and again.blocks[1] is clean.blocks[1]


def test_kept_outputs_hold_no_graph(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    clean = adapter.capture(tokens, [], keep_blocks=True)
    assert clean.logits.requires_grad
    tensors = [t for output in clean.blocks for t in (output if isinstance(output, tuple) else (output,))]
    assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))


def test_a_hook_of_the_user_on_a_block_acts_once(tokens: Tensor) -> None:
    model = models.gpt2(n_layer=3).requires_grad_(False)

    def twice(module: nn.Module, args: tuple, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    plain = adapted(model).forward(tokens)
    with model.transformer.h[0].register_forward_hook(twice):
        assert difference(adapted(model).forward(tokens), plain) > 1e-3
        assert_resumed_is_full(adapted(model), tokens)


def test_everything_is_back_after_an_exception(tokens: Tensor) -> None:
    for kind in ("gpt2", "nnsight", "hooked", "bridge"):
        try:
            model = DEEP[kind]()
        except pytest.skip.Exception:
            continue
        adapter = adapted(model)
        with torch.no_grad():
            before, forwards = adapter.capture(tokens, [], keep_blocks=True), own_forwards(model)
            with pytest.raises(ZeroDivisionError):
                with adapter.resumed(before.blocks, 3), adapter.intercept({"unembed.W_U": lambda call: 1 / 0}):
                    adapter.forward(tokens)
            with pytest.raises(ZeroDivisionError):
                with adapter.intercept({"blocks.1.attn.W_O": lambda call: 1 / 0}):
                    adapter.capture(tokens, [], keep_blocks=True)
            assert own_forwards(model) == forwards
            assert torch.equal(adapter.forward(tokens), before.logits)


def test_a_site_in_a_block_left_out_does_not_fire(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
        with adapter.resumed(clean.blocks, 1):
            with adapter.intercept({"blocks.0.mlp.W_in": lambda call: call.y}):
                with pytest.raises(SiteNotFiredError, match=r"blocks\.0\.mlp\.W_in"):
                    adapter.forward(tokens)


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_that_is_not_there(block: int, tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
    with pytest.raises(SettingError, match="0 to 3"):
        with adapter.resumed(clean.blocks, block):
            pass
    with pytest.raises(SettingError, match="outputs of all 3 blocks"):
        with adapter.resumed(clean.blocks[:2], 1):
            pass


def test_a_plain_module_takes_full_passes(tokens: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, VOCAB))
    adapter = adapted(model)
    assert not adapter.blocks and adapter.block_of("1.weight") is None
    captured = adapter.capture(tokens, ["1.weight"], keep_blocks=True)
    assert captured.blocks == ()
    assert not adapter.splits_at_unembedding
    with pytest.raises(UnsupportedModelError, match=r"no site unembed\.W_U"):
        adapter.hidden(tokens)
    with pytest.raises(UnsupportedModelError, match="full forward pass"):
        adapter.unembed(torch.zeros(2, 5))


class ReadsAnEarlierBlock(nn.Module):
    """A block's MLP that adds what an earlier block's MLP last gave, past the residual stream."""

    def __init__(self, mlp: nn.Module, earlier: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = mlp.c_fc, mlp.c_proj, mlp.act
        self.kept: list[Tensor] = []
        earlier.register_forward_hook(lambda module, args, output: self.kept.__setitem__(slice(None), [output]))

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x))) + self.kept[0]


def test_blocks_that_share_more_than_the_residual_stream_are_not_left_out(tokens: Tensor) -> None:
    model = models.gpt2(n_layer=3)
    model.transformer.h[1].mlp = ReadsAnEarlierBlock(model.transformer.h[1].mlp, model.transformer.h[0].mlp)
    adapter = adapted(model)
    assert not adapter.blocks
    assert adapter.block_of("blocks.1.mlp.W_in") is None
    assert adapter.capture(tokens, [], keep_blocks=True).blocks == ()


def test_a_block_called_twice_is_not_left_out() -> None:
    model = models.gpt2(n_layer=3)
    model.transformer.h = nn.ModuleList([*model.transformer.h, model.transformer.h[0]])
    assert not adapted(model).blocks


def test_shortcuts_are_those_of_evaluation_mode(tokens: Tensor) -> None:
    model = models.gpt2(n_layer=3, resid_pdrop=0.5)
    adapter = adapted(model.train())
    assert len(adapter.blocks) == 3
    model.eval()
    assert len(adapter.blocks) == 3


# --- ending before the unembedding -----------------------------------------------------------------------------------
def assert_splits(adapter: ModelAdapter, tokens: Tensor, mask: Tensor | None = None) -> None:
    """x of the unembedding, its logits, and gradients through both, against the full pass."""
    assert adapter.splits_at_unembedding
    name = next(name for name in adapter.sites if name.startswith("blocks.1"))
    patch = Patch(adapter, name, tokens.shape)
    seen: list[Tensor] = []

    def see(call: SiteCall) -> Tensor:
        seen.append(call.x)
        return call.y

    with adapter.intercept({name: patch}):
        with adapter.intercept({"unembed.W_U": see}):
            logits = adapter.forward(tokens, mask)
        hidden = adapter.hidden(tokens, mask)
        assert torch.equal(adapter.forward(tokens, mask), logits)  # nothing of the ended pass is left
    assert torch.equal(hidden, seen[0])
    tolerance = 256 * torch.finfo(logits.dtype).eps  # GPT-J of transformers 4 gives float32 whatever its weights are
    found = adapter.unembed(hidden)
    assert found.shape == logits.shape
    assert difference(found, logits) < tolerance
    assert difference(adapter.unembed(hidden.flatten(0, 1)[3:5]), logits.flatten(0, 1)[3:5]) < tolerance
    expected = patch.gradients(logits)
    for key, gradient in patch.gradients(found).items():
        assert difference(gradient, expected[key]) < 8 * tolerance, key
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("family", "host"), ON_HOSTS)
def test_ending_before_the_unembedding(family: str, host: str, tokens: Tensor) -> None:
    model = on_host(build(family), host)
    adapter = adapted(model)
    adapter.forward(tokens)
    hooks, forwards = no_hooks_left(model), own_forwards(model)
    assert_splits(adapter, tokens)
    assert_splits(adapter, tokens, PADDED)
    assert no_hooks_left(model) == hooks
    assert own_forwards(model) == forwards


@needs_hooked
@pytest.mark.parametrize("kind", HOOKED)
def test_a_hooked_transformer_ends_before_the_unembedding(kind: str, tokens: Tensor) -> None:
    model = hooked(**HOOKED[kind])
    hooks = no_hooks_left(model)
    assert_splits(adapted(model), tokens)
    assert_splits(adapted(model), tokens, LEFT_PADDED)
    assert no_hooks_left(model) == hooks


@pytest.mark.parametrize("kind", ["gpt2 in float32", "gpt2 with scaled dot product"])
def test_other_dtypes_and_attention(kind: str, tokens: Tensor) -> None:
    assert_splits(adapted(DEEP[kind]()), tokens)


@pytest.mark.parametrize("kind", ["CohereForCausalLM", "GraniteForCausalLM", "FalconH1ForCausalLM"])
def test_scaled_logits(kind: str, tokens: Tensor) -> None:
    if transformers.__version__.startswith("4"):
        pytest.skip("the tiny models are configured for transformers 5")
    from ..support import zoo

    model = zoo.tiny(kind)
    if kind.startswith("Cohere"):
        model.logit_scale = model.config.logit_scale = 0.25
    if kind.startswith("Falcon"):
        model.config.lm_head_multiplier = 3.0
        model.model.lm_head_multiplier = 3.0
    adapter = adapted(model)
    with torch.no_grad():
        hidden, logits = adapter.hidden(tokens), adapter.forward(tokens)
        assert difference(adapter.unembed(hidden), logits) < 1e-5
        assert difference(hidden @ adapter.weight("unembed.W_U"), logits) > 0.1, "nothing is scaled here"


class Capped(transformers.GPT2LMHeadModel):
    """A GPT-2 that caps its logits and says so nowhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Sliced(transformers.GPT2LMHeadModel):
    """A GPT-2 that unembeds its last position alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, logits_to_keep=1, **kwargs)


@pytest.mark.parametrize("kind", [Capped, Sliced])
def test_a_host_that_does_more_is_found_out(kind: type, tokens: Tensor) -> None:
    """Even where the logits are so small that a cap does not show on them."""
    model = kind(models.gpt2(torch.float32).config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        assert model(tokens).logits.abs().max() < 0.03
    adapter = adapted(model)
    splits = adapter.splits_at_unembedding
    assert splits == (kind is Sliced)  # the last position alone is still x W_U
    if not splits:
        with pytest.raises(UnsupportedModelError, match="not known"):
            adapter.unembed(torch.zeros(2, 24))


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


WIDE: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: models.gpt2(vocab_size=3000),
    "bridge": lambda: models.bridge(models.gpt2(vocab_size=3000, tie_word_embeddings=False)),
    "nnsight": lambda: models.nnsight(models.llama(vocab_size=3000)),
    "hooked": lambda: models.hooked(d_vocab=3000),
}


@pytest.mark.parametrize("kind", WIDE)
def test_no_tensor_of_positions_by_vocabulary_is_made(kind: str) -> None:
    """Neither forward nor backward, and the clean capture neither; the full pass makes one, which shows the measure."""
    model = WIDE[kind]()
    root_of(model).requires_grad_(False)
    adapter, tokens = adapted(model), torch.arange(2 * 30).view(2, 30)
    patch = Patch(adapter, "blocks.0.mlp.W_in", tokens.shape)
    assert adapter.splits_at_unembedding and adapter.blocks  # tried out by now
    with LargestTensor() as largest, adapter.intercept({"blocks.0.mlp.W_in": patch}):
        patch.gradients(adapter.hidden(tokens))
        with torch.no_grad():
            adapter.capture(tokens, ["blocks.0.mlp.W_in"], keep_blocks=True, to_hidden=True)
    assert largest.numel < 30 * 3000
    with LargestTensor() as largest, torch.no_grad():
        adapter.forward(tokens)
    assert largest.numel >= 2 * 30 * 3000


def test_capture_to_hidden(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2(n_layer=3))
    names = ["blocks.0.mlp.W_in", "blocks.2.attn.W_O"]
    with torch.no_grad():
        full = adapter.capture(tokens, names, keep_blocks=True)
        short = adapter.capture(tokens, names, keep_blocks=True, to_hidden=True)
        assert difference(adapter.unembed(short.output), full.logits) < 1e-13
    assert all(torch.equal(short.inputs[name], full.inputs[name]) for name in names)
    assert len(short.blocks) == len(full.blocks) == 3
    with torch.no_grad(), adapter.resumed(short.blocks, 2):
        assert torch.equal(adapter.hidden(tokens), short.output)


@pytest.mark.parametrize("kind", ["gpt2", "bridge", "nnsight", "hooked"])
def test_sites_that_did_not_fire_are_told(kind: str, tokens: Tensor) -> None:
    adapter = adapted(DEEP[kind]())
    keep: Callable[[SiteCall], Tensor] = lambda call: call.y  # noqa: E731
    with torch.no_grad():
        clean = adapter.capture(tokens, [], keep_blocks=True)
        with adapter.intercept({"blocks.2.mlp.W_in": keep, "unembed.W_U": keep}):
            with pytest.raises(SiteNotFiredError, match=r"unembed\.W_U"):
                adapter.hidden(tokens)
            assert torch.equal(adapter.forward(tokens), clean.logits)
        with adapter.intercept({"blocks.0.mlp.W_in": keep}), adapter.resumed(clean.blocks, 1):
            with adapter.intercept({"blocks.2.mlp.W_in": keep}):
                with pytest.raises(SiteNotFiredError, match=r"blocks\.0\.mlp\.W_in"):
                    adapter.hidden(tokens)
        assert not adapter.interceptions
        adapter.hidden(tokens)


def test_an_exception_of_the_pass_is_not_swallowed(tokens: Tensor) -> None:
    adapter = adapted(models.gpt2())
    forwards = own_forwards(adapter.root)
    with pytest.raises(ZeroDivisionError):
        with adapter.intercept({"blocks.0.mlp.W_in": lambda call: 1 / 0}):
            adapter.hidden(tokens)
    assert own_forwards(adapter.root) == forwards


@pytest.mark.parametrize("kind", ["gpt2", "bridge", "nnsight", "hooked"])
def test_the_ended_pass_lets_go_of_its_activations(kind: str, tokens: Tensor) -> None:
    """At once, not when the garbage collector comes by."""
    adapter = adapted(DEEP[kind]())
    kept: list[weakref.ref] = []

    def note(call: SiteCall) -> Tensor:
        kept.append(weakref.ref(call.y))
        return call.y

    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), adapter.intercept({"blocks.1.mlp.W_in": note}):
            hidden = adapter.hidden(tokens)
        assert kept[0]() is None
    finally:
        gc.enable()
    assert hidden.shape == (2, 7, 24)


def test_trying_out_leaves_open_contexts_alone() -> None:
    """A mask for rows of its own shape stands at a site when the shortcuts are first asked for."""
    adapter = adapted(models.gpt2(n_layer=3))
    patch = Patch(adapter, "blocks.1.mlp.W_in", torch.Size((5, 9)))
    with adapter.intercept({"blocks.1.mlp.W_in": patch}):
        assert len(adapter.blocks) == 3
        assert adapter.splits_at_unembedding
        assert patch.calls == 0
        adapter.hidden(torch.zeros(5, 9, dtype=torch.long))
        assert patch.calls == 1


def test_a_copy_has_shortcuts_of_its_own(tokens: Tensor) -> None:
    model = models.gpt2(n_layer=3)
    first, second = adapted(model), adapted(copy.deepcopy(model))
    assert first.blocks[0] is not second.blocks[0]
    with torch.no_grad():
        assert torch.equal(first.hidden(tokens), second.hidden(tokens))
