"""Circuits, on a hand-set induction transformer whose circuit is known, and against edited weights."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.circuits.circuit import Circuit, evaluate_circuit, find_circuit
from tl_paramdecomp.analysis.circuits.search import LearnedMasks, members, pruned, shortest_good
from tl_paramdecomp.analysis.circuits.units import (
    TaskRuns,
    adversarial_value,
    baseline_of,
    component_units,
    mask_gradients,
    mask_sensitivities,
    neuron_and_head_units,
    stochastic_value,
)
from tl_paramdecomp.analysis.evaluation.measures import auroc
from tl_paramdecomp.analysis.tasks.metrics import AnswerProbability, LogitDifference
from tl_paramdecomp.analysis.tasks.task import Task
from tl_paramdecomp.errors import ComponentIndexError, NormalisationError, SettingError
from tl_paramdecomp.methods.from_factors import from_factors

VOCAB, LENGTH, JUNK = 8, 10, 4
WIDTH = 3 * VOCAB + LENGTH + JUNK
TOKEN, POSITION, BEFORE, OUT = 0, VOCAB, VOCAB + LENGTH, 2 * VOCAB + LENGTH
"""Where the residual stream holds the token, its position, the token before it, and what is written for the output."""


class Induction(nn.Module):
    """Two attention heads by hand. The first looks one position back and copies that token into a slot of its own; the second
    looks for positions whose slot holds the present token, and writes the token that stands there."""

    def __init__(self, sharp=30.0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        for layer in (0, 1):
            for matrix, d_in, d_out in (("Q", WIDTH, 16), ("K", WIDTH, 16), ("V", WIDTH, 16), ("O", 16, WIDTH)):
                setattr(self, f"{matrix}{layer}", nn.Linear(d_in, d_out, bias=False))
        self.unembed = nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for t in range(VOCAB):
                self.embed.weight[t, TOKEN + t] = 1.0
                for name, slot in (("V0", TOKEN), ("K1", BEFORE), ("V1", TOKEN)):
                    getattr(self, name).weight[t, slot + t] = 1.0
                self.Q1.weight[t, TOKEN + t] = sharp
                self.O0.weight[BEFORE + t, t] = 1.0
                self.O1.weight[OUT + t, t] = 1.0
                self.unembed.weight[t, OUT + t] = 10.0
            for p in range(LENGTH):
                self.positions.weight[p, POSITION + p] = 1.0
                self.K0.weight[p, POSITION + p] = 1.0
                if p:
                    self.Q0.weight[p - 1, POSITION + p] = sharp
            for name in ("Q0", "K0"):  # room for the components that do nothing
                getattr(self, name).weight[LENGTH:].zero_()
            torch.manual_seed(0)
            for layer in (0, 1):  # heads also write junk that nothing reads
                getattr(self, f"V{layer}").weight[VOCAB:12, : TOKEN + VOCAB] = torch.randn(12 - VOCAB, VOCAB)
                getattr(self, f"O{layer}").weight[-JUNK:, VOCAB:12] = torch.randn(JUNK, 12 - VOCAB)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in (0, 1):
            q, k, v = (getattr(self, f"{m}{layer}")(x) for m in "QKV")
            scores = q @ k.transpose(1, 2)
            # the second head leaves the present position out: its slot may hold the same token
            causal = torch.ones_like(scores[0], dtype=torch.bool).tril(-layer)
            causal[0, 0] = True
            x = x + getattr(self, f"O{layer}")(scores.masked_fill(~causal, -math.inf).softmax(-1) @ v)
        return self.unembed(x)


def axes(weight):
    """A matrix as one component for each row of its smaller side: rows of what it reads, or of what it writes."""
    W = weight.T.detach()
    d_in, d_out = W.shape
    return (W, torch.eye(d_out)) if d_out <= d_in else (torch.eye(d_in), W)


MATRICES = [f"{m}{layer}.weight" for layer in (0, 1) for m in "QKVO"]
TRUE = {name: {2} if name in ("Q0.weight", "K0.weight") else set(range(VOCAB)) for name in MATRICES}
"""What the task below needs: the fourth position looks back to the third, and everything of tokens."""


def by_hand(extra=0.0):
    """The model and its components; with `extra`, two more at O1 that write large vectors and cancel each other."""
    model = Induction()
    factors = {name: axes(model.get_parameter(name)) for name in MATRICES}
    V, U = factors["O1.weight"]
    write = torch.zeros(WIDTH)
    write[OUT : OUT + VOCAB] = extra * torch.linspace(-1.0, 1.0, VOCAB)
    read = torch.zeros(16, 1)
    read[:VOCAB] = 1.0
    if extra:
        factors["O1.weight"] = torch.cat([V, read, read], 1), torch.cat([U, write[None], -write[None]])
    return model, from_factors(model, factors)


def task(n=24, seed=0):
    """a b c d | a b c -> d: four distinct tokens, repeated; every token is the third, which is looked for, equally often."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        a, b, d = [t for t in torch.randperm(VOCAB, generator=generator).tolist() if t != i % VOCAB][:3]
        rows.append([a, b, i % VOCAB, d])
    return Task.from_tokens("induction", [[*r, *r[:3]] for r in rows], [r[3] for r in rows], wrong=[r[0] for r in rows])


