"""Attribution against masked runs, finite differences, closed forms and hand-worked numbers, on every host."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import tl_paramdecomp as tlpd
from tests.support.slow_ablations import ablation_effects
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.effects.attribution import Attribution, attribute
from tl_paramdecomp.errors import (
    DecompositionFileError,
    NoMatchingSiteError,
    PositionIndexError,
    SettingError,
    ShapeError,
    TargetMismatchError,
)

from ..support.models import GPT2_LIKE, VOCAB, C, bridge, build, decomposition_of, gpt2, hooked, llama, logits, nnsight

WIDE = {
    "llama": lambda: llama(torch.float64),
    "bridge-llama": lambda: bridge(llama(torch.float64)),
    "nnsight-llama": lambda: nnsight(llama(torch.float64)),
}
"""Llamas in float64: grouped heads, gated MLP, norms that compute in float32."""
HOSTS = [*GPT2_LIKE, "hooked-gqa", *WIDE]
A, B = 3, 5


def made(host: str) -> Any:
    if host not in WIDE:
        return build(host)
    model = WIDE[host]()
    getattr(model, "_module", model).requires_grad_(False)
    return model


def difference(found: Tensor) -> Tensor:
    """A metric linear in the logits."""
    return found[:, -1, A] - found[:, -1, B]


def log_prob(found: Tensor) -> Tensor:
    """A metric that is not."""
    return torch.log_softmax(found[:, -1], -1)[:, A]


def masked(
    model: Any, dec: tlpd.Decomposition, masks: tlpd.Masks, tokens: Tensor, metric: Any, **kwargs: Any
) -> Tensor:
    with tlpd.patched(model, dec, masks):
        return metric(logits(model, tokens, **kwargs))


# --- first order ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", HOSTS)
def test_where_all_that_follows_is_linear_predicted_and_measured_changes_agree(host: str, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model, ["unembed.W_U", "blocks.1.mlp.W_out"])
    found = attribute(model, dec, tokens, difference, sites="unembed.W_U")
    assert list(found.values) == ["unembed.W_U"] and found.direction == "removal"
    plain = difference(logits(model, tokens))
    for c in range(C):
        for p in (5, 6):
            gone = masked(model, dec, dec.masks().ablate("unembed.W_U", c, positions=p), tokens, difference)
            assert (found.values["unembed.W_U"][:, p, c] - (plain - gone)).abs().max() < 1e-8
    no_delta = dec.masks().with_values("unembed.W_U", 1.0, delta=0.0)
    assert (
        found.delta["unembed.W_U"].sum(1) - (plain - masked(model, dec, no_delta, tokens, difference))
    ).abs().max() < 1e-8


@pytest.mark.parametrize("host", HOSTS)
def test_with_the_last_norm_frozen_the_last_writes_are_exact_parts(host: str, tokens: Tensor) -> None:
    """By hand: (h U) through the final norm, its denominator that of the clean run, to two columns of the unembedding."""
    model = made(host)
    dec, adapter = decomposition_of(model, ["blocks.1.mlp.W_out", "blocks.1.mlp.W_in"]), adapt(model)
    site = "blocks.1.mlp.W_out"
    found = attribute(model, dec, tokens, difference, sites=site, frozen_norms=True)
    xhat = adapter.capture(tokens, ["unembed.W_U"]).inputs["unembed.W_U"][:, -1]
    gain = adapter.gain("ln_final.w") if "ln_final.w" in adapter.norms.wirings else adapter.gain(_final_norm(adapter))
    bias = adapter.gain_bias(_final_norm(adapter))
    residual = _final_input(adapter, tokens)[:, -1]
    centred = bias is not None
    z = residual - residual.mean(-1, keepdim=True) if centred else residual
    scale = ((xhat - (bias if centred else 0.0)) / gain * z).sum(-1, keepdim=True) / z.pow(2).sum(-1, keepdim=True)
    W = adapter.weight("unembed.W_U")
    h = tlpd.component_acts(model, dec, tokens)[site][:, -1]
    for c in range(C):
        write = h[:, c, None] * dec[site].U[c]
        through = (write - write.mean(-1, keepdim=True) if centred else write) * scale * gain
        expected = through @ (W[:, A] - W[:, B])
        assert (found.values[site][:, -1, c] - expected).abs().max() < (1e-8 if centred or "hooked" in host else 1e-6)
    assert found.values[site][:, :-1].abs().max() == 0.0


def _final_norm(adapter: Any) -> str:
    return next(name for name in adapter.norms.wirings if "blocks." not in name and "layers." not in name)


def _final_input(adapter: Any, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []
    module = adapter.root.get_submodule(adapter.norms.wirings[_final_norm(adapter)].path)
    handle = module.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    adapter.forward(tokens)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("host", HOSTS)
def test_activation_times_gradient_is_the_limit_of_finite_differences(host: str, tokens: Tensor) -> None:
    """m(1) - m(1 - eps) over eps tends to it, and the error falls with eps, at every site of every host."""
    model = made(host)
    dec = decomposition_of(model)
    found = attribute(model, dec, tokens, log_prob)
    plain = log_prob(logits(model, tokens))
    for site in dec:
        places = [(1, 2), (3, 6)] if "blocks.1" in site or "unembed" in site else [(1, 2)]
        for c, p in places:
            exact, errors = found.values[site][:, p, c], []
            for eps in (1e-2, 1e-3):
                moved = masked(model, dec, dec.masks().scale(site, c, 1 - eps, positions=p), tokens, log_prob)
                errors.append(float(((plain - moved) / eps - exact).abs().max()))
            noise = 1e-3 if host in WIDE else 1e-8  # float32 norms round the difference
            assert errors[1] < errors[0] / 5 + noise, site


def test_delta_components_biases_and_embeddings_by_finite_differences(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.attn.W_Q", "blocks.1.mlp.W_in"])
    found = attribute(model, dec, tokens, log_prob)
    plain, eps, adapter = log_prob(logits(model, tokens)), 1e-6, adapt(model)
    for site in dec:
        d = torch.ones(7, dtype=torch.float64)
        d[6] = 1 - eps
        moved = masked(model, dec, dec.masks().with_values(site, 1.0, delta=d), tokens, log_prob)
        assert ((plain - moved) / eps - found.delta[site][:, 6]).abs().max() < 1e-4
        with adapter.replaced_weights({site: adapter.bias(site) * (1 - eps)}, biases=True):
            moved = log_prob(logits(model, tokens))
        assert ((plain - moved) / eps - found.bias[site].sum(1)).abs().max() < 1e-4
    assert set(found.embeddings) == {"embed.W_E", "pos_embed.W_pos"}
    table = model.transformer.wpe.weight
    table.data[2] *= 1 - eps
    moved = log_prob(logits(model, tokens))
    assert ((plain - moved) / eps - found.embeddings["pos_embed.W_pos"][:, 2]).abs().max() < 1e-4


def test_parts_sum_to_the_whole_write(tokens: Tensor) -> None:
    """Components, delta component and bias are a site's output: their attributions sum to y . dL/dy by autograd."""
    model = gpt2().requires_grad_(False)
    dec = decomposition_of(model, "blocks.*")
    found = attribute(model, dec, tokens, log_prob)
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_(True)
        kept.append(output)
        return output

    with model.transformer.h[1].mlp.c_fc.register_forward_hook(keep):
        log_prob(model(tokens).logits).sum().backward()
    site = "blocks.1.mlp.W_in"
    whole = (kept[0] * kept[0].grad).sum(-1)
    assert (found.values[site].sum(-1) + found.delta[site] + found.bias[site] - whole).abs().max() < 1e-10


