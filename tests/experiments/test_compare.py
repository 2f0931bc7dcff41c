"""`compare`: its figures are those of `decompose` and `evaluate`, and what is there is not done again."""

import dataclasses

import pytest
import torch

import tl_paramdecomp as tlpd
from tests.support.models import gpt2
from tl_paramdecomp.errors import DataError, DecompositionFileError, SettingError
from tl_paramdecomp.experiments import compare as room
from tl_paramdecomp.methods.losses import ImportanceMinimality

SITES = ("blocks.0.mlp.*",)
PROTOCOL = tlpd.ComparisonProtocol(
    SITES, steps=3, batch_size=2, seeds=(0, 1), sparsities=(1.0, 50.0), oracle_shares=(0.5, 0.1), capacities=(1.0, 2.0),
    evaluation=tlpd.EvaluationConfig(ladder=(2,), restarts=2, samples=2, ablated=0, by_site=False),
)  # fmt: skip
METHODS = {
    "SPD, few": tlpd.SPD(n_components=12, start="random", warm_up_steps=2),
    "SVD": tlpd.SVD(),
    "SVD, oracle": tlpd.SVD(training=None),
}


def tokens(rows=8, seed=1):
    return torch.randint(0, 61, (rows, 6), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return gpt2()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def found(model, folder):
    return tlpd.compare(model, METHODS, PROTOCOL, tokens(), tokens(4, 2), run_dir=folder, progress=False)


def again(model, folder, methods=METHODS, protocol=PROTOCOL, data=None, held_out=None):
    data, held_out = tokens() if data is None else data, tokens(4, 2) if held_out is None else held_out
    return tlpd.compare(model, methods, protocol, data, held_out, run_dir=folder, progress=False)


def test_every_method_sparsity_and_seed_is_there(found):
    trained = [(m, s, seed) for m in ("SPD, few", "SVD") for s in (1.0, 50.0) for seed in (0, 1)]
    assert [(p["method"], p["sparsity"], p["seed"]) for p in found.points] == [
        *trained, *(("SVD, oracle", s, seed) for s in (0.5, 0.1) for seed in (0, 1)),
    ]  # fmt: skip
    sides = [(s.d_in, s.d_out) for s in tlpd.find_sites(gpt2(), list(SITES)).values()]
    assert found.ranks == sum(map(min, sides)) and found.parameters == sum(a * b for a, b in sides)
    assert [p["l0"] for p in found.points[-4:]] == pytest.approx(
        [max(1, round(share * found.ranks)) for share in (0.5, 0.5, 0.1, 0.1)]
    )


def test_a_run_is_decompose_and_evaluate(model, found):
    method = METHODS["SPD, few"]
    losses = tuple(
        dataclasses.replace(loss, coefficient=50.0 * loss.coefficient)
        if isinstance(loss, ImportanceMinimality)
        else loss
        for loss in method.losses
    )
    made = tlpd.decompose(
        model, list(SITES), dataclasses.replace(method, losses=losses), tokens(), 3, 2, seed=1, progress=False
    )
    alone = tlpd.evaluate(model, made, tokens(4, 2), protocol=PROTOCOL.evaluation, progress=False)
    (row,) = [p for p in found.points if (p["method"], p["sparsity"], p["seed"]) == ("SPD, few", 50.0, 1)]
    for key in ("l0", "rounded", "adversarial"):
        assert row[key] == pytest.approx(alone.headline[key], rel=1e-6), key
    assert row["stochastic"] == pytest.approx(alone.mask_row("stochastic", "masked")["kl"], rel=1e-6)
    assert row["active_parameters"] == pytest.approx(alone.sites_frame()["active_parameters"].sum())


def test_seeds_and_their_starts_are_matched(found):
    rows = {(r["method"], r["sparsity"]): r for r in found.stability}
    assert set(rows) == {(method, s) for method in ("SPD, few", "SVD") for s in (1.0, 50.0)}
    frozen = rows["SVD", 1.0]  # the same components whatever the seed, but others of them active
    assert frozen["trained"] == pytest.approx(frozen["untrained"], abs=1e-6)
    spd = rows["SPD, few", 1.0]
    assert 0.0 < spd["untrained"]["rank_one"] < 0.9
    assert spd["untrained"]["components"] == spd["trained"]["components"] <= 24


def test_capacities_are_run_at_the_middle_sparsity(found):
    assert [(r["method"], r["capacity"], r["components"]) for r in found.splitting] == [
        ("SPD, few", 1.0, 24), ("SPD, few", 2.0, 48),
    ]  # fmt: skip
    assert found.splitting[0]["split"] is not None and found.splitting[1]["split"] is None


def test_what_is_there_is_not_done_again(model, folder, found, monkeypatch):
    assert tlpd.Comparison.load(folder / "comparison.json") == found

    def never(*args, **kwargs):
        assert kwargs.get("steps", args[4] if len(args) > 4 else 0) == 0, "a run was repeated"
        return tlpd.decompose(*args, **kwargs)

    monkeypatch.setattr(room, "decompose", never)
    monkeypatch.setattr(room, "evaluate", None)
    assert again(model, folder) == found


def test_a_run_that_is_lost_is_done_again_to_the_same_figures(model, folder, found):
    lost = folder / "SPD-few" / "sparsity-50-seed-1" / "point.json"
    lost.unlink()
    points, new = again(model, folder).points, lost.exists()
    for a, b in zip(points, found.points, strict=True):
        assert {k: v for k, v in a.items() if k != "measured_in"} == {k: v for k, v in b.items() if k != "measured_in"}
    assert new


def test_without_a_folder_nothing_is_written(model, tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    one = tlpd.compare(
        model, {"SVD": tlpd.SVD()}, dataclasses.replace(PROTOCOL, seeds=(0,)), tokens(), tokens(4, 2), progress=False
    )
    assert not list(tmp_path.iterdir()) and one.stability == []
    assert [p["rounded"] for p in one.points] == [
        p["rounded"] for p in found.points if p["method"] == "SVD" and p["seed"] == 0
    ]


def test_another_protocol_data_or_method_is_refused(model, folder, found):
    for changed, word in (
        ({"protocol": dataclasses.replace(PROTOCOL, steps=4)}, "steps"),
        ({"data": tokens(8, 5)}, "data"),
        ({"held_out": tokens(4, 5)}, "held_out"),
    ):
        with pytest.raises(SettingError, match=f"of other {word}"):
            again(model, folder, **changed)
    with pytest.raises(SettingError, match="another label"):
        again(model, folder, methods={"SVD": tlpd.SVD(training=tlpd.SPD(lr_importance=1e-3))})
    (folder / "SVD" / "sparsity-1-seed-0" / "point.json").rename(folder / "kept.json")
    with pytest.raises(SettingError, match="another label"):  # the decomposition alone is known as well
        again(model, folder, methods={"SVD": tlpd.SVD(training=tlpd.SPD(lr_importance=1e-3))})
    (folder / "kept.json").rename(folder / "SVD" / "sparsity-1-seed-0" / "point.json")


def test_another_model_is_refused(model, folder, found):
    with tlpd.shuffled_weights(model), pytest.raises(SettingError, match="of other target"):
        again(model, folder)


def test_a_damaged_run_is_named(model, tmp_path):
    one = dataclasses.replace(PROTOCOL, seeds=(0,), sparsities=(1.0,), capacities=())
    again(model, tmp_path, methods={"SVD": tlpd.SVD()}, protocol=one)
    path = tmp_path / "SVD" / "sparsity-1-seed-0" / "point.json"
    for text in (path.read_text()[:40], "[]"):
        path.write_text(text)
        with pytest.raises(DecompositionFileError, match="delete it"):
            again(model, tmp_path, methods={"SVD": tlpd.SVD()}, protocol=one)
    path.unlink()
    for part in (path.parent / "decomposition").iterdir():  # killed while it was saved: the checkpoint is there
        part.unlink()
    assert again(model, tmp_path, methods={"SVD": tlpd.SVD()}, protocol=one).points


def test_padding_of_held_out_rows_is_left_out(model):
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[2:] = 0
    one = dataclasses.replace(PROTOCOL, seeds=(0,), sparsities=(1.0,), capacities=())
    padded, alone = (
        tlpd.compare(
            model, {"SVD": tlpd.SVD()}, one, tokens(), rows, attention_mask=given, progress=False
        ).points[0]
        for rows, given in ((tokens(4, 2), mask), (tokens(4, 2)[:2], None))
    )  # fmt: skip
    for key in ("l0", "rounded", "adversarial", "active", "zero"):
        assert padded[key] == pytest.approx(alone[key], rel=1e-5), key


def test_one_capacity_is_compared_with_the_usual_one(model):
    wider = dataclasses.replace(PROTOCOL, seeds=(0,), sparsities=(3.0, 1.0, 2.0), capacities=(2.0,))
    few = {"SPD": METHODS["SPD, few"]}
    found = tlpd.compare(model, few, wider, tokens(), tokens(4, 2), progress=False)
    assert [row["capacity"] for row in found.splitting] == [1.0, 2.0]
    (middle,) = [p for p in found.points if p["sparsity"] == 2.0]
    assert found.splitting[0]["l0"] == middle["l0"]


def test_bad_settings_are_refused(model, tmp_path):
    for wrong in ({"sites": ()}, {"seeds": ()}, {"sparsities": (0.0,)}, {"steps": 0}, {"capacities": (-1.0,)},
                  {"seeds": (0, 0)}, {"sparsities": (1.0, 1.0)}):  # fmt: skip
        with pytest.raises(SettingError):
            dataclasses.replace(PROTOCOL, **wrong)
    assert dataclasses.replace(PROTOCOL, sites="blocks.0.mlp.*") == PROTOCOL
    with pytest.raises(SettingError, match="no method"):
        tlpd.compare(model, {}, PROTOCOL, tokens(), tokens(4), progress=False)
    with pytest.raises(SettingError, match="letter"):
        again(model, tmp_path, methods={"--": tlpd.SVD()})
    with pytest.raises(SettingError, match="Labels must differ"):
        again(model, tmp_path, methods={"SVD (a)": tlpd.SVD(), "svd a": tlpd.SVD()})
    with pytest.raises(SettingError, match="ImportanceMinimality"):
        again(model, tmp_path, methods={"SVD": tlpd.SVD(), "SPD": tlpd.SPD(losses=tlpd.SPD().losses[:2])})
    with pytest.raises(DataError, match="no held-out rows"):
        again(model, tmp_path, held_out=tokens(0))
    assert not list(tmp_path.iterdir())
    (tmp_path / "protocol.json").write_text("{")
    with pytest.raises(DecompositionFileError, match=r"protocol\.json"):
        again(model, tmp_path)


def test_sparser_and_wider_change_what_they_say(model):
    method = tlpd.SPD.targeted(n_components={"*.W_in": 10, "*": 4})
    pressed = method.sparser(3.0)
    for stream in ("losses", "background_losses"):
        (before,), (after,) = (
            [loss.coefficient for loss in getattr(m, stream) if isinstance(loss, ImportanceMinimality)]
            for m in (method, pressed)
        )
        assert after == pytest.approx(3.0 * before)
    sites = tlpd.find_sites(model, list(SITES))
    assert method.wider(2.5, sites).counts(sites) == {"blocks.0.mlp.W_in": 25, "blocks.0.mlp.W_out": 10}
    assert method.pressed(0.5).losses[-1].coefficient == 0.5
    assert tlpd.SVD().pressed(0.5).training == tlpd.SPD().pressed(0.5)
    with pytest.raises(SettingError, match="as many components"):
        tlpd.SVD().wider(2.0, sites)
    with pytest.raises(SettingError, match="nothing to train"):
        tlpd.SVD(training=None).sparser(2.0)
    with pytest.raises(SettingError, match="ImportanceMinimality"):
        tlpd.SPD(losses=tlpd.SPD().losses[:2]).sparser(2.0)
