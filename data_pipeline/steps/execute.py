"""Run the work on every raw table: in this process, or through Ray Data over the cluster. The result is the same."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.steps.ray_address import join_or_start
from data_pipeline.steps.ray_data import blocks_of, quiet_ray_data
from data_pipeline.steps.store import RawStore, rows_in, write_atomically
from data_pipeline.steps.work import process_batch

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rows are done, and how many there are."""

_PARTS_A_TASK = 16
"""Parts of a task at most, a few seconds of work: a core waits some 0.2 s for its next task, and a task tells of its
parts when it ends."""


def in_process(store: RawStore, progress: Progress) -> Generator[pa.Table, None, None]:
    """The processed tables in order, one core."""
    done = 0
    for table in store.tables():
        yield process_batch(table)
        done += len(table)
        progress("structures", done, store.num_rows)


def with_ray(store: RawStore, progress: Progress) -> Generator[pa.Table, None, None]:
    """The processed tables in order, by Ray Data over staged parts.

    Tasks read a part and write the finished one beside it, so that no row passes through this process before it is
    finished, and a run that was stopped does only the rest when it is started again. All nodes must see the staging
    folder. Tables are yielded while later ones are still worked on.
    """
    finished = [rows_in(_done(part)) == n for part, n in zip(store.parts, store.rows, strict=True)]
    yielded, rows = 0, sum(n for n, there in zip(store.rows, finished, strict=True) if there)
    missing = [i for i, there in enumerate(finished) if not there]
    if missing:
        with (
            _ray() as ray,
            closing(_finished_parts(store, missing, int(ray.cluster_resources().get("CPU", 1)))) as parts,
        ):
            for part in parts:
                finished[part] = True
                rows += store.rows[part]
                progress("structures", rows, store.num_rows)
                while yielded < len(finished) and finished[yielded]:
                    yield _finished_table(store, yielded)
                    yielded += 1
    for part in range(yielded, len(finished)):
        yield _finished_table(store, part)


def _done(part: Path) -> Path:
    return part.with_name(part.name.replace("raw-", "done-"))


def _finished_table(store: RawStore, part: int) -> pa.Table:
    """A finished part. Raises RuntimeError where it is not the one it should be."""
    table: pa.Table = pq.read_table(_done(store.parts[part]))
    if len(table) != store.rows[part] or table.column("part").unique().to_pylist() != [part]:
        raise RuntimeError(f"{_done(store.parts[part])}: not the {store.rows[part]} rows of part {part}")
    return table


def _finished_parts(store: RawStore, missing: Sequence[int], cores: int) -> Generator[int, None, None]:
    """Have Ray Data work on the parts ``missing``; their numbers as they are finished, in any order.

    Raises OSError where one cannot be read or written.
    """
    import ray.data

    quiet_ray_data()
    tasks = [
        pa.table({"part": pa.array(parts, pa.int64()), "path": [str(store.parts[i].resolve()) for i in parts]})
        for parts in dealt(missing, cores)
    ]
    data = ray.data.from_arrow(tasks)
    data.context.enable_progress_bars = False
    # One core a task: Ray then sets OMP_NUM_THREADS to 1 for it, and no task waits for another's threads.
    work = data.map_batches(process_parts, batch_format="pyarrow", batch_size=None, num_cpus=1)
    with closing(blocks_of(work)) as blocks:
        for block in blocks:
            for part, problem in zip(
                block.column("part").to_pylist(), block.column("problem").to_pylist(), strict=True
            ):
                if problem is not None:
                    raise OSError(problem)
                yield part


def dealt(parts: Sequence[int], cores: int) -> Iterator[Sequence[int]]:
    """Cut parts into tasks, ever smaller ones: few in all, and yet all cores are done at about the same time."""
    start = 0
    while start < len(parts):
        size = min(_PARTS_A_TASK, max(1, (len(parts) - start) // (2 * max(1, cores))))
        yield parts[start : start + size]
        start += size


def process_parts(parts: pa.Table) -> pa.Table:
    """Work on the raw tables at ``path``, write the finished ones beside them.

    Returns ``part`` and ``problem``: null, or why that part could not be read or written.
    """
    problems: list[str | None] = []
    for path in map(Path, parts.column("path").to_pylist()):
        try:
            write_atomically(process_batch(pq.read_table(path)), _done(path))
            problems.append(None)
        except OSError as error:
            problems.append(f"{error} (on {platform.node()}; all machines of a cluster must see the data folder)")
    return parts.select(["part"]).append_column("problem", pa.array(problems, pa.string()))


@contextmanager
def _ray() -> Iterator[Any]:
    """Use the running Ray, that of RAY_ADDRESS, or one started for the time being."""
    import ray

    started = not ray.is_initialized()
    if started:
        join_or_start(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