@pytest.mark.parametrize("host", ["bridge", "nnsight"])
def test_hosts_of_one_model_agree(host: str, tokens: Tensor) -> None:
    reference = build("gpt2")
    dec = decomposition_of(reference)
    expected, found = (attribute(m, dec, tokens, log_prob) for m in (reference, build(host)))
    for part in ("values", "delta", "bias"):
        for site, values in getattr(found, part).items():
            known = getattr(expected, part).get(site, 0.0)  # a bridge adds zeros where GPT-2 has no bias
            assert (values - known).abs().max() < 1e-9, (part, site)


# --- corrupt prompts ------------------------------------------------------------------------------------------------
def test_noising_and_denoising_differ_in_the_run_that_gives_the_gradient(tokens: Tensor) -> None:
    """By finite differences in the clean run, and in the corrupt one."""
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.*")
    corrupt, eps, site = tokens.roll(1, 0), 1e-6, "blocks.0.attn.W_V"
    noising = attribute(model, dec, tokens, log_prob, corrupt=corrupt)
    denoising = attribute(model, dec, tokens, log_prob, corrupt=corrupt, direction="denoising")
    acts = {rows: tlpd.component_acts(model, dec, t)[site] for rows, t in (("clean", tokens), ("corrupt", corrupt))}
    for found, rows, base in ((noising, tokens, "clean"), (denoising, corrupt, "corrupt")):
        plain = log_prob(logits(model, rows))
        change = (acts["clean"] - acts["corrupt"])[:, 4, 2] / acts[base][:, 4, 2]  # as a share of what is there
        m = torch.ones(2, 7, C, dtype=torch.float64)
        m[:, 4, 2] += eps * change
        moved = masked(model, dec, dec.masks().with_values(site, m), rows, log_prob)
        assert ((moved - plain) / eps - found.values[site][:, 4, 2]).abs().max() < 1e-4
    assert (noising.values[site] - denoising.values[site]).abs().max() > 1e-3
    assert torch.allclose(torch.tensor(noising.clean), torch.tensor(denoising.clean))
    assert noising.corrupt == pytest.approx(log_prob(logits(model, corrupt)).tolist())
    assert noising.bias == {}


