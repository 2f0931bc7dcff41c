"""Every family that must be exact, on every host, against weights that the test edits by hand in the host's own parameters."""

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd

from ..support.exactness import (
    GONE,
    ablate,
    assert_ablation_is_an_edited_weight,
    assert_no_mask_is_the_model,
    difference,
    gone,
    no_hooks_left,
    part_kept,
    patched_run,
    random_decomposition,
)
from ..support.families import FAMILIES, build, read, subtract
from ..support.hosts import on_host, run

TOLERANCE = 1e-10
"""In float64. transformers computes the RMSNorm of Llama, Mistral, Qwen and Gemma in float32 whatever the model's dtype: that
hides differences below 1e-8 in what a norm passes on, so that there the tests see errors from about float32's rounding up."""
ON_HOSTS = [(family, host) for family in FAMILIES for host in ("transformers", "nnsight", "bridge")]
ON_HOSTS += [(family, host) for family in ("gpt2", "llama") for host in ("language_model", "transformers_model")]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_hand_read_weights_in_execution_order(family: str, tokens: Tensor) -> None:
    model, places = build(family), FAMILIES[family].places()
    sites = tlpd.find_sites(model)
    assert list(sites) == list(places)
    for name, place in places.items():
        assert torch.equal(tlpd.site_weight(model, name), read(model, place)), name
        assert (sites[name].d_in, sites[name].d_out) == tuple(read(model, place).shape)
        assert sites[name].n_heads == place.heads, name
        assert sites[name].has_bias == (getattr(model.get_submodule(place.path), "bias", None) is not None)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sites["unembed.W_U"].tied_to == ("embed.W_E" if tied else None)
    fired: list[str] = []
    paths = {place.path for place in places.values()}
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    run(model, tokens)
    assert fired == list(dict.fromkeys(place.path for place in places.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_site_at_a_time_against_a_hand_edited_weight(family: str, tokens: Tensor) -> None:
    model, places = build(family), FAMILIES[family].places()
    decomposition = random_decomposition(model)
    plain = run(model, tokens)
    for name, place in places.items():
        edited = build(family)
        subtract(edited, place, gone(decomposition, name))
        by_hand, hooked = run(edited, tokens), patched_run(model, decomposition, ablate(decomposition, [name]), tokens)
        assert difference(hooked, by_hand) < TOLERANCE, name
        assert difference(hooked, plain) > 1e-4, f"{name}: the patch does nothing"
        masks, taken = part_kept(decomposition, name)
        edited = build(family)
        subtract(edited, place, taken(read(edited, place)))
        assert difference(patched_run(model, decomposition, masks, tokens), run(edited, tokens)) < TOLERANCE, name
    assert torch.equal(run(model, tokens), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_against_hand_edited_slices(family: str, tokens: Tensor) -> None:
    """Ablating in one head edits that head's columns (rows, for W_O) alone; the heads' edits sum to the whole."""
    model, places = build(family), FAMILIES[family].places()
    decomposition = random_decomposition(model, "blocks.1.attn.*")
    for name, place in places.items():
        if place.heads is None or name not in decomposition:
            continue
        whole = gone(decomposition, name)
        axis = 0 if name.endswith("W_O") else 1
        parts = whole.chunk(place.heads, dim=axis)
        for head in (0, place.heads - 1):
            delta = torch.zeros_like(whole)
            delta.chunk(place.heads, dim=axis)[head].copy_(parts[head])
            edited = build(family)
            subtract(edited, place, delta)
            hooked = patched_run(model, decomposition, ablate(decomposition, [name], head), tokens)
            assert difference(hooked, run(edited, tokens)) < TOLERANCE, (name, head)
            with tlpd.edited_weights(model, decomposition, ablate(decomposition, [name], head)):
                assert difference(hooked, run(model, tokens)) < TOLERANCE, (name, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_sum_to_the_whole(family: str, tokens: Tensor) -> None:
    """At the site's own output, read by a torch hook of the test's."""
    model, places = build(family), FAMILIES[family].places()
    decomposition = random_decomposition(model, "blocks.0.attn.*")
    for name, place in places.items():
        if place.heads is None or name not in decomposition:
            continue
        outputs: list[Tensor] = []
        with model.get_submodule(place.path).register_forward_hook(lambda m, a, y, outputs=outputs: outputs.append(y)):
            run(model, tokens)
            patched_run(model, decomposition, ablate(decomposition, [name]), tokens)
            for head in range(place.heads):
                patched_run(model, decomposition, ablate(decomposition, [name], head), tokens)
        plain, whole, *heads = outputs
        assert len(heads) == place.heads
        assert (sum(y - plain for y in heads) - (whole - plain)).abs().max() < 1e-12, name
        assert (whole - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "host"), ON_HOSTS)
def test_every_site_at_once_on_every_host(family: str, host: str, tokens: Tensor) -> None:
    original, places = build(family), FAMILIES[family].places()
    model = on_host(original, host)
    assert list(tlpd.find_sites(model)) == list(places)
    decomposition = random_decomposition(original)  # made through transformers, opened here
    for name, place in places.items():
        assert torch.equal(tlpd.site_weight(model, name), read(original, place)), name
        subtract(original, place, gone(decomposition, name))
    run(model, tokens)  # hosts set hooks of their own up at their first run
    before = no_hooks_left(model)
    assert_no_mask_is_the_model(model, tokens, decomposition, tuple(tokens.shape))
    assert_ablation_is_an_edited_weight(model, tokens, decomposition, TOLERANCE)
    hooked = patched_run(model, decomposition, ablate(decomposition), tokens)
    assert difference(hooked, run(on_host(original, host), tokens)) < TOLERANCE
    assert no_hooks_left(model) == before


@pytest.mark.parametrize(("family", "host"), [pair for pair in ON_HOSTS if pair[1] != "transformers"])
def test_hosts_agree(family: str, host: str, tokens: Tensor) -> None:
    """One decomposition, the same masks by position and head: the same logits on every host."""
    original = build(family)
    decomposition = random_decomposition(original)
    masks = decomposition.masks().ablate("blocks.1.attn.W_O", GONE, head=1)
    masks = masks.ablate("blocks.0.attn.W_K", [0, 2], positions=[2, -1]).ablate(
        "embed.W_E", GONE, positions=slice(1, 3)
    )
    masks = masks.keep_only("blocks.1.mlp.W_in", [0], delta=0.5)
    expected = patched_run(original, decomposition, masks, tokens)
    model = on_host(original, host)
    # the bridge computes attention and rotations itself, in float32 here and there
    assert difference(patched_run(model, decomposition, masks, tokens), expected) < (
        1e-5 if host == "bridge" else 1e-12
    )
