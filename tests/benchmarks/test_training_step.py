"""A training step against the textbook step with the same losses and random numbers: time, memory, and the floor.

GPT-2 small by size (random weights), its 24 MLP matrices, C = 768, 128 tokens, the paper's importance networks; and TMS 40-10
by size at batch 4096. The floor is the floating-point operations that the step needs over this machine's matmul speed.
"""

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.textbook import matmul_speed, textbook_of
from tests.benchmarks.timing import ratio
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.data.batch import Batch
from tl_paramdecomp.methods.losses import Faithfulness, ImportanceMinimality
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.reconstruction import StochasticReconstruction
from tl_paramdecomp.methods.spd import SPD
from tl_paramdecomp.patching.target import frozen
from tl_paramdecomp.training.state import optimise

pytestmark = pytest.mark.benchmark
D, D_MLP, C, TOKENS, LAYERS, VOCAB, GATE = 768, 3072, 768, 128, 12, 50257, 16


def method_of(layerwise=False, rows=None, autocast=None, measure="kl", C=C):
    terms = [
        Faithfulness(100.0, rows=rows),
        ImportanceMinimality(1e-3, p_start=2.0, p_end=2.0),
        StochasticReconstruction(),
    ]
    if layerwise:
        terms.append(StochasticReconstruction(sites="layerwise"))
    return SPD(
        n_components=C, losses=tuple(terms), importance=ImportanceConfig("component_mlp", hidden=GATE), start="random",
        warm_up_steps=0, measure=measure, autocast=autocast,
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval().requires_grad_(False)
    modules = {}
    for i, block in enumerate(model.transformer.h):
        modules |= {f"blocks.{i}.mlp.W_in": block.mlp.c_fc, f"blocks.{i}.mlp.W_out": block.mlp.c_proj}
    return model, modules, torch.randint(0, VOCAB, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1))


class TMS(torch.nn.Module):
    def __init__(self, n=40, d=10):
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(n, d, bias=False), torch.nn.Linear(d, n)

    def forward(self, x):
        return torch.relu(self.linear2(self.linear1(x)))


def tms():
    torch.manual_seed(0)
    model = TMS().requires_grad_(False)
    modules = {"linear1.weight": model.linear1, "linear2.weight": model.linear2}
    x = torch.rand(4096, 40) * (torch.rand(4096, 40) < 0.05)
    return model, modules, x


class Ours:
    """The library's step."""

    def __init__(self, method, model, modules, tokens):
        self.method, self.model, self.tokens, self.adapter = method, model, tokens, adapt(model)
        sites = {name: self.adapter.sites[name] for name in modules}
        self.dec = method.initialise(self.adapter, sites, torch.Generator().manual_seed(0), lambda what, n: range(n))
        self.dec.requires_grad_(True)
        self.groups = method.parameter_groups(self.dec)
        self.optimiser = torch.optim.AdamW([{"params": g.parameters} for g in self.groups], lr=1e-4, fused=True)
        self.generator = torch.Generator()

    def gradients(self):
        self.generator.manual_seed(3)
        self.optimiser.zero_grad()
        return self.method.gradients(
            TrainingStep(self.adapter, self.dec, Batch(self.tokens, None), self.generator)
        ).total

    def step(self):
        self.gradients()
        optimise(self.groups, self.optimiser, 1.0)


class Plain:
    """The textbook step."""

    def __init__(self, ours, modules, **settings):
        self.book, self.tokens = textbook_of(ours.method, ours.model, ours.dec, modules, **settings), ours.tokens
        flat = [t for values in self.book.parameters.values() for t in values.values()]
        self.optimiser = torch.optim.AdamW(flat, lr=1e-4)

    def gradients(self):
        self.book.generator.manual_seed(3)
        self.optimiser.zero_grad()
        loss = self.book.loss(self.tokens)
        loss.backward()
        return loss.detach()

    def step(self):
        self.gradients()
        self.optimiser.step()


def same_gradients(ours, plain):
    """Largest relative difference of loss and gradients, parameter by parameter."""
    a, b = ours.gradients(), plain.gradients()
    worst = ((a - b) / b).abs().item()
    for name, values in plain.book.parameters.items():
        net = ours.dec.importance.networks[name.replace(".", "/")]
        found = {"V": ours.dec[name].V, "U": ours.dec[name].U, **dict(net.named_parameters())}
        worst = max(worst, *((found[k].grad - t.grad).norm() / t.grad.norm() for k, t in values.items()))
    return float(worst)


