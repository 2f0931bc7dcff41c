"""Training: one loop for every method, its data and its checkpoints."""
