"""Where benchmark ratios go: the terminal always, and a JSON file when TLPD_BENCHMARKS names one."""

import datetime
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from tl_paramdecomp.methods.from_factors import versions

RATIOS = []


@pytest.fixture
def report(capsys):
    """`report(what, (ratio, ms, against_ms), floor_ms)` prints and keeps one ratio; the first cannot be under the floor."""

    def keep(what, measured, floor=None):
        quotient, slow, fast = measured
        RATIOS.append({"what": what, "ratio": quotient, "slow_ms": slow, "fast_ms": fast, "floor_ms": floor})
        with capsys.disabled():
            least = "" if floor is None else f"; floor {floor:.1f}, {slow / floor:.2f} times that"
            print(f"\n{what}: {quotient:.3f} ({slow:.1f} / {fast:.1f}{least})")

    return keep


def pytest_sessionfinish(session):
    path = os.environ.get("TLPD_BENCHMARKS")
    if not path or not RATIOS:
        return
    record = {
        "command": f"TLPD_BENCHMARKS={path} make bench",
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} thread(s), medians",
        "ratios": RATIOS,
    }
    Path(path).write_text(json.dumps(record, indent=1), encoding="utf-8")