def is_true(decomposition):
    return torch.cat([
        torch.tensor([c in TRUE[name] for c in range(parts.n_components)]) for name, parts in decomposition.items()
    ])  # fmt: skip


def runs_of(model, decomposition, asked, delta=1.0, **changes):
    return TaskRuns(
        adapt(model), decomposition, component_units(decomposition), asked, LogitDifference(), delta, **changes
    )


# --- known answers ----------------------------------------------------------------------------------------------------
def test_the_model_by_hand_does_induction():
    model, asked = Induction(), task()
    assert (model(asked.clean)[:, -1].argmax(-1) == torch.tensor([a[0] for a in asked.answers])).all()


@pytest.mark.parametrize("method", ["gradients", "integrated", "masks"])
def test_the_circuit_found_is_the_true_one(method):
    """Its components come first (AUROC 1), and what is left after pruning is made of them alone."""
    model, made = by_hand()
    asked, wanted = task(), is_true(made)
    how = LearnedMasks(steps=50, penalty=0.3, lr=0.15) if method == "masks" else method
    found = find_circuit(model, made, asked, method=how, prune=False, held_out=task(seed=9), progress=False)
    inside = torch.cat(
        [torch.tensor([c in found.components.get(n, []) for c in range(p.n_components)]) for n, p in made.items()]
    )
    assert not bool((inside & ~wanted).any()) and found.faithfulness["ablated"] >= 0.9
    assert min(found.faithfulness.values()) > 0.7 and found.complement < 0.2
    assert max(found.random_circuits) < 0.5
    if method != "masks":
        runs, generator = runs_of(model, made, asked), torch.Generator().manual_seed(0)
        scores = mask_sensitivities(runs, generator) if method == "gradients" else mask_gradients(runs, steps=16)
        assert auroc(scores, wanted) == 1.0


def test_the_true_circuit_is_the_model_under_every_mask():
    model, made = by_hand()
    true = {name: sorted(TRUE[name]) for name in MATRICES}
    found = evaluate_circuit(model, made, task(), true)
    assert all(value == pytest.approx(1.0, abs=1e-3) for value in found.faithfulness.values())
    assert found.complement == pytest.approx(0.0, abs=1e-3) and found.units == sum(map(len, true.values()))
    assert max(found.drops) > 0.1 and found.curve == [] and found.cpr is None


def test_an_adversary_exposes_what_cancels():
    """Two components that undo each other: without both the task is done as well, with one of them it is not."""
    model, made = by_hand(extra=20.0)
    true = {name: sorted(TRUE[name]) for name in MATRICES}
    found = evaluate_circuit(model, made, task(), true)
    assert found.faithfulness["ablated"] == pytest.approx(1.0, abs=1e-3)
    assert found.faithfulness["adversarial, 20 steps"] < 0.0
    honest = evaluate_circuit(*by_hand(), task(), true)
    assert honest.faithfulness["adversarial, 20 steps"] > 0.99


