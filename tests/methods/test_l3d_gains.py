"""L3D over normalisation gains, against per-sample gradients of the hosts' own parameters taken by autograd."""

import json

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import build, gpt2, hooked
from tests.support.norms import NORMED, normed
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.components.subnetworks import GainSubnetworks, Subnetworks
from tl_paramdecomp.errors import NoMatchingSiteError, ShapeError, UnsupportedSiteError
from tl_paramdecomp.methods.l3d import reconstruction, revive
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients, references
from tl_paramdecomp.settings import from_settings, to_settings


def tokens(rows=4, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(3)


def start(model, sites="blocks.0.mlp.W_in", **settings):
    """Subnetworks whose encoder is not the decoder."""
    made = tlpd.decompose(model, sites, tlpd.L3D(**settings), tokens(), steps=0, progress=False)
    with torch.no_grad():
        for i, parameter in enumerate(made.encoder.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


def last(made, model, rows=None):
    run = GradientPass(adapt(model), list(made.decoder), tokens() if rows is None else rows)
    return list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))


def dense(host, made, places, against):
    """[sample, entry]: gradients of each row's KL(reference || output), norms' gains first, then their biases."""
    adapter, gains, biases = adapt(host.model), host.gains, host.biases
    parameters = [gains[n] for n in made.norms] + [biases[n] for n in made.norms if n in biases]
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = []
    with torch.enable_grad():
        for row, place, q in zip(tokens(), places, against, strict=True):
            log_p = adapter.forward(row.unsqueeze(0))[0, place].log_softmax(-1)
            kl = (q * (q.clamp(min=1e-300).log() - log_p)).sum()
            found.append(torch.cat(torch.autograd.grad(kl, parameters)))
    for parameter in parameters:
        parameter.requires_grad_(False)
    return torch.stack(found)


def dictionary(side, norms):
    return torch.cat(
        [side[n].gain for n in norms] + [side[n].bias for n in norms if side[n].bias is not None], 1
    )  # fmt: skip


@pytest.mark.parametrize("name", NORMED)
def test_gains_are_what_dense_gradients_give(name):
    """Every norm of every host: inner products, norms, Gram matrix to 1e-10 in float64; HookedTransformer calls ln1 thrice."""
    host = normed(name)
    made = start(host.model, n_subnetworks=5, gains=True)
    assert set(made.norms) == set(host.gains)
    assert {n for n in made.norms if made.decoder[n].bias is not None} == set(host.biases)
    run = GradientPass(adapt(host.model), list(made.decoder), tokens())
    (places,) = run.places("one", generator())
    (group,) = all_gradients(run, [places], "sample", "kl", generator())
    against = references(run.at(places), "sample", "kl", generator())
    flat = dense(host, made, places.tolist(), against)
    scale = flat.norm(dim=1)
    assert scale.min() > 1e-4
    for side in (made.encoder, made.decoder):
        ours = Subnetworks({n: side[n] for n in made.norms})
        E = dictionary(side, made.norms)
        assert ((ours.inner(group) - flat @ E.T).abs() / scale[:, None]).max() < 1e-10
        assert (ours.squared_norm(group).sqrt() / scale - 1).abs().max() < 1e-10
        assert (ours.gram() - E @ E.T).abs().max() < 1e-12 and (ours.norms() - E.norm(dim=1)).abs().max() < 1e-12
        site = Subnetworks({n: side[n] for n in made.sites})
        assert (side.inner(group) - ours.inner(group) - site.inner(group)).abs().max() < 1e-12
        assert (side.gram() - ours.gram() - site.gram()).abs().max() < 1e-12


def test_the_loss_and_its_gradients_are_those_of_dense_subnetworks():
    host = normed("gpt2")
    made = start(host.model, "blocks.0.mlp.W_in", n_subnetworks=5, biases=True, gains="*ln*").requires_grad_(True)
    run = GradientPass(adapt(host.model), list(made.decoder), tokens())
    groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
    found = reconstruction(made, groups, 0.4)
    found.loss.backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    site = "blocks.0.mlp.W_in"

    def whole(side):
        matrices = [(side[site].A[k] @ side[site].B[k].T).flatten() for k in range(5)]
        return torch.cat([torch.stack(matrices), side[site].bias, dictionary(side, made.norms)], 1)

    places = torch.full((4,), 4)
    flat = dense(host, made, places.tolist(), references(run.at(places), "mean", "kl", generator()))
    at = groups[0][site]
    flat = torch.cat([(at.x.transpose(1, 2) @ at.g).flatten(1), at.g.sum(1), flat], 1)
    a = flat @ whole(made.encoder).T
    kept = a.abs() >= a.abs().flatten().sort(descending=True).values[round(0.4 * a.numel()) - 1]
    loss = ((flat - (a * kept) @ whole(made.decoder)) ** 2).sum() / (flat**2).sum()
    loss.backward()
    assert abs(found.loss.item() - loss.item()) < 1e-10
    for name, parameter in made.named_parameters():
        assert (ours[name] - parameter.grad).abs().max() < 1e-10 * max(1.0, parameter.grad.abs().max()), name
        assert parameter.grad.abs().max() > 0


