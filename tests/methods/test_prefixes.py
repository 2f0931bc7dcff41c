"""Passes that begin at the first decomposed block, and what is remembered of the rows before it, against whole passes."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import VOCAB, bridge, gpt2, hooked, llama, nnsight
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import UnsupportedModelError
from tl_paramdecomp.methods.prefixes import Prefixes
from tl_paramdecomp.methods.reconstruction import stochastic_masks
from tl_paramdecomp.methods.step import LossStep

HOSTS = {"gpt2": gpt2, "llama": llama, "hooked": hooked, "bridge": bridge, "nnsight": nnsight}
LATE = "blocks.1.*"
ROOM = 1 << 20


def made_on(host, pattern=LATE):
    try:
        model = HOSTS[host]()
    except (ImportError, UnsupportedModelError):
        pytest.skip(f"no {host} here")
    method = tlpd.SPD(n_components=5, start="random", warm_up_steps=0)
    adapter = adapt(model)
    start = torch.Generator().manual_seed(0)
    made = method.initialise(adapter, tlpd.find_sites(model, pattern), start, lambda _, n: range(n))
    assert len(adapter.blocks) > 1  # tried out now, so that no later pass is part of that
    return model, adapter, made.requires_grad_(True)


def rows_of(n=4, length=6, seed=1):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(adapter, made, tokens, mask=None, prefixes=None, whole=False):
    """Divergence under drawn masks, and its gradients; `whole`: every pass begins at the beginning."""
    made.zero_grad()
    step = LossStep.of(adapter, made, tokens, mask, torch.Generator().manual_seed(3), prefixes=prefixes)
    if whole:
        step.blocks = ()
    loss = step.divergence.of(step.run_masked(stochastic_masks(step)))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in made.parameters() if p.grad is not None]


def calls_of(adapter, block, run):
    """How often a block's own MLP weights were used meanwhile."""
    name = next(n for n in adapter.sites if n.startswith(f"blocks.{block}.mlp."))
    module = adapter.root.get_submodule(adapter.wirings[name].owner)
    seen = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    try:
        run()
    finally:
        handle.remove()
    return len(seen)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_passes_that_begin_later_are_the_whole_passes(host, padded):
    _model, adapter, made = made_on(host)
    tokens, mask = rows_of(), None
    if padded:
        mask = torch.ones_like(tokens)
        mask[1, 4:] = mask[3, 2:] = 0
    whole = loss_and_gradients(adapter, made, tokens, mask, whole=True)
    shorter = loss_and_gradients(adapter, made, tokens, mask)
    assert torch.equal(whole[0], shorter[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[1], shorter[1], strict=True))
    kept = Prefixes(ROOM)
    for _ in range(2):
        remembered = loss_and_gradients(adapter, made, tokens, mask, kept)
        torch.testing.assert_close(remembered, whole)
    assert len(kept) == len(tokens)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_before_the_first_site_is_computed_once(host):
    _model, adapter, made = made_on(host)
    tokens, kept = rows_of(), Prefixes(ROOM)
    assert calls_of(adapter, 0, lambda: loss_and_gradients(adapter, made, tokens, whole=True)) == 2
    assert calls_of(adapter, 0, lambda: loss_and_gradients(adapter, made, tokens)) == 1
    assert calls_of(adapter, 0, lambda: loss_and_gradients(adapter, made, tokens, prefixes=kept)) == len(tokens)
    assert calls_of(adapter, 0, lambda: loss_and_gradients(adapter, made, tokens.flip(0), prefixes=kept)) == 0
    other = torch.cat([tokens[:2], rows_of(1, seed=9)])
    assert calls_of(adapter, 0, lambda: loss_and_gradients(adapter, made, other, prefixes=kept)) == 1


def test_rows_are_told_apart_by_their_mask_and_kept_as_far_as_there_is_room():
    _model, adapter, made = made_on("gpt2")
    tokens = rows_of(2)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    kept = Prefixes(ROOM)
    loss_and_gradients(adapter, made, tokens, None, kept)
    loss_and_gradients(adapter, made, tokens, mask, kept)
    assert len(kept) == 4
    row = kept.used // 4
    small = Prefixes(2 * row)
    first = loss_and_gradients(adapter, made, rows_of(4), prefixes=small)
    assert len(small) == 2 and small.used == 2 * row
    nothing = loss_and_gradients(adapter, made, rows_of(4), prefixes=Prefixes(0))
    assert torch.equal(first[0], nothing[0])  # to the bit, whatever is remembered
    assert all(torch.equal(a, b) for a, b in zip(first[1], nothing[1], strict=True))


def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it():
    _model, adapter, _ = made_on("llama")
    tokens = rows_of()
    together = Prefixes(0).before(adapter, 1, tokens, None)
    alone = torch.cat([Prefixes(0).before(adapter, 1, tokens[i : i + 1], None) for i in range(len(tokens))])
    assert torch.equal(together, alone)


def test_sites_before_all_blocks_leave_nothing_out():
    _model, adapter, made = made_on("gpt2", ["embed.W_E", "blocks.1.mlp.W_in"])
    kept = Prefixes(ROOM)
    a, b = (
        loss_and_gradients(adapter, made, rows_of(), prefixes=kept),
        loss_and_gradients(adapter, made, rows_of(), whole=True),
    )
    assert len(kept) == 0 and torch.equal(a[0], b[0])


def test_a_run_whose_rows_come_again_goes_on_to_the_bit(tmp_path):
    model, data = gpt2(torch.float32), rows_of(6)
    settings = {"steps": 6, "batch_size": 4, "progress": False, "log_every": 1}
    method = tlpd.SPD(n_components=5, start="random", warm_up_steps=0)

    def stop(info):
        return tlpd.STOP if info.step == 3 else None

    straight = tlpd.decompose(model, LATE, method, data, **settings)
    tlpd.decompose(model, LATE, method, data, run_dir=tmp_path, callbacks=[stop], **settings)
    resumed = tlpd.decompose(model, LATE, method, data, run_dir=tmp_path, **settings)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    without = tlpd.decompose(
        model, LATE, tlpd.SPD(n_components=5, start="random", warm_up_steps=0, prefix_memory=0.0), data, **settings
    )
    for name, parameter in straight.named_parameters():
        torch.testing.assert_close(parameter, without.get_parameter(name), rtol=1e-3, atol=1e-4)
