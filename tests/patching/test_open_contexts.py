"""Contexts that end in any order, in several tasks and threads; and what they leave behind: nothing."""

import asyncio
import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt

from ..support.models import BUILDERS, LENS, build, decomposition_of, logits, module_of, nnsight, nnsight_lm

SITES = ["blocks.0.mlp.W_in", "blocks.1.attn.W_O"]
HOSTS = [*BUILDERS, "language model"]
Open = Callable[[Any, tlpd.Decomposition, int], contextlib.AbstractContextManager[Any]]


def made(host: str) -> Any:
    return nnsight_lm(build("gpt2")) if host == "language model" else build(host)


def ablated(model: Any, dec: tlpd.Decomposition, component: int) -> contextlib.AbstractContextManager[Any]:
    masks = dec.masks()
    for name in dec:
        masks = masks.ablate(name, component)
    return tlpd.patched(model, dec, masks)


def doubled(model: Any, dec: tlpd.Decomposition, component: int) -> contextlib.AbstractContextManager[Any]:
    patches = tlpd.act_patches(dec)
    for name in dec:
        patches = patches.scale(name, component, 2.0)
    return tlpd.patched_acts(model, dec, patches)


def hook_points(model: Any, dec: tlpd.Decomposition, component: int) -> contextlib.AbstractContextManager[Any]:
    return tlpd.attached(model, tlpd.from_factors(model, {SITES[0]: (dec[SITES[0]].V, dec[SITES[0]].U)}))


KINDS: dict[str, Open] = {"patched": ablated, "acts": doubled, "attached": hook_points}


def state_of(model: Any) -> list[Any]:
    """What a context could leave on a model: attributes of instances, hooks, nnsight's bodies, hook points."""
    found: list[Any] = [sorted(vars(model))]
    for module in module_of(model).modules():
        own = {
            name: value for name, value in vars(module).items() if name in ("forward", "generate", "generate_stream")
        }
        hooks = [list(hooks) for name, hooks in sorted(vars(module).items()) if name.endswith("_hooks")]
        body = getattr(vars(module).get("__nnsight__"), "body", None)
        found.append((id(module), {name: id(value) for name, value in own.items()}, hooks, id(body)))
    for registry in ("mod_dict", "hook_dict", "_hook_registry"):
        found.append(sorted(getattr(model, registry, ())))
    return found


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_contexts_end_in_the_order_they_began(host: str, second: str, tokens: Tensor) -> None:
    model = made(host)
    if second == "attached" and host not in LENS:
        pytest.skip("hook points are of TransformerLens")
    dec, other = decomposition_of(model, SITES), decomposition_of(model, SITES, seed=1)
    logits(model, tokens)  # nnsight and TransformerLens set some things up at the first pass
    before, plain = state_of(model), logits(model, tokens)
    with KINDS[second](model, other, 1):
        alone = logits(model, tokens)
    first, then = ablated(model, dec, 0), KINDS[second](model, other, 1)
    first.__enter__()
    then.__enter__()
    both = logits(model, tokens)
    first.__exit__(None, None, None)
    assert torch.equal(logits(model, tokens), alone)
    assert (both - alone).abs().max() > 1e-3
    then.__exit__(None, None, None)
    assert state_of(model) == before
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("host", HOSTS)
def test_contexts_that_ended_crosswise_keep_nothing_alive(host: str, tokens: Tensor) -> None:
    model = made(host)

    def use() -> list[weakref.ref[Any]]:
        decs = [decomposition_of(model, SITES, seed=seed) for seed in (0, 1)]
        contexts = [ablated(model, dec, 0) for dec in decs]
        for context in contexts:
            context.__enter__()
        logits(model, tokens)
        for context in contexts:
            context.__exit__(None, None, None)
        return [weakref.ref(dec) for dec in decs]

    kept = use()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


