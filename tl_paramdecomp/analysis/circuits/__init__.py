"""Which units carry a task."""
