"""Micro-batches: gradients gathered over several are those of the batch taken whole, for every loss and preset."""

import pytest

from tests.support.divided import difference, methods, train


@pytest.mark.parametrize("name", methods())
def test_four_micro_batches_are_the_whole_batch(name):
    """Gradients, figures and what is remembered, over three steps, in float64 with the same random numbers."""
    (whole, memory, _), (divided, other, _) = train(name), train(name, accumulate=4)
    assert difference(whole, divided) < 1e-6
    assert memory.keys() == other.keys()
    assert all((t - other[key]).abs().max() < 1e-6 for key, t in memory.items() if t.numel())
