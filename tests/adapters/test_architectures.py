"""Every architecture that transformer-lens knows: each site exact, or refused with a reason."""

import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers

import tl_paramdecomp as tlpd

from ..support.exactness import (
    ablate,
    assert_ablation_is_an_edited_weight,
    difference,
    ones,
    patched_run,
    random_decomposition,
    roles,
)

if transformers.__version__.startswith("4"):
    pytest.skip("the tiny models are configured for transformers 5", allow_module_level=True)

from tl_paramdecomp.adapters import adapt

from ..support import zoo
from ..support.architectures import HOSTS, TELLING, page, row, surveyed, tiny_on
from ..support.hosts import run

TL4 = version("transformer-lens").startswith("4.")
EVERY = [
    pytest.param(key, host, marks=[] if key in TELLING and (TL4 or host == "transformers") else [pytest.mark.slow])
    for host in HOSTS
    for key in zoo.TABLE
]
"""The quick tests try the telling ones, their bridges on the newest transformer-lens alone; the slow tests try all. The page
is made from all of them even so, by the library's own trial at load."""
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.mark.parametrize(("architecture", "host"), EVERY)
@pytest.mark.filterwarnings("ignore")  # tiny models are odd, and their hosts say so
def test_every_site_is_exact_or_refused_with_a_reason(architecture: str, host: str) -> None:
    try:
        model = tiny_on(architecture, host)
    except zoo.ArchitectureMissing as reason:
        pytest.skip(str(reason))
    found = row(architecture, host, model)
    assert found.exact or found.refused
    assert all(len(reason) > 10 and names for reason, names in found.refused.items())
    if not found.exact:
        return
    inputs = zoo.sample_inputs(architecture)
    decomposition = random_decomposition(model, _seen_in_the_output(adapt(model).sites))
    plain = run(model, inputs)
    under_ones = patched_run(model, decomposition, ones(decomposition, (1,) * (plain.ndim - 1)), inputs)
    assert torch.equal(under_ones, plain)
    hooked = patched_run(model, decomposition, ablate(decomposition), inputs)
    with tlpd.edited_weights(model, decomposition, ablate(decomposition)):
        edited = run(model, inputs)
    # float32 models: rounding differs between x W' and x W plus a correction, and grows with depth
    assert difference(hooked, edited) < 1e-4
    assert difference(hooked, plain) > 1e-2, "the patch does nothing"


def _seen_in_the_output(names: Iterable[str]) -> list[str]:
    """Sites that reach the output which is compared; the poolers and contrastive heads of towers give others."""
    return [name for name in names if not name.startswith(("pooler.", "quantizer.", "project_q."))]


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("architecture", zoo.TABLE)
@pytest.mark.filterwarnings("ignore")
def test_every_role_by_itself_in_float64_where_it_runs(architecture: str, host: str) -> None:
    inputs, tolerance = zoo.sample_inputs(architecture), 1e-8
    found = surveyed(architecture, host)
    if not found.exact:
        pytest.skip("; ".join(found.refused))
    model = tiny_on(architecture, host)
    try:
        model.to(torch.float64)
        run(model, inputs)
    except RuntimeError:  # grouped matrix products of experts, and a few more, have no float64
        model, tolerance = tiny_on(architecture, host), 1e-4
    names = _seen_in_the_output(adapt(model).sites)
    decomposition = random_decomposition(model, names, size=1.0)
    assert_ablation_is_an_edited_weight(model, inputs, decomposition, tolerance, roles(names).values())


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_the_run_gives() -> None:
    if not TL4:
        pytest.skip("the page is made with transformer-lens 4")
    written = PAGE.read_text(encoding="utf-8")
    made_with = re.search(r"Made with transformer-lens (\S+) and transformers (\S+)\.\n", written)
    assert made_with is not None
    if made_with.groups() != (version("transformer-lens"), version("transformers")):
        pytest.skip(f"the page is made with transformer-lens {made_with[1]} and transformers {made_with[2]}")
    assert page() == written, "run docs/make_architectures.py"


@pytest.mark.filterwarnings("ignore")
def test_families_refused_for_a_reason_say_it() -> None:
    mixtral = surveyed("MixtralForCausalLM", "transformers")
    assert "blocks.*.mlp.W_in" in mixtral.refused["the block routes tokens among experts"]
    latent = surveyed("DeepseekV3ForCausalLM", "transformers")
    assert any("blocks.*.attn.W_Q" in names for names in latent.refused.values())
    assert "blocks.*.attn.W_O" in latent.exact
    assert any("encoder-decoder" in reason for reason in surveyed("T5ForConditionalGeneration", "transformers").refused)
    called_again = surveyed("HrmTextForCausalLM", "transformers")
    assert any("more than once" in reason for reason in called_again.refused)
