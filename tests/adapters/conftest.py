"""Tiny models run fastest on one thread."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    logging.getLogger("transformers").setLevel(logging.ERROR)  # tiny configurations lack special tokens, and it says so
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
