"""Reading a structure table: any rows of it as packed arrays, without a Python loop over them.

The arrays are views of the Arrow buffers. A table out of Ray's object store is therefore mapped, not copied, and all
workers of a node share one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.crystal import fixed_values, list_values, one_chunk
from data_pipeline.errors import DataError
from data_pipeline.schema import FIXED_COLUMNS, check_columns, check_schema

FINGERPRINT_KEY = "crystalformer.fingerprint"
"""In the metadata of every Parquet file of a prepared data set: the fingerprint of the preparation that made it."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDisorder:
    """Every species of every disordered site of a batch.

    site (S,) int64 index of the site among the packed atoms; atomic_number (S,) int64; occupancy (S,) float64.
    """

    site: Ints
    atomic_number: Ints
    occupancy: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStructures:
    """B crystals of N atoms in all, one after another.

    positions (N, 3) float64 Cartesian Å; atomic_numbers (N,) int64, 0 for a disordered site; lattice (B, 3, 3)
    float64 rows Å; sizes (B,) int64 atoms of each crystal; disorder None if no site is disordered.
    """

    positions: Floats
    atomic_numbers: Ints
    lattice: Floats
    sizes: Ints
    disorder: PackedDisorder | None


class StructureTable:
    """One split of a data set, or any structure table, with the targets asked for.

    Rows where one of these targets is missing are left out: row 0 is the first that has them all, ``num_dropped``
    says how many there were.
    """

    def __init__(self, table: pa.Table, targets: Sequence[str], where: str) -> None:
        check_columns(table.schema, where, targets)
        self.where = where
        self.arrow = table
        self.target_names = tuple(targets)
        self._offsets, numbers = list_values(table.column("atomic_numbers"))
        self._numbers = _flat_numbers(numbers)
        position_offsets, positions = list_values(table.column("positions"))
        self._positions = fixed_values(positions, 3).reshape(-1, 3)
        self._lattice = fixed_values(table.column("lattice"), 9).reshape(-1, 3, 3)
        self._ids = one_chunk(table.column("material_id"))
        self._targets = [_flat(table.column(name)) for name in targets]
        self._kept = self._rows_with_targets(len(table))
        self._disorder = _DisorderColumn(table.column("disorder"))
        if not np.array_equal(np.diff(self._offsets), np.diff(position_offsets)):
            raise DataError(f"{where}: a row has another number of positions than of atomic numbers")
        self._first_position = int(position_offsets[0] - self._offsets[0])

    @classmethod
    def open(cls, folder: Path, targets: Sequence[str] = ()) -> Self:
        """Read the Parquet files of a folder such as data/<name>/train. Raises DataError if it is not there."""
        return cls(read_table(folder, targets), targets, str(folder))

    @classmethod
    def from_arrow(cls, table: pa.Table, targets: Sequence[str] = (), where: str = "table") -> Self:
        """From a table in memory, sliced or not; copied only where its columns have several chunks."""
        return cls(table, targets, where)

    @property
    def stored_rows(self) -> Ints | None:
        """(num_rows,) the rows of the stored table that have all targets; None if all have."""
        return self._kept

    @property
    def num_rows(self) -> int:
        """Rows that have all targets."""
        return len(self._lattice) if self._kept is None else len(self._kept)

    @property
    def num_dropped(self) -> int:
        """Rows left out because a target is missing."""
        return len(self._lattice) - self.num_rows

    @property
    def sizes(self) -> Ints:
        """(num_rows,) atoms of each crystal."""
        sizes = np.diff(self._offsets)
        return sizes if self._kept is None else sizes[self._kept]

    def material_ids(self, rows: NDArray[np.integer] | None = None) -> list[str]:
        """The ids of ``rows``, or of all."""
        ids: list[str] = self._ids.take(pa.array(self._stored(rows))).to_pylist()
        return ids

    def targets(self, rows: NDArray[np.integer] | None = None) -> Floats:
        """(n, T) values of the targets for ``rows``, or for all, in their own units."""
        stored = self._stored(rows)
        out = np.empty((len(stored), len(self._targets)))
        for i, column in enumerate(self._targets):
            out[:, i] = column[stored]
        return out

    def gather(self, rows: NDArray[np.integer]) -> PackedStructures:
        """The structures of ``rows``, in that order, repeats allowed. Raises IndexError for a row out of range."""
        stored = self._stored(rows)
        sizes = self._offsets[stored + 1] - self._offsets[stored]
        starts = np.cumsum(sizes) - sizes
        atoms = np.arange(int(sizes.sum())) + np.repeat(self._offsets[stored] - starts, sizes)
        return PackedStructures(
            positions=self._positions[atoms + self._first_position],
            atomic_numbers=self._numbers[atoms].astype(np.int64),
            lattice=self._lattice[stored],
            sizes=sizes,
            disorder=self._disorder.gather(stored, starts),
        )

    def _stored(self, rows: NDArray[np.integer] | None) -> Ints:
        """Rows of the stored table for rows of this one."""
        if rows is None:
            return np.arange(self.num_rows) if self._kept is None else self._kept
        chosen = np.asarray(rows, dtype=np.int64)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_rows:
            raise IndexError(
                f"{self.where}: rows must be in 0..{self.num_rows - 1}, got {chosen.min()}..{chosen.max()}"
            )
        return chosen if self._kept is None else self._kept[chosen]

    def _rows_with_targets(self, n: int) -> Ints | None:
        """None if all rows have all targets."""
        missing = np.zeros(n, dtype=np.bool_)
        for column in self._targets:
            missing |= ~np.isfinite(column)
        return np.flatnonzero(~missing) if missing.any() else None


