"""Ray Data as it is used here: quiet on the terminal, and at an end when its reader is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from ray.data import Dataset

_THREADS = ("iter_threaded", "StreamingExecutor-", "ray-data-")
"""How the names of Ray Data's threads begin."""

END_SECONDS = 10.0
"""For its threads to end: each is done with what it asks Ray for just now."""


def quiet_ray_data() -> None:
    """Keep Ray Data's notes off the terminal, which shows our progress; its log files have them, errors both.

    Of the handlers only that which Ray Data's own configuration calls its console: others are their owners'.
    """
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.ERROR)


def blocks_of(data: Dataset) -> Generator[pa.Table, None, None]:
    """The blocks of a data set as they are made; where it is closed before the last one, the rest is not made.

    It has to be closed before Ray is left, and ends with Ray Data's threads: one that still asked for a block then
    would start another Ray, beside which the next one that this process starts may take the process with it.
    """
    before = set(threading.enumerate())
    # Nothing is fetched in advance: the thread that does it is left waiting for more when all has ended.
    blocks = iter(data.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0))
    try:
        yield from blocks
    finally:
        deadline = time.monotonic() + END_SECONDS
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith(_THREADS):
                thread.join(max(0.0, deadline - time.monotonic()))
