"""That W_Q is the query's weight and not the key's: by what a patch there does, whatever the family's code looks like.

In one attention layer a query changes what is read at its own position alone; a key or value also what later positions
read; at the first position, which sees only itself, a query or key changes nothing and a value does. One head of W_Q, W_K
or W_V changes what that head (or its group) reads, and no other. W_out reads a linear function of W_in's output and not of
W_gate's.
"""

import pytest
import torch
import transformers
from torch import Tensor

import tl_paramdecomp as tlpd

if transformers.__version__.startswith("4"):
    pytest.skip("the tiny models are configured for transformers 5", allow_module_level=True)

from tl_paramdecomp.adapters import adapt

from ..support import zoo
from ..support.architectures import FUSED, TELLING, tiny_on
from ..support.exactness import random_decomposition

NOT_CAUSAL = ("BertForMaskedLM", "RobertaForMaskedLM")
SINKS = ("GptOssForCausalLM",)
"""Attention may rest on nothing, so that a query or key matters at the first position as well."""
NORM_OVER_ALL_HEADS = tuple(
    f"{name}ForCausalLM" for name in ("BitNet", "FlexOlmo", "MiniMaxM2", "Olmo2", "Olmo3", "Olmoe", "OlmoHybrid")
)
"""Queries and keys, or what W_O reads, are normalised over all heads at once, so that one head's change is every head's."""
LENGTH, AT = 6, 2
KEYS = [key for key in zoo.TABLE if key not in NOT_CAUSAL]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


class Layer:
    """The last layer of a model that has a role, and what W_O or W_out reads there."""

    def __init__(self, model: object, roles: tuple[str, ...]) -> None:
        self.model, sites = model, tlpd.find_sites(model)
        layers = sorted({name.split(".")[1] for name in sites if name.startswith("blocks.")}, key=int)
        layers = [i for i in layers if all(f"blocks.{i}.{role}" in sites for role in roles)]
        if not layers:
            pytest.skip(f"no layer has {', '.join(roles)}")
        self.prefix = f"blocks.{layers[-1]}"
        self.dec = random_decomposition(model, [f"{self.prefix}.{role}" for role in roles[1:]], size=0.6)
        self.reads = f"{self.prefix}.{roles[0]}"
        self.n_heads = sites[self.reads].n_heads
        self.tokens = torch.randint(0, zoo.VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(3))

    def read(self, masks: object = None) -> Tensor:
        """x of W_O or W_out [pos, d_in]."""
        with torch.no_grad(), tlpd.patched(self.model, self.dec, masks or self.dec.masks()):
            return adapt(self.model).capture(self.tokens, [self.reads]).inputs[self.reads].reshape(LENGTH, -1)

    def gone(self, role: str, **where: int) -> Tensor:
        return self.read(self.dec.masks().ablate(f"{self.prefix}.{role}", [0, 1, 2], **where))


@pytest.fixture
def layer(request: pytest.FixtureRequest) -> Layer:
    architecture, host, roles = request.param
    try:
        return Layer(tiny_on(architecture, host), roles)
    except (zoo.ArchitectureMissing, tlpd.errors.UnsupportedModelError) as reason:
        pytest.skip(str(reason))


def layers(roles: tuple[str, ...]) -> pytest.MarkDecorator:
    marks = {key: [] if key in TELLING else [pytest.mark.slow] for key in KEYS}
    cases = [pytest.param((key, "transformers", roles), id=key, marks=marks[key]) for key in KEYS]
    return pytest.mark.parametrize("layer", cases, indirect=True)


pytestmark = pytest.mark.filterwarnings("ignore")  # tiny models are odd, and their hosts say so
KEYS_AND_VALUES = ("attn.W_O", "attn.W_K", "attn.W_V")
ATTENTION = ("attn.W_O", "attn.W_Q", "attn.W_K", "attn.W_V")


def check_attention(layer: Layer, architecture: str) -> None:
    plain = layer.read()
    for role in ("attn.W_Q", "attn.W_K", "attn.W_V"):
        if f"{layer.prefix}.{role}" not in layer.dec:
            continue
        here, first = layer.gone(role, positions=AT), layer.gone(role, positions=0)
        assert close(here[:AT], plain[:AT]), f"{role} changes what earlier positions read"
        assert not close(here[AT : AT + 1], plain[AT : AT + 1]), f"{role} does nothing at its position"
        if role == "attn.W_Q":
            assert close(here[AT + 1 :], plain[AT + 1 :]), "a query changes what later positions read"
        else:
            assert not close(here[AT + 1 :], plain[AT + 1 :]), f"{role} does nothing at later positions"
        if role == "attn.W_V" or architecture not in SINKS:
            assert close(first[:1], plain[:1]) == (role != "attn.W_V"), f"{role} at the first position"


def check_heads(layer: Layer) -> None:
    plain = layer.read().unflatten(-1, (layer.n_heads, -1))
    for name, site in layer.dec.sites.items():
        role, group = name.split(".", 2)[2], layer.n_heads // site.n_heads
        for head in range(site.n_heads):
            read = layer.gone(role, head=head).unflatten(-1, (layer.n_heads, -1))
            mine = torch.arange(layer.n_heads) // group == head
            if not mine.all():
                assert close(read[:, ~mine], plain[:, ~mine]), f"{role} of head {head} changes others"
            assert not any(close(read[:, i], plain[:, i]) for i in mine.nonzero().flatten()), f"{role} of head {head}"


@layers(ATTENTION)
def test_queries_keys_and_values(layer: Layer, request: pytest.FixtureRequest) -> None:
    architecture = request.node.callspec.params["layer"][0]
    check_attention(layer, architecture)
    if architecture not in NORM_OVER_ALL_HEADS:
        check_heads(layer)


@pytest.mark.parametrize("layer", [(key, "transformer_bridge", ATTENTION) for key in FUSED], ids=FUSED, indirect=True)
def test_queries_keys_and_values_that_the_bridge_splits(layer: Layer) -> None:
    check_attention(layer, "")
    check_heads(layer)


GATED = ("Qwen3_5ForCausalLM", "Qwen3NextForCausalLM")


@pytest.mark.parametrize("layer", [(key, "transformers", KEYS_AND_VALUES) for key in GATED], ids=GATED, indirect=True)
def test_keys_and_values_beside_gated_queries(layer: Layer) -> None:
    check_attention(layer, "")
    with pytest.raises(tlpd.errors.UnsupportedSiteError, match="columns a head"):
        tlpd.find_sites(layer.model, f"{layer.prefix}.attn.W_Q")


@layers(("mlp.W_out", "mlp.W_gate", "mlp.W_in"))
def test_gates_and_inputs(layer: Layer) -> None:
    """W_out's input at d = -1, 0, 1 times the weight: on a line for W_in, not for W_gate."""
    for role, linear in (("mlp.W_in", True), ("mlp.W_gate", False)):
        name = f"{layer.prefix}.{role}"
        down, none, up = (layer.read(layer.dec.masks().keep_only(name, [], delta=d)) for d in (-1.0, 0.0, 1.0))
        bend = (up + down - 2 * none).abs().max() / (up - down).abs().max()
        assert (bend < 1e-4) == linear, role
