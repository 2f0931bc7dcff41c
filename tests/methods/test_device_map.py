"""A target spread over devices: components live where their site lives, and nothing meets a tensor of another device.

The second device is torch's `meta`, which computes nothing. A dispatch mode refuses operations on tensors of both, as devices
do, and makes up what is copied from there to the CPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tl_paramdecomp as tlpd
from tests.support.divided import LOSSES, batches, methods
from tests.support.models import gpt2
from tl_paramdecomp.adapters import adapt, weights, wiring
from tl_paramdecomp.components.importance import ImportanceConfig
from tl_paramdecomp.methods.method import TrainingStep
from tl_paramdecomp.methods.random_streams import Generators, RandomNumbers
from tl_paramdecomp.patching.target import frozen

FAR = torch.device("meta")
SITES = ["blocks.0.mlp.W_in", "blocks.1.attn.W_Q", "blocks.1.mlp.W_out"]


class TwoDevices(TorchDispatchMode):
    """Refuses tensors of two devices in one operation, numbers aside; gives ones for values of the second device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if len({t.device for t in tensors}) > 1 and func is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{func}: tensors on several devices, {[(t.device, list(t.shape)) for t in tensors]}")
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == FAR:
            return True if args[0].dtype == torch.bool else args[0].dtype.is_floating_point + 0.0
        if func is torch.ops.aten._to_copy.default and args[0].device == FAR:
            target = torch.device(kwargs.get("device") or FAR)
            if target != FAR:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.nonzero.default and args[0].device == FAR:
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten.index.Tensor and args[0].device == FAR:
            args = (args[0], [index for mask in args[1] for index in self.all_of(mask)])
        return func(*args, **kwargs)

    def all_of(self, mask):
        """Of a mask without values every entry, as one index for each of its dimensions."""
        if mask is None or mask.dtype != torch.bool:
            return [mask]
        return [mask.new_zeros(mask.numel(), dtype=torch.int64) for _ in range(mask.ndim)]


@pytest.fixture
def spread(monkeypatch):
    """A model whose second block, and what follows it, is on the second device."""
    monkeypatch.setattr(Generators, "on", lambda self, device: self._first)
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *rest, **s: autocast("cpu" if kind == FAR.type else kind, *rest, **s)
    )
    for room in (weights, wiring):  # which refuses weights without numbers
        monkeypatch.setattr(
            room, "read_parameter", lambda root, w: getattr(wiring.find_module(root, w.owner), w.weight)
        )
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: self.cpu().numpy().tolist())
    model = gpt2(tie_word_embeddings=False).requires_grad_(False)
    with frozen(model), adapt(model).patterns():  # tried out while all values are there
        assert adapt(model).blocks and adapt(model).splits_at_unembedding
    far = [model.transformer.h[1], model.transformer.ln_f, model.lm_head]

    def over(module, args, kwargs):
        def move(t):
            return t.to(FAR) if isinstance(t, torch.Tensor) else t

        return tuple(map(move, args)), {key: move(value) for key, value in kwargs.items()}

    for module in far:
        module.to(FAR)
        module.register_forward_pre_hook(over, with_kwargs=True)
    return model


def train(model, method, background=False):
    adapter, numbers = adapt(model), RandomNumbers(0)
    batch, other = batches()
    with TwoDevices(), frozen(model):
        made = method.initialise(
            adapter,
            tlpd.find_sites(model, SITES),
            torch.Generator().manual_seed(0),
            lambda _, n: range(n),
            lambda _: batch,
        )
        made.requires_grad_(True)
        step = TrainingStep(adapter, made, batch, numbers, 0.5, {}, other if background else None)
        report = method.gradients(step)
        figures = {k: float(v) for k, v in (report.terms | report.figures()).items()}
        method.after_step(step)
    return made, figures


@pytest.mark.parametrize("name", [name for name in methods() if "SVD" not in name and "Basis" not in name])
def test_components_live_where_their_site_lives(name, spread):
    made, figures = train(spread, methods()[name], name == "SPD.targeted")
    for site in SITES:
        assert made.device_of(site) == adapt(spread).weight(site).device
    assert {made.device_of(site).type for site in SITES} == {"cpu", "meta"}
    for parameter in made.parameters():
        assert parameter.grad is None or parameter.grad.device == parameter.device
    assert figures


@pytest.mark.parametrize("kind", ["component_mlp", "vector_mlp", "global_mlp", "global_transformer"])
def test_every_importance_function(kind, spread):
    config = ImportanceConfig(kind, hidden=8, heads=2, layers=1)
    made, _ = train(
        spread, tlpd.SPD(6, losses=(LOSSES["stochastic"],), importance=config, warm_up_steps=0, start="random")
    )
    assert all(p.grad is not None for p in made.importance.parameters())


def test_the_second_device_refuses_others():
    """What the tests here rest on."""
    with TwoDevices(), pytest.raises(RuntimeError, match="several devices"):
        torch.ones(2, 2) @ torch.ones(2, 2, device=FAR)
