"""Every crystal's neighbour shells, found once and kept beside the data: one Arrow file a split and radius.

Workers of a node map the same memory. Shells depend on the crystal and the radius alone, so they serve every epoch,
layer, worker and later run (a list of 12 atoms within 11.9 Å takes about 0.3 ms to find, 1.5 ms without numba).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cluster.data.spool import MappedTable, write_table
from cluster.errors import UserError
from crystalformer.batch import PackedShells
from crystalformer.neighbors import Shells, find_shells
from data_pipeline.schema import STRUCTURE_COLUMNS
from data_pipeline.steps.ray_data import blocks_of, quiet_ray_data
from data_pipeline.table import StructureTable

IntArray = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rows are done, and how many there are; not where nothing is to be done."""

FORMAT = "3"

SHELLS_FOLDER = "shells"
"""Of a data set: what is found of its crystals, and its splits as Arrow files."""

_CHUNK = 512

_PACKED_AT_ONCE = 16
"""Crystals packed before the next are looked at: their rows then stay in the second-level cache."""

RAY_FROM_SECONDS = 60.0
"""Seconds of one core's work left, from which Ray Data finds the shells on all cores of the cluster.

Starting Ray and its processes costs about 20 s: what took 16.7 s in one process took 41.4 s through Ray on two cores
that other programs used as well. Two free cores repay that from some 40 s on, more cores earlier.
"""

SCHEMA = pa.schema(
    [
        pa.field("rows_an_atom", pa.large_list(pa.int32())),
        pa.field("neighbor", pa.large_list(pa.int32())),
        pa.field("distance", pa.large_list(pa.float32())),
        pa.field("count", pa.large_list(pa.int16())),
    ]
)
"""A row a crystal: shells of each atom (n,), then all shells (S,): atom j, Å, images."""


def _found_here(structures: StructureTable, start: int, radius: float) -> Iterator[pa.Table]:
    for first in range(start, structures.num_rows, _CHUNK):
        yield _find(structures, np.arange(first, min(first + _CHUNK, structures.num_rows)), radius)


