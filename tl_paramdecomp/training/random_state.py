"""Every source of random numbers that a step may draw from, as tensors and back."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tl_paramdecomp.methods.random_streams import RandomNumbers
from tl_paramdecomp.parallel import ProcessGroup


def random_tensors(numbers: RandomNumbers, processes: ProcessGroup) -> dict[str, Tensor]:
    """The state of the masks' generators of every process, and of this one's global ones of torch, CUDA, numpy and Python.

    Data code draws from the global ones.
    """
    found = {"torch": torch.get_rng_state()}
    for name, state in numbers.own.state().items():
        for rank, each in enumerate(processes.every(state)):
            found[f"masks.{rank}.{name}"] = each
    if numbers.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(numbers.device)
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    if kind == "MT19937":  # a user may have put another kind there
        found["numpy"] = torch.tensor([*np.asarray(keys).tolist(), place, has_gauss], dtype=torch.int64)
        found["numpy.gauss"] = torch.tensor(gauss, dtype=torch.float64)
    version, words, gauss = random.getstate()
    found["python"] = torch.tensor([version, *words], dtype=torch.int64)
    found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
    return found


def set_random(
    tensors: Mapping[str, Tensor], numbers: RandomNumbers, processes: ProcessGroup, step: int, as_before: bool = True
) -> None:
    """Put every source where `random_tensors` found it.

    Args:
        tensors: What it gave.
        numbers: The masks'.
        processes: The processes of the run now.
        step: Steps done.
        as_before: Whether batches are divided among processes and micro-batches as they were; else the masks begin anew.

    Raises:
        KeyError, RuntimeError: Something is missing, or is of a device of another kind.
    """
    if as_before:
        own = f"masks.{processes.rank}."
        state = {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
        numbers.own.restore({"": state.pop(""), **state})
    else:
        numbers.begin_anew(processes.rank, step)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and numbers.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], numbers.device)
    if "numpy" in tensors:
        *keys, place, has_gauss = tensors["numpy"].tolist()
        gauss = tensors["numpy.gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    version, *words = tensors["python"].tolist()
    random.setstate((version, tuple(words), next(iter(tensors["python.gauss"].tolist()), None)))
