"""Environment variables that Ray reads when it is imported or started; ``import cluster`` sets them where unset."""

from __future__ import annotations

import os
import re
import sys

VARIABLES = {
    # A local cluster asks for its token; nothing turns authentication off.
    "RAY_AUTH_MODE": "token",
    # The controller answers a report at its next poll, so the default of 2 s would hold up every checkpoint.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Prints of workers would appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths keep their meaning in workers.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What is asked of Ray after it was left is an error, and starts no other Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Idle OpenMP threads sleep soon: longer spins are faster on idle cores and slower on busy ones. With 1000, 4000,
    # 10000, 100000: 1,630, 1,790, 1,850, 2,020 structures a second, and 960, 840, 780, 350 beside two busy programs.
    "GOMP_SPINCOUNT": "4000",
    # Matrix products do not depend on where memory happens to lie; without it 3 of 16 repeated runs differed.
    "MKL_CBWR": "AUTO,STRICT",
}


NO_PREEMPTION_WATCHER = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
"""One process less to start: nobody drains the only machine there is."""

LOOPBACK_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Ray listens on 127.0.0.1 alone; named after the systems where it does so of itself. Workers never need it."""

_LOOPBACK = re.compile(r"(local|(localhost|127\.0\.0\.1):\d+)?")
"""RAY_ADDRESS of a Ray on this machine alone."""


_WORKER = "default_worker.py"
"""What every process of Ray runs."""


def set_defaults() -> None:
    """Set every variable that the user has not set; a Ray of this machine alone stays on loopback.

    Of that a process of Ray's judges nothing: on the head of a cluster, KubeRay's, RAY_ADDRESS is on loopback too.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if os.path.basename(sys.argv[0]) != _WORKER and _LOOPBACK.fullmatch(os.environ.get("RAY_ADDRESS", "")):
        os.environ.setdefault(*LOOPBACK_ONLY)
        os.environ.setdefault(*NO_PREEMPTION_WATCHER)


def for_workers() -> dict[str, str]:
    """The variables as they stand, for the workers of a cluster that was started by somebody else."""
    return {name: os.environ[name] for name in VARIABLES if name != "RAY_AUTH_MODE"}
