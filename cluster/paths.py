"""Relative paths of what must last: in this folder, but in a Ray job, whose folder is a copy that Ray deletes."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CRYSTALFORMER_HOME"
"""The folder that relative storage and data paths begin at, where it is set."""

_JOB_FOLDER = "runtime_resources/working_dir_files"
"""Part of the path of the copy that ``ray job submit --working-dir`` makes on the cluster."""

LASTING = ("storage_path", "data_dir", "init_from")
"""Settings that hold such a path."""


def lasting(path: str) -> str:
    """``path``, absolute where this process's folder is not the one to begin at.

    That is where ``CRYSTALFORMER_HOME`` is set, and in a Ray job, which gets ~/crystalformer of its node.
    """
    base = os.environ.get(VARIABLE)
    if base is None and _JOB_FOLDER in Path.cwd().as_posix():
        base = str(Path.home() / "crystalformer")
    if base is None or "://" in path:
        return path
    return str(Path(base) / path)


def there(path: str) -> str:
    """``path`` of what is read: in this folder where it is there, as what a job brings along, else ``lasting``."""
    return path if os.path.lexists(path) else lasting(path)
