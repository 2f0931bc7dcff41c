"""L3D's factored form against per-sample gradients taken by autograd and dense subnetworks, written plainly here."""

import pytest
import torch
from jaxtyping import TypeCheckError

import tl_paramdecomp as tlpd
from tests.support.models import gpt2, llama, plain
from tl_paramdecomp.adapters import adapt
from tl_paramdecomp.adapters.swapping import swapped_parameter
from tl_paramdecomp.adapters.wiring import find_module, read_parameter
from tl_paramdecomp.components.subnetworks import SampleGradient
from tl_paramdecomp.errors import (
    ComponentIndexError,
    DataError,
    DecompositionFileError,
    NoMatchingSiteError,
    SettingError,
    UnsupportedSiteError,
)
from tl_paramdecomp.methods.l3d import low_rank, reconstruction, revive
from tl_paramdecomp.methods.sample_gradients import GradientPass, all_gradients, output_gradient, references

MODELS = {"gpt2": gpt2, "llama": lambda: llama(torch.float64)}
SITES = {"gpt2": "*", "llama": "*"}


def tokens(rows=4, length=5, seed=1):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(3)


def start(model, sites="*", **settings):
    """Subnetworks whose encoder is not the decoder."""
    made = tlpd.decompose(model, sites, tlpd.L3D(**settings), tokens(), steps=0, progress=False)
    with torch.no_grad():
        for i, parameter in enumerate(made.encoder.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


def dense_gradients(model, sites, rows, places, against):
    """Gradients of each row's KL(reference || output) with respect to W and b of each site, by autograd.

    One site at a time, its parameter swapped for a copy, so that a tied neighbour keeps its own.
    """
    adapter, found = adapt(model), []
    for row, place, q in zip(rows, places, against, strict=True):
        of_weight, of_bias = {}, {}
        for name in sites:
            wiring = adapter.wirings[name]
            with torch.enable_grad(), adapter.replaced_weights({name: adapter.weight(name).detach()}):
                parameter = read_parameter(adapter.root, wiring).requires_grad_(True)
                log_p = adapter.forward(row.unsqueeze(0))[0, place].log_softmax(-1)
                kl = (q * (q.clamp(min=1e-300).log() - log_p)).sum()
                (gradient,) = torch.autograd.grad(kl, parameter, retain_graph=True)
                with swapped_parameter(find_module(adapter.root, wiring.owner), wiring.weight, gradient):
                    of_weight[name] = adapter.weight(name).detach().clone()  # in the site's own layout
                bias = adapter.bias(name)
                if bias is not None:
                    base = bias if bias._base is None else bias._base
                    (whole,) = torch.autograd.grad(kl, base)
                    of_bias[name] = whole if bias._base is None else _like(bias, base, whole)
        found.append((of_weight, of_bias))
    return found


def _like(view, base, whole):
    """The part of a gradient of the base that belongs to a view of it."""
    return whole.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())


