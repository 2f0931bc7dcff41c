"""Edges against masked runs, hand-worked writes through frozen norms, and the activations that they must sum to."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_paramdecomp as tlpd
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.effects.attribution import attribute
from tl_paramdecomp.analysis.effects.edges import METRIC, Graph, dataset_graph, edges_into, prompt_graph
from tl_paramdecomp.errors import (
    ComponentIndexError,
    NoMatchingSiteError,
    PositionIndexError,
    SettingError,
    UnsupportedModelError,
)

from ..support.models import C, build, decomposition_of, gpt2, hooked, logits
from .test_attribution import HOSTS, WIDE, A, B, StandIn, answer_difference, difference, made


def tolerance(host: str) -> float:
    """Llama's norms compute in float32 wherever transformers runs them."""
    return 1e-5 if host in WIDE else 1e-8


def patterns_free(dec: tlpd.Decomposition) -> list[str]:
    """Sites that read the residual stream, so that only norms stand between them and what was written."""
    return [s for s in dec if s.endswith(("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U"))]


@pytest.mark.parametrize("host", HOSTS)
def test_edges_bias_embedding_and_delta_terms_sum_to_the_activation(host: str, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model)
    acts = tlpd.component_acts(model, dec, tokens)
    for site in patterns_free(dec):
        edges = edges_into(model, dec, tokens, (site, 1, 5))
        assert torch.equal(edges.value, acts[site][:, 5, 1]) or (edges.value - acts[site][:, 5, 1]).abs().max() < 1e-12
        assert edges.remainder.abs().max() < tolerance(host), site
    for site in ("blocks.0.attn.W_O", "blocks.1.attn.W_O"):
        edges = edges_into(model, dec, tokens, (site, 2, -1), frozen_patterns=True)
        assert edges.remainder.abs().max() < tolerance(host), site
        assert all(values.abs().max() == 0.0 for name, values in edges.values.items() if name.endswith(("W_Q", "W_K")))


@pytest.mark.parametrize("host", HOSTS)
def test_with_undecomposed_weights_between_embeddings_and_biases_are_sources(host: str, tokens: Tensor) -> None:
    """Attention and embeddings that are not decomposed, patterns held: their tables and biases make up the rest."""
    model = made(host)
    dec = decomposition_of(model, ["blocks.0.mlp.W_out", "blocks.1.attn.W_V", "blocks.1.mlp.W_in"])
    edges = edges_into(model, dec, tokens, ("blocks.1.mlp.W_in", 0, 6), frozen_patterns=True)
    assert edges.remainder.abs().max() < tolerance(host)
    assert edges.embeddings["embed.W_E"].abs().max() > 1e-3
    assert any(name.startswith("norm") for name in edges.bias) == (host not in ("hooked-gqa", *WIDE))
    if host == "gpt2":
        assert "blocks.1.attn.W_O" in edges.bias and edges.bias["blocks.1.attn.W_O"].abs().max() > 1e-5


@pytest.mark.parametrize("host", HOSTS)
def test_edges_across_positions_are_measured_by_ablation(host: str, tokens: Tensor) -> None:
    """A value component removed at a key position changes what W_O reads at a later query by the edge, exactly."""
    model = made(host)
    dec = decomposition_of(model, ["blocks.1.attn.W_V", "blocks.1.attn.W_O"])
    source, target = "blocks.1.attn.W_V", "blocks.1.attn.W_O"
    edges = edges_into(model, dec, tokens, (target, 3, 5))
    clean = tlpd.component_acts(model, dec, tokens)[target]
    for position in (0, 3, 5, 6):
        for c in (0, 4):
            with tlpd.patched(model, dec, dec.masks().ablate(source, c, positions=position)):
                gone = tlpd.component_acts(model, dec, tokens)[target]
            change = (clean - gone)[:, 5, 3]
            assert (edges.values[source][:, position, c] - change).abs().max() < (1e-6 if host in WIDE else 1e-10)
            assert (position == 6) == bool(change.abs().max() == 0.0)