def read_table(folder: Path, targets: Sequence[str] = ()) -> pa.Table:
    """The Parquet files of a folder as one table of one chunk a column, with only the columns asked for.

    Raises DataError if the folder holds none, or a file is not a structure table of this version.
    """
    columns = [name for name, _ in FIXED_COLUMNS] + list(targets)
    parts = [pq.read_table(file, columns=columns, memory_map=True) for file in checked_files(folder, targets)]
    return pa.concat_tables(parts).combine_chunks()


def read_pieces(folder: Path, rows: int = 8192, fingerprint: str | None = None) -> Iterator[pa.Table]:
    """The same with all columns, in order and at most ``rows`` at a time: of a split that memory need not hold."""
    for file in checked_files(folder, fingerprint=fingerprint):
        with _opened(file) as reader:
            _check_preparation(reader.schema_arrow, file, fingerprint)  # of what is read: it may have been replaced
            for batch in reader.iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch])


def checked_files(folder: Path, targets: Sequence[str] = (), fingerprint: str | None = None) -> list[Path]:
    """The Parquet files of a folder, every one a structure table with ``targets``. Raises DataError.

    fingerprint: of the preparation that has to have made them; files that name none may be of any.
    """
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder}: no Parquet files; prepare the data set first")
    for file in files:
        with _opened(file) as reader:
            schema = reader.schema_arrow
        check_schema(schema, str(file))
        _check_preparation(schema, file, fingerprint)
        check_columns(schema, str(file), targets)
    return files


def _opened(file: Path) -> pq.ParquetFile:
    """Raises DataError where it is no Parquet file, or has gone since the folder was listed."""
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file: {error}") from error
    except FileNotFoundError as error:
        raise DataError(_anew(file)) from error


def _check_preparation(schema: pa.Schema, file: Path, fingerprint: str | None) -> None:
    """Splits of two preparations may share crystals, so that a model would be tested on what it was trained on."""
    found = (schema.metadata or {}).get(FINGERPRINT_KEY.encode())
    if fingerprint and found and found != fingerprint.encode():
        raise DataError(_anew(file))


def _anew(file: Path) -> str:
    name = file.parent.parent.name
    return f"{file}: data set {name!r} was prepared anew while this run began: start again"


class _DisorderColumn:
    """The disordered sites of a table, by row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._any = column.null_count < len(column)
        if not self._any:
            return
        self._offsets, entries = list_values(column)
        self._site = _struct_field(entries, "site")
        self._number = _struct_field(entries, "atomic_number")
        self._occupancy = _struct_field(entries, "occupancy")

    def gather(self, rows: Ints, starts: Ints) -> PackedDisorder | None:
        """The entries of ``rows``; ``starts`` are the first packed atoms of their crystals."""
        if not self._any:
            return None
        counts = self._offsets[rows + 1] - self._offsets[rows]
        total = int(counts.sum())
        if total == 0:
            return None
        entry = np.repeat(self._offsets[rows] - (np.cumsum(counts) - counts), counts) + np.arange(total)
        return PackedDisorder(
            site=self._site[entry].astype(np.int64) + np.repeat(starts, counts),
            atomic_number=self._number[entry].astype(np.int64),
            occupancy=self._occupancy[entry].astype(np.float64, copy=False),
        )


def _struct_field(entries: pa.StructArray, name: str) -> NDArray[np.generic]:
    return np.asarray(entries.field(name).to_numpy(zero_copy_only=False))


def _flat(column: pa.ChunkedArray) -> Floats:
    """A column of numbers; NaN where null."""
    return np.asarray(one_chunk(column).to_numpy(zero_copy_only=False), dtype=np.float64)


def _flat_numbers(values: pa.Array) -> NDArray[np.int16]:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int16)
