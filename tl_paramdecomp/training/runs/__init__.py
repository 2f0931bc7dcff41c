"""A run's directory: who may write to it, and its checkpoints."""
