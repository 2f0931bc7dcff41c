"""Moving gains along subnetworks: hooks against swapped parameters against parameters edited by hand."""

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import bridge, gpt2, hooked, logits
from tests.support.norms import NORMED, normed
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.errors import NoMatchingSiteError, PatchConflictError, SiteNotFiredError, TargetMismatchError
from tl_paramdecomp.patching.subnetworks import perturbed


def tokens(rows=3, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def made_of(model, sites="blocks.1.mlp.W_in", **settings):
    method = tlpd.L3D(**({"n_subnetworks": 4, "gains": True} | settings))
    return tlpd.decompose(model, sites, method, tokens(), steps=0, progress=False)


@pytest.mark.parametrize("name", NORMED)
def test_hooks_weights_and_hand_edits_agree(name):
    """On norms alone, to 1e-10; afterwards every parameter is the very same one."""
    host = normed(name)
    model, root = host.model, adapt(host.model).root
    made = made_of(model)
    parameters = {n: (p, p.detach().clone()) for n, p in root.named_parameters()}
    plainly = logits(model, tokens())
    norms = list(made.norms)
    with perturbed(model, made, {0: 3.0, -1: -2.0}, sites=norms):
        by_hooks = logits(model, tokens())
    with perturbed(model, made, {0: 3.0, -1: -2.0}, sites=norms, in_weights=True):
        by_weights = logits(model, tokens())
    assert torch.equal(logits(model, tokens()), plainly)
    for n, p in root.named_parameters():
        assert p is parameters[n][0] and torch.equal(p, parameters[n][1])
    first, other = made.subnetwork(0), made.subnetwork(3)
    with torch.no_grad():
        for norm in norms:
            host.gains[norm].add_(3.0 * first[norm].gain - 2.0 * other[norm].gain)
            if norm in host.biases:
                host.biases[norm].add_(3.0 * first[norm].bias - 2.0 * other[norm].bias)
    by_hand = logits(model, tokens())
    assert (by_hand - plainly).abs().max() > 1e-2
    # transformers' RMSNorms compute in float32, whose rounding later layers pass on
    near = 1e-10 if name.startswith(("gpt2", "hooked", "gemma2")) else 1e-5
    assert (by_weights - by_hand).abs().max() < 1e-12 and (by_hooks - by_hand).abs().max() < near


def test_weights_and_gains_move_together():
    model = gpt2()
    made = made_of(model, "*")
    with perturbed(model, made, {2: 0.5}):
        by_hooks = logits(model, tokens())
    with perturbed(model, made, {2: 0.5}, sites=list(made.sites)):
        without = logits(model, tokens())
    with perturbed(model, made, {2: 0.5}, in_weights=True):
        assert (logits(model, tokens()) - by_hooks).abs().max() < 1e-10
    assert (by_hooks - without).abs().max() > 1e-4
    with perturbed(model, made, {2: 0.5}, sites=list(made.sites)), perturbed(model, made, {2: 0.5}, sites="*ln*"):
        assert (logits(model, tokens()) - by_hooks).abs().max() < 1e-10
    with perturbed(model, made, {2: 0.5}, sites="*"):
        assert torch.equal(logits(model, tokens()), by_hooks)
    with perturbed(model, made, {2: 0.5}, sites=lambda site: site.d_in > 0):
        assert torch.equal(logits(model, tokens()), without)
    for wrong in ("*ln9*", ["*ln*", "*W_up"], []):
        with pytest.raises(NoMatchingSiteError), perturbed(model, made, {2: 0.5}, sites=wrong):
            pass
    with perturbed(model, made, {2: 1.0}, sites="ln_final.w"), pytest.raises(PatchConflictError):
        with perturbed(model, made, {2: 1.0}, sites="ln_final.w"):
            pass


def test_gradients_reach_deltas():
    model = gpt2().requires_grad_(False)
    made = made_of(model).requires_grad_(False)
    delta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad(), perturbed(model, made, {3: delta}, sites="*ln*"):
        model(tokens()).logits.log_softmax(-1)[..., 7].sum().backward()
    h, values = 1e-5, []
    for sign in (1.0, -1.0):
        with perturbed(model, made, {3: sign * h}, sites="*ln*", in_weights=True):
            values.append(logits(model, tokens()).log_softmax(-1)[..., 7].sum())
    assert delta.grad.item() == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=1e-5)


def test_a_changed_gain_or_bias_is_another_model():
    for attribute in ("weight", "bias"):
        model = gpt2()
        made = made_of(model)
        tlpd.check_target(model, made)
        with torch.no_grad():
            getattr(model.transformer.h[1].ln_2, attribute)[3] += 1e-3
        with pytest.raises(TargetMismatchError, match=r"blocks\.1\.ln2\.w"):
            tlpd.check_target(model, made)
        with pytest.raises(TargetMismatchError), perturbed(model, made, {0: 1.0}):
            pass
        tlpd.check_target(model, made_of(gpt2(), gains=False))


def test_folding_is_told_apart():
    made = made_of(gpt2())
    folded = bridge(gpt2())
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(TargetMismatchError, match="look processed"):
        tlpd.check_target(folded, made)
    made = made_of(hooked())
    with pytest.raises(TargetMismatchError, match="not a site of this model"):
        tlpd.check_target(hooked(normalization_type="LNPre"), made)


def test_user_hooks_are_seen_and_see():
    """An edit before a bridge's norm counts, and its hook_out shows the moved value."""
    model = bridge(gpt2())
    made = made_of(model)
    seen = {}

    def shift(x, hook):
        return x * 1.7 + 0.3

    def keep(x, hook):
        seen[len(seen)] = x.clone()

    hooks = [("blocks.0.ln1.hook_in", shift), ("blocks.0.ln1.hook_out", keep)]
    results = []
    for in_weights in (False, True):
        with torch.no_grad(), perturbed(model, made, {0: 2.0}, sites="*ln*", in_weights=in_weights):
            results.append(model.run_with_hooks(tokens(), fwd_hooks=hooks))
    assert (results[0] - results[1]).abs().max() < 1e-10 and (seen[0] - seen[1]).abs().max() < 1e-10
    with torch.no_grad():
        assert (model.run_with_hooks(tokens(), fwd_hooks=hooks) - results[0]).abs().max() > 1e-3


def test_a_norm_that_is_not_reached_is_no_silence():
    class Beside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)

        def forward(self, x):
            return self.out(torch.nn.functional.layer_norm(x, (6,), self.norm.weight, self.norm.bias))

    model, rows = Beside(), torch.randn(4, 6)
    made = tlpd.decompose(model, "*", tlpd.L3D(divergence="mse", gains=True), rows, 0, progress=False)
    with pytest.raises(SiteNotFiredError, match=r"norm\.weight"), perturbed(model, made, {0: 1.0}):
        model(rows)
