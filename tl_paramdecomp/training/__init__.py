"""Training: one loop for every method (`fit`, `loop`), its data (`data`), its directory and checkpoints (`runs`),
and what it will take (`estimates`)."""
