"""The digits: their split, their training, and what is said where scikit-learn is missing."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tl_paramdecomp as tlpd
from tl_paramdecomp.errors import MissingExtraError, SettingError
from tl_paramdecomp.toy_models import Digits, DigitsConfig, load_digits, load_target, save_target, train_digits
from tl_paramdecomp.toy_models.targets import Trained, fresh

SMALL = DigitsConfig((3, 4), steps=5, batch_size=16)


def test_no_image_is_both_trained_on_and_held_out() -> None:
    (train, labels), (held_out, others) = load_digits("train", 500), load_digits("held_out", 500)
    assert train.shape == (1297, 1, 8, 8) and held_out.shape == (500, 1, 8, 8)
    assert train.min() == 0.0 and train.max() == 1.0
    assert set(labels.tolist()) == set(others.tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in held_out)
    data = SMALL.data(64, 3)
    assert torch.equal(data(7), data(7)) and not torch.equal(data(7), data(8))
    assert all(image.numpy().tobytes() in seen for image in data(7))
    drawn = data.drawn(7)
    assert torch.equal(data(7), train[drawn]) and torch.equal(data.labels(7), labels[drawn])
    for wrong in (0, 1797):
        with pytest.raises(SettingError, match="1797 digits"):
            load_digits("train", wrong)


def test_the_network_by_hand() -> None:
    model, images = fresh(Digits, SMALL), load_digits("held_out", 500)[0][:3]
    x = F.max_pool2d(F.conv2d(images, model.conv1.weight, model.conv1.bias, padding=1).clamp(min=0), 2)
    x = F.max_pool2d(F.conv2d(x, model.conv2.weight, model.conv2.bias, padding=1).clamp(min=0), 2)
    assert torch.allclose(model(images), x.flatten(1) @ model.linear.weight.T + model.linear.bias, atol=1e-6)
    widths = {name: (site.d_in, site.d_out) for name, site in tlpd.find_sites(model).items()}
    assert widths == {"conv1.weight": (9, 3), "conv2.weight": (27, 4), "linear.weight": (16, 10)}


def test_training_depends_on_the_seed_alone_and_is_kept(tmp_path) -> None:
    state = torch.get_rng_state()
    first = train_digits(SMALL, 1)
    assert torch.equal(state, torch.get_rng_state())
    again, other = train_digits(SMALL, 1), train_digits(SMALL, 2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    assert not first.is_sound()
    save_target(Trained(first, 1, 1), tmp_path)
    loaded = load_target(Digits(SMALL), tmp_path)
    assert loaded is not None and torch.equal(loaded.model.conv2.weight, first.conv2.weight)
    assert load_target(Digits(replace(SMALL, channels=(4, 4))), tmp_path) is None


def test_without_scikit_learn_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    load_digits.cache_clear()
    with pytest.raises(MissingExtraError, match=r"tl-paramdecomp\[toys\]"):
        train_digits(SMALL)
    assert Digits(SMALL)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_to_read(seed: int) -> None:
    model = train_digits(DigitsConfig(), seed)
    assert model.is_sound()
    print(model.strengths())