def _find(structures: StructureTable, rows: IntArray, radius: float) -> pa.Table:
    packed = structures.gather(rows)
    ends = np.cumsum(packed.sizes)
    found = [
        find_shells(packed.positions[end - size : end], cell, radius) if radius > 0 else _no_shells(size)
        for size, end, cell in zip(packed.sizes, ends, packed.lattice, strict=True)
    ]
    columns = [
        _joined([np.diff(s.ptr) for s in found], pa.int32()),
        _joined([s.neighbor for s in found], pa.int32()),
        _joined([s.distance for s in found], pa.float32()),
        _joined([s.count for s in found], pa.int16()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _no_shells(atoms: int) -> Shells:
    nothing = np.zeros(0, dtype=np.int64)
    return Shells(ptr=np.zeros(atoms + 1, dtype=np.int64), neighbor=nothing, distance=np.zeros(0), count=nothing)


def _joined(parts: list[npt.NDArray[np.generic]], kind: pa.DataType) -> pa.LargeListArray:
    return list_column(np.cumsum([0, *map(len, parts)]), np.concatenate(parts), kind)


def _found(
    structures: StructureTable, radius: float, progress: Progress, ray_from: float
) -> Generator[pa.Table, None, None]:
    """The shells of all crystals in order: the first found here and timed; the rest by Ray Data if they are many."""
    total, done, start = structures.num_rows, 0, time.monotonic()
    for piece in _found_here(structures, 0, radius):
        yield piece
        done += len(piece)
        progress("neighbour lists", done, total)
        if (time.monotonic() - start) / done * (total - done) > ray_from:
            break
    if done == total:
        return
    with closing(_found_by_ray(structures.arrow, done, radius)) as pieces:
        for piece in pieces:
            yield piece
            done += len(piece)
            progress("neighbour lists", done, total)
    if done != total:
        raise RuntimeError(f"Ray Data returned the shells of {done} crystals for {total}")


def _found_by_ray(structures: pa.Table, start: int, radius: float) -> Generator[pa.Table, None, None]:
    """The shells of the rows from ``start``, in order, found all over the cluster."""
    import ray.data

    from cluster.session import ray_session

    columns = structures.select([name for name, _ in STRUCTURE_COLUMNS]).append_column(
        "material_id", pa.nulls(len(structures), pa.string())
    )
    quiet_ray_data()
    with ray_session():
        parts = ray.data.from_arrow([columns.slice(i, _CHUNK) for i in range(start, len(structures), _CHUNK)])
        parts.context.execution_options.preserve_order = True
        parts.context.enable_progress_bars = False
        found = parts.map_batches(
            partial(find_table_shells, radius=radius), batch_format="pyarrow", batch_size=None, num_cpus=1
        )
        with closing(blocks_of(found)) as pieces:
            for piece in pieces:
                yield piece.cast(SCHEMA)


def find_table_shells(structures: pa.Table, *, radius: float) -> pa.Table:
    """The shells of all rows of a structure table, a row each."""
    table = StructureTable.from_arrow(structures)
    return _find(table, np.arange(table.num_rows), radius)


def shells_file(folder: Path, split: str, radius: float) -> Path:
    """Where ``cached_shells`` keeps a split's shells within ``radius`` Å."""
    return folder / SHELLS_FOLDER / f"{split}-{radius:.4f}.arrow"


def cached_shells(
    folder: Path,
    split: str,
    structures: StructureTable,
    radius: float,
    fingerprint: str,
    progress: Progress | None = None,
    *,
    ray_from: float = RAY_FROM_SECONDS,
) -> pa.Table:
    """The shells of a split from ``folder/shells``, found and written there on first use; memory-mapped.

    From ``ray_from`` seconds of work left Ray Data finds them; infinity where its tasks could not get a CPU.

    ``fingerprint`` identifies the prepared data; a file made from other data is replaced. The file is the same bytes
    whoever finds the shells. UserError where it cannot be written.
    """
    path = shells_file(folder, split, radius)
    with closing(_found(structures, radius, progress or _silent, ray_from)) as pieces:
        return cached_table(path, shells_identity(fingerprint, structures.num_rows), SCHEMA, pieces)


def shells_identity(fingerprint: str, rows: int) -> dict[str, str]:
    """What a file of shells says that it was made from, and how."""
    return {"format": FORMAT, "data": fingerprint, "rows": str(rows)}


def cached_table(path: Path, identity: Mapping[str, str], schema: pa.Schema, pieces: Iterable[pa.Table]) -> pa.Table:
    """The table of ``path`` where it was written with ``identity``, else made of ``pieces`` now; memory-mapped.

    UserError where it cannot be written, or another run put the file of other data there at once.
    """
    ready = MappedTable.matching(path, identity)
    if ready is None:
        write_table(path, schema, pieces, identity)
        ready = MappedTable.matching(path, identity)
    if ready is None:
        raise UserError(f"{path}: replaced by the file of another run: its data were prepared anew: start again")
    return ready.table


def _silent(_what: str, _done: int, _total: int) -> None:
    """Progress nobody looks at."""


class ShellTable:
    """Shells of a table's crystals, read without copying and packed for batches."""

    def __init__(self, table: pa.Table, radius: float) -> None:
        self.radius = radius
        self._rows_at, self._rows_an_atom = flatten(table.column("rows_an_atom"))
        self._at, self._neighbor = flatten(table.column("neighbor"))
        _, self._distance = flatten(table.column("distance"))
        _, self._count = flatten(table.column("count"))
        self.costs: IntArray = np.diff(self._at)
        """(crystals,) shells of each crystal: the work its attention is."""

    def pack(self, rows: IntArray, sizes: IntArray) -> PackedShells:
        """The lists of the given crystals, which have ``sizes`` atoms, for a batch in that order."""
        lengths = self.costs[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        first_atom = np.cumsum(sizes) - sizes
        neighbor = np.empty(ends[-1], dtype=np.int64)
        distance = np.empty(ends[-1], dtype=np.float32)
        count = np.empty(ends[-1], dtype=np.int16)
        for start in range(0, len(rows), _PACKED_AT_ONCE):
            some = slice(start, start + _PACKED_AT_ONCE)
            cuts = _slices(self._at, rows[some])
            here = slice(ends[start], ends[min(start + _PACKED_AT_ONCE, len(rows))])
            np.concatenate([self._neighbor[cut] for cut in cuts], out=neighbor[here])
            neighbor[here] += np.repeat(first_atom[some], lengths[some])
            np.concatenate([self._distance[cut] for cut in cuts], out=distance[here])
            np.concatenate([self._count[cut] for cut in cuts], out=count[here])
        ptr = np.zeros(int(sizes.sum()) + 1, dtype=np.int64)
        np.cumsum(np.concatenate([self._rows_an_atom[cut] for cut in _slices(self._rows_at, rows)]), out=ptr[1:])
        return PackedShells(
            radius=self.radius,
            ptr=torch.from_numpy(ptr),
            neighbor=torch.from_numpy(neighbor),
            distance=torch.from_numpy(distance),
            count=torch.from_numpy(count),
        )


def _slices(offsets: IntArray, rows: IntArray) -> list[slice]:
    return [slice(a, b) for a, b in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)]


def list_column(offsets: IntArray, values: npt.NDArray[Any], kind: pa.DataType) -> pa.LargeListArray:
    """A list column of (rows + 1,) offsets and its values, which become of type ``kind``."""
    kept = pa.array(values.astype(kind.to_pandas_dtype(), copy=False), kind)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), kept)


def flatten(column: pa.ChunkedArray) -> tuple[IntArray, npt.NDArray[Any]]:
    """(rows + 1,) offsets from 0 and the values of a list column; without copying where it is one whole chunk."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    offsets = array.offsets.to_numpy().astype(np.int64, copy=False)
    values = array.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
    return offsets - offsets[0] if offsets[0] else offsets, values