def test_hosts_of_one_model_give_the_same_numbers():
    found = {}
    for name in ("gpt2", "gpt2-bridge", "gpt2-nnsight"):
        host = normed(name)
        made = tlpd.decompose(
            host.model, "blocks.0.mlp.*", tlpd.L3D(n_subnetworks=4, gains=True), tokens(16), 6, 4, progress=False
        )
        found[name] = made.decoder.state_dict()
    for name in ("gpt2-bridge", "gpt2-nnsight"):
        for key, tensor in found["gpt2"].items():
            assert (tensor - found[name][key]).abs().max() < 1e-9, (name, key)


def test_padding_and_pairs_reach_gains():
    model = gpt2()
    made = start(model, n_subnetworks=3, gains=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    groups = []
    for rows in (tokens(), torch.where(mask == 1, tokens(), 3)):
        run = GradientPass(adapt(model), list(made.decoder), rows, mask)
        groups.append(list(all_gradients(run, run.places("all", generator()), "sample", "kl", generator())))
    for a, b in zip(*groups, strict=True):  # what padding says does not matter
        assert torch.allclose(a["ln_final.w"].gain, b["ln_final.w"].gain, atol=1e-12)
    assert [len(g["ln_final.w"].gain) for g in groups[0]] == mask.sum(0).tolist()
    run = GradientPass(adapt(model), list(made.decoder), tokens())
    (pairs,) = all_gradients(run, run.places("last", generator()), "pairs", "kl", generator())
    assert len(pairs["ln_final.w"].gain) == len(pairs["ln_final.w"].bias) == 2
    assert made.encoder.inner(pairs).shape == (2, 3)


def test_gains_take_part_in_norms_and_begin_anew():
    model = gpt2()
    made = start(model, n_subnetworks=6, gains=["blocks.1.*", "ln_final.w"])
    assert list(made.norms) == ["blocks.1.ln1.w", "blocks.1.ln2.w", "ln_final.w"]
    made.encoder.normalise()
    E = dictionary(made.encoder, made.norms)
    site = made.encoder["blocks.0.mlp.W_in"]
    total = torch.stack([site.matrix(k).square().sum() for k in range(6)]) + site.bias.square().sum(1)
    assert (E.square().sum(1) + total - 1).abs().max() < 1e-9
    for _ in range(40):
        made.encoder.normalise("paper_code")
    parts = [made.encoder[n] for n in made.norms]
    sizes = sum(p.gain.norm(dim=1) + p.bias.norm(dim=1) for p in parts)
    sizes = sizes + torch.stack([site.matrix(k).norm() for k in range(6)]) + site.bias.norm(dim=1)
    assert (sizes - 1).abs().max() < 1e-6
    groups = last(made, model)
    before = reconstruction(made, groups, 0.5)
    dead = torch.tensor([False, True, False, False, True, False])
    revive(made, before, dead, generator())
    anew, own = made.decoder["ln_final.w"], groups[0]["ln_final.w"]
    for k in (1, 4):
        cosines = torch.nn.functional.cosine_similarity(anew.gain[k][None], own.gain, dim=1)
        with_bias = torch.nn.functional.cosine_similarity(anew.bias[k][None], own.bias, dim=1)
        assert cosines.max() > 1 - 1e-9 and cosines.argmax() == with_bias.argmax()
        assert torch.equal(made.encoder["ln_final.w"].gain[k], anew.gain[k])
    assert reconstruction(made, groups, 0.5).loss < before.loss


@pytest.mark.parametrize("biases", [True, False])
def test_it_is_saved_and_loaded(tmp_path, biases):
    model = gpt2()
    method = tlpd.L3D(n_subnetworks=3, gains=["blocks.0.ln1.w", "ln_final*"], biases=biases)
    made = tlpd.decompose(model, "blocks.0.mlp.*", method, tokens(16), 4, 4, progress=False, run_dir=tmp_path)
    loaded = tlpd.SubnetworkDecomposition.load(tmp_path / "decomposition")
    assert list(loaded.norms) == ["blocks.0.ln1.w", "ln_final.w"] == list(made.norms)
    assert (
        loaded.norms == made.norms
        and list(loaded.decoder) == list(made.decoder)
        and loaded.fingerprints == made.fingerprints
    )
    assert {n for n in loaded.decoder if loaded.decoder[n].bias is not None} == (set(made.decoder) if biases else set())
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = from_settings(json.loads(json.dumps(to_settings(method))))
    assert list(again.gains) == list(method.gains)
    one = loaded.subnetwork(1)["ln_final.w"]
    assert torch.equal(one.gain, made.decoder["ln_final.w"].gain[1]) and (one.bias is None) != biases


def test_the_default_is_as_before(tmp_path):
    """Nothing of it is drawn, stored or mentioned; files without it load."""
    model = gpt2()
    plain = tlpd.decompose(model, "blocks.0.*", tlpd.L3D(n_subnetworks=3), tokens(16), 3, 4, progress=False)
    both = tlpd.decompose(model, "blocks.0.*", tlpd.L3D(n_subnetworks=3, gains=True), tokens(), 0, progress=False)
    fresh = tlpd.decompose(model, "blocks.0.*", tlpd.L3D(n_subnetworks=3), tokens(), 0, progress=False)
    ratio = both.decoder["blocks.0.mlp.W_in"].A / fresh.decoder["blocks.0.mlp.W_in"].A
    assert (ratio / ratio.mean((1, 2), keepdim=True) - 1).abs().max() < 1e-9  # the same draw, of another length
    assert "gains" not in to_settings(tlpd.L3D()) and to_settings(tlpd.L3D(gains=True))["gains"] is True
    assert tlpd.L3D().gains is False and not plain.norms
    plain.save(tmp_path)
    text = (tmp_path / "decomposition.json").read_text()
    assert '"norms"' not in text and '"gains"' not in text
    assert list(tlpd.SubnetworkDecomposition.load(tmp_path).decoder) == list(plain.sites)


def test_training_moves_gains_and_leaves_the_model():
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    made = tlpd.decompose(
        model, "blocks.0.mlp.W_out", tlpd.L3D(n_subnetworks=20, lr=2e-2, gains=True), tokens(32), 50, 8, progress=False,
        log_every=1, callbacks=[lambda info: losses.append(info.figures["reconstruction"])],
    )  # fmt: skip
    assert sum(losses[-10:]) < 0.8 * sum(losses[6:16])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert (made.decoder.norms() - 1).abs().max() < 1e-6


def test_what_matches_no_norm_is_refused_by_name():
    for gains, words in (("blocks.*.ln3.w", "Nearest names: blocks"), ([], "empty list"), ("*.W_in", "matches none")):
        with pytest.raises(NoMatchingSiteError, match=words):
            start(gpt2(), gains=gains)
    with pytest.raises(NoMatchingSiteError, match="LayerNorm folded into the weights"):
        start(hooked(normalization_type="LNPre"), gains=True)
    batch = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6)).double().eval()
    method = tlpd.L3D(divergence="mse", gains="1.*")
    with pytest.raises(UnsupportedSiteError, match="BatchNorm1d keeps statistics"):
        tlpd.decompose(batch, "*", method, torch.randn(4, 6).double(), 0, progress=False)
    model = gpt2()
    with pytest.raises(ShapeError, match="gain of ln_final.w must be"):
        GainSubnetworks(adapt(model).norms.sites["ln_final.w"], torch.zeros(3, 5))


