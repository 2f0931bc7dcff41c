"""KL, chunked KL and mean square against torch.nn.functional in float64; what the chunked form keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tl_paramdecomp as tlpd
from tests.support.models import BUILDERS, build, dtype_of, gpt2, module_of
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.adversary import AdversarialReconstruction
from tl_paramdecomp.methods.divergence import KL, ChunkedKL, MeanSquare
from tl_paramdecomp.methods.losses import ImportanceMinimality
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.methods.step import LossStep

BATCH, POS, D, VOCAB = 3, 5, 6, 11


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def some_scored():
    scored = torch.ones(BATCH, POS, dtype=torch.bool)
    scored[0, 3:] = scored[2, 0] = False
    return scored


def textbook_kl(target, output, scored):
    """KL summed over the vocabulary, mean over the scored positions."""
    t, o = target.double().flatten(0, -2), output.double().flatten(0, -2)
    if scored is not None:
        t, o = t[scored.flatten()], o[scored.flatten()]
    return F.kl_div(o.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True)


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def agree(value, leaf, expected, other):
    """One value and one gradient, within the rounding of the leaf's dtype; a value in float32 at least."""
    tolerance = TOLERANCE[leaf.dtype]
    assert value.dtype == torch.promote_types(leaf.dtype, torch.float32)
    assert abs(value.item() - expected.item()) < min(tolerance, 1e-5) * 4 * max(1.0, expected.item())
    found, wanted = torch.autograd.grad(3.0 * value, leaf)[0], torch.autograd.grad(3.0 * expected, other)[0]
    assert found.dtype == leaf.dtype and (found.double() - wanted).abs().max() < tolerance * max(
        1.0, wanted.abs().max()
    )