def test_attributions_along_a_path_of_writes_sum_to_the_difference(tokens: Tensor) -> None:
    """With components, delta components and embeddings; faster than any fixed number of nodes."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.mlp.W_out", "blocks.1.attn.W_V"])
    corrupt = tokens.roll(1, 0)
    wanted = log_prob(logits(model, tokens)) - log_prob(logits(model, corrupt))
    errors = []
    for steps in (2, 8, 32):
        found = attribute(
            model, dec, tokens, log_prob, method="integrated", corrupt=corrupt, path="writes", steps=steps
        )
        errors.append(float((found.total() - wanted).abs().max()))
    assert errors[0] > 1e-3 and errors[2] < 1e-2 * errors[0] and errors[2] < 1e-4


def test_the_embedding_along_a_path_of_embeddings_sums_to_the_difference(tokens: Tensor) -> None:
    model = made("llama")
    corrupt = tokens.roll(1, 0)
    wanted = log_prob(logits(model, tokens)) - log_prob(logits(model, corrupt))
    dec, errors = decomposition_of(model, ["embed.W_E", "blocks.0.mlp.W_in"]), []
    for steps in (2, 16, 64):
        found = attribute(model, dec, tokens, log_prob, method="integrated", corrupt=corrupt, steps=steps)
        whole = found.values["embed.W_E"].sum((1, 2)) + found.delta["embed.W_E"].sum(1)
        errors.append(float((whole - wanted).abs().max()))
    assert errors[2] < 1e-2 * errors[0] and errors[2] < 1e-2
    left_out = attribute(
        model, dec, tokens, log_prob, method="integrated", corrupt=corrupt, steps=64, sites="blocks.0.mlp.W_in"
    )
    assert (left_out.embeddings["embed.W_E"].sum(1) - wanted).abs().max() < 1e-2
    assert torch.allclose(left_out.values["blocks.0.mlp.W_in"], found.values["blocks.0.mlp.W_in"])


def test_integrated_gradients_are_the_mean_of_gradients_at_the_nodes(tokens: Tensor) -> None:
    """One node is the midpoint: activations' difference times the gradient halfway, from embeddings given to the model."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.1.attn.W_V"])
    corrupt, site = tokens.roll(1, 0), "blocks.1.attn.W_V"
    found = attribute(model, dec, tokens, log_prob, method="integrated", corrupt=corrupt, steps=1)
    halfway = (model.transformer.wte(tokens) + model.transformer.wte(corrupt)) / 2
    zeros = torch.zeros(2, 7, 72, dtype=torch.float64, requires_grad=True)
    with model.transformer.h[1].attn.c_attn.register_forward_hook(lambda m, args, y: y + zeros):
        log_prob(model(inputs_embeds=halfway).logits).sum().backward()
    h = tlpd.component_acts(model, dec, tokens)[site] - tlpd.component_acts(model, dec, corrupt)[site]
    assert zeros.grad is not None
    expected = h * (zeros.grad[..., 48:] @ dec[site].U.T)
    assert (found.values[site] - expected).abs().max() < 1e-10
    assert found.direction == "corrupt to clean"


