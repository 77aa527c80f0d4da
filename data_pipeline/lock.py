"""One process at a time, told by a locked file: those that come later wait and find the work done."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError

_log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What file systems without locks answer; the last two are one on Linux."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made and stays; a lock ends with its process, however that ends.

    The folder of the file has to be there. On a file system without locks it is up to the user, who is told, that no
    other process comes. Raises DataError where the file cannot be made or locked.
    """
    try:
        handle = _opened(path)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written to: {path.name}: {error.strerror}") from error
    try:
        _take(handle, path)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """The file, made if it is not there; that of another user may be locked by those who can only read it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _take(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise DataError(f"{path}: cannot be locked: {error.strerror}") from error
        _log.warning("%s has no file locks: see that no other process prepares data there", path.parent)