@pytest.mark.parametrize("scored", [None, some_scored()], ids=["all", "some"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kl(dtype, scored):
    target, output = draw(BATCH, POS, VOCAB, dtype=dtype), draw(BATCH, POS, VOCAB, seed=1, dtype=dtype)
    leaf, other = output.clone().requires_grad_(), output.double().requires_grad_()
    agree(KL(target, scored).of(leaf), leaf, textbook_kl(target, other, scored), other)


@pytest.mark.parametrize("scored", [None, some_scored()], ids=["all", "some"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mean_square(dtype, scored):
    target, output = draw(BATCH, POS, VOCAB, dtype=dtype), draw(BATCH, POS, VOCAB, seed=1, dtype=dtype)
    leaf, other = output.clone().requires_grad_(), output.double().requires_grad_()
    keep = torch.ones(BATCH, POS, dtype=torch.bool) if scored is None else scored
    expected = F.mse_loss(other[keep], target.double()[keep])
    agree(MeanSquare(target, scored).of(leaf), leaf, expected, other)


def unembedding(bias, dtype):
    W, b = draw(D, VOCAB, seed=5, scale=0.7, dtype=dtype), draw(VOCAB, seed=6, dtype=dtype)
    return (lambda x: x @ W + b) if bias else (lambda x: x @ W), W, b if bias else torch.zeros_like(b)


@pytest.mark.parametrize("scored", [None, some_scored()], ids=["all", "some"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 4, 7, 15, 100])
def test_chunked_kl(chunk, dtype, bias, scored):
    """Chunks that do not divide the 15 (or 12 scored) positions, one position, and more than there are."""
    target, output = draw(BATCH, POS, D, dtype=dtype), draw(BATCH, POS, D, seed=1, dtype=dtype)
    unembed, W, b = unembedding(bias, dtype)
    leaf, other = output.clone().requires_grad_(), output.double().requires_grad_()
    # logits are rounded to the dtype, as an unembedding's are, before they are compared in float32
    logits = [(x @ W.double() + b.double()) for x in (target.double(), other)]
    expected = textbook_kl(*logits, scored)
    value = ChunkedKL(target, scored, unembed, chunk).of(leaf)
    if dtype != torch.bfloat16:
        return agree(value, leaf, expected, other)
    found, wanted = torch.autograd.grad(value, leaf)[0], torch.autograd.grad(expected, other)[0]
    assert abs(value.item() - expected.item()) < 2e-2 * expected.item()
    assert found.dtype == dtype and (found.double() - wanted).norm() < 2e-2 * wanted.norm()


def test_chunks_and_whole_agree_where_the_unembedding_caps_its_logits():
    unembed, _, _ = unembedding(True, torch.float64)
    capped = lambda x: 3.0 * torch.tanh(unembed(x) / 3.0)  # noqa: E731
    target, output = draw(BATCH, POS, D), draw(BATCH, POS, D, seed=1).requires_grad_()
    whole, parts = KL(capped(target), None).of(capped(output)), ChunkedKL(target, None, capped, 4).of(output)
    grads = [torch.autograd.grad(value, output)[0] for value in (whole, parts)]
    assert abs(whole - parts) < 1e-13 and (grads[0] - grads[1]).abs().max() < 1e-13


def test_no_gradient_is_asked_for_as_a_metric():
    unembed, _, _ = unembedding(True, torch.float64)
    target, output = draw(BATCH, POS, D), draw(BATCH, POS, D, seed=1).requires_grad_()
    for divergence, out in (
        (KL(unembed(target), None), unembed(output)),
        (ChunkedKL(target, None, unembed, 4), output),
    ):
        with torch.no_grad():
            bare = divergence.of(out)
        assert not bare.requires_grad and torch.equal(bare, divergence.of(out).detach())


def test_a_million_float32_terms_add_up():
    """One long float32 dot product is off by 3e-5 on some processors."""
    target, output = draw(600, 2000, dtype=torch.float32), draw(600, 2000, seed=1, dtype=torch.float32)
    found = KL(target, None).of(output).item()
    assert found == pytest.approx(textbook_kl(target, output, None).item(), rel=2e-6)


def test_the_divergence_of_the_target_from_itself_is_zero_and_flat():
    logits = draw(BATCH, POS, VOCAB).requires_grad_()
    value = KL(logits, None).of(logits)
    assert value.item() == 0.0 and not torch.autograd.grad(value, logits)[0].any()


class Largest(TorchDispatchMode):
    """Notes the most entries of any tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(made):
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.numel())
        return made


def largest(rows, chunk, vocab=1000):
    """Most entries of a tensor in value and gradient, over rows x 8 positions."""
    W = draw(D, vocab, dtype=torch.float32)
    target, output = (draw(rows, 8, D, seed=s, dtype=torch.float32) for s in (0, 1))
    output.requires_grad_()
    with Largest() as seen:
        if chunk is None:
            KL(target @ W, None).of(output @ W).backward()
        else:
            ChunkedKL(target, None, lambda x: x @ W, chunk).of(output).backward()
    return seen.entries


def test_memory_of_the_chunked_kl_does_not_grow_with_the_batch():
    """No tensor is larger than chunk x vocab, while the whole form's are batch x pos x vocab."""
    assert [largest(rows, None) for rows in (2, 8)] == [16_000, 64_000]
    assert [largest(rows, 4) for rows in (2, 8, 32)] == [max(4000, D * 1000)] * 3
    assert largest(8, 13) == 13_000


# --- inside a step ----------------------------------------------------------------------------------------------------
def gradients_of(model, kl_chunk, layerwise=False):
    names = list(tlpd.find_sites(model, ["blocks.*.mlp.W_out", "blocks.1.attn.W_V"]))
    method = tlpd.SPD(
        n_components=6, warm_up_steps=0, start="random", kl_chunk=kl_chunk, importance=ImportanceConfig(hidden=8),
        losses=(
            StochasticReconstruction(0.5, sites="layerwise" if layerwise else "subset"), AdversarialReconstruction(0.7),
            ImportanceMinimality(1e-2),
        ),
    )  # fmt: skip
    adapter = adapt(model)
    made = method.initialise(
        adapter, {n: adapter.sites[n] for n in names}, torch.Generator().manual_seed(0), lambda _, n: range(n)
    ).requires_grad_(True)
    tokens = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(4)
    report = method.gradients(TrainingStep(adapter, made, Batch(tokens, None), generator, 0.5))
    assert all(p.grad is None for p in module_of(model).parameters())
    return report, {n: p.grad for n, p in made.named_parameters()}


@pytest.mark.parametrize("layerwise", [False, True], ids=["subset", "layerwise"])
@pytest.mark.parametrize("host", BUILDERS)
def test_a_step_in_chunks_has_the_gradients_of_a_whole_one(host, layerwise):
    """Layerwise passes moreover begin at a later block and end before the unembedding."""
    model = build(host)
    adapter = adapt(model)
    assert adapter.splits_at_unembedding
    (whole, expected), (parts, found) = (gradients_of(model, chunk, layerwise) for chunk in (None, 3))
    tolerance = 1e-10 if dtype_of(model) == torch.float64 else 2e-4
    assert whole.terms.keys() == parts.terms.keys()
    assert all(abs(whole.terms[k] - parts.terms[k]) < tolerance * (1 + abs(whole.terms[k])) for k in whole.terms)
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= tolerance * max(1.0, grad.abs().max().item()), name


def start_of(model, pattern):
    """A random start at some sites, and its first step over 8 x 16 positions."""
    method = tlpd.SPD(n_components=6, warm_up_steps=0, start="random", importance=ImportanceConfig(hidden=8))
    sites = tlpd.find_sites(model, pattern)
    made = method.initialise(adapt(model), sites, torch.Generator().manual_seed(0), lambda _, n: range(n))
    tokens = torch.randint(0, 61, (8, 16), generator=torch.Generator().manual_seed(0))
    return lambda chunk: LossStep.of(adapt(model), made, tokens, None, torch.Generator(), kl_chunk=chunk)


def test_a_step_in_chunks_never_makes_the_logits_of_a_batch():
    """The largest tensor of clean and masked passes is then the embedding table, not 128 positions' logits."""
    model = gpt2(vocab_size=997).requires_grad_(False)
    step = start_of(model, "blocks.0.mlp.W_out")
    step(2)  # whether the host can end passes early is tried out once, and not counted here
    found = {}
    for chunk in (None, 2):
        with Largest() as seen:
            StochasticReconstruction()(step(chunk)).backward()
        found[chunk] = seen.entries
    assert found == {None: 8 * 16 * 997, 2: 24 * 997}


def test_decomposing_the_unembedding_itself_falls_back_to_whole_logits():
    step = start_of(gpt2().requires_grad_(False), ["unembed.W_U", "blocks.1.mlp.W_in"])
    values = [StochasticReconstruction(sites="layerwise")(step(chunk)) for chunk in (2, None)]
    assert isinstance(step(2).divergence, KL) and torch.equal(*values) and values[0] > 0
