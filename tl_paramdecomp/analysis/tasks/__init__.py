"""Prompts with right and wrong answers, and metrics of them."""