# --- values -----------------------------------------------------------------------------------------------------------
def random_task(rows=4, length=5, corrupt=False, seed=1):
    tokens = torch.randint(0, 61, (2 * rows, length), generator=torch.Generator().manual_seed(seed))
    other = tokens[rows:] if corrupt else None
    return Task.from_tokens("random", tokens[:rows], [1, 2, 3, 4][:rows], wrong=[5, 6, 7, 8][:rows], corrupt=other)


def exact(model, sites="blocks.*"):
    return tlpd.decompose(model, sites, tlpd.SVD(training=None), progress=False)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_circuit_is_the_edited_weight(delta):
    model, asked = gpt2(), random_task()
    made = exact(model)
    inside = (torch.rand(len(component_units(made)), generator=torch.Generator().manual_seed(0)) < 0.5).double()
    masks = made.masks()
    for name, components in component_units(made).members(inside.nonzero().flatten()).items():
        masks = masks.keep_only(name, components, delta=delta)
    with tlpd.edited_weights(model, made, masks):
        expected = LogitDifference()(asked.at_answer(model(asked.clean).logits), asked)
    found = runs_of(model, made, asked, delta).values(inside)
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("value", ["mean", "corrupt"])
def test_ablated_components_take_the_baseline(value):
    """All of a site's components ablated: its output is that of the baseline's activations."""
    model, asked = gpt2(), random_task(corrupt=True)
    made = exact(model, "blocks.1.mlp.W_out")
    runs = runs_of(model, made, asked, baseline=baseline_of(adapt(model), made, asked, value))
    found = runs.values(torch.zeros(len(runs.units), dtype=torch.float64))
    kept = {}
    site = model.transformer.h[1].mlp.c_proj
    handle = site.register_forward_hook(lambda module, args, y: kept.setdefault("y", y))
    model(asked.corrupt if value == "corrupt" else asked.clean)
    handle.remove()
    y = kept["y"] if value == "corrupt" else kept["y"].mean(0, keepdim=True).expand_as(kept["y"])
    handle = site.register_forward_hook(lambda module, args, old: y)
    expected = LogitDifference()(asked.at_answer(model(asked.clean).logits), asked)
    handle.remove()
    assert (found - expected).abs().max() < 1e-10


def test_integrated_mask_gradients_sum_to_the_difference():
    model, asked = gpt2(), random_task()
    runs = runs_of(model, exact(model), asked)
    with runs.frozen():
        scores = mask_gradients(runs, steps=64)
        whole = runs.mean() - runs.mean(torch.zeros(len(runs.units)))
    assert scores.sum().item() == pytest.approx(whole, rel=2e-3)


def test_sensitivities_are_absolute_gradients_of_single_prompts():
    """At masks of 1, against finite differences of each prompt's own metric."""
    model, asked = gpt2(), random_task()
    runs, h = runs_of(model, exact(model, "blocks.1.mlp.*"), asked), 1e-4
    found = mask_sensitivities(runs, torch.Generator(), draws=1, low=1.0)
    for unit in (0, 7, 40):
        sides = []
        for sign in (1.0, -1.0):
            keep = torch.ones(len(runs.units), dtype=torch.float64)
            keep[unit] += sign * h
            sides.append(runs.values(keep))
        assert found[unit].item() == pytest.approx(((sides[0] - sides[1]) / (2 * h)).abs().mean().item(), rel=1e-4)


