"""Analysis: what components do, measured."""
