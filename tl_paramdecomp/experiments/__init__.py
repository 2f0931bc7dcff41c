"""Scores against mechanisms that are known."""