def test_a_norm_whose_rows_are_mixed_is_refused():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(8, 6))
            self.norm, self.out = torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)

        def forward(self, x):
            return self.out(x @ self.norm(self.table).T @ self.table)

    method = tlpd.L3D(divergence="mse", gains=True)
    with pytest.raises(UnsupportedSiteError, match="not known which belong"):
        tlpd.decompose(Table(), "*", method, torch.randn(4, 6), 1, 4, progress=False)


def test_a_narrow_model_has_wide_gains():
    model = gpt2().to(torch.bfloat16)
    made = tlpd.decompose(
        model, "blocks.0.mlp.*", tlpd.L3D(n_subnetworks=3, gains=True), tokens(), 1, 4, progress=False
    )
    (group,) = last(made, model)
    wide = gpt2()
    (near,) = last(start(wide, "blocks.0.mlp.*", n_subnetworks=3, gains=True), wide)
    assert {p.dtype for p in made.parameters()} == {torch.float32} == {group["ln_final.w"].gain.dtype}
    a, b = group["blocks.1.ln2.w"].gain.double(), near["blocks.1.ln2.w"].gain
    assert (a - b).norm() < 0.1 * b.norm()


def test_it_runs_on_every_builder():
    for host in ("bridge-llama", "nnsight-llama"):
        made = start(build(host), n_subnetworks=3, gains="blocks.1.ln*")
        assert list(made.norms) == ["blocks.1.ln1.w", "blocks.1.ln2.w"]
