"""The correction form against the textbook form that builds W - V U in the step: 128 tokens, 768 -> 3072, C = 768."""

import pytest
import torch

from tests.benchmarks.timing import ratio
from tl_paramdecomp.components.factors import Components
from tl_paramdecomp.components.masked_output import ResolvedMask, masked_output
from tl_paramdecomp.sites import WeightSite

pytestmark = pytest.mark.benchmark
D_IN, D_OUT, C, TOKENS = 768, 3072, 768, 128


def test_forward_and_backward_of_the_masked_output(report):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, bias = normal(1, TOKENS, D_IN), normal(D_IN, D_OUT) / D_IN**0.5, normal(D_OUT)
    m, d = torch.rand(1, TOKENS, C, generator=generator), torch.rand(1, TOKENS, generator=generator)
    components = Components(WeightSite("w", D_IN, D_OUT), normal(D_IN, C) / D_IN**0.5, normal(C, D_OUT) / C**0.5)
    y = x @ weight + bias  # the host computes it in any case
    upstream = normal(1, TOKENS, D_OUT)

    def gradients(output):
        components.zero_grad()
        output.backward(upstream)
        return components.V.grad.clone(), components.U.grad.clone()

    def textbook():
        V, U = components.V, components.U
        return gradients(bias + (m * (x @ V)) @ U + d.unsqueeze(-1) * (x @ (weight - V @ U)))

    def correction():
        return gradients(masked_output(components, ResolvedMask(m, d), x, y, bias))

    for slow, fast in zip(textbook(), correction(), strict=True):
        assert (slow - fast).abs().max() < 1e-3 * slow.abs().max()
    report("textbook / correction form of the masked output, forward and backward", ratio(textbook, correction))