@pytest.mark.parametrize("backend", ["factored", "dense"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("family", MODELS)
def test_everything_is_what_dense_gradients_give(family, rank, backend):
    """Coefficients, norms, loss and its gradients, to 1e-10 in float64; embeddings, fused and tied weights, biases included."""
    model = MODELS[family]()
    model.requires_grad_(True)
    made = start(model, SITES[family], n_subnetworks=5, rank=rank, warm_start=0.0)
    made.requires_grad_(True)
    sites, rows = list(made.sites), tokens()
    run = GradientPass(adapt(model), sites, rows)
    (places,) = run.places("one", generator())
    draw = generator()
    groups = list(all_gradients(run, [places], "sample", "kl", draw))
    found = reconstruction(made, groups, 0.4, backend)
    found.loss.backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters()}

    against = references(run.at(places), "sample", "kl", generator())
    gradients = dense_gradients(model, sites, rows, places.tolist(), against)
    made.zero_grad()
    flat = torch.stack([
        torch.cat([w[name].flatten() for name in sites] + [b[name].flatten() for name in sites if name in b])
        for w, b in gradients
    ])  # fmt: skip

    def dictionary(side):
        return torch.stack([
            torch.cat([(side[name].A[k] @ side[name].B[k].T).flatten() for name in sites]
                      + [side[name].bias[k] for name in sites if side[name].bias is not None])
            for k in range(5)
        ])  # fmt: skip

    E, D = dictionary(made.encoder), dictionary(made.decoder)
    a = flat @ E.T
    kept = a.abs() >= a.abs().flatten().sort(descending=True).values[round(0.4 * a.numel()) - 1]
    loss = ((flat - (a * kept) @ D) ** 2).sum() / (flat**2).sum()
    loss.backward()
    scale = flat.norm(dim=1)
    assert ((found.coefficients - a).abs() / scale[:, None]).max() < 1e-10
    assert (found.squared_norms.sqrt() / scale - 1).abs().max() < 1e-10
    assert torch.equal(found.mask, kept) and abs(found.loss.item() - loss.item()) < 1e-10
    biggest = max(p.grad.abs().max() for p in made.parameters())
    for name, parameter in made.named_parameters():
        assert (ours[name] - parameter.grad).abs().max() < 1e-10 * biggest, name


def test_the_gradient_of_each_divergence_is_autograds():
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(torch.randn(3, 7, dtype=torch.float64), -1)
    kl = (q * (q.log() - z.log_softmax(-1))).sum()
    mse = ((z - q) ** 2).mean(-1).sum()
    code = (z * (z - q)).mean(-1).sum()
    for kind, value in (("kl", kl), ("mse", mse), ("paper_code", code)):
        expected = torch.autograd.grad(value, z)[0]
        assert torch.allclose(output_gradient(z.detach(), q, kind), expected, atol=1e-12), kind


def test_references():
    z = torch.randn(6, 7, dtype=torch.float64)
    p = z.softmax(-1)
    for seed in range(20):
        drawn = references(z, "sample", "mse", torch.Generator().manual_seed(seed))
        assert not (drawn == z).all(1).any() and all((row == z).all(1).any() for row in drawn)
    assert torch.allclose(references(z, "mean", "kl", generator()), p.mean(0).expand(6, 7))
    assert (references(z, "uniform", "kl", generator()) == 1 / 7).all()
    pairs = references(z, "pairs", "kl", generator())
    assert torch.equal(pairs[::2], p[1::2]) and torch.equal(pairs[1::2], p[::2])
    itself = [references(z, "paper_code", "mse", torch.Generator().manual_seed(s)) for s in range(20)]
    assert any((drawn == z).all(1).any() for drawn in itself)
    with pytest.raises(SettingError, match="uniform"):
        references(z, "uniform", "mse", generator())
    with pytest.raises(DataError, match="given 1 row"):
        references(z[:1], "sample", "kl", generator())
    with pytest.raises(DataError, match="two by two"):
        references(z[:3], "pairs", "kl", generator())


def test_a_reference_that_is_the_sample_gives_no_gradient():
    model = gpt2()
    rows = tokens(1).expand(2, -1)
    run = GradientPass(adapt(model), ["blocks.0.mlp.W_in"], rows)
    (group,) = all_gradients(run, run.places("last", generator()), "sample", "kl", generator())
    assert group["blocks.0.mlp.W_in"].g.abs().max() < 1e-15


def test_positions():
    model = gpt2()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    run = GradientPass(adapt(model), ["blocks.0.mlp.W_in"], tokens(), mask)
    assert run.places("last", generator())[0].tolist() == [2, 4, 4, 0]
    drawn = torch.stack([run.places("one", torch.Generator().manual_seed(s))[0] for s in range(60)])
    assert mask.bool().gather(1, drawn.T).all() and {tuple(set(d.tolist())) for d in drawn.T} >= {(0,), (0, 1, 2)}
    with pytest.raises(SettingError, match="rows of 5"):
        run.places(5, generator())
    with pytest.raises(DataError, match="Position -1 is padding"):
        run.places(-1, generator())
    every = run.places("all", generator())
    assert [(p >= 0).tolist() for p in every] == mask.bool().T.tolist()
    groups = list(all_gradients(run, every, "sample", "kl", generator()))
    assert [len(g["blocks.0.mlp.W_in"].g) for g in groups] == mask.sum(0).tolist()
    changed = GradientPass(adapt(model), ["blocks.0.mlp.W_in"], torch.where(mask == 1, tokens(), 3), mask)
    others = list(all_gradients(changed, changed.places("all", generator()), "sample", "kl", generator()))
    for a, b in zip(groups, others, strict=True):  # what padding says does not matter
        assert torch.allclose(a["blocks.0.mlp.W_in"].g, b["blocks.0.mlp.W_in"].g, atol=1e-12)
    full = GradientPass(adapt(model), ["blocks.0.mlp.W_in"], tokens())
    assert [p.tolist() for p in full.places(-1, generator())] == [[4] * 4]
    groups = list(all_gradients(full, full.places("all", generator()), "mean", "kl", generator()))
    assert len(groups) == 5
    # what comes after the position of the loss cannot matter to it
    assert (
        groups[1]["blocks.0.mlp.W_in"].g[:, 2:].abs().max() == 0.0 < groups[1]["blocks.0.mlp.W_in"].g[:, 1].abs().min()
    )


def test_a_complete_dictionary_reconstructs_exactly():
    """One subnetwork for each entry of a matrix, all of them kept."""
    model = plain()
    name = next(n for n, s in tlpd.find_sites(model).items() if s.kind == "linear")
    site = tlpd.find_sites(model)[name]
    K = site.d_in * site.d_out
    made = tlpd.decompose(
        model, name, tlpd.L3D(n_subnetworks=K, biases=False, divergence="mse"), torch.randn(4, 5), 0, progress=False
    )
    A = torch.eye(site.d_in).repeat_interleave(site.d_out, 0).unsqueeze(-1)
    B = torch.eye(site.d_out).repeat(site.d_in, 1).unsqueeze(-1)
    for side in (made.encoder, made.decoder):
        with torch.no_grad():
            side[name].A.copy_(A)
            side[name].B.copy_(B)
    gradient = SampleGradient(*(torch.randn(6, 3, d, dtype=torch.float64) for d in (site.d_in, site.d_out)))
    found = reconstruction(made, [{name: gradient}], 1.0)
    assert abs(found.loss.item()) < 1e-12 and found.residuals.abs().max() < 1e-11 * found.squared_norms.max()


@pytest.mark.parametrize("kind", ["l2", "paper_code"])
def test_norms(kind):
    made = start(gpt2(), "blocks.0.*", n_subnetworks=4, rank=2)
    before = {name: made.encoder[name].matrix(1).detach() for name in made.sites}
    for _ in range(40 if kind == "paper_code" else 1):
        made.encoder.normalise(kind)
    tensors = [
        [made.encoder[n].matrix(k) for n in made.sites] + [made.encoder[n].bias[k] for n in made.sites]
        for k in range(4)
    ]
    norms = torch.tensor([[t.norm() for t in row] for row in tensors])
    size = norms.square().sum(1).sqrt() if kind == "l2" else norms.sum(1)
    assert (size - 1.0).abs().max() < 1e-6
    for name, matrix in before.items():  # only the length changes
        now = made.encoder[name].matrix(1)
        assert torch.nn.functional.cosine_similarity(matrix.flatten(), now.flatten(), dim=0) > 1 - 1e-9


def test_sign_of_a_subnetwork_does_not_matter():
    model = gpt2()
    made = start(model, "blocks.*.mlp.*", n_subnetworks=6)
    run = GradientPass(adapt(model), list(made.sites), tokens())
    groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
    before = reconstruction(made, groups, 0.3)
    with torch.no_grad():
        for side in (made.encoder, made.decoder):
            for part in side.values():
                part.A[2].neg_()
                part.bias[2].neg_()
    after = reconstruction(made, groups, 0.3)
    assert torch.equal(before.mask, after.mask) and abs(before.loss.item() - after.loss.item()) < 1e-12


def test_the_learned_threshold_is_that_of_training():
    """With one batch again and again it is the batch's own, once the warm start is over."""
    model = gpt2()
    method = tlpd.L3D(n_subnetworks=8, lr=1e-12, positions="last", reference="mean", warm_start=0.0)
    made = tlpd.decompose(model, "blocks.0.mlp.*", method, tokens(), 3, 4, progress=False)
    run = GradientPass(adapt(model), list(made.sites), tokens())
    groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
    by_batch, fixed = reconstruction(made, groups, 0.1), reconstruction(made, groups, None)
    assert made.threshold.item() == pytest.approx(by_batch.threshold.item(), rel=1e-6)
    assert by_batch.mask.sum() == 3  # a tenth of 4 x 8
    assert abs(int(fixed.mask.sum()) - 3) <= 1


def test_the_learned_threshold_follows_the_batches():
    """An average that forgets: the first step's threshold as it is, each later one by a share of 1 - memory."""
    model, seen = gpt2(), []
    method = tlpd.L3D(
        n_subnetworks=8, lr=1e-12, positions="last", reference="mean", warm_start=0.5, threshold_memory=0.7
    )
    rows = [tokens(seed=seed) for seed in range(6)]
    made = tlpd.decompose(model, "blocks.0.mlp.*", method, rows, 6, 4, progress=False)
    for batch in rows[3:]:  # the warm start keeps all, and says nothing of thresholds
        run = GradientPass(adapt(model), list(made.sites), batch)
        groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
        seen.append(reconstruction(made, groups, 0.1).threshold.item())
    expected = 0.7 * (0.7 * seen[0] + 0.3 * seen[1]) + 0.3 * seen[2]
    assert len(set(seen)) == 3 and made.threshold.item() == pytest.approx(expected, rel=1e-6)


def test_low_rank_is_the_truncated_svd():
    x, g = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    A, B = low_rank(x, g, 2)
    u, s, v = torch.linalg.svd(x.T @ g)
    assert torch.allclose(A @ B.T, u[:, :2] @ s[:2].diag() @ v[:2], atol=1e-10)
    A, B = low_rank(x, g, 8)
    assert torch.allclose(A @ B.T, x.T @ g, atol=1e-10) and A.shape == (9, 8)


def test_dead_subnetworks_begin_anew():
    model = gpt2()
    made = start(model, "blocks.*.mlp.*", n_subnetworks=6, rank=2)
    run = GradientPass(adapt(model), list(made.sites), tokens())
    groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
    before = reconstruction(made, groups, 0.5)
    old = {name: part.A.detach().clone() for name, part in made.decoder.items()}
    dead = torch.tensor([False, True, False, False, True, False])
    revive(made, before, dead, generator())
    for name, part in made.decoder.items():
        assert torch.equal(part.A[~dead], old[name][~dead]) and not torch.equal(part.A[dead], old[name][dead])
    assert (made.decoder.norms()[dead] - 1).abs().max() < 1e-9
    assert reconstruction(made, groups, 0.5).loss < before.loss
    few = {"n_subnetworks": 60, "warm_start": 0.0, "lr": 1e-9, "active": 0.02}
    kept, revived = (
        tlpd.decompose(
            model, "blocks.0.mlp.*", tlpd.L3D(revive_every=every, **few), tokens(16), 6, 4, seed=3, progress=False
        )
        for every in (0, 5)
    )
    (a, b) = (made.decoder["blocks.0.mlp.W_in"].A for made in (kept, revived))
    moved = (a - b).abs().amax((1, 2)) > 1e-3
    assert 0 < int(moved.sum()) < 60  # those that were used stay


def test_training_lowers_the_loss_and_leaves_the_model(tmp_path):
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    made = tlpd.decompose(
        model, "blocks.*.mlp.*", tlpd.L3D(n_subnetworks=20, lr=2e-2), tokens(32), 60, 8, progress=False, log_every=1,
        callbacks=[lambda info: losses.append(info.figures["reconstruction"])], run_dir=tmp_path,
    )  # fmt: skip
    assert sum(losses[-10:]) < 0.8 * sum(losses[6:16]) and losses[0] > 0.8
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert (made.decoder.norms() - 1).abs().max() < 1e-6 and made.threshold > 0


def test_it_is_saved_loaded_and_resumed(tmp_path):
    model = gpt2()
    method = tlpd.L3D(n_subnetworks=6, rank=2, revive_every=2)

    def stop(info):
        if info.step == 3 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt

    settings = {"batch_size": 4, "progress": False, "log_every": 1}
    whole = tlpd.decompose(model, "blocks.0.*", method, tokens(16), 6, run_dir=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tlpd.decompose(
            model, "blocks.0.*", method, tokens(16), 6, run_dir=tmp_path / "cut", callbacks=[stop], **settings
        )
    cut = tlpd.decompose(model, "blocks.0.*", method, tokens(16), 6, run_dir=tmp_path / "cut", **settings)
    loaded = tlpd.SubnetworkDecomposition.load(tmp_path / "cut" / "decomposition")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]) and torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.info["run"]["method"]["type"] == "L3D" and loaded.fingerprints == whole.fingerprints
    with pytest.raises(DecompositionFileError, match=r"SubnetworkDecomposition\.load"):
        tlpd.Decomposition.load(tmp_path / "cut" / "decomposition")
    components = tlpd.decompose(model, "blocks.0.*", tlpd.SVD(training=None), progress=False).save(tmp_path / "svd")
    with pytest.raises(DecompositionFileError, match=r"Decomposition\.load"):
        tlpd.SubnetworkDecomposition.load(components)


