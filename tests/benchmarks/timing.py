"""Ratios of CPU times, measured in turn so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable


def ratio(
    slow: Callable[[], object], fast: Callable[[], object], rounds: int = 15, warm: int = 3
) -> tuple[float, float, float]:
    """Median over rounds of time(slow) / time(fast), and the median CPU times in milliseconds."""
    for _ in range(warm):
        slow()
        fast()
    pairs = []
    for _ in range(rounds):
        times = []
        for run in (slow, fast):
            begun = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - begun))
        pairs.append(times)
    quotient = statistics.median(a / b for a, b in pairs)
    return quotient, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