def test_stochastic_and_adversarial_masks_leave_the_inside_alone():
    model, asked = gpt2(), random_task()
    runs, generator = runs_of(model, exact(model), asked), torch.Generator().manual_seed(0)
    everything = torch.ones(len(runs.units))
    with runs.frozen():
        full = runs.mean()
        assert stochastic_value(runs, everything, generator) == pytest.approx(full, abs=1e-9)
        assert adversarial_value(runs, everything, generator) == pytest.approx(full, abs=1e-9)
        none = torch.zeros(len(runs.units))
        start = runs.mean(torch.rand(len(none), generator=torch.Generator().manual_seed(5)))
        worst = adversarial_value(runs, none, torch.Generator().manual_seed(5), 10)
        best = -adversarial_value(runs, none, torch.Generator().manual_seed(5), 10, sign=-1.0)
    assert worst < start < -best


# --- search -----------------------------------------------------------------------------------------------------------
def test_the_shortest_good_beginning_and_what_can_go():
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    needed = {3, 4}

    def good(inside):
        return needed <= set(inside.nonzero().flatten().tolist())

    assert shortest_good(order, good) == 3
    assert pruned(order[:3], 6, good).tolist() == [3, 4]
    assert shortest_good(order, lambda inside: False) == 6
    assert members(torch.tensor([1, 2]), 4).tolist() == [0.0, 1.0, 1.0, 0.0]


def test_units_of_components_neurons_and_heads():
    model = gpt2()
    made = tlpd.decompose(model, "blocks.*", tlpd.NeuronBasis(training=None), progress=False)
    single, whole = component_units(made), neuron_and_head_units(made)
    blocks, heads = model.config.n_layer, model.config.n_head
    neurons = tlpd.find_sites(model)["blocks.0.mlp.W_in"].d_out
    assert len(single) == sum(parts.n_components for parts in made.values())
    assert len(whole) == blocks * (heads + neurons)
    d = model.config.n_embd
    by_label = dict(zip(whole.labels, whole.parameters.tolist(), strict=True))
    assert by_label["blocks.0.mlp neuron 3"] == 2 * d
    k = whole.labels.index("blocks.0.mlp neuron 3")
    assert whole.members(torch.tensor([k])) == {"blocks.0.mlp.W_in": [3], "blocks.0.mlp.W_out": [3]}
    head = whole.labels.index("blocks.1.attn head 1")
    masks = made.masks()
    keep = torch.ones(len(whole), dtype=torch.float64)
    keep[head] = 0.0
    masks = masks.replaced({name: (m, 1.0) for name, m in whole.spread(keep).items()})
    with tlpd.patched(model, made, masks):
        found = model(random_task().clean).logits
    z = made["blocks.1.attn.W_O"]
    by_head = made.masks().ablate("blocks.1.attn.W_O", slice(None), head=1)
    with tlpd.patched(model, made, by_head):
        expected = model(random_task().clean).logits
    assert z.site.n_heads == heads and (found - expected).abs().max() < 1e-10
    with pytest.raises(SettingError, match="NeuronBasis"):
        neuron_and_head_units(exact(model))


def test_a_circuit_is_kept_as_json_and_read_as_a_table(tmp_path):
    model, made = by_hand()
    found = find_circuit(model, made, task(), progress=False)
    assert Circuit.load(found.save(tmp_path / "circuit.json")) == found
    text = str(found)
    assert "adversarial" in text and "everything ablated" in text and "CPR" in text
    again = find_circuit(model, made, task(), progress=False)
    assert again == found and found.direction == "noising" and found.value == "zero"


def test_what_cannot_be_a_circuit_is_refused():
    model, made = by_hand()
    with pytest.raises(SettingError, match="between 0 and 1"):
        find_circuit(model, made, task(), faithfulness=1.5, progress=False)
    with pytest.raises((SettingError, TypeCheckError)):
        find_circuit(model, made, task(), method="magic", progress=False)
    with pytest.raises(ComponentIndexError):
        evaluate_circuit(model, made, task(), {"Q0.weight": [99]})
    with pytest.raises(SettingError, match="one component"):
        evaluate_circuit(model, made, task(), {})
    with torch.no_grad():
        model.unembed.weight.zero_()
    with pytest.raises(NormalisationError):
        find_circuit(model, made, task(), metric=AnswerProbability(), progress=False)
