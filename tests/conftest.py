"""Settings and fixtures of all tests: no network, and token rows that every tiny model takes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from .support.models import VOCAB

torch.set_num_threads(1)  # on tiny tensors a second thread costs more than it gives


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
