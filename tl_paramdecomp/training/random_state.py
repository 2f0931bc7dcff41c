"""Every source of random numbers that a step may draw from, as tensors and back."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """The state of the masks' generator, and of the global ones of torch, CUDA (the generator's device), numpy and Python.

    Data code draws from the global ones.
    """
    found = {"masks": generator.get_state(), "torch": torch.get_rng_state()}
    if generator.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(generator.device)
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    if kind == "MT19937":  # a user may have put another kind there
        found["numpy"] = torch.tensor([*np.asarray(keys).tolist(), place, has_gauss], dtype=torch.int64)
        found["numpy.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    version, numbers, gauss = random.getstate()
    found["python"] = torch.tensor([version, *numbers], dtype=torch.int64)
    found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    return found


def set_random(tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Put every source where `random_tensors` found it.

    Raises:
        KeyError, RuntimeError: Something is missing, or is of a device of another kind.
    """
    generator.set_state(tensors["masks"])
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and generator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], generator.device)
    if "numpy" in tensors:
        *keys, place, has_gauss = tensors["numpy"].tolist()
        gauss = tensors["numpy.gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    version, *numbers = tensors["python"].tolist()
    random.setstate((version, tuple(numbers), next(iter(tensors["python.gauss"].tolist()), None)))
