"""The Ray cluster a run uses: the one RAY_ADDRESS names, or a local one that ends with the process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.environment import for_workers
from cluster.errors import UserError
from data_pipeline.steps.ray_address import VARIABLE, join_or_start

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
"""The workers' output stays in Ray's log files, which the dashboard shows."""


_started_here = threading.Event()


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to RAY_ADDRESS, or start a local Ray and stop it at the end. A connected session is left as it is.

    DataError where RAY_ADDRESS leads nowhere.
    """
    if ray.is_initialized():
        yield
        return
    join_or_start({"runtime_env": {"env_vars": for_workers()}}, **_QUIET)
    if os.environ.get(VARIABLE, "local") in ("", "local"):
        _started_here.set()
    try:
        yield
    finally:
        _started_here.clear()
        ray.shutdown()


def own_session() -> bool:
    """Whether this process has started Ray for what it does now, and ends it after that."""
    return _started_here.is_set()


def autoscaled() -> bool:
    """Whether an autoscaler adds nodes for what waits, and may have added none yet. KubeRay tells the head so."""
    return os.environ.get("RAY_enable_autoscaler_v2", "").lower() in ("1", "true")


def require_told(**settings: object) -> None:
    """UserError for the first of the settings that is None or auto: nodes to come cannot be counted."""
    for name, value in settings.items():
        if value in (None, "auto"):
            raise UserError(f"{name} must be given on a cluster with an autoscaler: it cannot follow from the nodes")