# --- single ablations -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", HOSTS)
def test_ablations_are_single_masked_runs(host: str, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model, ["embed.W_E", "blocks.0.attn.W_K", "blocks.1.attn.W_O", "unembed.W_U"])
    found = attribute(
        model, dec, tokens, log_prob, method="ablation", positions=[2, -1], rows_at_once=12, progress=False
    )
    assert found.positions == [2, 6] and found.values["blocks.0.attn.W_K"].shape == (2, 2, C)
    plain = log_prob(logits(model, tokens))
    tolerance = 1e-6 if host in WIDE else 1e-10
    for site in dec:
        for place, p in enumerate((2, 6)):
            for c in (0, 4):
                gone = masked(model, dec, dec.masks().ablate(site, c, positions=p), tokens, log_prob)
                assert (found.values[site][:, place, c] - (plain - gone)).abs().max() < tolerance, site
        d = torch.ones(7)
        d[2] = 0.0
        gone = masked(model, dec, dec.masks().with_values(site, 1.0, delta=d), tokens, log_prob)
        assert (found.delta[site][:, 0] - (plain - gone)).abs().max() < tolerance, site


def test_ablations_at_all_positions_are_those_of_whole_components(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.attn.W_V", "blocks.1.mlp.W_in"])
    found = attribute(model, dec, tokens, log_prob, method="ablation", by_position=False, progress=False)
    assert found.granularity == "component at 7 positions together" and found.top(1)[0].position is None
    for row in range(2):
        for site, effects in ablation_effects(model, dec, tokens[row : row + 1], log_prob).items():
            assert (found.values[site][row, 0] - effects).abs().max() < 1e-10


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_exact_patching_gives_a_component_the_other_prompts_activation(direction: Any, tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.attn.W_V", "blocks.1.mlp.W_out"])
    corrupt = tokens.roll(1, 0)
    found = attribute(
        model,
        dec,
        tokens,
        log_prob,
        method="ablation",
        corrupt=corrupt,
        direction=direction,
        positions=4,
        progress=False,
    )
    noising = direction == "noising"
    rows, others = (tokens, corrupt) if noising else (corrupt, tokens)
    plain = log_prob(logits(model, rows))
    own, other = tlpd.component_acts(model, dec, rows), tlpd.component_acts(model, dec, others)
    for site in dec:
        m = torch.ones(2, 7, C, dtype=torch.float64)
        m[:, 4, 3] = other[site][:, 4, 3] / own[site][:, 4, 3]
        moved = masked(model, dec, dec.masks().with_values(site, m), rows, log_prob)
        expected = plain - moved if noising else moved - plain
        assert (found.values[site][:, 0, 3] - expected).abs().max() < 1e-10


def test_a_metric_may_remember_its_rows(tokens: Tensor) -> None:
    """Variants keep the rows together and in order, so that a KL to the clean logits of each row has its meaning."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.mlp.W_in"])
    clean = torch.log_softmax(logits(model, tokens)[:, -1], -1)

    def kl(found: Tensor) -> Tensor:
        assert len(found) == 2
        return (clean.exp() * (clean - torch.log_softmax(found[:, -1], -1))).sum(-1)

    found = attribute(model, dec, tokens, kl, method="ablation", positions=6, progress=False)
    assert (found.values["blocks.0.mlp.W_in"] < 0).all() and max(map(abs, found.clean)) < 1e-12


# --- rows, padding, tasks -------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class StandIn:
    """What attribution asks of a task."""

    clean: Tensor
    corrupt: Tensor | None
    attention_mask: Tensor | None
    last: Tensor

    def at_answer(self, found: Tensor) -> Tensor:
        return found[torch.arange(len(found)), self.last]

    def select(self, rows: Any) -> "StandIn":
        parts = (None if t is None else t[rows] for t in (self.clean, self.corrupt, self.attention_mask, self.last))
        return StandIn(*parts)  # type: ignore[arg-type]


def answer_difference(found: Tensor, task: Any) -> Tensor:
    assert found.shape == (len(task.clean), VOCAB)
    return found[:, A] - found[:, B]


@pytest.mark.parametrize("host", ["gpt2", "hooked", "bridge", "nnsight"])
@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_right_padded_tasks_are_their_rows_one_by_one(host: str, method: Any, tokens: Tensor) -> None:
    model = made(host)
    dec = decomposition_of(model, ["blocks.0.attn.W_K", "blocks.1.mlp.W_out"])
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, 5:], mask[1, 5:] = 0, 0
    corrupt = padded.clone()
    corrupt[:, 2] = torch.tensor([7, 9])
    task = StandIn(padded, corrupt, mask, torch.tensor([6, 4]))
    found = attribute(model, dec, task, answer_difference, method=method, progress=False)
    assert found.metric == "answer_difference" and found.direction == "noising"
    for row, length in ((0, 7), (1, 5)):
        alone = attribute(
            model,
            dec,
            tokens[row : row + 1, :length],
            difference,
            method=method,
            corrupt=corrupt[row : row + 1, :length],
            progress=False,
        )
        for site in dec:
            assert (found.values[site][row, :length] - alone.values[site][0]).abs().max() < 1e-9
            assert found.values[site][row, length:].abs().sum() == 0.0


def test_padding_is_attributed_nothing_even_by_a_metric_that_looks_there(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.1.mlp.W_out")
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    for method in ("gradient", "ablation"):
        found = attribute(
            model, dec, tokens, lambda y: y[..., A].sum(1), method=method, attention_mask=mask, progress=False
        )
        values = found.values["blocks.1.mlp.W_out"]
        assert values[1, 5:].abs().max() == 0.0 and values[1, :5].abs().min() > 0.0 and values[0].abs().min() > 0.0


def test_positions_and_sums(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.0.*")
    whole = attribute(model, dec, tokens, log_prob)
    some = attribute(model, dec, tokens, log_prob, positions=slice(1, 4))
    summed = attribute(model, dec, tokens, log_prob, by_position=False)
    for site in dec:
        assert torch.equal(some.values[site], whole.values[site][:, 1:4])
        assert torch.allclose(summed.values[site][:, 0], whole.by_component()[site])
    assert some.top(1)[0].position in (1, 2, 3)


def test_tied_embeddings_and_tied_components(tokens: Tensor) -> None:
    """Components of the unembedding that are the embedding's, transposed, are attributed at both places."""
    model = build("gpt2")
    tied = decomposition_of(model, ["embed.W_E", "unembed.W_U"])
    found = attribute(model, tied, tokens, difference, method="gradient")
    exact = attribute(model, tied, tokens, difference, method="ablation", sites="unembed.W_U", progress=False)
    assert (found.values["unembed.W_U"] - exact.values["unembed.W_U"]).abs().max() < 1e-10
    assert found.values["embed.W_E"].abs().max() > 0


def test_the_model_as_it_stands_and_afterwards(tokens: Tensor) -> None:
    """Attribution inside another patch is of the patched model, and nothing is left behind."""
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.mlp.W_in", "unembed.W_U"])
    before = logits(model, tokens)
    masks = dec.masks().ablate("blocks.0.mlp.W_in", [0, 1])
    with tlpd.patched(model, dec, masks):
        found = attribute(model, dec, tokens, difference, sites="unembed.W_U", method="gradient")
        exact = attribute(model, dec, tokens, difference, sites="unembed.W_U", method="ablation", progress=False)
    assert found.clean == pytest.approx(masked(model, dec, masks, tokens, difference).tolist())
    assert (found.values["unembed.W_U"] - exact.values["unembed.W_U"]).abs().max() < 1e-10
    assert torch.equal(logits(model, tokens), before)


# --- results and refusals -------------------------------------------------------------------------------------------
def test_a_result_is_read_saved_and_printed(tokens: Tensor, tmp_path: Any) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, ["blocks.0.mlp.W_in", "unembed.W_U"])
    found = attribute(model, dec, tokens, functools.partial(_difference_of, A, B))
    flat = sorted((abs(float(v)) for values in found.values.values() for v in values.mean(0).flatten()), reverse=True)
    top = found.top(5)
    assert [abs(effect.value) for effect in top] == pytest.approx(flat[:5])
    best = top[0]
    assert best.component is not None and best.position is not None
    assert found.values[best.site][:, best.position, best.component].mean().item() == pytest.approx(best.value)
    assert found.top(1, row=1)[0].value in found.values[found.top(1, row=1)[0].site][1]
    assert any(effect.component is None for effect in found.top(1000, delta=True))
    frame = found.to_frame()
    assert len(frame) == 2 * 2 * 7 * (C + 1) and frame["component"].isna().sum() == 28
    line = frame[(frame.row == 1) & (frame.site == "unembed.W_U") & (frame.component == 2) & (frame.position == 6)]
    assert line["value"].item() == float(found.values["unembed.W_U"][1, 6, 2])
    again = Attribution.load(found.save(tmp_path / "found.json"))
    assert torch.equal(again.values["unembed.W_U"], found.values["unembed.W_U"]) and again.top(3) == found.top(3)
    text = str(found)
    assert best.site in text and "metric minus metric with the component removed" in text and "partial" in text
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DecompositionFileError, match="holds no attribution"):
        Attribution.load(tmp_path / "other.json")
    with pytest.raises(SettingError, match="rows 0 to 1"):
        found.top(row=2)


