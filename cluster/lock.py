"""One process at a time: a file that is locked as long as its holder lives, wherever that dies."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 1.0


class InUseError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(file: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Within, no other process holds ``file``, which is made with its folder and stays, empty.

    patience: seconds to wait for another holder to go. Raises InUseError, or OSError where the file system has no
    locks or nothing can be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as stream:
        deadline = time.monotonic() + patience
        while not _taken(stream.fileno()):
            if time.monotonic() >= deadline:
                raise InUseError(str(file))
            time.sleep(POLL_SECONDS)
        yield


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
