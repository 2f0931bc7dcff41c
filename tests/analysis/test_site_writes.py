"""What sites write, on hosts that write into what they were given."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.exactness import random_decomposition
from tests.support.zoo import tiny
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.analysis.effects.site_writes import SiteWrites


@pytest.mark.parametrize("role", ["read", "open", "pinned"])
@pytest.mark.parametrize(
    "name", ["FalconForCausalLM/bias", "FalconForCausalLM/rw", "BloomForCausalLM", "GPT2LMHeadModel"]
)
def test_what_the_delta_component_writes_is_x_times_what_is_left_of_the_weight(name, role):
    model = tiny(name)
    dec = random_decomposition(model, "blocks.*")
    adapter, tokens = adapt(model), torch.arange(12).view(2, 6)
    writes = SiteWrites(len(tokens))
    with torch.no_grad(), adapter.intercept(writes.fns(dec, role)):
        adapter.forward(tokens)
    for site, components in dec.items():
        left = tlpd.site_weight(model, site) - components.product().detach()
        torch.testing.assert_close(writes.delta_write(site, components), writes.x[site] @ left, rtol=1e-4, atol=1e-5)