@pytest.mark.parametrize("host", HOSTS)
def test_edges_through_a_frozen_norm_by_hand(host: str, tokens: Tensor) -> None:
    """From block 0's MLP to block 1's queries: the write, centred where the norm centres, over the norm's denominator."""
    model = made(host)
    dec, adapter = decomposition_of(model), adapt(model)
    source, target = "blocks.0.mlp.W_out", "blocks.1.attn.W_Q"
    norm = next(w for n, w in adapter.norms.wirings.items() if n in ("blocks.1.ln1.w", "blocks.1.ln_1.w"))
    gain, kept = adapter.gain(norm.site.name), []
    module = adapter.root.get_submodule(norm.path)
    with module.register_forward_pre_hook(lambda m, args: kept.append(args[0])):
        adapter.forward(tokens)
    residual = kept[0].double()
    centred = norm.site.has_bias
    z = residual - residual.mean(-1, keepdim=True) if centred else residual
    scale = (z.pow(2).mean(-1, keepdim=True) + (norm.eps or 0.0)).rsqrt()
    h = tlpd.component_acts(model, dec, tokens)[source]
    edges = edges_into(model, dec, tokens, (target, 2, 4))
    for c in range(C):
        write = h[:, 4, c, None] * dec[source].U[c]
        through = (write - write.mean(-1, keepdim=True) if centred else write) * scale[:, 4] * gain
        expected = through @ dec[target].V[:, 2]
        assert (edges.values[source][:, 4, c] - expected).abs().max() < tolerance(host)
    others = torch.ones(7, dtype=torch.bool)
    others[4] = False
    assert edges.values[source][:, others].abs().max() == 0.0


def test_effects_through_other_decomposed_sites_are_not_the_edges(tokens: Tensor) -> None:
    """A value reaches the next block's MLP only through W_O: pinned it does not, left free it does by the right amount."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.attn.W_V", "blocks.0.attn.W_O", "blocks.0.mlp.W_in"])
    target = ("blocks.0.mlp.W_in", 1, 6)
    held = edges_into(model, dec, tokens, target)
    assert held.values["blocks.0.attn.W_V"].abs().max() == 0.0 and held.values["blocks.0.attn.W_O"].abs().max() > 0.0
    free = edges_into(model, dec, tokens, target, sites=["blocks.0.attn.W_V", "blocks.0.mlp.W_in"])
    assert set(free.values) == {"blocks.0.attn.W_V", "blocks.0.mlp.W_in"}
    through = torch.zeros(
        2, dtype=torch.float64
    )  # the values' writes by way of all of W_O: components and delta component
    h = tlpd.component_acts(model, dec, tokens)["blocks.0.attn.W_V"][:, 2, 3]
    W_O = tlpd.site_weight(model, "blocks.0.attn.W_O")
    with adapt(model).patterns() as kept, torch.no_grad():
        adapt(model).forward(tokens)
    z = (kept[0][:, :, 6, 2].unsqueeze(-1) * (h[:, None] * dec["blocks.0.attn.W_V"].U[3]).view(2, 3, 8)).flatten(1)
    write = z @ W_O
    seen: list[Tensor] = []
    with model.transformer.h[0].ln_2.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, 6])):
        model(tokens)
    ln = model.transformer.h[0].ln_2
    scale = (seen[0].var(-1, unbiased=False, keepdim=True) + ln.eps).rsqrt()
    through = ((write - write.mean(-1, keepdim=True)) * scale * ln.weight) @ dec["blocks.0.mlp.W_in"].V[:, 1]
    assert (free.values["blocks.0.attn.W_V"][:, 2, 3] - through).abs().max() < 1e-10


def test_without_freezing_edges_are_derivatives_of_the_norm_itself(tokens: Tensor) -> None:
    """By a finite difference of one write."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.1.attn.W_O", "blocks.1.mlp.W_in"])
    source, target, eps = "blocks.1.attn.W_O", ("blocks.1.mlp.W_in", 2, 6), 1e-6
    edges = edges_into(model, dec, tokens, target, frozen_norms=False)
    clean = tlpd.component_acts(model, dec, tokens)[target[0]][:, 6, 2]
    with tlpd.patched(model, dec, dec.masks().scale(source, 1, 1 - eps, positions=6)):
        moved = tlpd.component_acts(model, dec, tokens)[target[0]][:, 6, 2]
    assert ((clean - moved) / eps - edges.values[source][:, 6, 1]).abs().max() < 1e-5
    frozen = edges_into(model, dec, tokens, target)
    assert (frozen.values[source] - edges.values[source]).abs().max() > 1e-3
    assert edges.remainder.abs().max() > 1e-3  # the norm's denominator is no linear map


