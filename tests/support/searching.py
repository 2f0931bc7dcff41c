"""How hypothesis searches: few examples always, and many, other ones every time, among the slow tests."""

import pytest
from hypothesis import HealthCheck, settings


def few_and_many(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a search with few examples always, and with many, other ones every time, among the slow tests."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    )


def searching(examples: int) -> settings:
    """Without time limits for single examples, and the same ones where they are few."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