def _difference_of(a: int, b: int, found: Tensor) -> Tensor:
    return found[:, -1, a] - found[:, -1, b]


def test_what_cannot_be_is_refused(tokens: Tensor) -> None:
    model = build("gpt2")
    dec = decomposition_of(model, "blocks.0.mlp.*")
    run = functools.partial(attribute, model, dec, tokens)
    with pytest.raises((SettingError, TypeCheckError)):
        run(difference, method="shapley")
    with pytest.raises(SettingError, match="give corrupt="):
        run(difference, method="integrated")
    with pytest.raises(SettingError, match="give corrupt="):
        run(difference, direction="denoising")
    with pytest.raises(SettingError, match="has no gradient"):
        run(lambda found: found[:, -1].argsort(-1)[:, 0].double())
    with pytest.raises(SettingError, match="for gradients"):
        run(difference, method="ablation", frozen_norms=True)
    with pytest.raises(SettingError, match="at least 1"):
        run(difference, method="integrated", corrupt=tokens, steps=0)
    with pytest.raises(ShapeError, match="one number for each of 2 rows"):
        run(lambda found: found[:, -1])
    with pytest.raises(ShapeError, match="token by token"):
        run(difference, corrupt=tokens[:, :5])
    with pytest.raises(NoMatchingSiteError):
        run(difference, sites="blocks.7.*")
    with pytest.raises(PositionIndexError):
        run(difference, positions=9)
    with pytest.raises(SettingError, match="not finite"):
        run(lambda found: found[:, -1, A] / 0.0)
    with pytest.raises(SettingError, match="A task brings"):
        task = StandIn(tokens, None, None, torch.tensor([6, 6]))
        attribute(model, dec, task, answer_difference, attention_mask=torch.ones_like(tokens))
    with pytest.raises(TargetMismatchError):
        attribute(gpt2(seed=1), dec, tokens, difference)


def test_folded_hooked_transformers_have_norms_without_gains(tokens: Tensor) -> None:
    """LayerNorm folded away into `LNPre`: frozen, it is still no obstacle."""
    model = hooked(normalization_type="LNPre").requires_grad_(False)
    dec = decomposition_of(model, "blocks.1.mlp.W_out")
    found = attribute(model, dec, tokens, difference, frozen_norms=True)
    residual = _cached(model, tokens, "ln_final.hook_scale")
    W = model.W_U[:, A] - model.W_U[:, B]
    write = tlpd.component_acts(model, dec, tokens)["blocks.1.mlp.W_out"][:, -1, :, None] * dec["blocks.1.mlp.W_out"].U
    expected = ((write - write.mean(-1, keepdim=True)) / residual[:, -1, None]) @ W
    assert (found.values["blocks.1.mlp.W_out"][:, -1] - expected).abs().max() < 1e-8


def _cached(model: Any, tokens: Tensor, name: str) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=name)[1][name]