FUSED = [["blocks.0.attn.W_Q"], ["blocks.0.attn.W_K", "blocks.0.mlp.W_in"]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("host", HOSTS)
def test_edits_of_one_matrix_end_in_any_order(host: str, order: tuple[int, int], tokens: Tensor) -> None:
    """W_Q and W_K are one parameter in GPT-2: what the first context put there is not what the second one leaves."""
    model = made(host)
    decs = [decomposition_of(model, sites, seed=seed) for seed, sites in enumerate(FUSED)]
    masks = [dec.masks() for dec in decs]
    for i, dec in enumerate(decs):
        for name in dec:
            masks[i] = masks[i].ablate(name, [0, 1])
    plain, alone = logits(model, tokens), []
    before = dict(module_of(model).named_parameters())
    for dec, mask in zip(decs, masks):
        with tlpd.edited_weights(model, dec, mask):
            alone.append(logits(model, tokens))
    contexts = [tlpd.edited_weights(model, dec, mask) for dec, mask in zip(decs, masks)]
    for context in contexts:
        context.__enter__()
    both = logits(model, tokens)
    assert all((both - one).abs().max() > 1e-3 for one in alone)
    contexts[order[0]].__exit__(None, None, None)
    assert torch.equal(logits(model, tokens), alone[order[1]])
    contexts[order[1]].__exit__(None, None, None)
    assert torch.equal(logits(model, tokens), plain)
    assert all(p is before[name] for name, p in module_of(model).named_parameters())


def test_edits_of_computed_tensors_end_in_any_order() -> None:
    """A weight and a bias of one module, both parametrized."""
    layer = nn.Linear(4, 4).double().requires_grad_(False)
    model = nn.Sequential(layer, nn.Linear(4, 3).double().requires_grad_(False))
    torch.nn.utils.parametrizations.weight_norm(layer)
    x = torch.randn(2, 4, dtype=torch.float64)
    plain, kind = model(x), type(layer)
    adapter = adapt(model)
    one = adapter.replaced_weights({"0.weight": torch.eye(4, dtype=torch.float64)})
    other = adapter.replaced_weights({"0.weight": torch.zeros(4, 4, dtype=torch.float64)})
    one.__enter__()
    other.__enter__()
    with pytest.raises(tlpd.errors.PatchConflictError, match="edited at present"):
        copy.deepcopy(model)
    one.__exit__(None, None, None)
    assert torch.equal(model[0](x), layer.bias.expand(2, 4))
    other.__exit__(None, None, None)
    assert type(layer) is kind and torch.equal(model(x), plain)
    copy.deepcopy(model)


def test_tasks_of_one_thread_may_interleave(tokens: Tensor) -> None:
    """Each sees both patches while both are open, as contexts that nest do."""
    model = build("gpt2")
    dec = decomposition_of(model, SITES)
    before, plain = state_of(model), logits(model, tokens)

    async def task(component: int, entered: asyncio.Event, leave: asyncio.Event) -> None:
        with ablated(model, dec, component):
            entered.set()
            await leave.wait()

    async def both() -> Tensor:
        events = [asyncio.Event() for _ in range(4)]
        first, then = asyncio.ensure_future(task(0, *events[:2])), asyncio.ensure_future(task(1, *events[2:]))
        await events[0].wait()
        await events[2].wait()
        seen = logits(model, tokens)
        events[1].set()
        await first
        events[3].set()
        await then
        return seen

    seen = asyncio.run(both())
    with ablated(model, dec, 0), ablated(model, dec, 1):
        assert torch.equal(logits(model, tokens), seen)
    assert state_of(model) == before and torch.equal(logits(model, tokens), plain)


# --- threads ---------------------------------------------------------------------------------------------------------
def in_thread(call: Callable[[], Any]) -> Any:
    """What a call gives, or raises, in a second thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # handed over, whatever it is
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def edited(model: Any, dec: tlpd.Decomposition, component: int) -> contextlib.AbstractContextManager[Any]:
    return tlpd.edited_weights(model, dec, dec.masks().ablate(SITES[0], component))


@pytest.mark.parametrize("opened", [*KINDS.values(), edited])
def test_a_context_is_entered_once(opened: Open, tokens: Tensor) -> None:
    """Again by the same call, not by the same object."""
    model = made("bridge" if opened is hook_points else "gpt2")
    dec, plain = decomposition_of(model, SITES), logits(model, tokens)
    context = opened(model, dec, 0)
    with context:
        pass
    with pytest.raises(tlpd.errors.PatchConflictError, match=r"entered before.*\(\.\.\.\) again"), context:
        pass
    assert torch.equal(logits(model, tokens), plain)
    with opened(model, dec, 0):
        pass


@pytest.mark.parametrize("host", HOSTS)
def test_a_second_thread_is_refused_while_a_model_is_patched(host: str, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model, SITES)
    masks = dec.masks().ablate(SITES[0], 1)

    def patch() -> Tensor:
        with tlpd.patched(model, dec, masks):
            return logits(model, tokens)

    def edit() -> None:
        with tlpd.edited_weights(model, dec, masks):
            pass

    right = patch()
    questions = [lambda: tlpd.component_acts(model, dec, tokens), lambda: tlpd.activation_means(model, dec, tokens)]
    for entered in (lambda: ablated(model, dec, 0), lambda: tlpd.edited_weights(model, dec, masks)):
        with entered():
            inside = logits(model, tokens)
            for call in (patch, edit, *questions):
                assert isinstance(in_thread(call), tlpd.errors.PatchConflictError)
            assert torch.equal(logits(model, tokens), inside)
    assert torch.equal(in_thread(patch), right)
    assert not isinstance(in_thread(edit), Exception)


def test_a_model_and_what_wraps_it_are_one(tokens: Tensor) -> None:
    hf = build("gpt2")
    dec = decomposition_of(hf, SITES)
    with ablated(nnsight(hf), dec, 0):
        assert isinstance(in_thread(lambda: tlpd.component_acts(hf, dec, tokens)), tlpd.errors.PatchConflictError)


@pytest.mark.parametrize("host", ["gpt2", "hooked", "bridge"])
def test_a_patched_model_may_run_in_another_thread(host: str, tokens: Tensor) -> None:
    """As a streamer has it: generate in a thread, read in the first."""
    model = build(host)
    dec = decomposition_of(model, SITES)
    with ablated(model, dec, 0):
        assert torch.equal(in_thread(lambda: logits(model, tokens)), logits(model, tokens))


@pytest.mark.parametrize("host", ["gpt2", "hooked", "bridge"])
def test_two_passes_at_once_are_refused(host: str, tokens: Tensor) -> None:
    """The second pass begins while the first is held up between two sites."""
    model = build(host)
    dec = decomposition_of(model, ["blocks.0.mlp.W_in", "blocks.1.mlp.W_in"])
    seen: list[Any] = []

    def hold(module: nn.Module, args: tuple, output: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(in_thread(lambda: logits(model, tokens.flip(0))))

    with ablated(model, dec, 0):
        right = logits(model, tokens)
        handle = module_of(model).get_submodule("transformer.h.0" if host == "gpt2" else "blocks.0")
        handle = handle.register_forward_hook(hold)
        try:
            found = logits(model, tokens)
        finally:
            handle.remove()
        assert torch.equal(found, right)
        assert isinstance(seen[1], tlpd.errors.PatchConflictError)
        assert torch.equal(logits(model, tokens), right)


def test_threads_that_race_are_right_or_refused(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, SITES)
    right = {}
    for component in range(3):
        with ablated(model, dec, component):
            right[component] = logits(model, tokens)
    outcomes: list[str] = []
    barrier = threading.Barrier(3)

    def race(component: int) -> None:
        barrier.wait()
        for _ in range(10):
            try:
                with ablated(model, dec, component):
                    found = logits(model, tokens)
            except tlpd.errors.PatchConflictError:
                outcomes.append("refused")
            else:
                outcomes.append("right" if torch.equal(found, right[component]) else "wrong")

    threads = [threading.Thread(target=race, args=(component,)) for component in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 30 and "wrong" not in outcomes


# --- copies ----------------------------------------------------------------------------------------------------------
def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


COPIES = [
    *((kind, host, copy.deepcopy) for kind in KINDS for host in BUILDERS if kind != "attached" or host in LENS),
    ("patched", "gpt2", unpickled),
]


@pytest.mark.parametrize(("kind", "host", "copied"), COPIES)
def test_a_copy_of_a_patched_model_stands_alone(
    kind: str, host: str, copied: Callable[[Any], Any], tokens: Tensor
) -> None:
    model = build(host)
    dec = decomposition_of(model, SITES)
    plain = logits(model, tokens)
    with KINDS[kind](model, dec, 0):
        inside = logits(model, tokens)
        made = copied(module_of(model))
        assert torch.equal(logits(made, tokens), plain), "the copy is not patched"
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert torch.equal(logits(model, tokens), inside), "the copy shares nothing"
    assert torch.equal(logits(model, tokens), plain)
    assert not torch.equal(logits(made, tokens), plain)
    if kind == "attached":
        again = module_of(build(host))
        with KINDS[kind](again, dec, 0):
            made = copy.deepcopy(again)
        with KINDS[kind](made, dec, 0):
            assert torch.equal(logits(made, tokens), plain)
