"""Every crystal's neighbour shells, found once and kept beside the data: one Arrow file a split and radius.

Workers of a node map the same memory. Shells depend on the crystal and the radius alone, so they serve every epoch,
layer, worker and later run (a list of 12 atoms within 11.9 Å takes about 0.3 ms to find, 1.5 ms without numba; which
atoms are alike, 0.06 and 0.5 ms). A model that computes equivalent atoms once needs the lists of distinct ones alone,
in the embedded sets a tenth to a quarter.
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
from crystalformer.batch import CrystalBatch, PackedShells
from crystalformer.config import Neighborhood
from crystalformer.equivalence import Rows, distinct_atoms, kinds
from crystalformer.neighbors import Shells, find_shells
from data_pipeline.schema import STRUCTURE_COLUMNS
from data_pipeline.steps.ray_data import blocks_of, quiet_ray_data
from data_pipeline.table import StructureTable

IntArray = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rows are done, and how many there are; not where nothing is to be done."""

FORMAT = "4"

SHELLS_FOLDER = "shells"
"""Of a data set: what is found of its crystals, and its splits as Arrow files."""

_CHUNK = 512

_PACKED_AT_ONCE = 32
"""Crystals packed before the next are looked at: their rows then stay in the second-level cache."""

ATOM_SHELLS = 300
"""Shells whose attention takes as long as an atom's linear layers: 54 µs of a step against 0.17 µs (default model,
one core of a Xeon)."""

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
        pa.field("atom", pa.large_list(pa.int32())),
        pa.field("multiplicity", pa.large_list(pa.int32())),
    ]
)
"""A row a crystal: shells of each atom (n,), then all shells (S,): atom j, Å, images.

Where only its distinct atoms (R,) have shells (crystalformer/equivalence.py), j is one of these, and it follows which
atoms of the crystal they are and how many each stands for; else both lists are empty.
"""


def _found_here(structures: StructureTable, start: int, around: Neighborhood) -> Iterator[pa.Table]:
    for first in range(start, structures.num_rows, _CHUNK):
        yield _find(structures, np.arange(first, min(first + _CHUNK, structures.num_rows)), around)


def _find(structures: StructureTable, rows: IntArray, around: Neighborhood) -> pa.Table:
    packed = structures.gather(rows)
    ends = np.cumsum(packed.sizes)
    found = [
        find_shells(packed.positions[end - size : end], cell, around.radius)
        if around.radius > 0
        else _no_shells(size)
        for size, end, cell in zip(packed.sizes, ends, packed.lattice, strict=True)
    ]
    listed = PackedShells.pack(found, packed.sizes.tolist(), around.radius).rows
    if not around.distinct or around.radius == 0:
        nothing = list_column(np.zeros(len(rows) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32), pa.int32())
        return pa.Table.from_arrays([*_list_columns(packed.sizes, listed), nothing, nothing], schema=SCHEMA)
    mixed = packed.disorder
    species = () if mixed is None else (mixed.site, mixed.atomic_number, mixed.occupancy)
    atoms = distinct_atoms(packed.sizes, kinds(packed.atomic_numbers, *species), listed)
    starts, own = _ends(atoms.sizes), atoms.atom - np.repeat(ends - packed.sizes, atoms.sizes)
    said = [list_column(starts, values, pa.int32()) for values in (own, atoms.multiplicity)]
    return pa.Table.from_arrays([*_list_columns(atoms.sizes, atoms.rows), *said], schema=SCHEMA)


def _list_columns(sizes: IntArray, listed: Rows) -> list[pa.LargeListArray]:
    """The columns of the schema's shells, from those of packed crystals of ``sizes`` atoms."""
    atoms = _ends(sizes)
    rows = listed.ptr[atoms]
    neighbor = listed.neighbor - np.repeat(atoms[:-1], np.diff(rows))
    return [
        list_column(atoms, np.diff(listed.ptr), pa.int32()),
        list_column(rows, neighbor, pa.int32()),
        list_column(rows, listed.distance, pa.float32()),
        list_column(rows, listed.images, pa.int16()),
    ]


