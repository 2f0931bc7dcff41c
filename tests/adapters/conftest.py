"""What all tests of adapters share."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest

from ..support.hosts import let_go

logging.getLogger("transformers").setLevel(logging.ERROR)  # tiny configurations lack special tokens, and it says so


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    let_go()