def test_an_embedding_component_reads_tokens(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, ["embed.W_E", "blocks.0.mlp.W_in"])
    edges = edges_into(model, dec, tokens, ("embed.W_E", 0, 1))
    assert edges.total.abs().max() == 0.0 and torch.equal(edges.value, dec["embed.W_E"].V[tokens[:, 1], 0])


def test_padded_rows_have_the_edges_of_their_short_ones(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.*")
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[:, 5:], mask[:, 5:] = 0, 0
    target = ("blocks.1.attn.W_O", 1, 4)
    found = edges_into(model, dec, padded, target, attention_mask=mask)
    short = edges_into(model, dec, tokens[:, :5], target)
    for site in dec:
        assert (found.values[site][:, :5] - short.values[site]).abs().max() < 1e-10
        assert found.values[site][:, 5:].abs().max() == 0.0


# --- graphs ---------------------------------------------------------------------------------------------------------
def test_a_prompts_graph_holds_the_edges_between_its_nodes(tokens: Tensor, tmp_path: Any) -> None:
    model, row = build("gpt2"), tokens[:1]
    dec = decomposition_of(model, "blocks.*")
    chosen = [("blocks.1.mlp.W_in", 2, 6), ("blocks.0.attn.W_O", 1, 6), ("blocks.1.mlp.W_out", 3, 6)]
    graph = prompt_graph(model, dec, row, difference, nodes=chosen)
    names = [(n["site"], n["component"], n["position"]) for n in graph.nodes]
    assert names == [chosen[1], chosen[0], chosen[2]]  # in execution order
    acts = tlpd.component_acts(model, dec, row)
    for target in (1, 2):
        edges = edges_into(model, dec, row, chosen[target - 1 if target == 1 else 2])
        for found in graph.into(target):
            site, c, p = names[found["source"]]
            assert found["value"] == pytest.approx(float(edges.values[site][0, p, c]))
    assert [n["activation"] for n in graph.nodes] == pytest.approx([float(acts[s][0, p, c]) for s, c, p in names])
    (of_metric,) = [e for e in graph.explained if e["target"] == METRIC]
    assert of_metric["value"] == pytest.approx(difference(logits(model, row)).item())
    assert abs(of_metric["remainder"]) < 1e-8  # only the final norm and the unembedding are between
    parts = ("nodes", "other_components", "delta", "bias", "embeddings", "remainder")
    for line in graph.explained:
        assert sum(line[part] for part in parts) == pytest.approx(line["value"])
    again = Graph.load(graph.save(tmp_path / "graph.json"))
    assert again == graph and again.strongest(2) == graph.strongest(2)
    assert "blocks.1.mlp.W_out[3] @6" in str(graph) and "3 nodes" in str(graph)


def test_nodes_are_taken_by_attribution(tokens: Tensor) -> None:
    model, row = build("gpt2"), tokens[:1]
    dec = decomposition_of(model, "blocks.1.*")
    graph = prompt_graph(model, dec, row, difference, nodes=6)
    top = {(e.site, e.component, e.position): e.value for e in attribute(model, dec, row, difference).top(6)}
    assert {(n["site"], n["component"], n["position"]): n["attribution"] for n in graph.nodes} == pytest.approx(top)


@pytest.mark.parametrize("size", [1, 16])
def test_a_datasets_graph_is_the_mean_of_absolute_edges(size: int, tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.1.*")
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    u, v = ("blocks.1.attn.W_V", 1), ("blocks.1.attn.W_O", 2)

    def metric(found: Tensor) -> Tensor:
        return found[:, 4, A] - found[:, 4, B]

    graph = dataset_graph(
        model, dec, tokens, metric, nodes=[v, u], batch_size=size, attention_mask=mask, progress=False
    )
    assert [(n["site"], n["component"], n["position"]) for n in graph.nodes] == [(*u, None), (*v, None)]
    total = 0.0
    for row, length in ((0, 7), (1, 5)):
        for p in range(length):
            edges = edges_into(model, dec, tokens[row : row + 1], (*v, p))
            total += float(edges.values[u[0]][0, :length, u[1]].abs().sum())
    (edge,) = [e for e in graph.edges if (e["source"], e["target"]) == (0, 1)]
    assert edge["value"] == pytest.approx(total / 12)
    prompts = [prompt_graph(model, dec, tokens[r : r + 1], metric, nodes=[(*v, p) for p in range(5)]) for r in range(2)]
    (into,) = [e for e in graph.edges if (e["source"], e["target"]) == (1, METRIC)]
    assert into["value"] == pytest.approx(sum(abs(e["value"]) for g in prompts for e in g.into(METRIC)) / 2)
    acts = tlpd.component_acts(model, dec, tokens, mask)[v[0]][..., v[1]].abs()
    assert graph.nodes[1]["activation"] == pytest.approx(float((acts * mask).sum() / 12))
    assert len(dataset_graph(model, dec, tokens, metric, nodes=3, progress=False).nodes) == 3


def test_a_tasks_graph_is_that_of_its_rows(tokens: Tensor) -> None:
    """In batches of its own `select`, with its own answer positions and padding."""
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.1.*")
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    task = StandIn(tokens, None, mask, torch.tensor([4, 4]))
    nodes = [("blocks.1.attn.W_V", 0), ("blocks.1.mlp.W_out", 1)]
    found = [
        dataset_graph(model, dec, *given, nodes=nodes, batch_size=size, progress=False, **more)
        for given, size, more in (
            ((task, answer_difference), 1, {}),
            ((tokens, lambda y: y[:, 4, A] - y[:, 4, B]), 2, {"attention_mask": mask}),
        )
    ]
    for one, other in zip(found[0].edges, found[1].edges, strict=True):
        assert one == pytest.approx(other)


def test_what_cannot_be_is_refused(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.0.mlp.*")
    for node, error in (
        (("blocks.9.mlp.W_in", 0, 0), NoMatchingSiteError),
        (("blocks.0.mlp.W_in", C, 0), ComponentIndexError),
        (("blocks.0.mlp.W_in", 0, 7), PositionIndexError),
    ):
        with pytest.raises(error):
            edges_into(model, dec, tokens, node)
    with pytest.raises(SettingError, match="one row; given 2"):
        prompt_graph(model, dec, tokens, difference)
    with pytest.raises(SettingError, match="at least one node"):
        prompt_graph(model, dec, tokens[:1], difference, nodes=0)
    with pytest.raises(SettingError, match="batch_size"):
        dataset_graph(model, dec, tokens, difference, batch_size=0, progress=False)


def test_a_norm_of_another_kind_cannot_be_held(tokens: Tensor) -> None:
    class CubeNorm(torch.nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + input**3

    model = gpt2().requires_grad_(False)
    model.transformer.h[1].ln_2 = CubeNorm(24).double()
    dec = decomposition_of(model, "blocks.1.*")
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.1\.ln_2 .*frozen_norms=False"):
        edges_into(model, dec, tokens, ("blocks.1.mlp.W_in", 0, 0))
    assert edges_into(model, dec, tokens, ("blocks.1.mlp.W_in", 0, 0), frozen_norms=False).total.isfinite().all()


@pytest.mark.parametrize("kind", ["LNPre", "RMSPre"])
def test_norms_of_centred_rows_are_told_apart(kind: str, tokens: Tensor) -> None:
    """Where rows have no mean, LayerNorm and RMSNorm give the same values, but only one ignores what is added to all."""
    model = hooked(normalization_type=kind, positional_embedding_type="rotary", rotary_dim=8, attn_only=True)
    model.requires_grad_(False)
    with torch.no_grad():
        for name in ("embed.W_E", "blocks.0.attn.W_O", "blocks.0.attn.b_O"):
            parameter = model.get_parameter(name)
            parameter -= parameter.mean(-1, keepdim=True)
    dec = decomposition_of(model, ["blocks.0.attn.W_O", "blocks.1.attn.W_Q"])
    edges = edges_into(model, dec, tokens, ("blocks.1.attn.W_Q", 0, 6))
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    h = tlpd.component_acts(model, dec, tokens)["blocks.0.attn.W_O"][:, 6, 3, None]
    write = h * dec["blocks.0.attn.W_O"].U[3]
    scale = cache["blocks.1.ln1.hook_scale"][:, 6]
    expected = ((write - write.mean(-1, keepdim=True) if kind == "LNPre" else write) / scale) @ dec[
        "blocks.1.attn.W_Q"
    ].V[:, 0]
    assert (edges.values["blocks.0.attn.W_O"][:, 6, 3] - expected).abs().max() < 1e-8
