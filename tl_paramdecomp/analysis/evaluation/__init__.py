"""How good a decomposition is, and how two of them compare."""
