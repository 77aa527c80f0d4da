"""Trained models at work: predictions, how good they are, other formats of checkpoints."""
