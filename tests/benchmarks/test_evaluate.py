"""What an evaluation costs: seconds for 4,096 tokens, and whether memory grows with the kinds of masks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tl_paramdecomp.analysis.evaluation.evaluate import KINDS

pytestmark = pytest.mark.benchmark
ASSETS = Path(os.environ.get("TLPD_TEST_ASSETS", Path(__file__).parents[3] / "shared"))
LIMIT = 180.0


def measured(kinds):
    command = [sys.executable, "-m", "tests.benchmarks.evaluation", str(ASSETS), str(kinds)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not (ASSETS / "models" / "stories260K").exists(), reason="no stories260K at TLPD_TEST_ASSETS")
def test_an_evaluation_of_4096_tokens(report):
    every, one = measured(len(KINDS)), measured(1)
    assert every["tokens"] == 4096
    report(
        "evaluate on stories260K, 15 matrices, 4,096 tokens, adversary to 20 steps, 2 threads (ms) / three minutes",
        (every["seconds"] / LIMIT, 1e3 * every["seconds"], 1e3 * LIMIT),
    )
    mega = [v["peak"] / 2**20 for v in (every, one)]
    report(f"its peak memory (MB), {len(KINDS)} kinds of masks / one", (mega[0] / mega[1], *mega))
