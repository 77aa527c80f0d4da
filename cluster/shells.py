"""Every crystal's neighbour shells, found once and kept beside the data: one Arrow table a split and radius.

Workers of a node map the same memory. Shells depend on the crystal and the radius alone, so they serve every epoch,
layer, worker and later run (facts: a list of 12 atoms within 11.9 Å takes about 1.8 ms to find).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from crystalformer.batch import PackedShells
from crystalformer.neighbors import find_shells
from data_pipeline.table import StructureTable

IntArray = npt.NDArray[np.int64]

FORMAT = "2"
_CHUNK = 512

SCHEMA = pa.schema(
    [
        pa.field("rows_an_atom", pa.large_list(pa.int32())),
        pa.field("neighbor", pa.large_list(pa.int32())),
        pa.field("distance", pa.large_list(pa.float32())),
        pa.field("count", pa.large_list(pa.int16())),
    ]
)
"""A row a crystal: shells of each atom (n,), then all shells (S,): atom j, Å, images.

Offsets are 64 bits wide: a column is one chunk, which alone is read without copying, and may hold over 2^31 shells.
"""


def build_shells(structures: StructureTable, radius: float) -> pa.Table:
    """The shells of every crystal of a table, in its order, within ``radius`` Å."""
    chunks = [
        _build_chunk(structures, np.arange(start, min(start + _CHUNK, structures.num_rows)), radius)
        for start in range(0, structures.num_rows, _CHUNK)
    ]
    return pa.Table.from_batches(chunks, SCHEMA).combine_chunks()


def _build_chunk(structures: StructureTable, rows: IntArray, radius: float) -> pa.RecordBatch:
    packed = structures.gather(rows)
    ends = np.cumsum(packed.sizes)
    found = [
        find_shells(packed.positions[end - size : end], cell, radius)
        for size, end, cell in zip(packed.sizes, ends, packed.lattice, strict=True)
    ]
    columns = [
        _list_column([np.diff(s.ptr) for s in found], pa.int32()),
        _list_column([s.neighbor for s in found], pa.int32()),
        _list_column([s.distance for s in found], pa.float32()),
        _list_column([s.count for s in found], pa.int16()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _list_column(parts: list[npt.NDArray[np.generic]], value_type: pa.DataType) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    values = pa.array(np.concatenate(parts).astype(value_type.to_pandas_dtype()), value_type)
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def cached_shells(folder: Path, split: str, structures: StructureTable, radius: float, fingerprint: str) -> pa.Table:
    """The shells of a split from ``folder/shells``, built and written there on first use; memory-mapped.

    ``fingerprint`` identifies the prepared data; a file made from other data, or a damaged one, is replaced.
    """
    path = folder / "shells" / f"{split}-{radius:.4f}.arrow"
    identity = {b"format": FORMAT.encode(), b"data": fingerprint.encode(), b"rows": str(structures.num_rows).encode()}
    kept = _read(path, identity)
    if kept is not None:
        return kept
    table = build_shells(structures, radius).replace_schema_metadata(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    partial.replace(path)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _read(path: Path, identity: dict[bytes, bytes]) -> pa.Table | None:
    """The memory-mapped table, or None where there is none of that identity."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return table if table.schema.metadata == identity else None


class ShellTable:
    """Shells of a table's crystals, read without copying and packed for batches."""

    def __init__(self, table: pa.Table, radius: float) -> None:
        self.radius = radius
        self._parts = {name: _flatten(table.column(name)) for name in SCHEMA.names}

    @property
    def costs(self) -> IntArray:
        """(crystals,) shells of each crystal: the work its attention is."""
        return np.diff(self._parts["neighbor"][0])

    def pack(self, rows: IntArray, sizes: IntArray) -> PackedShells:
        """The lists of the given crystals, which have ``sizes`` atoms, for a batch in that order."""
        lengths = self.costs[rows]
        starts = np.cumsum(sizes) - sizes
        neighbor = self._take("neighbor", rows).astype(np.int64)
        neighbor += np.repeat(starts, lengths)
        ptr = np.zeros(int(sizes.sum()) + 1, dtype=np.int64)
        np.cumsum(self._take("rows_an_atom", rows), out=ptr[1:])
        return PackedShells(
            radius=self.radius,
            ptr=torch.from_numpy(ptr),
            neighbor=torch.from_numpy(neighbor),
            distance=torch.from_numpy(self._take("distance", rows)),
            count=torch.from_numpy(self._take("count", rows)),
        )

    def _take(self, name: str, rows: IntArray) -> npt.NDArray[np.generic]:
        offsets, values = self._parts[name]
        return np.concatenate([values[offsets[row] : offsets[row + 1]] for row in rows.tolist()])


def _flatten(column: pa.ChunkedArray) -> tuple[IntArray, npt.NDArray[np.generic]]:
    """(rows + 1,) offsets and the values of a list column; without copying where it is one chunk."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.offsets.to_numpy().astype(np.int64), array.values.to_numpy(zero_copy_only=True)
