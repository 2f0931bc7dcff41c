"""The time as runs ask for it, in one place: a test that sets it here depends on no machine's speed."""

import time

now = time.monotonic
"""Seconds since some moment, as `clock.now()`."""
