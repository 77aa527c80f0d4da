"""Hyperparameter search with Ray Tune and Optuna."""

import cluster  # noqa: F401 - sets Ray's environment
