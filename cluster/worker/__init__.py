"""What runs in every worker: the steps, their sums over the workers, checkpoints."""