def flops(layerwise):
    """Needed by a step on GPT-2: (without faithfulness, of exact faithfulness)."""
    sites, blocks, attention = 2 * LAYERS, LAYERS * (4 * D * D + 2 * D * D_MLP), LAYERS * 2 * D * TOKENS // 2
    forward = 2 * TOKENS * (blocks + attention + D * VOCAB)
    pair = 2 * TOKENS * C * (D + D_MLP)  # x V and (.) U of one site
    gate = 3 * 2 * TOKENS * C * (D + D_MLP) // 2 * sites  # x V of the gate, forward, and backward to V
    masked = 2 * forward + 3 * pair * sites  # frozen weights pass gradients on, factors also get their own
    passes = masked
    if layerwise:  # from its site on: half of the blocks, both ways, and the vocabulary
        passes += sites * (2 * 2 * TOKENS * (blocks // 2 + attention // 2 + D * VOCAB) + 3 * pair)
    return forward + gate + passes, 3 * 2 * C * D * D_MLP * sites


@pytest.mark.parametrize("what, changes, needs_bf16", [
    ("exact faithfulness", {}, False),
    ("faithfulness on 64 rows", {"rows": 64}, False),
    ("faithfulness on 64 rows, bf16 autocast", {"rows": 64, "autocast": "bfloat16"}, True),
])  # fmt: skip
def test_gpt2_step(what, changes, needs_bf16, report):
    if needs_bf16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bf16 arithmetic")
    model, modules, tokens = gpt2()
    with frozen(model):
        plain = Plain(Ours(method_of(), model, modules, tokens), modules)
        exact = Ours(method_of(), model, modules, tokens)
        if not changes:
            assert same_gradients(exact, plain) < 1e-5
        ours = Ours(method_of(**changes), model, modules, tokens)
        measured = ratio(ours.step, plain.step, rounds=3, warm=1)
    data, faithful = flops(False)
    speed = matmul_speed([(TOKENS, D, C), (TOKENS, C, D_MLP), (D, C, D_MLP)])
    floor = 1e3 * (data + (faithful if not changes else faithful * 64 // D)) / speed
    report(f"step / textbook step, GPT-2 size, 24 MLP matrices, {what}", measured, floor)


def test_gpt2_step_with_layerwise_terms(report):
    model, modules, tokens = gpt2()
    with frozen(model):
        ours = Ours(method_of(layerwise=True), model, modules, tokens)
        plain = Plain(ours, modules, layerwise=True)
        assert same_gradients(ours, plain) < 1e-5
        measured = ratio(ours.step, plain.step, rounds=1, warm=1)
    speed = matmul_speed([(TOKENS, D, C), (TOKENS, C, D_MLP), (TOKENS, D, VOCAB)])
    report(
        "step / textbook step, GPT-2 size, 24 MLP matrices, with layerwise terms",
        measured,
        1e3 * sum(flops(True)) / speed,
    )


def test_tms_step(report):
    model, modules, x = tms()
    with frozen(model):
        ours = Ours(method_of(layerwise=True, measure="mse", C=200), model, modules, x)
        plain = Plain(ours, modules, layerwise=True)
        assert same_gradients(ours, plain) < 1e-4
        report(
            "step / textbook step, TMS 40-10, batch 4096, with layerwise terms", ratio(ours.step, plain.step, rounds=5)
        )


@pytest.mark.parametrize("layerwise", [False, True])
def test_peak_memory_of_a_gpt2_step(layerwise, report):
    """Peak resident memory of a process that takes two steps, less what it held before them."""
    found = {}
    for which in ("ours", "plain"):
        command = [sys.executable, "-m", "tests.benchmarks.peak_memory", which, str(int(layerwise))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[which] = json.loads(done.stdout)
    for key in ("peak", "grown"):
        mega = {which: values[key] / 2**20 for which, values in found.items()}
        label = "peak memory" if key == "peak" else "peak memory above that of the model and components"
        name = f"{label} / textbook step's, GPT-2 size{', with layerwise terms' if layerwise else ''} (MB)"
        report(name, (mega["ours"] / mega["plain"], mega["ours"], mega["plain"]))
