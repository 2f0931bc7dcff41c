"""A small convolutional network that reads handwritten digits: 8 x 8 images, ten classes.

    logits = W pool(ReLU(conv2(pool(ReLU(conv1(x)))))) + b

The images are scikit-learn's `load_digits` (1,797 of them, from the UCI repository), brought to [0, 1]. Which mechanisms such a
network has is not known; what is known of each image is its class.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_paramdecomp.errors import MissingExtraError, SettingError
from tl_paramdecomp.toy_models.targets import Progress, ToyTarget, drawn_at, quiet, trained

SPLIT_SEED = 0
"""Of the permutation that divides the images: every seed of a target is held to the same ones."""
CLASSES = 10


@dataclass(frozen=True)
class DigitsConfig:
    """Sizes of a target, and how it is trained."""

    channels: tuple[int, int] = (8, 16)
    """Of the two convolutions."""
    held_out: int = 500
    """Images that are never trained on."""
    steps: int = 1500
    batch_size: int = 128
    lr: float = 5e-3
    weight_decay: float = 0.01

    def data(self, batch_size: int, seed: int) -> "DigitImages":
        return DigitImages(self.held_out, batch_size, seed)


@dataclass(frozen=True)
class DigitImages:
    """Batches of images to train on, as a function of the step; drawn with replacement."""

    held_out: int
    batch_size: int
    seed: int = 0

    def __call__(self, step: int) -> Float[Tensor, "batch 1 8 8"]:
        return load_digits("train", self.held_out)[0][self.drawn(step)]

    def labels(self, step: int) -> Int[Tensor, " batch"]:
        """The classes of a step's images."""
        return load_digits("train", self.held_out)[1][self.drawn(step)]

    def drawn(self, step: int) -> Int[Tensor, " batch"]:
        """Places of a step's images among those to train on."""
        n = len(load_digits("train", self.held_out)[1])
        return torch.randint(0, n, (self.batch_size,), generator=drawn_at(self.seed, step))


class Digits(ToyTarget):
    """A convolutional network that gives the logits of an image's class."""

    measured: ClassVar[str] = "accuracy on held-out images"
    least: ClassVar[float] = 0.97

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.channels
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.linear = nn.Linear(second * 2 * 2, CLASSES)

    def forward(self, x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch classes"]:
        for convolution in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(torch.relu(convolution(x)), 2)
        return self.linear(x.flatten(1))

    def strengths(self) -> Float[Tensor, "1"]:
        """Share of held-out images that it reads rightly."""
        images, labels = load_digits("held_out", self.config.held_out)
        with torch.no_grad():
            right = self(images.to(self.linear.weight)).argmax(-1).cpu() == labels
        return right.float().mean().unsqueeze(0)


@functools.lru_cache(maxsize=8)
def load_digits(
    part: Literal["train", "held_out"], held_out: int
) -> tuple[Float[Tensor, "images 1 8 8"], Int[Tensor, " images"]]:
    """Images and their classes, of which a fixed permutation holds so many out; MissingExtraError without scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            "The digits are scikit-learn's, which is not installed; pip install 'tl-paramdecomp[toys]'."
        ) from error
    pixels, classes = datasets.load_digits(return_X_y=True)
    if not 0 < held_out < len(pixels):
        raise SettingError(f"held_out must leave some of the {len(pixels)} digits on both sides; given {held_out}.")
    images = torch.from_numpy(pixels).to(torch.float32).div(16.0).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[:held_out] if part == "held_out" else order[held_out:]
    return images[chosen], torch.from_numpy(classes)[chosen]


def train_digits(config: DigitsConfig, seed: int = 0, progress: Progress = quiet) -> Digits:
    """A target trained on the cross entropy, by AdamW with a cosine to 0."""

    def loss(model: Digits, data: DigitImages, step: int) -> Tensor:
        return nn.functional.cross_entropy(model(data(step)), data.labels(step))

    return trained(Digits, config, seed, progress, loss)
