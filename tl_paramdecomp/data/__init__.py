"""Rows of tokens: what users have, read, joined, cut, shuffled, and gone back to."""