def test_a_subnetwork_can_be_read():
    made = start(gpt2(), "blocks.0.mlp.*", n_subnetworks=3, rank=2)
    one = made.subnetwork(-1)
    part = made.decoder["blocks.0.mlp.W_in"]
    assert torch.equal(one["blocks.0.mlp.W_in"].weight, part.A[2] @ part.B[2].T)
    assert torch.equal(one["blocks.0.mlp.W_in"].bias, part.bias[2])
    with pytest.raises(ComponentIndexError, match="no subnetwork 3"):
        made.subnetwork(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrower_models_have_wide_subnetworks(dtype):
    """Gradients pass through the model in its own number type; everything else is float32, near to float64."""
    found = {}
    for kind in (dtype, torch.float64):
        model = gpt2().to(kind)
        made = tlpd.decompose(model, "*", tlpd.L3D(n_subnetworks=5), tokens(), 2, 4, progress=False, seed=1)
        assert {p.dtype for p in made.parameters()} == {torch.promote_types(kind, torch.float32)}
        run = GradientPass(adapt(model), list(made.sites), tokens())
        groups = list(all_gradients(run, run.places("last", generator()), "mean", "kl", generator()))
        found[kind] = torch.cat([made.decoder.squared_norm(group).double() for group in groups])
    assert (found[dtype] / found[torch.float64] - 1).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_an_exact_dictionary_in_float32_leaves_next_to_nothing():
    """Each subnetwork is one sample's own gradient."""
    samples = torch.randn(4, 3, 6), torch.randn(4, 3, 5)
    A, B = (torch.stack(f) for f in zip(*(low_rank(x, g, 3) for x, g in zip(*samples, strict=True)), strict=True))
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    method = tlpd.L3D(n_subnetworks=4, rank=3, divergence="mse")
    made = tlpd.decompose(model, "*", method, torch.randn(4, 6), 0, progress=False)
    with torch.no_grad():
        for side in (made.encoder, made.decoder):
            side["0.weight"].A.copy_(A)
            side["0.weight"].B.copy_(B)
    made.encoder.rescale(made.decoder.norms() ** -2)
    for n in range(4):
        own = SampleGradient(samples[0][n : n + 1], samples[1][n : n + 1])
        found = reconstruction(made, [{"0.weight": own}], 0.25)
        assert found.mask.tolist() == [[k == n for k in range(4)]] and abs(found.loss.item()) < 1e-5


def test_zero_coefficients_are_never_active():
    made = start(gpt2(), "blocks.0.mlp.*", n_subnetworks=5)
    nothing = {
        name: SampleGradient(*(torch.zeros(3, 2, d, dtype=torch.float64) for d in (site.d_in, site.d_out)))
        for name, site in made.sites.items()
    }
    assert not reconstruction(made, [nothing], 0.5).mask.any()


def test_a_site_that_is_called_twice_is_refused():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(torch.tanh(self.inner(x)))

    with pytest.raises(UnsupportedSiteError, match="more than once"):
        tlpd.decompose(Twice(), "*", tlpd.L3D(divergence="mse"), torch.randn(8, 4), 2, 4, progress=False)


def test_bad_settings_are_refused():
    for field in ("divergence", "reference", "norm", "backend", "positions"):  # past the type checker of the tests
        method = tlpd.L3D()
        object.__setattr__(method, field, "smaple")
        with pytest.raises(SettingError, match="smaple"):
            method.__post_init__()
    for wrong in (
        {"divergence": "KL"},
        {"reference": "smaple"},
        {"norm": "L2"},
        {"positions": "first"},
        {"rank": {"*": 0}},
    ):
        with pytest.raises((SettingError, TypeCheckError)):
            tlpd.L3D(**wrong)
    for wrong in (
        {"n_subnetworks": 0},
        {"rank": 0},
        {"active": 0.0},
        {"lr": 0.0},
        {"warm_start": 2.0},
        {"revive_every": -1},
    ):
        with pytest.raises(SettingError):
            tlpd.L3D(**wrong)
    sites = tlpd.find_sites(gpt2(), "blocks.0.mlp.*")
    assert tlpd.L3D(rank={"*.W_in": 2, "*": 99}).ranks(sites) == {"blocks.0.mlp.W_in": 2, "blocks.0.mlp.W_out": 24}
    with pytest.raises(NoMatchingSiteError, match="matches none"):
        tlpd.L3D(rank={"*.W_up": 2}).ranks(sites)
    with pytest.raises(NoMatchingSiteError, match="says nothing"):
        tlpd.L3D(rank={"*.W_in": 2}).ranks(sites)
