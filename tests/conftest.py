"""What all tests share: the longest files go first; those marked ``gpu`` are skipped where there is no GPU."""

import os
import shlex
from pathlib import Path

import pytest

# `make check ARGS=..` hands its flags and variables down to the tests: a make that one of them runs is a user's own.
_given = [word.split("=")[0] for word in shlex.split(os.environ.get("MAKEFLAGS", "")) if "=" in word]
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", *_given):
    os.environ.pop(_name, None)

LONGEST = (
    "cluster/driver/test_nodes.py",
    "cluster/driver/test_recovery.py",
    "k8s/test_live.py",
    "cluster/run/test_storage.py",
    "test_readme.py",
    "cluster/worker/test_fine_tuning.py",
    "tune/test_search.py",
    "tune/test_endings.py",
    "cluster/driver/test_full_disk.py",
    "cluster/test_head.py",
)
"""Of several files at once, the one that begins last should not be one of these."""


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    """With ``-m gpu`` only what has such tests is read: a bare GPU machine lacks what other tests import."""
    if config.option.markexpr != "gpu":
        return None
    folder = collection_path.is_dir()
    files = collection_path.rglob("test_*.py") if folder else [collection_path]
    return None if any("pytest.mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


def pytest_collection_modifyitems(items):
    items.sort(key=_place)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _place(item) -> int:
    """Where its file comes: by LONGEST, then all others as they were."""
    path = item.path.as_posix()
    return next((place for place, name in enumerate(LONGEST) if path.endswith(f"tests/{name}")), len(LONGEST))