def _ends(sizes: IntArray) -> IntArray:
    """(crystals + 1,) where each of them begins and ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _no_shells(atoms: int) -> Shells:
    nothing = np.zeros(0, dtype=np.int64)
    return Shells(ptr=np.zeros(atoms + 1, dtype=np.int64), neighbor=nothing, distance=np.zeros(0), count=nothing)


def _found(
    structures: StructureTable, around: Neighborhood, progress: Progress, ray_from: float
) -> Generator[pa.Table, None, None]:
    """The shells of all crystals in order: the first found here and timed; the rest by Ray Data if they are many."""
    total, done, start = structures.num_rows, 0, time.monotonic()
    for piece in _found_here(structures, 0, around):
        yield piece
        done += len(piece)
        progress("neighbour lists", done, total)
        if (time.monotonic() - start) / done * (total - done) > ray_from:
            break
    if done == total:
        return
    with closing(_found_by_ray(structures.arrow, done, around)) as pieces:
        for piece in pieces:
            yield piece
            done += len(piece)
            progress("neighbour lists", done, total)
    if done != total:
        raise RuntimeError(f"Ray Data returned the shells of {done} crystals for {total}")


def _found_by_ray(structures: pa.Table, start: int, around: Neighborhood) -> Generator[pa.Table, None, None]:
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
            partial(find_table_shells, around=around),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=1,
        )
        with closing(blocks_of(found)) as pieces:
            for piece in pieces:
                yield piece.cast(SCHEMA)


def find_table_shells(structures: pa.Table, *, around: Neighborhood) -> pa.Table:
    """The shells of all rows of a structure table, a row each."""
    table = StructureTable.from_arrow(structures)
    return _find(table, np.arange(table.num_rows), around)


def shells_file(folder: Path, split: str, around: Neighborhood) -> Path:
    """Where ``cached_shells`` keeps a split's shells."""
    return folder / SHELLS_FOLDER / f"{split}-{around.radius:.4f}{'' if around.distinct else '-all'}.arrow"


def cached_shells(
    folder: Path,
    split: str,
    structures: StructureTable,
    around: Neighborhood,
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
    path = shells_file(folder, split, around)
    with closing(_found(structures, around, progress or _silent, ray_from)) as pieces:
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
        _, self._atom = flatten(table.column("atom"))
        _, self._multiplicity = flatten(table.column("multiplicity"))
        self.costs: IntArray = np.diff(self._rows_at)
        """(crystals,) the work that each crystal is, in shells."""
        self.costs *= ATOM_SHELLS
        self.costs += self.shells

    @property
    def shells(self) -> IntArray:
        """(crystals,) their number. Not kept: every process of a node would have its own."""
        return np.asarray(np.diff(self._at))

    def attach(self, batch: CrystalBatch, rows: IntArray) -> None:
        """Hand the lists of the given crystals to a batch of them in that order."""
        shells = self.pack(rows)
        if not len(self._atom):
            batch.attach_shells(shells)
            return
        sizes, entry = _lengths(self._rows_at, rows), self._atoms_of(rows)
        atom = self._atom[entry] + np.repeat(_ends(batch.sizes.numpy())[:-1], sizes)
        multiplicity = self._multiplicity[entry]
        batch.attach_distinct(torch.from_numpy(atom), torch.from_numpy(multiplicity), torch.from_numpy(sizes), shells)

    def _atoms_of(self, rows: IntArray) -> IntArray:
        """Where the values of the given crystals' atoms are in the table."""
        sizes = _lengths(self._rows_at, rows)
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        return np.asarray(within + np.repeat(self._rows_at[rows], sizes))

    def pack(self, rows: IntArray) -> PackedShells:
        """The lists of the given crystals one after another, those of their distinct atoms where they hold these."""
        lengths, sizes = _lengths(self._at, rows), _lengths(self._rows_at, rows)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        first_atom = np.cumsum(sizes) - sizes
        neighbor = np.empty(ends[-1], dtype=np.int64)
        distance = np.empty(ends[-1], dtype=np.float32)
        count = np.empty(ends[-1], dtype=np.int16)
        cut = [slice(a, b) for a, b in zip(self._at[rows].tolist(), self._at[rows + 1].tolist(), strict=True)]
        for start in range(0, len(rows), _PACKED_AT_ONCE):
            some = slice(start, start + _PACKED_AT_ONCE)
            cuts = cut[some]
            here = slice(ends[start], ends[min(start + _PACKED_AT_ONCE, len(rows))])
            np.concatenate([self._neighbor[cut] for cut in cuts], out=neighbor[here])
            neighbor[here] += np.repeat(first_atom[some], lengths[some])
            np.concatenate([self._distance[cut] for cut in cuts], out=distance[here])
            np.concatenate([self._count[cut] for cut in cuts], out=count[here])
        ptr = np.zeros(int(sizes.sum()) + 1, dtype=np.int64)
        np.cumsum(self._rows_an_atom[self._atoms_of(rows)], out=ptr[1:])
        return PackedShells(
            radius=self.radius,
            ptr=torch.from_numpy(ptr),
            neighbor=torch.from_numpy(neighbor),
            distance=torch.from_numpy(distance),
            count=torch.from_numpy(count),
        )


def _lengths(offsets: IntArray, rows: IntArray) -> IntArray:
    return np.asarray(offsets[rows + 1] - offsets[rows])


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
