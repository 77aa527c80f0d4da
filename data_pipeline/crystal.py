"""One crystal as arrays, and columns of a structure table from and to many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.schema import DISORDER_TYPE, LATTICE_TYPE, NUMBERS_TYPE, POSITIONS_TYPE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Disorder:
    """Every species of every disordered site.

    site (S,) int64 index of the site; atomic_number (S,) int64; occupancy (S,) float64.
    """

    site: Ints
    atomic_number: Ints
    occupancy: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Crystal:
    """positions (n, 3) Cartesian Å; atomic_numbers (n,) int64, 0 for a disordered site; lattice (3, 3) rows Å.

    Nothing is checked here: validate.py says what is wrong with a crystal.
    """

    positions: Floats
    atomic_numbers: Ints
    lattice: Floats
    disorder: Disorder | None = None

    def fractional(self) -> Floats:
        """(n, 3) coordinates along the lattice vectors."""
        return np.asarray(self.positions @ np.linalg.inv(self.lattice), dtype=np.float64)


EMPTY = Crystal(positions=np.zeros((0, 3)), atomic_numbers=np.zeros(0, np.int64), lattice=np.zeros((3, 3)))
"""Stands where a row has no readable structure."""


def to_cartesian(fractional: Floats, lattice: Floats) -> Floats:
    """(n, 3) Cartesian coordinates, summed term by term so that every machine gives the same bits."""
    f = np.asarray(fractional, dtype=np.float64).reshape(-1, 3)
    rows = np.asarray(lattice, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # validate.py tells the row whose numbers overflow
        return np.asarray(f[:, 0:1] * rows[0] + f[:, 1:2] * rows[1] + f[:, 2:3] * rows[2])


def structure_columns(crystals: Sequence[Crystal]) -> list[pa.Array]:
    """The columns atomic_numbers, positions, lattice and disorder of a structure table."""
    numbers = _lists([_clipped(c.atomic_numbers) for c in crystals], np.int16)
    positions = _lists([c.positions for c in crystals], np.float64)
    lattice = np.array([c.lattice for c in crystals], dtype=np.float64).reshape(-1)
    return [
        pa.ListArray.from_arrays(numbers[0], pa.array(numbers[1]), type=NUMBERS_TYPE),
        pa.ListArray.from_arrays(
            positions[0], pa.FixedSizeListArray.from_arrays(pa.array(positions[1]), 3), type=POSITIONS_TYPE
        ),
        pa.FixedSizeListArray.from_arrays(pa.array(lattice), type=LATTICE_TYPE),
        _disorder_column(crystals),
    ]


def read_crystals(table: pa.Table) -> list[Crystal]:
    """The crystals of a structure table; null structures are empty, null lattices NaN, null elements -1."""
    numbers_at, numbers = list_values(table.column("atomic_numbers"))
    positions_at, positions = list_values(table.column("positions"))
    lattice = fixed_values(table.column("lattice"), 9).reshape(-1, 3, 3)
    flat = fixed_values(positions, 3).reshape(-1, 3)
    z = numbers.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    disorder = [None] * len(table) if "disorder" not in table.column_names else table.column("disorder").to_pylist()
    return [
        Crystal(
            positions=flat[positions_at[i] : positions_at[i + 1]],
            atomic_numbers=z[numbers_at[i] : numbers_at[i + 1]],
            lattice=lattice[i],
            disorder=_disorder(disorder[i]),
        )
        for i in range(len(table))
    ]


def list_values(column: pa.ChunkedArray | pa.Array) -> tuple[Ints, pa.Array]:
    """(rows + 1,) offsets of a list column and the array they point into: no copy if the column is one chunk."""
    array = one_chunk(column)
    return array.offsets.to_numpy().astype(np.int64, copy=False), array.values


def fixed_values(column: pa.ChunkedArray | pa.Array, size: int) -> Floats:
    """The flat values of a fixed_size_list column, null rows included (as they lie); a view where possible."""
    array = one_chunk(column)
    values = array.values.slice(array.offset * size, len(array) * size).to_numpy(zero_copy_only=False)
    if array.null_count:
        values = values.reshape(-1, size).copy()
        values[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return np.asarray(values, dtype=np.float64).reshape(-1)


def one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as a single array, copied only where it has several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists(parts: Sequence[NDArray[np.generic]], dtype: type) -> tuple[pa.Array, NDArray[np.generic]]:
    """Offsets of the parts and their flat values."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    flat: NDArray[np.generic] = np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
    return pa.array(offsets), flat.reshape(-1)


def _clipped(numbers: Ints) -> Ints:
    """Atomic numbers within int16, so that an absurd one stays absurd instead of wrapping round to a real element."""
    return np.clip(numbers, -1, np.iinfo(np.int16).max)


def _disorder_column(crystals: Sequence[Crystal]) -> pa.Array:
    rows = [
        None
        if c.disorder is None
        else [
            {"site": int(s), "atomic_number": int(z), "occupancy": float(o)}
            for s, z, o in zip(c.disorder.site, _clipped(c.disorder.atomic_number), c.disorder.occupancy, strict=True)
        ]
        for c in crystals
    ]
    return pa.array(rows, type=DISORDER_TYPE)


def _disorder(rows: list[dict[str, float | None] | None] | None) -> Disorder | None:
    """What is null is what no crystal has: site -1, element -1, occupancy NaN."""
    if not rows:
        return None

    def column(name: str, null: float) -> list[float]:
        values = (None if row is None else row[name] for row in rows)
        return [null if value is None else value for value in values]

    return Disorder(
        site=np.array(column("site", -1), dtype=np.int64),
        atomic_number=np.array(column("atomic_number", -1), dtype=np.int64),
        occupancy=np.array(column("occupancy", np.nan), dtype=np.float64),
    )
