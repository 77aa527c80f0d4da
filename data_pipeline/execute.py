"""Run the work on every raw table: in this process, or through Ray Data over the cluster. The result is the same."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.store import RawStore, write_atomically
from data_pipeline.work import process_batch

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rows are done, and how many there are."""


def in_process(store: RawStore, progress: Progress) -> Iterator[pa.Table]:
    """The processed tables in order, one core."""
    done = 0
    for table in store.tables():
        yield process_batch(table)
        done += len(table)
        progress("structures", done, store.num_rows)


def with_ray(store: RawStore, progress: Progress) -> Iterator[pa.Table]:
    """The processed tables in order, by Ray Data over staged parts.

    Finished parts are kept beside the raw ones, so that a run that was stopped does only the rest.
    """
    missing = [i for i, part in enumerate(store.parts) if not _done(part).is_file()]
    if missing:
        finished = store.num_rows - sum(store.rows[i] for i in missing)
        with _ray():
            for i, table in _regroup(_ray_batches([store.parts[i] for i in missing]), missing, store.rows):
                write_atomically(table, _done(store.parts[i]))
                finished += len(table)
                progress("structures", finished, store.num_rows)
    yield from (pq.read_table(_done(part)) for part in store.parts)


def _done(part: Path) -> Path:
    return part.with_name(part.name.replace("raw-", "done-"))


def _ray_batches(parts: list[Path]) -> Iterable[pa.Table]:
    """Processed blocks in the order of the parts, of whatever size Ray makes them."""
    import ray.data

    quiet_ray_data()
    data = ray.data.read_parquet([str(part.resolve()) for part in parts], override_num_blocks=len(parts))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    work = data.map_batches(process_batch, batch_format="pyarrow", batch_size=None)
    blocks: Iterable[pa.Table] = work.iter_batches(batch_format="pyarrow", batch_size=None)
    return blocks


def quiet_ray_data() -> None:
    """Keep Ray Data's notes off the terminal, which shows our progress; its log files have them, errors both."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def _regroup(blocks: Iterable[pa.Table], order: list[int], rows: list[int]) -> Iterator[tuple[int, pa.Table]]:
    """Cut a stream of blocks into the parts of ``order``. Raises RuntimeError if rows are lost or out of order."""
    pending: list[pa.Table] = []
    held = 0
    waiting = iter(order)
    part = next(waiting, None)
    for block in (block for block in blocks if len(block)):
        pending.append(block)
        held += len(block)
        while part is not None and held >= rows[part]:
            table = pa.concat_tables(pending)
            ready, rest = table.slice(0, rows[part]), table.slice(rows[part])
            if ready.column("part").unique().to_pylist() != [part]:
                raise RuntimeError(f"Ray Data returned the rows of part {part} out of order")
            yield part, ready
            pending, held, part = [rest], len(rest), next(waiting, None)
    if part is not None or held:
        raise RuntimeError(f"Ray Data returned other rows than it was given: stopped before part {part}")


@contextmanager
def _ray() -> Iterator[Any]:
    """Use the running Ray, that of RAY_ADDRESS, or one started for the time being."""
    import ray

    started = not ray.is_initialized()
    if started:
        # Without an address Ray would join whatever cluster was last started on this machine, even one that is gone.
        address = os.environ.get("RAY_ADDRESS")
        where = {"address": address} if address else {"address": "local", "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **where)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
