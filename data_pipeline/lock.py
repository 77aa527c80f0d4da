"""One process at a time, told by a locked file: those that come later wait and find the work done."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made and stays; a lock ends with its process, however that ends.

    The folder of the file has to be there. Raises DataError where the file cannot be written or locked.
    """
    try:
        stream = path.open("w")
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written to: {path.name}: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(f"{path}: cannot be locked: {error.strerror}") from error
        yield
