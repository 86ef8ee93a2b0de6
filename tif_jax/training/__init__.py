"""Training: from a stage's recipe to checkpoints."""
