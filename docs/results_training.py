"""Sections on runs that last: memory over a long run, and memory foretold."""

from collections.abc import Mapping
from typing import Any

from rendering import origin, table


def endurance(record: Mapping[str, Any]) -> str:
    """A long run with streaming data."""
    settings, (low, high) = record["settings"], record["after_warm_up_mb"]
    rows = [(step, f"{mb:.1f}") for step, mb in record["resident_mb"]]
    shown = [rows[i] for i in sorted({round(k * (len(rows) - 1) / 9) for k in range(10)})]
    run = (
        f"{record['steps']} steps in {record['minutes']:.0f} minutes, {record['rows']} rows; {settings['method']['type']} on "
        f"{len(settings['sites'])} matrices, seed {settings['seed']}. After the first fifth, resident memory is between "
        f"{low:.1f} and {high:.1f} MB, and its least-squares slope is **{record['slope_mb_per_1000_steps']:+.2f} MB per 1,000 "
        "steps**."
    )
    return f"{origin(record)}\n\n{run}\n\n{table(('step', 'resident memory, MB'), shown)}"


def memory(record: Mapping[str, Any]) -> str:
    """Peak memory foretold by a dry run and measured."""
    rows = [
        (
            run["name"],
            f"{run['predicted'] / 2**30:.2f}",
            f"{run['measured'] / 2**30:.2f}" if run["measured"] else "not run",
            f"{run['predicted'] / run['measured']:.3f}" if run["measured"] else "",
        )
        for run in record["runs"]
    ]
    return f"{origin(record)}\n\n{table(('run', 'foretold, GiB', 'measured peak, GiB', 'ratio'), rows)}"
