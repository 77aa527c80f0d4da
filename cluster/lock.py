"""One process at a time: a file that is locked as long as its holder lives, wherever that dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster.log import say
from data_pipeline.lock import NO_LOCKS

POLL_SECONDS = 1.0

LOST_SECONDS = 120.0
"""A file server lets go of the locks of a machine that has died within this."""


class InUseError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(file: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Within, no other process holds ``file``, which is made with its folder and stays, empty.

    patience: seconds to wait for another holder to go. Raises InUseError, or OSError where the file system has no
    locks or nothing can be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        handle = -1
        while handle < 0 or not _is_there(handle, file):  # its last holder may have deleted it
            handle = stack.enter_context(file.open("a+")).fileno()
            while not _taken(handle):
                if time.monotonic() >= deadline:
                    raise InUseError(str(file))
                time.sleep(POLL_SECONDS)
        yield


@contextmanager
def claimed(file: Path, *, patient: bool) -> Iterator[None]:
    """Within, no other process holds ``file``; on a file system without locks that is up to the user, who is told.

    patient: wait for the file server to notice that the last holder's machine is gone. Raises InUseError, or OSError
    where nothing can be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(file, patience=LOST_SECONDS if patient else 0.0))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f"warning: {file.parent} has no file locks: see that no other process writes there")
        yield


def _is_there(handle: int, file: Path) -> bool:
    """Whether an open file is still the one of that name: others would make and lock a new one."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
